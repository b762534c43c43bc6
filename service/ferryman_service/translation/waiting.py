"""Sentences that wait for a place in a running batch, in the order of fairness (domain.translation.FairShare)."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
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
    """The waiting sentences of one engine. Not thread-safe: the engine's lock guards it.

    Virtual time is at least the start of what was taken last, and it passes with what is taken: a cost takes cost / all
    waiting callers' weights. If it did not, callers that come with one sentence each, one after the other, would all
    start at the same virtual time, and one that has queued many would wait for as long as they come.
    """

    def __init__(self) -> None:
        self._heap: list[Waiting] = []
        self._order = itertools.count()
        self._now = 0.0
        self._sentences: Counter[FairShare] = Counter()
        self._tokens: Counter[CancelToken] = Counter()
        self._weight = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, work: SentenceWork, submitted_ns: int) -> None:
        """Put a sentence in line; its cost is its rows times the subwords that each takes."""
        cost = work.options.rows * work.sentence.work_tokens
        share = work.share
        start = share.start_of(cost, self._now)
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
