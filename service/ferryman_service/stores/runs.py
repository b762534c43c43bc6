"""Runs and their records in SQL."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    Row,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    tuple_,
    update,
)

from ferryman_service.domain.errors import (
    AttemptFenced,
    DatabaseDamaged,
    DiskFull,
    IllegalTransition,
    RequestIdReused,
    RunNotFinished,
    StoreUnavailable,
    TooManyRuns,
)
from ferryman_service.domain.records import Payload, Record, RunState, StateChange, StepMetrics
from ferryman_service.domain.runs import (
    AppendAck,
    Handover,
    ProcessIdentity,
    RequestKey,
    RunFailure,
    RunFilter,
    RunHead,
    RunProgress,
    TrainingRun,
)
from ferryman_service.stores import tables
from ferryman_service.stores.database import reading, writing
from ferryman_service.stores.earlier_release import uncounted_reports
from ferryman_service.stores.pending import FolderChange, announce
from ferryman_service.stores.run_rows import (
    DELETING,
    add_records,
    check_attempt,
    enter_state,
    failure_to_value,
    got_further,
    lock_head,
    read_run,
    record_from_row,
    run_from_row,
    run_to_values,
    worker_to_values,
)

_log = logging.getLogger(__name__)
_RUNS: Final = tables.runs
_UPDATE_RUN: Final = update(_RUNS).where(_RUNS.c.run_id == bindparam("of_run"))
_RECORDS: Final = tables.records
_UNFINISHED: Final = [state.value for state in RunState if not state.is_terminal]
_INSERTION: Final = literal_column("runs.rowid", BigInteger)
"""The order of insertion. Not that of create_time_ns: whoever sets the clock back would let later runs go first."""
_SLICE: Final = 5000
"""How many records are deleted in one transaction, for which every other writer waits."""
_SLICE_PAUSE_S: Final = 0.01
"""Lets the others in between: SQLite's place for a writer is nobody's turn."""


class SqlRunStore:
    """The RunStore. Records get their numbers in the transaction that stores them, so a number is never seen before its
    record is durable, and never twice."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(self, run: TrainingRun, key: RequestKey | None, max_queued: int) -> TrainingRun:
        """Store a QUEUED run and its first record, or return the run of a known key."""
        assert run.state is RunState.QUEUED, "a run begins QUEUED"
        with writing(self._engine) as connection:
            if key is not None and (known := _run_of_key(connection, key)) is not None:
                return known
            self._check_queue(connection, max_queued)
            values = run_to_values(dataclasses.replace(run, last_sequence=1))
            values |= {"request_id": key and key.request_id, "body_digest": key and key.body_digest}
            connection.execute(insert(_RUNS).values(values))
            add_records(connection, run.run_id, 0, [StateChange(state=run.state, attempt=run.attempt)])
            return read_run(connection, run.run_id)

    def find(self, key: RequestKey) -> TrainingRun | None:
        """Return the run of the key, None if the key is unknown; raises RequestIdReused."""
        with reading(self._engine) as connection:
            return _run_of_key(connection, key)

    def get(self, run_id: str) -> TrainingRun:
        """Return the run; raises RunNotFound."""
        with reading(self._engine) as connection:
            return read_run(connection, run_id)

    def list_page(self, wanted: RunFilter, after: str | None, limit: int) -> Sequence[TrainingRun]:
        """Return the runs that follow the place `after` in the filter's order, at most `limit`."""
        place = (_RUNS.c.create_time_ns, _RUNS.c.run_id)
        query = select(_RUNS).where(_RUNS.c.state != DELETING)
        if wanted.states:
            query = query.where(_RUNS.c.state.in_([state.value for state in wanted.states]))
        if wanted.model_name:
            query = query.where(_RUNS.c.model_name == wanted.model_name)
        if after is not None:
            time_ns, _, run_id = after.partition("/")
            last = tuple_(literal(int(time_ns)), literal(run_id))
            query = query.where(tuple_(*place) > last if wanted.oldest_first else tuple_(*place) < last)
        order = [column.asc() if wanted.oldest_first else column.desc() for column in place]
        with reading(self._engine) as connection:
            return [run_from_row(row) for row in connection.execute(query.order_by(*order).limit(limit))]

    def unfinished(self) -> Sequence[TrainingRun]:
        """Return all runs that are not terminal, in the order in which they were created."""
        query = select(_RUNS).where(_RUNS.c.state.in_(_UNFINISHED)).order_by(_INSERTION)
        with reading(self._engine) as connection:
            return [run_from_row(row) for row in connection.execute(query)]

    def begin_attempt(self, run_id: str, previous_attempt: int) -> TrainingRun | None:
        """Make the run STARTING with the next attempt; None if somebody else was faster. Raises RunNotFound."""
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            waiting = RunState(head.state) in (RunState.QUEUED, RunState.STARTING)
            if not waiting or head.attempt != previous_attempt or head.worker_pid is not None:
                return None
            changes = {"attempt": previous_attempt + 1, "not_before_ns": 0}
            enter_state(connection, head, RunState.STARTING, changes=changes)
            return read_run(connection, run_id)

    def claim_attempt(self, run_id: str, attempt: int, worker: ProcessIdentity) -> TrainingRun:
        """Make the run RUNNING under this worker; raises AttemptFenced."""
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            check_attempt(head, attempt)
            if RunState(head.state) is not RunState.STARTING or head.worker_pid is not None:
                raise AttemptFenced(
                    f"attempt {attempt} of run {run_id} is claimed already: the run is {head.state}",
                    run_id=run_id,
                    attempt=attempt,
                )
            changes = worker_to_values(worker) | uncounted_reports(connection, run_id)
            if head.start_time_ns is None:
                changes["start_time_ns"] = time.time_ns()
            enter_state(connection, head, RunState.RUNNING, changes=changes)
            return read_run(connection, run_id)

    def append(self, run_id: str, attempt: int, payloads: Sequence[Payload], progress: RunProgress | None) -> AppendAck:
        """Append records in order, durably, all or none; also store the progress. Raises AttemptFenced."""
        assert not any(isinstance(payload, StateChange) for payload in payloads), "change_state writes those"
        if not payloads and progress is None:
            return self._acknowledge(run_id, attempt)
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            check_attempt(head, attempt)
            values: dict[str, Any] = {}
            if payloads:
                values["last_sequence"] = add_records(connection, run_id, head.last_sequence, payloads)
            if head.restarts and any(isinstance(payload, StepMetrics) for payload in payloads):
                values["restarts"] = 0  # a resumed worker reports only steps that no earlier one did
            if progress is not None:
                values["progress"] = dataclasses.asdict(progress)
            connection.execute(_UPDATE_RUN, {"of_run": run_id, **values})
        last_sequence = values.get("last_sequence", head.last_sequence)
        return AppendAck(
            last_sequence=last_sequence, cancel_requested=head.cancel_requested, pause_requested=head.pause_requested
        )

    def change_state(
        self, run_id: str, attempt: int, state: RunState, message: str = "", failure: RunFailure | None = None
    ) -> TrainingRun:
        """Change the state. Raises AttemptFenced, IllegalTransition."""
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            check_attempt(head, attempt)
            if not RunState(head.state).may_become(state):
                raise _illegal(head, state)
            changes = {"failure": failure_to_value(failure)} if failure is not None else {}
            enter_state(connection, head, state, message, changes)
            return read_run(connection, run_id)

    def give_up_attempt(self, run_id: str, attempt: int, handover: Handover) -> TrainingRun:
        """Give the attempt up without an end. Raises AttemptFenced."""
        assert handover.state in (RunState.QUEUED, RunState.PAUSED), "another attempt can follow"
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            check_attempt(head, attempt)
            if head.cancel_requested:
                enter_state(connection, head, RunState.CANCELLED, "cancelled by the caller")
            elif head.pause_requested and handover.state is RunState.QUEUED:
                enter_state(connection, head, RunState.PAUSED, "paused by the caller")
            else:
                _hand_over(connection, head, handover)
            return read_run(connection, run_id)

    def fail_waiting(self, run_id: str, attempt: int, failure: RunFailure) -> TrainingRun:
        """Make a QUEUED run FAILED that shall have no other attempt. Raises AttemptFenced, RunNotFound."""
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            if RunState(head.state) is not RunState.QUEUED or head.attempt != attempt:
                text = f"run {run_id} does not wait for the attempt after {attempt}: it is {head.state}"
                raise AttemptFenced(text, run_id=run_id, attempt=attempt)
            changes = {"failure": failure_to_value(failure)}
            enter_state(connection, head, RunState.FAILED, failure.message, changes)
            return read_run(connection, run_id)

    def request_pause(self, run_id: str) -> TrainingRun:
        """Pause a QUEUED run, ask an active one to rest. Raises RunNotFound, IllegalTransition."""
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            match RunState(head.state):
                case RunState.QUEUED:
                    enter_state(connection, head, RunState.PAUSED, "paused by the caller")
                case RunState.PAUSED:
                    pass
                case RunState.STARTING | RunState.RUNNING:
                    asked = update(_RUNS).where(_RUNS.c.run_id == run_id).values(pause_requested=True)
                    connection.execute(asked)
                case _:
                    raise _illegal(head, RunState.PAUSED)
            return read_run(connection, run_id)

    def request_resume(self, run_id: str) -> TrainingRun:
        """Queue a PAUSED run, withdraw a pause that has not taken effect. Raises RunNotFound, IllegalTransition."""
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            state = RunState(head.state)
            if state.is_terminal:
                raise _illegal(head, RunState.QUEUED)
            if state is RunState.PAUSED:
                changes = {"restarts": 0, "not_before_ns": 0}
                enter_state(connection, head, RunState.QUEUED, "resumed by the caller", changes)
            elif head.pause_requested:
                withdrawn = update(_RUNS).where(_RUNS.c.run_id == run_id).values(pause_requested=False)
                connection.execute(withdrawn)
            return read_run(connection, run_id)

    def delete(self, run_id: str) -> None:
        """Remove a terminal run and its records. Raises RunNotFound, RunNotFinished.

        From its first transaction on the run is gone; the records follow in slices. What a crash leaves of them is
        removed by `recover`.
        """
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            if not RunState(head.state).is_terminal:
                text = f"run {run_id} is {head.state}: cancel it and wait for its end, then delete it"
                raise RunNotFinished(text, run_id=run_id, state=head.state)
            hidden = {"state": DELETING, "request_id": None}
            connection.execute(update(_RUNS).where(_RUNS.c.run_id == run_id).values(hidden))
            announce(connection, f"runs/{run_id}", FolderChange.DELETING)
        self._finish_deletion(run_id, head.last_sequence)

    def recover(self) -> None:
        """Finish the deletions that a crash has interrupted; call it when a service starts."""
        query = select(_RUNS.c.run_id, _RUNS.c.last_sequence).where(_RUNS.c.state == DELETING)
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        for row in rows:
            self._finish_deletion(row.run_id, row.last_sequence)

    def request_cancel(self, run_id: str) -> TrainingRun:
        """Cancel a QUEUED run, ask an active one to stop. Raises RunNotFound, IllegalTransition."""
        with writing(self._engine) as connection:
            head = lock_head(connection, run_id)
            match RunState(head.state):
                case RunState.QUEUED | RunState.PAUSED:
                    enter_state(connection, head, RunState.CANCELLED, "cancelled while no worker had it")
                case RunState.CANCELLED:
                    pass
                case RunState.SUCCEEDED | RunState.FAILED:
                    raise _illegal(head, RunState.CANCELLED)
                case _:
                    asked = update(_RUNS).where(_RUNS.c.run_id == run_id).values(cancel_requested=True)
                    connection.execute(asked)
            return read_run(connection, run_id)

    def records_after(self, run_id: str, after_sequence: int, limit: int) -> Sequence[Record]:
        """Return the records that follow, in order, at most `limit`."""
        query = (
            select(_RECORDS)
            .where(_RECORDS.c.run_id == run_id, _RECORDS.c.sequence > after_sequence)
            .order_by(_RECORDS.c.sequence)
            .limit(limit)
        )
        with reading(self._engine) as connection:
            return [record_from_row(row) for row in connection.execute(query)]

    def heads(self, run_ids: Iterable[str]) -> Mapping[str, RunHead]:
        """Return the heads of the runs that exist."""
        query = select(_RUNS.c.run_id, _RUNS.c.state, _RUNS.c.last_sequence).where(_RUNS.c.run_id.in_(list(run_ids)))
        with reading(self._engine) as connection:
            return {
                row.run_id: RunHead(state=RunState(row.state), last_sequence=row.last_sequence)
                for row in connection.execute(query.where(_RUNS.c.state != DELETING))
            }

    def _finish_deletion(self, run_id: str, last_sequence: int) -> None:
        of_run = _RECORDS.c.run_id == run_id
        try:
            # The last ones first: who reads them just now finds no gap.
            for after in range((last_sequence - 1) // _SLICE * _SLICE, -1, -_SLICE):
                with writing(self._engine) as connection:
                    connection.execute(delete(_RECORDS).where(of_run, _RECORDS.c.sequence > after))
                time.sleep(_SLICE_PAUSE_S)
            with writing(self._engine) as connection:
                connection.execute(delete(_RUNS).where(_RUNS.c.run_id == run_id))
        except (DiskFull, StoreUnavailable, DatabaseDamaged) as error:
            _log.warning("records of %s, which was deleted, are left until the next start: %s", run_id, error)

    def _acknowledge(self, run_id: str, attempt: int) -> AppendAck:
        with reading(self._engine) as connection:
            head = lock_head(connection, run_id)
        check_attempt(head, attempt)
        return AppendAck(
            last_sequence=head.last_sequence,
            cancel_requested=head.cancel_requested,
            pause_requested=head.pause_requested,
        )

    @staticmethod
    def _check_queue(connection: Connection, max_queued: int) -> None:
        query = select(func.count()).select_from(_RUNS).where(_RUNS.c.state == RunState.QUEUED.value)
        queued = connection.execute(query).scalar_one()
        if queued >= max_queued:
            raise TooManyRuns(
                f"{queued} runs are waiting, the limit is {max_queued}: try again when one has started, or cancel one",
                queued=queued,
                limit=max_queued,
            )


def _run_of_key(connection: Connection, key: RequestKey) -> TrainingRun | None:
    row = connection.execute(select(_RUNS).where(_RUNS.c.request_id == key.request_id)).one_or_none()
    if row is None:
        return None
    if row.body_digest != key.body_digest:
        raise RequestIdReused(
            f"request_id {key.request_id} came before with another body, for run {row.run_id}: use a new request_id",
            request_id=key.request_id,
        )
    return run_from_row(row)


def _hand_over(connection: Connection, head: Row[Any], handover: Handover) -> None:
    changes = {"not_before_ns": handover.not_before_ns}
    forgiven = handover.forgiven and got_further(connection, head.run_id)
    if handover.restarts is not None and not forgiven:
        changes["restarts"] = handover.restarts
    enter_state(connection, head, handover.state, handover.message, changes, handover.remark)


def _illegal(head: Row[Any], state: RunState) -> IllegalTransition:
    return IllegalTransition(
        f"run {head.run_id} is {head.state} and cannot become {state.value}",
        run_id=head.run_id,
        state=head.state,
        wanted=state.value,
    )
