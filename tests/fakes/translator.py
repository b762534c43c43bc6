"""An engine that answers in upper case, and a loader of it: translating without a model."""

from __future__ import annotations

import queue
import random
import threading
import time
from dataclasses import dataclass

from ferryman_service.domain.errors import InvalidSentence, Violation
from ferryman_service.domain.translation import (
    ComputeType,
    FairShare,
    Hypothesis,
    PreparedSentence,
    SentenceResult,
    SentenceWork,
    Timings,
    Translation,
)

STEP_S = 0.002
TIMINGS = Timings(
    queue_ns=1_000, text_ns=1_000_000, encode_ns=2_000_000, decode_ns=3_000_000_000, steps=4, row_steps=40
)


@dataclass(frozen=True, kw_only=True)
class FakePrepared(PreparedSentence):
    """A prepared sentence that still knows its words."""

    text: str = ""
    prefix_text: str = ""


class FakeEngine:
    """Implements ports.TranslationEngine; a word is `word_tokens`, and each takes a random time, up to `delay_s`.

    A sentence "wait" is busy until its caller gives up, "break" is a bug in the engine. `busy` is set when a "wait" is
    being decoded, `given_up` when its caller gave up. `began` is set once anything is submitted, `preparing` when a
    sentence is prepared, which waits for `preparing_gate` if that is set to an event. `in_flight` counts what was
    submitted and is not done, `peak` is the most that ever was; `shares` are the callers' weights and `peers` their
    peers in the order of their sentences. Every step takes STEP_S and looks at every token.
    """

    def __init__(self, *, delay_s=0.0, seed=0, max_sentence_tokens=8, word_tokens=1):
        self.busy = threading.Event()
        self.given_up = threading.Event()
        self.began = threading.Event()
        self.preparing = threading.Event()
        self.preparing_gate = None
        self.delay_s = delay_s
        self.in_flight = 0
        self.peak = 0
        self.submitted = 0
        self.shares = []
        self.peers = []
        self.seeds = []
        self.closed = False
        self._random = random.Random(seed)
        self._max_sentence_tokens = max_sentence_tokens
        self._word_tokens = word_tokens
        self._lock = threading.Lock()
        self._waiting = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def memory_bytes(self):
        return 1000

    def compute_type(self):
        return ComputeType.FP32

    def cache_bytes(self):
        return 0

    def drop_caches(self):
        pass

    def warm_up(self):
        pass

    def close(self):
        assert not self.closed, "an engine is closed once"
        assert self.in_flight == 0, "an engine is closed when nothing is in flight"
        self.closed = True
        self._waiting.put(None)
        self._thread.join()

    def max_sentence_tokens(self):
        return self._max_sentence_tokens

    def prepare(self, sentence, prefix, options):
        assert not self.closed, "nobody uses a closed engine"
        self.preparing.set()
        if self.preparing_gate is not None:
            assert self.preparing_gate.wait(10), "the test forgot to open the gate"
        violations = []
        if "\x00" in sentence:
            violations.append(
                Violation(field="sentence", description="holds control characters", reason="CONTROL_CHARACTER")
            )
        words = len(sentence.split())
        if words >= self.max_sentence_tokens():
            text = f"has {words + 1} subwords, the model takes at most {self.max_sentence_tokens()}"
            violations.append(Violation(field="sentence", description=text, reason="SENTENCE_TOO_LONG"))
        if len(prefix.split()) >= self.max_sentence_tokens():
            violations.append(Violation(field="prefix", description="leaves no room", reason="PREFIX_TOO_LONG"))
        if violations:
            raise InvalidSentence(violations)
        source = (1,) * (words * self._word_tokens) + (2,) if words else ()
        return FakePrepared(source=source, text=sentence, prefix_text=prefix, max_length=2 * len(source) + 10)

    def prepare_all(self, sentences, prefixes, options):
        prepared, violations = [], []
        fields = {"sentence": "sentences", "prefix": "target_prefixes"}
        for i, sentence in enumerate(sentences):
            try:
                prepared.append(self.prepare(sentence, prefixes[i] if prefixes else "", options))
            except InvalidSentence as error:
                violations += [
                    Violation(field=f"{fields[v.field]}[{i}]", description=v.description, reason=v.reason)
                    for v in error.violations
                ]
        if violations:
            raise InvalidSentence(violations)
        return prepared

    def submit(self, work):
        assert not self.closed, "nobody uses a closed engine"
        self.began.set()
        with self._lock:
            self.submitted += len(work)
            self.in_flight += len(work)
            self.peak = max(self.peak, self.in_flight)
            self.shares += [item.share.weight for item in work]
            self.peers += [item.share.peer for item in work]
            self.seeds += [item.seed for item in work]
        empty = [item for item in work if not item.sentence.source]
        for item in empty:
            self._finish(item, translation(item), None)
        if len(empty) < len(work):
            self._waiting.put([item for item in work if item.sentence.source])

    def translate(self, sentences, options, token):
        done = queue.SimpleQueue()
        self.submit(
            [
                SentenceWork(
                    sentence=prepared,
                    options=options,
                    token=token,
                    share=FairShare(),
                    done=lambda result, i=i: done.put((i, result)),
                )
                for i, prepared in enumerate(self.prepare_all(sentences, (), options))
            ]
        )
        results = dict(done.get(timeout=10) for _ in sentences)
        for result in results.values():
            if result.error is not None:
                raise result.error
        return [results[i].translation for i in range(len(sentences))], TIMINGS

    def _run(self):
        """Take what was submitted, and step."""
        running = []
        while True:
            try:
                batch = self._waiting.get(timeout=STEP_S if running else None)
            except queue.Empty:
                batch = []
            if batch is None:
                return
            now_s = time.monotonic()
            running += [(now_s + self._random.random() * self.delay_s, item) for item in batch]
            self._random.shuffle(running)
            running = [(due_s, item) for due_s, item in running if not self._step(item, due_s)]

    def _step(self, item, due_s):
        """Look at a sentence once; tell whether it has left."""
        try:
            item.token.check()
        except Exception as error:  # noqa: BLE001 (it is the result)
            self._finish(item, None, error)
            if item.sentence.text == "wait":
                self.given_up.set()
            return True
        if item.sentence.text == "break":
            self._finish(item, None, ZeroDivisionError("the secret of the house"))
        elif item.sentence.text == "wait":
            self.busy.set()
            return False
        elif time.monotonic() < due_s:
            return False
        else:
            self._finish(item, translation(item), None)
        return True

    def _finish(self, item, found, error):
        with self._lock:
            self.in_flight -= 1
        item.done(SentenceResult(translation=found, error=error, timings=TIMINGS))


