"""Sentences that wait for a place in a running batch, in the order of fairness (domain.translation.FairShare): peers
first, and of each peer the callers."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from ferryman_service.domain.translation import CancelToken, FairShare, SentenceWork


@dataclass(order=True)
class Waiting:
    """A waiting sentence. The one with the smallest virtual start time is next; of equal ones the heavier caller's
    (`lightness` is minus the weight), then the earlier."""

    start: float
    lightness: float
    order: int
    work: SentenceWork = field(compare=False)
    cost: float = field(compare=False)
    submitted_ns: int = field(compare=False)


class WaitingLine:
    """The waiting sentences of one peer. Not thread-safe: the engine's lock guards it.

    Virtual time is at least the start of what was taken last, and it passes with what is taken: a cost takes cost / all
    waiting callers' weights. If it did not, callers that come with one sentence each, one after the other, would all
    start at the same virtual time, and one that has queued many would wait for as long as they come.
    """

    def __init__(self, now: float = 0.0, clock: Hashable = None) -> None:
        """Make an empty line whose virtual time begins with `now`, and is that of `clock`: callers' sentences in lines
        of other clocks say nothing of their place in this one."""
        self._clock = clock
        self._heap: list[Waiting] = []
        self._order = itertools.count()
        self._now = now
        self._sentences: Counter[FairShare] = Counter()
        self._tokens: Counter[CancelToken] = Counter()
        self._weight = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def now(self) -> float:
        """The virtual time."""
        return self._now

    def add(self, work: SentenceWork, submitted_ns: int) -> None:
        """Put a sentence in line; its cost is its rows times the subwords that each is booked with."""
        cost = work.options.rows * work.sentence.booked_tokens
        share = work.share
        start = share.start_of(cost, self._now, self._clock)
        if not self._sentences[share]:
            self._weight += share.weight
        self._sentences[share] += 1
        self._tokens[work.token] += 1
        heapq.heappush(self._heap, Waiting(start, -share.weight, next(self._order), work, cost, submitted_ns))

    def first(self) -> Waiting:
        """Return who is next."""
        return self._heap[0]

    def take(self) -> Waiting:
        """Take who is next, and let virtual time pass."""
        waiting = heapq.heappop(self._heap)
        self._now = max(self._now, waiting.start) + waiting.cost / self._weight
        self._forget(waiting)
        return waiting

    def take_abandoned(self) -> list[Waiting]:
        """Take all those nobody waits for any more. Asks once for each token, since callers have many sentences."""
        unwanted = {token for token in self._tokens if not token.is_wanted()}
        if not unwanted:
            return []
        kept: list[Waiting] = []
        gone: list[Waiting] = []
        for waiting in self._heap:
            (gone if waiting.work.token in unwanted else kept).append(waiting)
        self._heap = kept
        heapq.heapify(self._heap)
        for waiting in gone:
            self._forget(waiting)
        return gone

    def _forget(self, waiting: Waiting) -> None:
        share, token = waiting.work.share, waiting.work.token
        self._tokens[token] -= 1
        if not self._tokens[token]:
            del self._tokens[token]
        self._sentences[share] -= 1
        if not self._sentences[share]:
            del self._sentences[share]
            self._weight = self._weight - share.weight if self._sentences else 0.0


@dataclass
class _PeerLine:
    """A peer's sentences, and the virtual time at which the next of them starts among the peers."""

    line: WaitingLine
    start: float


class PeerLines:
    """Sentences of all peers, taken by start-time fair queueing over peers of equal weight. Not thread-safe.

    Virtual time passes with what is taken, as in WaitingLine. A peer that has nothing in line is forgotten; the virtual
    time of its next line begins no earlier than where this one ended, because its callers have booked on that.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _PeerLine] = {}
        self._heap: list[tuple[float, int, str]] = []  # the start of each peer's next sentence; old entries stay
        self._order = itertools.count()
        self._now = 0.0
        self._callers_now = 0.0  # where the lines that are gone have ended
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, work: SentenceWork, submitted_ns: int) -> None:
        """Put a sentence in line."""
        peer = work.share.peer
        if peer not in self._lines:
            self._lines[peer] = _PeerLine(WaitingLine(self._callers_now, self), self._now)
            self._push(peer)
        self._lines[peer].line.add(work, submitted_ns)
        self._count += 1

    def first(self) -> Waiting:
        """Return who is next."""
        return self._lines[self._next_peer()].line.first()

    def take(self) -> Waiting:
        """Take who is next, and let virtual time pass."""
        name = self._next_peer()
        peer = self._lines[name]
        heapq.heappop(self._heap)
        waiting = peer.line.take()
        self._count -= 1
        self._now = max(self._now, peer.start) + waiting.cost / len(self._lines)
        peer.start += waiting.cost
        if peer.line:
            self._push(name)
        else:
            self._forget(name)
        return waiting

    def take_abandoned(self) -> list[Waiting]:
        """Take all those nobody waits for any more."""
        gone: list[Waiting] = []
        for name, peer in list(self._lines.items()):
            gone += peer.line.take_abandoned()
            if not peer.line:
                self._forget(name)
        self._count -= len(gone)
        return gone

    def _forget(self, peer: str) -> None:
        self._callers_now = max(self._callers_now, self._lines.pop(peer).line.now)

    def _push(self, peer: str) -> None:
        heapq.heappush(self._heap, (self._lines[peer].start, next(self._order), peer))

    def _next_peer(self) -> str:
        """Return the peer whose turn it is; drop the entries of peers that have left, or have come anew since."""
        while True:
            start, _, name = self._heap[0]
            if name in self._lines and self._lines[name].start == start:
                return name
            heapq.heappop(self._heap)
