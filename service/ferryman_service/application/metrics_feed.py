"""StreamMetrics: the history of a run, then its life, without gap or duplicate.

The store is the only source, so a record is seen if and only if it is durable. One task looks at the heads of all
watched runs several times a second; every stream reads its records itself, from its own cursor, so a slow reader holds
back nobody and nothing is queued for it in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ferryman_service.application.ports import RunHead, RunStore
from ferryman_service.domain.errors import (
    DatabaseDamaged,
    DiskFull,
    FerrymanError,
    InvalidRequest,
    RunNotFound,
    SequenceOutOfRange,
    StoreUnavailable,
    Violation,
)
from ferryman_service.domain.records import Record, RunState, StateChange
from ferryman_service.domain.threads import Threads

_log = logging.getLogger(__name__)
_READ_LIMIT: Final = 500


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """How often to look for new records, and to say that there are none."""

    poll_interval_s: float = 0.05
    heartbeat_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Nothing new: everything up to `last_sequence` has been sent."""

    last_sequence: int
    state: RunState
    interval_s: float


@dataclass
class _Watch:
    """A run that streams wait for. `moved` is set, and replaced, each time its head moves or it is deleted."""

    head: RunHead
    streams: int = 0
    deleted: bool = False
    moved: asyncio.Event = field(default_factory=asyncio.Event)


class MetricsFeed:
    """Streams records. All methods belong to one event loop."""

    def __init__(self, runs: RunStore, config: FeedConfig, threads: Threads) -> None:
        """Store the port and the threads that read; the poll task runs only while somebody watches."""
        self._runs = runs
        self._config = config
        self._threads = threads
        self._watches: dict[str, _Watch] = {}
        self._poller: asyncio.Task[None] | None = None

    async def stream(
        self, run_id: str, after_sequence: int, *, follow: bool
    ) -> AsyncGenerator[Record | Heartbeat, None]:
        """Yield the records after `after_sequence`; with `follow`, go on until the run's end.

        Raises InvalidRequest, RunNotFound, SequenceOutOfRange before the first item; RunNotFound also when the run is
        deleted before its records were read; RowUnreadable.
        """
        head = await self._first_head(run_id, after_sequence)
        cursor, last_of_history = after_sequence, head.last_sequence
        with _Watching(self, run_id, head) as watch:
            while True:
                head = watch.head
                records = await self._threads.run(self._runs.records_after, run_id, cursor, _READ_LIMIT)
                for record in records:
                    if not follow and record.sequence > last_of_history:
                        return
                    yield record
                    cursor = record.sequence
                    if isinstance(record.payload, StateChange) and record.payload.state.is_terminal:
                        return
                if not records and watch.deleted:
                    raise await self._why_gone(run_id)
                # The last records of a damaged run may be missing, whatever its head says.
                read_all = not records and (head.state.is_terminal or not follow)
                if read_all or self._is_over(watch.head, cursor) or (not follow and cursor >= last_of_history):
                    return
                if not records and not await self._moves(watch, head, cursor):
                    yield Heartbeat(last_sequence=cursor, state=watch.head.state, interval_s=self._config.heartbeat_s)

    async def _why_gone(self, run_id: str) -> FerrymanError:
        """Return why a run has no head: it does not exist, or its row cannot be read."""
        try:
            await self._threads.run(self._runs.get, run_id)
        except FerrymanError as error:
            return error
        return _not_found(run_id)

    async def _first_head(self, run_id: str, after_sequence: int) -> RunHead:
        violations = []
        if not run_id:
            violations.append(Violation(field="run_id", description="is required", reason="REQUIRED"))
        if after_sequence < 0:
            text = f"is {after_sequence}, must not be negative"
            violations.append(Violation(field="after_sequence", description=text, reason="OUT_OF_RANGE"))
        if violations:
            raise InvalidRequest(violations)
        heads = await self._threads.run(self._runs.heads, [run_id])
        if run_id not in heads:
            raise await self._why_gone(run_id)
        head = heads[run_id]
        if after_sequence > head.last_sequence:
            raise SequenceOutOfRange(
                f"after_sequence is {after_sequence}, but the run's last record is {head.last_sequence}",
                after_sequence=after_sequence,
                last_sequence=head.last_sequence,
            )
        return head

    @staticmethod
    def _is_over(head: RunHead, cursor: int) -> bool:
        return head.state.is_terminal and cursor >= head.last_sequence

    async def _moves(self, watch: _Watch, read: RunHead, cursor: int) -> bool:
        """Wait until the run has records after the cursor, of which a look at the head `read` has found none; False if
        a heartbeat is due first."""
        if watch.head != read and watch.head.last_sequence > cursor:
            return True
        try:
            await asyncio.wait_for(watch.moved.wait(), self._config.heartbeat_s)
        except TimeoutError:
            return False
        return True

    def _attach(self, run_id: str, head: RunHead) -> _Watch:
        watch = self._watches.setdefault(run_id, _Watch(head))
        watch.streams += 1
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll(), name="metrics-feed")
        return watch

    def _detach(self, run_id: str) -> None:
        watch = self._watches[run_id]
        watch.streams -= 1
        if not watch.streams:
            del self._watches[run_id]

    async def _poll(self) -> None:
        while self._watches:
            asked = list(self._watches)
            try:
                heads = await self._threads.run(self._runs.heads, asked)
            except (StoreUnavailable, DiskFull, DatabaseDamaged) as error:
                _log.warning("cannot look for new records, trying again: %s", error)
            else:
                self._spread(asked, heads)
            await asyncio.sleep(self._config.poll_interval_s)

    def _spread(self, asked: Sequence[str], heads: Mapping[str, RunHead]) -> None:
        for run_id in asked:
            watch, head = self._watches.get(run_id), heads.get(run_id)
            if watch is None or head == watch.head:
                continue
            watch.head = head or watch.head
            watch.deleted = head is None
            watch.moved.set()
            watch.moved = asyncio.Event()


def _not_found(run_id: str) -> RunNotFound:
    return RunNotFound(f"there is no training run {run_id[:80]!r}", run_id=run_id[:80])


class _Watching:
    """Holds a watch for as long as a stream needs it."""

    def __init__(self, feed: MetricsFeed, run_id: str, head: RunHead) -> None:
        self._feed = feed
        self._run_id = run_id
        self._head = head

    def __enter__(self) -> _Watch:
        return self._feed._attach(self._run_id, self._head)

    def __exit__(self, *_: object) -> None:
        self._feed._detach(self._run_id)
