"""Decoding threads that share the sentences waiting for one model.

Each thread has running batches of its own. Between two steps it takes waiting sentences: at most its share of all
that wait or run, so that threads are evenly loaded; no more rows than its batches may have; not a few at a time while
its batches are nearly full, since encoding many together is cheaper; and only so many source tokens that the rows
already running do not wait long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ferryman_service.domain.translation import SentenceResult, SentenceWork, Timings
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.pipeline.translator import sentence_search
from ferryman_service.search.decoder import Decoder
from ferryman_service.search.sentence import SentenceSearch
from ferryman_service.translation.counts import EngineCounts
from ferryman_service.translation.lane import Lane, LaneKind, lane_kind, why_unwanted
from ferryman_service.translation.waiting import Waiting, WaitingLine

_ABANDONED_INTERVAL_S: Final = 0.02
_NEARLY_FULL: Final = 1 / 2
_WORTH_ENCODING: Final = 1 / 8
_KEPT_LANES: Final = 6


DEFAULT_ROWS: Final = 160
"""More are no faster on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How many threads decode, how many rows each may run, and how many source tokens it encodes between two steps."""

    threads: int = 1
    max_rows: int = DEFAULT_ROWS
    max_encoded_tokens: int = 512

    def __post_init__(self) -> None:
        assert self.threads > 0, "threads must be positive"
        assert self.max_rows > 0, "max_rows must be positive"
        assert self.max_encoded_tokens > 0, "max_encoded_tokens must be positive"


class Scheduler:
    """Translates what is submitted. Safe to use from every thread."""

    def __init__(
        self, decoder: Decoder, text: SentenceText, config: SchedulerConfig, counts: EngineCounts | None = None
    ) -> None:
        """Start the threads; `counts` is told what they do."""
        self._config = config
        self._counts = counts or EngineCounts()
        self._text = text
        self._line = WaitingLine()
        self._changed = threading.Condition()
        self._closing = False
        self._next_look = 0.0
        self._workers = [_Worker(decoder, text, self._counts) for _ in range(config.threads)]
        self._counts.watch(self.cache_bytes)
        self._threads = [
            threading.Thread(target=self._run, args=(worker,), name=f"decode-{index}", daemon=True)
            for index, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, works: Sequence[SentenceWork]) -> None:
        """Put sentences in line; each `done` is called once. The longest come first, so that similar ones run
        together."""
        now_ns = time.perf_counter_ns()
        waiting = sorted((work for work in works if work.sentence.source), key=lambda work: -len(work.sentence.source))
        with self._changed:
            assert not self._closing, "nothing may be submitted to an engine that is closed"
            for work in waiting:
                self._line.add(work, now_ns)
            self._changed.notify(min(len(waiting), len(self._threads)))
        for work in works:
            if not work.sentence.source:
                translation = self._text.translation(work.sentence, (), work.options)
                work.done(SentenceResult(translation=translation, error=None, timings=Timings()))

    def close(self) -> None:
        """Translate what was submitted, then end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._counts.unwatch(self.cache_bytes)

    def cache_bytes(self) -> int:
        """Return how much memory the running batches' caches take."""
        return sum(worker.cache_bytes() for worker in self._workers)

    def drop_idle_batches(self) -> None:
        """Let each thread free its batches, with their memory, as soon as nothing runs in any of them."""
        with self._changed:
            for worker in self._workers:
                worker.drops_batches = True
            self._changed.notify_all()

    def _run(self, worker: _Worker) -> None:
        while True:
            with self._changed:
                while not self._line and not worker.sentences:
                    if self._closing:
                        return
                    worker.drop_batches()
                    self._changed.wait()
                abandoned = self._take_abandoned()
                taken = self._take(worker)
            for waiting in abandoned:
                _refuse(waiting, why_unwanted(waiting.work.token))
            worker.turn(taken)

    def _take_abandoned(self) -> list[Waiting]:
        """Take those nobody waits for any more, but do not look at every turn."""
        now_s = time.monotonic()
        if not self._line or now_s < self._next_look:
            return []
        self._next_look = now_s + _ABANDONED_INTERVAL_S
        return self._line.take_abandoned()

    def _take(self, worker: _Worker) -> list[Waiting]:
        """Take the sentences that join the worker's batches now; see the module's docstring."""
        config, line = self._config, self._line
        free = config.max_rows - worker.rows
        if not line or (worker.rows > config.max_rows * _NEARLY_FULL and free < config.max_rows * _WORTH_ENCODING):
            return []
        unfinished = len(line) + sum(each.sentences for each in self._workers)
        share = -(-unfinished // len(self._workers)) - worker.sentences
        taken: list[Waiting] = []
        rows, tokens = worker.rows, 0
        while line and len(taken) < share:
            work = line.first().work
            tokens += len(work.sentence.source)
            if rows and rows + work.options.rows > config.max_rows:
                break
            if worker.rows and taken and tokens > config.max_encoded_tokens:
                break
            rows += work.options.rows
            taken.append(line.take())
        worker.sentences += len(taken)
        return taken


class _Worker:
    """What one decoding thread has. `sentences` is read by the other threads too, under the scheduler's lock."""

    def __init__(self, decoder: Decoder, text: SentenceText, counts: EngineCounts) -> None:
        self._decoder = decoder
        self._text = text
        self._counts = counts
        self._lanes: dict[LaneKind, Lane] = {}
        self.sentences = 0
        self.rows = 0
        self.drops_batches = False

    def drop_batches(self) -> None:
        """Free the batches if somebody has asked for it; nothing runs in any."""
        if self.drops_batches:
            self._lanes.clear()
            self.drops_batches = False

    def cache_bytes(self) -> int:
        """Return how much memory the batches' caches take; called from other threads."""
        return sum(lane.cache_bytes for lane in tuple(self._lanes.values()))

    def turn(self, taken: Sequence[Waiting]) -> None:
        """Let the taken sentences join, and take a step with every batch."""
        joining: dict[LaneKind, list[tuple[Waiting, SentenceSearch]]] = {}
        for waiting in taken:
            work = waiting.work
            try:
                search = sentence_search(work.sentence, work.options, seed=work.seed)
            except Exception as error:  # noqa: BLE001
                _refuse(waiting, error)
            else:
                joining.setdefault(lane_kind(work.options, search), []).append((waiting, search))
        for kind, admitted in joining.items():
            self._admit(kind, admitted)
        for lane in self._lanes.values():
            if lane.sentences:
                lane.step()
        for kind in [kind for kind, lane in self._lanes.items() if lane.has_failed]:
            del self._lanes[kind]
        self.sentences = sum(lane.sentences for lane in self._lanes.values())
        self.rows = sum(lane.rows for lane in self._lanes.values())
        if len(self._lanes) > _KEPT_LANES:
            self._forget_idle_lanes()

    def _admit(self, kind: LaneKind, admitted: Sequence[tuple[Waiting, SentenceSearch]]) -> None:
        try:
            lane = self._lanes.pop(kind, None) or Lane(kind, self._decoder, self._text, self._counts)
        except Exception as error:  # noqa: BLE001 (this thread must live on, and those who wait must be told)
            for waiting, _ in admitted:
                _refuse(waiting, error)
            return
        self._lanes[kind] = lane
        lane.admit(admitted)

    def _forget_idle_lanes(self) -> None:
        """Let empty batches go, with their memory, those that nobody has joined for longest first: else every kind of
        batch that was ever asked for would stay."""
        idle = [kind for kind, lane in self._lanes.items() if not lane.sentences]
        for kind in idle[: len(self._lanes) - _KEPT_LANES]:
            del self._lanes[kind]


def _refuse(waiting: Waiting, error: Exception) -> None:
    work = waiting.work
    timings = Timings(queue_ns=time.perf_counter_ns() - waiting.submitted_ns, text_ns=work.sentence.text_ns)
    work.done(SentenceResult(translation=None, error=error, timings=timings))