def translation(item):
    """Return the translation of a sentence: in upper case, after its prefix."""
    sentence, options = item.sentence, item.options
    words = f"{sentence.prefix_text} {sentence.text.upper()}".split()
    asked = options.return_token_scores or options.return_alignment
    pieces = (*words, "</s>") if words else ()
    hypotheses = [
        Hypothesis(
            text=" ".join(words),
            score=-0.5 * rank,
            log_probability=-0.5 * rank * (len(words) + 1),
            target_tokens=len(words) + 1,
            finished=True,
            pieces=pieces if asked else (),
            token_log_probabilities=[-0.5 * rank] * len(pieces) if options.return_token_scores else (),
            alignment=range(len(pieces)) if options.return_alignment else (),
        )
        for rank in range(1, (options.n_best if words else 1) + 1)
    ]
    source_pieces = (*sentence.text.split(), "</s>") if asked and words else ()
    return Translation(hypotheses=hypotheses, source_tokens=len(sentence.source), source_pieces=source_pieces)


class FakeBundleLoader:
    """Implements ports.BundleLoader. `translator` is the engine that was loaded last, or will be first."""

    def __init__(self, **options):
        self._options = options
        self._is_fresh = True
        self.translator = FakeEngine(**options)

    def load(self, bundle):
        if not self._is_fresh:
            self.translator = FakeEngine(**self._options)
        self._is_fresh = False
        return self.translator
