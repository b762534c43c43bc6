"""How much translating may wait and run at the same time in this process, counted in row tokens.

A sentence costs its rows (the beam, or the samples) times its source subwords n, or times half of its maximum length
where that is longer than the default, 2 n + 10: what it takes of encoder, cache and decoder grows with both. The cost
is given back when the sentence is done, however short its translation. From the moment that work is accepted until its
sentences are cut into subwords, while its model loads or a thread is busy with other texts, it is counted as what it is
expected to cost; what it does cost replaces that, and work that was accepted is not refused any more. Should it cost so
much more that over twice the budget would be taken, it gives back what it has and waits for room, and nothing else is
accepted before it has that.

Unary calls and streams have a budget each, of the same size, so that neither can shut the other out: a call that finds
no room is refused at once, a stream waits for its turn, first come, first served. Whoever asks gets room as soon as
there is any, however much it asks for: so what is large is refused no more often, and waits no longer, than what is
small, and for a while up to twice the budget may be taken. Hence a call must not cost more than the budget (it never
finds room: that is an error of its own), and a stream takes what it needs in portions.

Peers share a budget: what one leaves, others borrow. But nobody is refused, or waits, who stays within the share of its
peer, an equal part for each peer that has something or waits, however much others have borrowed. Of the peers that wait
the one that has least is served first. All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from ferryman_service.domain.errors import InvalidRequest, QueueFull, Violation
from ferryman_service.domain.translation import MAX_TRANSLATION_TOKENS, PreparedSentence, SearchOptions, tokens_to_book
from ferryman_service.text.normalise import least_subwords

T = TypeVar("T")

_CHARACTERS_PER_TOKEN: Final = 4
_MORE_BYTES: Final = 2
_MOST_BUDGETS: Final = 2
_PORTIONS: Final = 16
_FORGET_S: Final = 10.0
_UNKNOWN_DELAY_S: Final = 1.0
_LEAST_DELAY_S: Final = 0.1
_MOST_DELAY_S: Final = 30.0


def cost_tokens(sentence: PreparedSentence, options: SearchOptions) -> int:
    """Return what a sentence costs, row tokens; at least 1, also for an empty sentence."""
    return max(1, sentence.booked_tokens * options.rows)


def expected_tokens(
    texts: Sequence[str],
    prefixes: Sequence[str],
    options: SearchOptions,
    most_tokens: int = MAX_TRANSLATION_TOKENS,
) -> int:
    """Return what texts will cost as far as their lengths, and those that translations must and may have, tell;
    `most_tokens` is the longest translation, whatever the options say."""
    words = itertools.zip_longest(texts, prefixes, fillvalue="")
    least = min(options.min_length, most_tokens)
    if options.max_length is not None:
        least = max(least, tokens_to_book(min(options.max_length, most_tokens)))
    return sum(_expected_subwords(text + prefix, least) for text, prefix in words) * options.rows


def _expected_subwords(text: str, least: int) -> int:
    """Count a subword for four characters, and the end symbol, and at least so many. But scripts without spaces, whose
    characters take three bytes of UTF-8, two more than ASCII's, have about a subword for each."""
    if not text:
        return 1
    characters = len(text)
    subwords = math.ceil(characters / _CHARACTERS_PER_TOKEN)
    if not text.isascii():
        subwords = max(subwords, (len(text.encode(errors="surrogatepass")) - characters) // _MORE_BYTES)
    return max(subwords + 1, least)


class TokenBudget:
    """Tokens that are lent to peers and given back. `used` are lent now; while any of the limit is left, whoever asks
    gets what it asks for."""

    def __init__(self, limit_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Store; `clock` tells seconds."""
        assert limit_tokens > 0, "a budget must be positive"
        self.used = 0
        self.limit_tokens = limit_tokens
        self._drain = _DrainRate(clock)
        self._used: dict[str, int] = {}  # by peer, none of them 0
        self._waiting: dict[str, deque[_Turn]] = {}  # by peer, none of them empty
        self._order = itertools.count()

    @property
    def portion_tokens(self) -> int:
        """What a stream takes at a time, but for a single sentence that costs more."""
        return max(1, self.limit_tokens // _PORTIONS)

    def has_room(self, tokens: int, peer: str) -> bool:
        """Tell whether anything is left, or the peer stays within its share."""
        return self.used < self.limit_tokens or self._is_within_share(tokens, peer)

    def try_take(self, tokens: int, peer: str = "") -> bool:
        """Take the tokens if there is room; they must be given back."""
        if not self.has_room(tokens, peer):
            return False
        self._lend(tokens, peer)
        return True

    async def take(self, tokens: int, peer: str = "") -> None:
        """Wait, behind those of the peer who wait already, until there is room, and take the tokens."""
        if peer in self._waiting or not self.try_take(tokens, peer):
            await self._take_in_turn(tokens, peer)

    async def exchange(self, lent: int, tokens: int, peer: str = "") -> None:
        """Take the tokens in place of others that are lent to the same work, which costs other than was expected.

        If that were too much, those others are given back and it waits as in `take`: nobody who waits holds anything,
        so that there is always somebody whose work goes on. Nothing is left lent to who is cancelled.
        """
        change = tokens - lent
        most = _MOST_BUDGETS * self.limit_tokens
        if (
            change <= 0
            or (not self._waiting and self.used + change <= most)
            or (peer not in self._waiting and self._is_within_share(change, peer))
        ):
            self._change(change, peer)
        else:
            await self._take_in_turn(tokens, peer, lent)

    def give_back(self, tokens: int, peer: str = "") -> None:
        """Give tokens back; who waits gets room, the peer that has least first."""
        self._drain.drained(tokens)
        self._change(-tokens, peer)

    def delay_s(self, tokens: int) -> float:
        """Estimate when so many will be free, seconds from now, by how fast tokens have come back lately."""
        before = self.used + sum(turn.tokens for turns in self._waiting.values() for turn in turns)
        missing = before + min(tokens, self.limit_tokens) - self.limit_tokens
        rate = self._drain.tokens_per_second()
        delay_s = _UNKNOWN_DELAY_S if rate is None else missing / rate
        return min(max(delay_s, _LEAST_DELAY_S), _MOST_DELAY_S)

    def _is_within_share(self, tokens: int, peer: str) -> bool:
        """Tell whether the peer may have so many more although nothing is left; a peer alone has no share."""
        peers = len({peer, *self._used, *self._waiting})
        return peers > 1 and self._used.get(peer, 0) + tokens <= self.limit_tokens // peers

    async def _take_in_turn(self, tokens: int, peer: str, lent: int = 0) -> None:
        """Give back what was lent, and wait for room for the tokens."""
        turn = _Turn(tokens, next(self._order), asyncio.get_running_loop().create_future())
        self._waiting.setdefault(peer, deque()).append(turn)  # first, so that nobody comes between
        self._change(-lent, peer)
        try:
            await turn.served
        except asyncio.CancelledError:
            if turn.served.cancelled():
                self._serve()  # which forgets those who have stopped waiting
            else:
                self.give_back(tokens, peer)
            raise

    def _change(self, tokens: int, peer: str) -> None:
        self._count(tokens, peer)
        assert self.used >= 0, "more was given back than was taken"
        self._serve()

    def _lend(self, tokens: int, peer: str) -> None:
        if self.used == 0:
            self._drain.begin()
        self._count(tokens, peer)

    def _count(self, tokens: int, peer: str) -> None:
        self.used += tokens
        used = self._used[peer] = self._used.get(peer, 0) + tokens
        if not used:
            del self._used[peer]

    def _serve(self) -> None:
        while (peer := self._next_peer()) is not None and self.has_room(self._waiting[peer][0].tokens, peer):
            turn = self._waiting[peer].popleft()
            if not self._waiting[peer]:
                del self._waiting[peer]
            self._lend(turn.tokens, peer)
            turn.served.set_result(None)

    def _next_peer(self) -> str | None:
        """Return the peer to serve, that which has least, of equal ones the one that has waited longest; forget those
        who have stopped waiting."""
        for peer, turns in list(self._waiting.items()):
            while turns and turns[0].served.cancelled():
                turns.popleft()
            if not turns:
                del self._waiting[peer]
        return min(
            self._waiting, key=lambda peer: (self._used.get(peer, 0), self._waiting[peer][0].order), default=None
        )


@dataclass(frozen=True, slots=True)
class _Turn:
    """Somebody who waits for tokens."""

    tokens: int
    order: int
    served: asyncio.Future[None]


class Held:
    """Tokens, taken already, of work that is not with the engine yet."""

    def __init__(self, budget: TokenBudget, tokens: int, peer: str = "") -> None:
        """Store."""
        self._budget = budget
        self._tokens = tokens
        self._peer = peer

    async def settle(self, tokens: int) -> None:
        """Hold what the work does cost instead of what was expected; if that is too much, hold nothing until there is
        room."""
        expected, self._tokens = self._tokens, 0
        await self._budget.exchange(expected, tokens, self._peer)
        self._tokens = tokens

    def hand_over(self) -> None:
        """Leave the tokens to whom the work is handed to, who gives them back."""
        self._tokens = 0

    def release(self) -> None:
        """Give back what was not handed over; harmless when repeated."""
        tokens, self._tokens = self._tokens, 0
        if tokens:
            self._budget.give_back(tokens, self._peer)


class Admission:
    """The budgets of unary calls and of streams."""

    def __init__(self, limit_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Make two budgets of `limit_tokens` row tokens each; `clock` tells seconds."""
        self.calls = TokenBudget(limit_tokens, clock)
        self.streams = TokenBudget(limit_tokens, clock)

    def admit(self, expected: int, peer: str = "") -> Held:
        """Take the expected tokens of a peer's call, at most the whole budget; raises QueueFull."""
        tokens = min(expected, self.calls.limit_tokens)
        if not self.calls.try_take(tokens, peer):
            raise self._full(tokens)
        return Held(self.calls, tokens, peer)

    def check_texts(self, texts: Sequence[str], options: SearchOptions) -> None:
        """Raise InvalidRequest if the lengths of a call's texts tell that it costs more than the whole budget."""
        if sum(map(len, texts)) * options.rows > self.calls.limit_tokens:  # fewer characters are fewer subwords
            self.check_size(sum(map(least_subwords, texts)) * options.rows, at_least=True)

    def check_size(self, tokens: int, *, at_least: bool = False) -> None:
        """Raise InvalidRequest if a call costs more than the whole budget; `at_least`: it costs so much or more."""
        limit = self.calls.limit_tokens
        if tokens > limit:
            text = (
                f"take {'at least ' if at_least else ''}{tokens:,} row tokens (source subwords times beam, or half of "
                f"max_length times beam), a call may take at most {limit:,} (--queue-tokens): send fewer in a call, "
                "lower max_length, or use StreamTranslate"
            )
            raise InvalidRequest([Violation(field="sentences", description=text, reason="TOO_MANY_TOKENS")])

    def _full(self, tokens: int) -> QueueFull:
        delay_s, limit = self.calls.delay_s(tokens), self.calls.limit_tokens
        return QueueFull(
            f"the request takes about {tokens:,} row tokens (subwords times beam), and of the {limit:,} that "
            f"this server lets wait {self.calls.used:,} are taken: call again in {delay_s:.1f} s, or use "
            "StreamTranslate, which waits",
            retry_delay_s=delay_s,
            request_tokens=tokens,
            queued_tokens=self.calls.used,
            limit_tokens=limit,
        )


def in_portions(items: Sequence[tuple[T, int]], most_tokens: int) -> Iterator[tuple[list[T], int]]:
    """Yield the items, each with its tokens, in groups of at most so many tokens with their sum; an item that has more
    is a group by itself."""
    group: list[T] = []
    tokens = 0
    for item, cost in items:
        if group and tokens + cost > most_tokens:
            yield group, tokens
            group, tokens = [], 0
        group.append(item)
        tokens += cost
    if group:
        yield group, tokens


class _DrainRate:
    """Tokens that come back a second, over the time in which any were lent; what is ten seconds old counts a third."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = 0.0
        self._seconds = 0.0
        self._since_s = clock()

    def begin(self) -> None:
        self._since_s = self._clock()

    def drained(self, tokens: int) -> None:
        now_s = self._clock()
        passed_s = now_s - self._since_s
        kept = math.exp(-passed_s / _FORGET_S)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + passed_s
        self._since_s = now_s

    def tokens_per_second(self) -> float | None:
        """None while nothing is known."""
        return self._tokens / self._seconds if self._seconds > 0 and self._tokens > 0 else None
