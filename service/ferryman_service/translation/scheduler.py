"""Decoding threads that share the sentences waiting for one model.

Each thread has running batches of its own. Between two steps it takes waiting sentences: at most its share of all
that wait or run, so that threads are evenly loaded; no more rows than its batches may have; not a few at a time while
its batches are nearly full, since encoding many together is cheaper; only so many source tokens that the rows already
running do not wait long; and none whose caches might not find room.

A caller with one sentence must not wait for one with thousands, nor for one whose sentences are long. So sentences have
a size (lane.Size), which follows from rows times maximum length: of the sentence, and of all that its caller has in
the engine. Each size has a line, rows and batches of its own. A thread takes one step with one batch at a time: of all
batches, that which has had the least time for the weight of its callers (start-time fair queueing of batches). So a
long search gives way at every step, and goes on later: it keeps its caches meanwhile, and its result is the same.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ferryman_service.domain.translation import SentenceResult, SentenceWork, Timings
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.pipeline.translator import sentence_search
from ferryman_service.search.decoder import Decoder
from ferryman_service.search.sentence import SentenceSearch
from ferryman_service.translation.cache_memory import NO_SHAPE, CacheBooking, CacheShape
from ferryman_service.translation.counts import EngineCounts
from ferryman_service.translation.lane import Lane, LaneKind, Size, lane_kind, why_unwanted
from ferryman_service.translation.waiting import PeerLines, Waiting

_ADDED_AT_ONCE: Final = 256
_ABANDONED_INTERVAL_S: Final = 0.02
_REFUSED_AT_ONCE: Final = 256
_NEARLY_FULL: Final = 1 / 2
_WORTH_ENCODING: Final = 1 / 8
_KEPT_LANES: Final = 6
_SMALL_POSITIONS: Final = 32
"""A small caller has at most so many positions for each row that a thread may run: it needs as many steps of a full
batch at most, and usually far fewer."""

DEFAULT_ROWS: Final = 160
"""More are no faster on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How many threads decode, how many rows of each size each may run, how many source tokens it encodes between two
    steps, and what caches take."""

    threads: int = 1
    max_rows: int = DEFAULT_ROWS
    max_encoded_tokens: int = 512
    cache_shape: CacheShape = NO_SHAPE

    def __post_init__(self) -> None:
        assert self.threads > 0, "threads must be positive"
        assert self.max_rows > 0, "max_rows must be positive"
        assert self.max_encoded_tokens > 0, "max_encoded_tokens must be positive"


class Scheduler:
    """Translates what is submitted. Safe to use from every thread."""

    def __init__(
        self,
        decoder: Decoder,
        text: SentenceText,
        config: SchedulerConfig,
        counts: EngineCounts | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the threads; `counts` is told what they do, and bounds the memory of caches. `clock` tells the seconds
        by which batches share a thread."""
        self._config = config
        self._counts = counts or EngineCounts()
        self._text = text
        self._lines = {size: PeerLines() for size in Size}
        self._changed = threading.Condition()
        self._closing = False
        self._next_look = 0.0
        self._blocked: Size | None = None  # the size whose first sentence waits for memory
        self._workers = [
            _Worker(decoder, text, self._counts, CacheBooking(self._counts.memory, config.cache_shape), clock)
            for _ in range(config.threads)
        ]
        self._counts.watch(self)
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
                work.share.booked += _positions(work)
        # What is booked says how large the call is. The lines are filled some at a time, for others wait for the lock.
        for first in range(0, len(waiting), _ADDED_AT_ONCE):
            with self._changed:
                for work in waiting[first : first + _ADDED_AT_ONCE]:
                    self._lines[self._size(work)].add(work, now_ns)
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
        self._counts.unwatch(self)

    def cache_bytes(self) -> int:
        """Return how much memory the running batches' caches take."""
        return sum(worker.cache_bytes() for worker in self._workers)

    def waiting(self) -> dict[str, int]:
        """Return how many sentences of each size wait; safe to call from every thread."""
        return {size.name.lower(): len(line) for size, line in self._lines.items()}

    def drop_idle_batches(self) -> None:
        """Let each thread free its batches, with their memory, as soon as nothing runs in any of them."""
        with self._changed:
            for worker in self._workers:
                worker.drops_batches = True
            self._changed.notify_all()

    def _run(self, worker: _Worker) -> None:
        while True:
            with self._changed:
                self._forget(worker.take_left())
                while worker.is_idle and not self._waits():
                    if self._closing:
                        return
                    worker.drop_batches()
                    self._changed.wait()
                abandoned = self._take_abandoned()
                self._forget(waiting.work for waiting in abandoned)
                if len(abandoned) <= _REFUSED_AT_ONCE:  # they need not wait for those of a large call
                    worker.abandoned.extendleft(reversed(abandoned))
                else:
                    worker.abandoned.extend(abandoned)
                taken = self._take(worker)
            worker.refuse_abandoned()
            worker.turn(taken)

    def _waits(self) -> bool:
        return any(self._lines.values())

    def _size(self, work: SentenceWork) -> Size:
        """Return the size of a sentence that is booked already."""
        most = self._config.max_rows * _SMALL_POSITIONS
        if _positions(work) > most:
            return Size.LONG
        return Size.SMALL if work.share.booked <= most else Size.LARGE

    def _forget(self, works: Iterable[SentenceWork]) -> None:
        """Let callers have booked less: these sentences are no longer in the engine."""
        for work in works:
            work.share.booked -= _positions(work)

    def _take_abandoned(self) -> list[Waiting]:
        """Take those nobody waits for any more, but do not look at every turn."""
        now_s = time.monotonic()
        if now_s < self._next_look or not self._waits():
            return []
        self._next_look = now_s + _ABANDONED_INTERVAL_S
        return [waiting for line in self._lines.values() for waiting in line.take_abandoned()]

    def _take(self, worker: _Worker) -> list[_Taken]:
        """Take the sentences that join the worker's batches now; see the module's docstring. While small ones have the
        next step, others join no batch that runs: to encode them takes time. While one waits for memory, larger ones,
        and those of another size that is not small, do not join: else it might wait permanently."""
        unfinished = sum(map(len, self._lines.values())) + sum(each.sentences for each in self._workers)
        share = -(-unfinished // len(self._workers)) - worker.sentences
        taken: list[_Taken] = []
        for size in Size:
            if size is not Size.SMALL and self._blocked not in (None, size):
                continue
            if size is Size.SMALL or not worker.rows[size] or worker.next_size() is not Size.SMALL:
                if not self._take_of(size, worker, taken, share):
                    self._blocked = size
                    break
                if self._blocked is size:
                    self._blocked = None
        worker.sentences += len(taken)
        return taken

    def _take_of(self, size: Size, worker: _Worker, taken: list[_Taken], most: int) -> bool:
        """Take sentences of a size, until `most` are taken; tell whether none waits for memory."""
        config, line, rows = self._config, self._lines[size], worker.rows[size]
        if rows > config.max_rows * _NEARLY_FULL and config.max_rows - rows < config.max_rows * _WORTH_ENCODING:
            return True
        tokens = sum(len(one.waiting.work.sentence.source) for one in taken)
        while line and len(taken) < most:
            work = line.first().work
            tokens += len(work.sentence.source)
            if rows and rows + work.options.rows > config.max_rows:
                break
            if worker.sentences and taken and tokens > config.max_encoded_tokens:
                break
            key, is_first = (work.options.rows, size), not worker.sentences and not taken
            if not worker.booking.join(key, work.sentence, is_small=size is Size.SMALL, must=is_first):
                return False
            rows += work.options.rows
            taken.append(_Taken(line.take(), size))
        return True


@dataclass(frozen=True, slots=True)
class _Taken:
    """A sentence that is to join a batch of its size."""

    waiting: Waiting
    size: Size


def _positions(work: SentenceWork) -> int:
    """Return the positions that a sentence's rows may come to have."""
    return work.options.rows * work.sentence.max_length


class _Worker:
    """What one decoding thread has; `rows` by size. `sentences` is read by the other threads too, under the scheduler's
    lock."""

    def __init__(
        self,
        decoder: Decoder,
        text: SentenceText,
        counts: EngineCounts,
        booking: CacheBooking,
        clock: Callable[[], float],
    ) -> None:
        self.booking = booking
        self._decoder = decoder
        self._text = text
        self._counts = counts
        self._clock = clock
        self._lanes: dict[LaneKind, Lane] = {}
        self._left: list[SentenceWork] = []
        self._virtual_s = 0.0  # where the step that was taken last has begun
        self.sentences = 0
        self.rows: Counter[Size] = Counter()
        self.abandoned: deque[Waiting] = deque()
        self.drops_batches = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nobody is to be told anything."""
        return not self.sentences and not self.abandoned

    def refuse_abandoned(self) -> None:
        """Tell some of those that nobody waits for any more; thousands at once would halt the batches for too long."""
        for _ in range(min(len(self.abandoned), _REFUSED_AT_ONCE)):
            waiting = self.abandoned.popleft()
            _refuse(waiting, why_unwanted(waiting.work.token))

    def drop_batches(self) -> None:
        """Free the batches if somebody has asked for it; nothing runs in any."""
        if self.drops_batches:
            self._lanes.clear()
            self.drops_batches = False

    def cache_bytes(self) -> int:
        """Return how much memory the batches' caches take; called from other threads."""
        return sum(lane.cache_bytes for lane in tuple(self._lanes.values()))

    def take_left(self) -> list[SentenceWork]:
        """Return the sentences that have left since the last time."""
        left, self._left = self._left, []
        return left

    def next_size(self) -> Size | None:
        """Return the size of the batch that has the next step; None if nothing runs."""
        lane = self._next_lane()
        return None if lane is None else lane.kind.size

    def turn(self, taken: Sequence[_Taken]) -> None:
        """Let the taken sentences join, and take a step with one batch."""
        joining: dict[LaneKind, list[tuple[Waiting, SentenceSearch]]] = {}
        for one in taken:
            work = one.waiting.work
            try:
                search = sentence_search(work.sentence, work.options, seed=work.seed)
            except Exception as error:  # noqa: BLE001
                self._refuse(one.waiting, error)
            else:
                joining.setdefault(lane_kind(work.options, search, one.size), []).append((one.waiting, search))
        for kind, admitted in joining.items():
            self._admit(kind, admitted)
        for lane in self._lanes.values():
            lane.let_go()
        if (chosen := self._next_lane()) is not None:
            self._virtual_s = chosen.virtual_s
            self._charge(chosen, chosen.step)
        self._count()
        if len(self._lanes) > _KEPT_LANES:
            self._forget_idle_lanes()

    def _next_lane(self) -> Lane | None:
        """Return the batch that has had the least time for its weight."""
        running = [lane for lane in self._lanes.values() if lane.sentences]
        return min(running, key=lambda lane: lane.virtual_s, default=None)

    def _charge(self, lane: Lane, action: Callable[[], None]) -> None:
        """Do something for a batch, and count its time."""
        weight, begin_s = lane.weight, self._clock()
        action()
        lane.virtual_s += (self._clock() - begin_s) / (weight or lane.weight or 1.0)

    def _count(self) -> None:
        """Note what is in the batches now; let go of those that have failed."""
        sentences: Counter[tuple[int, int]] = Counter()
        self.rows.clear()
        for kind, lane in list(self._lanes.items()):
            self._left += lane.left
            lane.left.clear()
            self.rows[kind.size] += lane.rows
            sentences[kind.width, kind.size] += lane.sentences
            if lane.has_failed:
                del self._lanes[kind]
        self.sentences = sentences.total()
        self.booking.settle(sentences)

    def _admit(self, kind: LaneKind, admitted: Sequence[tuple[Waiting, SentenceSearch]]) -> None:
        try:
            lane = self._lanes.pop(kind, None) or Lane(kind, self._decoder, self._text, self._counts)
        except Exception as error:  # noqa: BLE001 (this thread must live on, and those who wait must be told)
            for waiting, _ in admitted:
                self._refuse(waiting, error)
            return
        self._lanes[kind] = lane
        if not lane.sentences:
            lane.virtual_s = max(lane.virtual_s, self._virtual_s)
        self._charge(lane, lambda: lane.admit(admitted))

    def _refuse(self, waiting: Waiting, error: Exception) -> None:
        self._left.append(waiting.work)
        _refuse(waiting, error)

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
