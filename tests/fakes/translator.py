"""A translator that answers in upper case, and a loader of it: translating without a model."""

from __future__ import annotations

import threading
import time

from ferryman_service.domain.errors import InvalidSentence, Violation
from ferryman_service.domain.translation import Hypothesis, Timings, Translation


class FakeTranslator:
    """Implements ports.Translator; a word is a token. A sentence "wait" keeps it busy until its caller gives up,
    "break" is a bug in it. `given_up` is set when a caller gave up."""

    def __init__(self):
        self.busy = threading.Event()
        self.given_up = threading.Event()

    def max_sentence_tokens(self):
        return 8

    def translate(self, sentences, options, token):
        violations = [
            Violation(field=f"sentences[{i}]", description="has too many words", reason="SENTENCE_TOO_LONG")
            for i, sentence in enumerate(sentences)
            if len(sentence.split()) >= self.max_sentence_tokens()
        ]
        if violations:
            raise InvalidSentence(violations)
        if "break" in sentences:
            raise ZeroDivisionError("the secret of the house")
        if "wait" in sentences:
            self._wait(token)
        timings = Timings(queue_ns=0, text_ns=1_000_000, encode_ns=2_000_000, decode_ns=3_000_000_000)
        return [self._translation(sentence, options) for sentence in sentences], timings

    def _wait(self, token):
        self.busy.set()
        try:
            while True:
                token.check()
                time.sleep(0.005)
        finally:
            self.given_up.set()

    @staticmethod
    def _translation(sentence, options):
        words = len(sentence.split())
        hypotheses = [
            Hypothesis(
                text=sentence.upper(),
                score=-0.5 * rank,
                log_probability=-0.5 * rank * (words + 1),
                target_tokens=words + 1,
                finished=True,
            )
            for rank in range(1, (options.n_best if words else 1) + 1)
        ]
        return Translation(hypotheses=hypotheses, source_tokens=words + 1 if words else 0)


class FakeBundleLoader:
    """Implements ports.BundleLoader."""

    def __init__(self):
        self.translator = FakeTranslator()

    def load(self, bundle):
        return self.translator
