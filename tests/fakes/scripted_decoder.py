"""A search.Decoder whose sentences take as many steps as their first source token says, and which a test can hold up,
watch and make fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.translation import (
    CancelToken,
    FairShare,
    Hypothesis,
    PreparedSentence,
    SearchOptions,
    SentenceResult,
    SentenceWork,
    Translation,
)
from ferryman_service.search.decoder import Candidates
from ferryman_service.search.sentence import RawHypothesis

VOCABULARY_SIZE = 40
BYTES_PER_ROW = 100
GREEDY = SearchOptions(beam_size=1)
LIKELY, UNLIKELY, NEVER = -0.01, -6.0, -1000.0


class ScriptedDecoder:
    """`admitted` are the sources in the order in which they joined, `steps` all steps, `peak_rows` the most rows that a
    thread ever had in all its batches, `peak_sentences` the same of sentences by thread. Steps wait while `gate` is
    cleared. `on_step` is called before each step, in the decoding thread, outside the engine's locks; it may raise, and
    so may `on_admit`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.steps = 0
        self.admitted: list[tuple[int, ...]] = []
        self.admitted_at: list[int] = []
        self.encoded: list[list[tuple[int, ...]]] = []
        self.peak_rows = 0
        self.peak_sentences: dict[int, int] = {}
        self.on_step: Callable[[], None] = lambda: None
        self.on_admit: Callable[[Sequence[Sequence[int]]], None] = lambda sources: None
        self.made = 0
        self._batches: dict[int, list[ScriptedBatch]] = {}
        self._lock = threading.Lock()

    def batch(self, width: int, *, attention: bool = False) -> ScriptedBatch:
        batch = ScriptedBatch(self, width)
        with self._lock:
            self.made += 1
            self._batches.setdefault(threading.get_ident(), []).append(batch)
        return batch

    def rows(self) -> int:
        """How many rows are in all batches."""
        return sum(batch.sentences * batch.width for batches in self._batches.values() for batch in batches)

    def forget(self, batch: ScriptedBatch) -> None:
        """Count a batch no longer: its thread has let it go."""
        for batches in self._batches.values():
            if batch in batches:
                batches.remove(batch)

    def note_admitted(self, sources: Sequence[Sequence[int]]) -> None:
        with self._lock:
            self.admitted += map(tuple, sources)
            self.admitted_at += [self.steps] * len(sources)
            self.encoded.append([tuple(source) for source in sources])

    def note_step(self) -> None:
        with self._lock:
            self.steps += 1
            mine = self._batches[threading.get_ident()]
            self.peak_rows = max(self.peak_rows, sum(batch.sentences * batch.width for batch in mine))
            sentences = sum(batch.sentences for batch in mine)
            thread = threading.get_ident()
            self.peak_sentences[thread] = max(self.peak_sentences.get(thread, 0), sentences)


class ScriptedBatch:
    """A RunningBatch: every row's likeliest continuation is one token, the end symbol when the time has come."""

    def __init__(self, decoder: ScriptedDecoder, width: int) -> None:
        self._decoder = decoder
        self._left_S = np.empty(0, np.int64)
        self.width = width

    @property
    def sentences(self) -> int:
        return len(self._left_S)

    @property
    def size_bytes(self) -> int:
        return (1 + self.sentences) * self.width * BYTES_PER_ROW  # an empty one keeps some

    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        try:
            self._decoder.on_admit(sources)
        except Exception:
            self._decoder.forget(self)
            raise
        self._decoder.note_admitted(sources)
        self._left_S = np.concatenate((self._left_S, [source[0] for source in sources]))

    def keep(self, kept_S: NDArray[np.int64]) -> None:
        self._left_S = self._left_S[kept_S]

    def step(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64], k: int) -> Candidates:
        log_probs_SWV = self._log_probs()
        tokens_SWK = np.argsort(-log_probs_SWV, axis=2, kind="stable")[:, :, :k]
        return Candidates(np.take_along_axis(log_probs_SWV, tokens_SWK, axis=2), tokens_SWK)

    def step_logits(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._log_probs()

    def attention(self) -> NDArray[np.float32]:
        return np.ones((self.sentences, self.width, 1), np.float32)

    def _log_probs(self) -> NDArray[np.float32]:
        assert self._decoder.gate.wait(30), "the test forgot to open the gate"
        try:
            self._decoder.on_step()
        except Exception:
            self._decoder.forget(self)
            raise
        self._decoder.note_step()
        self._left_S -= 1
        log_probs_SWV = np.full((self.sentences, self.width, VOCABULARY_SIZE), UNLIKELY, np.float32)
        log_probs_SWV[:, :, EOS] = NEVER
        log_probs_SWV[np.arange(self.sentences), :, np.where(self._left_S <= 0, EOS, 9)] = LIKELY
        return log_probs_SWV


class ScriptedText:
    """What the engine needs of pipeline.SentenceText: the text is the number of tokens that were found."""

    max_sentence_tokens = 64

    def translation(
        self, sentence: PreparedSentence, found: Sequence[RawHypothesis], options: SearchOptions
    ) -> Translation:
        hypotheses = [
            Hypothesis(
                text=str(len(raw.tokens)),
                score=raw.score,
                log_probability=raw.log_probability,
                target_tokens=raw.length,
                finished=raw.finished,
                tokens=raw.tokens,
            )
            for raw in found
        ]
        return Translation(hypotheses=hypotheses, source_tokens=len(sentence.source))


class Results:
    """What came of each sentence. `errors()` and `translations()` fail the test where a sentence was told twice."""

    def __init__(self) -> None:
        self.by_name: dict[object, list[SentenceResult]] = {}
        self.order: list[object] = []
        self._changed = threading.Condition()

    def of(self, name: object) -> Callable[[SentenceResult], None]:
        """Return what takes the result of the sentence of that name."""

        def done(result: SentenceResult) -> None:
            with self._changed:
                self.by_name.setdefault(name, []).append(result)
                self.order.append(name)
                self._changed.notify_all()

        return done

    def wait(self, count: int, timeout_s: float = 20.0) -> None:
        """Wait for so many results."""
        self.wait_for(lambda: len(self.order) >= count, timeout_s)

    def wait_for(self, enough: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait until it is true of the results."""
        with self._changed:
            assert self._changed.wait_for(enough, timeout_s), f"only {len(self.order)} results came"

    def __getitem__(self, name: object) -> SentenceResult:
        [result] = self.by_name[name]
        return result


def work(
    steps: int,
    done: Callable[[SentenceResult], None],
    *,
    source_tokens: int = 4,
    options: SearchOptions = GREEDY,
    token: CancelToken | None = None,
    share: FairShare | None = None,
    **sentence: object,
) -> SentenceWork:
    """Return a sentence that takes so many steps, of so many source tokens."""
    source = (steps, *([5] * (source_tokens - 2)), EOS)
    return SentenceWork(
        sentence=PreparedSentence(source=source, **{"max_length": steps + 1, **sentence}),  # type: ignore[arg-type]
        options=options,
        token=token or CancelToken(),
        share=share or FairShare(),
        done=done,
    )
