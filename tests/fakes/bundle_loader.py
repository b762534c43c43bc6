"""A loader whose translators remember what was done with them: loading without a model."""

from __future__ import annotations

import threading

from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.translation import (
    ComputeType,
    Hypothesis,
    PreparedSentence,
    SentenceResult,
    Timings,
    Translation,
)


class SpyTranslator:
    """Implements ports.TranslationEngine; translates a sentence to its bundle's "name/version", and fails the test that
    uses it after `close`, or closes it twice."""

    def __init__(self, bundle, memory_bytes, failures):
        self.reference = f"{bundle.parent.name}/{bundle.name}"
        self.warmed_up = False
        self.closed = False
        self.cached_bytes = 0
        self._memory_bytes = memory_bytes
        self._failures = failures

    def memory_bytes(self):
        return self._memory_bytes

    def cache_bytes(self):
        return self.cached_bytes

    def drop_caches(self):
        self.cached_bytes = 0

    def compute_type(self):
        return ComputeType.FP32

    def warm_up(self):
        assert not self.warmed_up, "a model is warmed up once"
        if self._failures:
            raise self._failures.pop(0)
        self.warmed_up = True

    def close(self):
        assert not self.closed, "a model is closed once"
        self.closed = True

    def max_sentence_tokens(self):
        return 8

    def prepare(self, sentence, prefix, options):
        return PreparedSentence(source=(1, 2))

    def prepare_all(self, sentences, prefixes, options):
        return [self.prepare(sentence, "", options) for sentence in sentences]

    def submit(self, work):
        for item in work:
            item.done(SentenceResult(translation=self._translation(), error=None, timings=Timings()))

    def translate(self, sentences, options, token):
        return [self._translation() for _ in sentences], Timings()

    def _translation(self):
        assert self.warmed_up, "nobody translates before the warm-up"
        assert not self.closed, "nobody translates after the end"
        hypothesis = Hypothesis(text=self.reference, score=0.0, log_probability=0.0, target_tokens=1, finished=True)
        return Translation(hypotheses=[hypothesis], source_tokens=1)


class SpyBundleLoader:
    """Implements ports.BundleLoader. `loads` holds the references in order, `made` the translators; `memory_bytes` the
    size of the next ones; `failures` is raised from, one a load, `warm_up_failures` one a warm-up; a load waits while
    `gate` is cleared."""

    def __init__(self, memory_bytes=100):
        self.memory_bytes = memory_bytes
        self.loads = []
        self.made = []
        self.failures = []
        self.warm_up_failures = []
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def load(self, bundle):
        self.loads.append(f"{bundle.parent.name}/{bundle.name}")
        self.began.set()
        assert self.gate.wait(10), "the test forgot to open the gate"
        if self.failures:
            raise self.failures.pop(0)
        if not (bundle / "manifest.json").exists():
            raise ModelDamaged("manifest.json cannot be read: No such file or directory", file="manifest.json")
        self.made.append(SpyTranslator(bundle, self.memory_bytes, self.warm_up_failures))
        return self.made[-1]

    def open(self):
        """Return the references of the translators that are not closed, sorted."""
        return sorted(translator.reference for translator in self.made if not translator.closed)
