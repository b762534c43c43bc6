"""One running batch with its searches: sentences of the same width and size, each for a caller of its own."""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from ferryman_service.domain.errors import FerrymanError
from ferryman_service.domain.translation import CancelToken, SearchOptions, SentenceResult, SentenceWork, Timings
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.search.beam import Searches
from ferryman_service.search.decoder import Decoder
from ferryman_service.search.sentence import RawHypothesis, SentenceSearch, needs_logits
from ferryman_service.translation.counts import EngineCounts
from ferryman_service.translation.waiting import Waiting

_MOST_PEER_WEIGHT: Final = 8.0
"""Twice that of a unary call: so a peer's crowd of calls leaves time for other batches."""


class Size(enum.IntEnum):
    """How much a sentence may take of a thread, and for how long. Sentences of different sizes share no batch: a small
    call must not wait for the steps, nor for the rows, of a large one."""

    SMALL = 0
    """Of a caller that has little in the engine."""
    LARGE = 1
    """Of a caller that has much in the engine."""
    LONG = 2
    """Much by itself: it may keep its rows for many steps."""


class LaneKind(NamedTuple):
    """What sentences must have in common to share a running batch."""

    width: int
    logits: bool
    attention: bool
    size: Size


def lane_kind(options: SearchOptions, search: SentenceSearch, size: Size) -> LaneKind:
    """Return the kind of batch that the search needs."""
    return LaneKind(options.rows, needs_logits(search), options.return_alignment, size)


@dataclass(slots=True)
class _Running:
    """A sentence in the batch. `steps` and `row_steps` are the lane's counts when it joined."""

    work: SentenceWork
    queue_ns: int
    joined_ns: int
    steps: int
    row_steps: int
    encode_ns: int = 0


class Lane:
    """A running batch that sentences join and leave between steps. Used by one thread, and no more once it
    `has_failed`. `left` are the sentences that have left it; whoever reads them empties the list. `virtual_s` belongs
    to the thread."""

    def __init__(self, kind: LaneKind, decoder: Decoder, text: SentenceText, counts: EngineCounts) -> None:
        """Make an empty batch; raises what the decoder raises, a lack of memory for instance. `counts` is told of every
        step."""
        self.kind = kind
        self.has_failed = False
        self.left: list[SentenceWork] = []
        self.virtual_s = 0.0
        self._weight: float | None = None
        self._text = text
        self._counts = counts
        self._batch = decoder.batch(kind.width, attention=kind.attention)
        self._searches = Searches(kind.width, logits=kind.logits, attention=kind.attention)
        self._running: list[_Running] = []
        self._tokens: Counter[CancelToken] = Counter()
        self._steps = self._row_steps = 0

    @property
    def sentences(self) -> int:
        """How many sentences are in the batch."""
        return len(self._running)

    @property
    def rows(self) -> int:
        """How many rows a step computes."""
        return len(self._running) * self.kind.width

    @property
    def weight(self) -> float:
        """The weights of all callers in the batch, but those of a peer count at most as two unary calls."""
        if self._weight is None:
            by_peer: dict[str, float] = {}
            for share in {running.work.share for running in self._running}:
                by_peer[share.peer] = by_peer.get(share.peer, 0.0) + share.weight
            self._weight = sum(min(weight, _MOST_PEER_WEIGHT) for weight in by_peer.values())
        return self._weight

    @property
    def cache_bytes(self) -> int:
        """How much memory the batch's caches take; other threads may ask."""
        return self._batch.size_bytes

    def admit(self, admitted: Sequence[tuple[Waiting, SentenceSearch]]) -> None:
        """Encode sentences and let them join."""
        started_ns = time.perf_counter_ns()
        self._weight = None
        for waiting, _ in admitted:
            work, queue_ns = waiting.work, started_ns - waiting.submitted_ns
            self._running.append(_Running(work, queue_ns, started_ns, self._steps, self._row_steps))
            self._tokens[work.token] += 1
        try:
            self._batch.admit([waiting.work.sentence.source for waiting, _ in admitted])
            self._searches.admit([search for _, search in admitted])
        except Exception as error:  # noqa: BLE001
            self._fail_all(error)
            return
        now_ns = time.perf_counter_ns()
        for running in self._running[-len(admitted) :]:
            running.encode_ns, running.joined_ns = now_ns - started_ns, now_ns

    def step(self) -> None:
        """Feed a token to every row, and hand over what is done."""
        try:
            self._searches.step(self._batch)
            self._steps += 1
            self._row_steps += self.rows
            self._counts.step(self.rows)
            done_S = self._searches.done()
            if len(done_S):
                self._hand_over(done_S.tolist())
        except Exception as error:  # noqa: BLE001
            self._fail_all(error)

    def let_go(self) -> None:
        """Let those leave whom nobody waits for any more."""
        unwanted = {token for token in self._tokens if not token.is_wanted()}
        if not unwanted:
            return
        gone = [number for number, running in enumerate(self._running) if running.work.token in unwanted]
        try:
            leaving = self._remove(gone)
        except Exception as error:  # noqa: BLE001
            self._fail_all(error)
            return
        for running in leaving:
            running.work.done(
                SentenceResult(translation=None, error=why_unwanted(running.work.token), timings=self._timings(running))
            )

    def _hand_over(self, done: list[int]) -> None:
        found = [self._searches.results(number) for number in done]
        for running, hypotheses in zip(self._remove(done), found, strict=True):
            self._tell(running, hypotheses)

    def _tell(self, running: _Running, hypotheses: Sequence[RawHypothesis]) -> None:
        work, timings = running.work, self._timings(running)
        try:
            translation = self._text.translation(work.sentence, hypotheses, work.options)
        except Exception as error:  # noqa: BLE001
            work.done(SentenceResult(translation=None, error=error, timings=timings))
        else:
            work.done(SentenceResult(translation=translation, error=None, timings=timings))

    def _remove(self, numbers: list[int]) -> list[_Running]:
        """Let these sentences leave the batch and return them."""
        leaving = [self._running[number] for number in numbers]
        stays_S = np.ones(len(self._running), bool)
        stays_S[numbers] = False
        kept_S = np.flatnonzero(stays_S)
        self._batch.keep(kept_S)
        self._searches.keep(kept_S)
        self._running = [self._running[number] for number in kept_S.tolist()]
        self._weight = None
        for running in leaving:
            self._forget(running.work.token)
        self.left += [running.work for running in leaving]
        return leaving

    def _forget(self, token: CancelToken) -> None:
        self._tokens[token] -= 1
        if not self._tokens[token]:
            del self._tokens[token]

    def _timings(self, running: _Running) -> Timings:
        end_ns = time.perf_counter_ns()
        return Timings(
            queue_ns=running.queue_ns,
            text_ns=running.work.sentence.text_ns,
            encode_ns=running.encode_ns,
            decode_ns=end_ns - running.joined_ns,
            steps=self._steps - running.steps,
            row_steps=self._row_steps - running.row_steps,
            end_ns=end_ns,
        )

    def _fail_all(self, error: Exception) -> None:
        """Tell every caller that it went wrong. Nobody knows what state the batch is in."""
        self.has_failed = True
        failed, self._running = self._running, []
        self._tokens.clear()
        self.left += [running.work for running in failed]
        for running in failed:
            running.work.done(SentenceResult(translation=None, error=error, timings=self._timings(running)))


def why_unwanted(token: CancelToken) -> FerrymanError:
    """Return why nobody waits any more."""
    try:
        token.check()
    except FerrymanError as error:
        return error
    raise AssertionError("the token is wanted after all")
