"""Sentences of one caller on their way through the engine, and back into the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from ferryman_service.application.admission import TokenBudget, cost_tokens
from ferryman_service.application.loaded_models import Lease
from ferryman_service.domain.translation import (
    CancelToken,
    FairShare,
    PreparedSentence,
    SearchOptions,
    SentenceResult,
    SentenceWork,
)

K = TypeVar("K")
_QUICK_SENTENCES: Final = 256
"""So many take a few milliseconds of the event loop's time."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """For whom sentences are translated, and how; `budget` is what their tokens go back to, for the share's peer."""

    options: SearchOptions
    token: CancelToken
    share: FairShare
    budget: TokenBudget


class Flights:
    """Counts the flights that have not landed, so that an end can wait for them. Safe to use from every thread."""

    def __init__(self, executor: Executor) -> None:
        """Store the executor that frees models."""
        self.executor = executor
        self._changed = threading.Condition()
        self._count = 0

    def started(self) -> None:
        """Count one more."""
        with self._changed:
            self._count += 1

    def landed(self) -> None:
        """Count one less."""
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all have landed."""
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0)


class Flight(Generic[K]):
    """Submits sentences, each under a key, and delivers their results; belongs to its event loop.

    The lease is given back when the flight is closed and the engine is done with the last sentence, however long after
    its caller: until then the model must stay. The tokens of each sentence, which the submitter must have taken from
    the caller's budget, go back when the sentence is done. Results that come while the loop is busy are delivered
    together: the loop is woken once for all of them.
    """

    def __init__(
        self,
        lease: Lease,
        caller: Caller,
        flights: Flights,
        deliver: Callable[[Sequence[tuple[K, SentenceResult]]], None],
    ) -> None:
        """Store; must be called in the event loop. `deliver` is called there and must not raise."""
        self.lease = lease
        self._caller = caller
        self._flights = flights
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._done: list[tuple[K, int, SentenceResult]] = []
        self._in_flight = 0
        self._closed = False
        flights.started()

    def submit(self, sentences: Sequence[tuple[K, PreparedSentence]]) -> None:
        """Hand the sentences to the engine."""
        assert not self._closed, "a closed flight takes nothing"
        work = [self._work(key, sentence) for key, sentence in sentences]
        try:
            self.lease.engine.submit(work)
        except BaseException:
            self._give_back(sum(cost_tokens(s, self._caller.options) for _, s in sentences))
            raise
        self._in_flight += len(work)

    async def submit_many(self, sentences: Sequence[tuple[K, PreparedSentence]]) -> None:
        """Hand the sentences to the engine, in a thread if they are many; a cancellation does not keep them from it."""
        if len(sentences) <= _QUICK_SENTENCES:
            self.submit(sentences)
            return
        self._in_flight += len(sentences)
        submitting = asyncio.ensure_future(asyncio.to_thread(self._hand_over, sentences))
        submitting.add_done_callback(functools.partial(self._handed_over, sentences))
        await asyncio.shield(submitting)

    def _hand_over(self, sentences: Sequence[tuple[K, PreparedSentence]]) -> None:
        self.lease.engine.submit([self._work(key, sentence) for key, sentence in sentences])

    def _handed_over(self, sentences: Sequence[tuple[K, PreparedSentence]], submitting: asyncio.Future[None]) -> None:
        if submitting.cancelled() or submitting.exception() is not None:
            self._in_flight -= len(sentences)
            self._give_back(sum(cost_tokens(sentence, self._caller.options) for _, sentence in sentences))
            if self._closed:
                self._land()

    def close(self) -> None:
        """Say that nothing more will be submitted; call it once. Results that still come are not delivered."""
        self._closed = True
        self._land()

    def _work(self, key: K, sentence: PreparedSentence) -> SentenceWork:
        caller = self._caller
        sampling = caller.options.sampling
        seed = 0
        if sampling is not None:
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        return SentenceWork(
            sentence=sentence,
            options=caller.options,
            token=caller.token,
            share=caller.share,
            done=functools.partial(self._sentence_done, key, cost_tokens(sentence, caller.options)),
            seed=seed,
        )

    def _give_back(self, tokens: int) -> None:
        self._caller.budget.give_back(tokens, self._caller.share.peer)

    def _sentence_done(self, key: K, tokens: int, result: SentenceResult) -> None:
        """Take a result, in a thread of the engine."""
        with self._lock:
            self._done.append((key, tokens, result))
            if len(self._done) == 1:
                with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waits
                    self._loop.call_soon_threadsafe(self._arrived)

    def _arrived(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        self._in_flight -= len(done)
        self._give_back(sum(tokens for _, tokens, _ in done))
        if self._closed:
            self._land()
        else:
            self._deliver([(key, result) for key, _, result in done])

    def _land(self) -> None:
        if self._in_flight == 0:
            self.lease.release(self._flights.executor)
            self._flights.landed()
