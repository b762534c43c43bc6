"""Runs and their records in SQL."""

from __future__ import annotations

import dataclasses
import logging
import sys
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
    literal_column,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

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
from ferryman_service.domain.ids import RUN_PREFIX, is_id
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
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.stores import tables
from ferryman_service.stores.corpus_rows import corpus_not_found
from ferryman_service.stores.database import reading, writing
from ferryman_service.stores.pages import page_by_time
from ferryman_service.stores.pending import FolderChange, announce
from ferryman_service.stores.readable import note_unreadable, require
from ferryman_service.stores.run_rows import (
    DELETING,
    IS_THERE,
    add_records,
    check_attempt,
    enter_state,
    failure_to_value,
    find_run,
    got_further,
    is_readable_head,
    lock_head,
    read_run,
    record_from_row,
    run_from_row,
    run_to_values,
    unreadable_record,
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

    def create(
        self, run: TrainingRun, key: RequestKey | None, max_queued: int, max_unfinished: int = sys.maxsize
    ) -> TrainingRun:
        """Store a QUEUED run and its first record, or return the run of a known key.

        Raises RequestIdReused, TooManyRuns; CorpusNotFound if the corpus was deleted meanwhile.
        """
        assert run.state is RunState.QUEUED, "a run begins QUEUED"
        with writing(self._engine) as connection:
            if key is not None and (known := _run_of_key(connection, key)) is not None:
                return known
            _check_corpus(connection, run.corpus_id)
            _check_capacity(connection, max_queued, max_unfinished)
            values = run_to_values(dataclasses.replace(run, last_sequence=1))
            values |= {"request_id": key and key.request_id, "body_digest": key and key.body_digest}
            connection.execute(insert(_RUNS).values(values))
            add_records(connection, run.run_id, 0, [StateChange(state=run.state, attempt=run.attempt)])
            return read_run(connection, run.run_id)

    def check_capacity(self, max_queued: int, max_unfinished: int) -> None:
        """Raise TooManyRuns where `create` would."""
        with reading(self._engine) as connection:
            _check_capacity(connection, max_queued, max_unfinished)

    def find(self, key: RequestKey) -> TrainingRun | None:
        """Return the run of the key, None if the key is unknown; raises RequestIdReused."""
        with reading(self._engine) as connection:
            return _run_of_key(connection, key)

    def get(self, run_id: str) -> TrainingRun:
        """Return the run; raises RunNotFound."""
        with reading(self._engine) as connection:
            return read_run(connection, run_id)

    def list_page(self, wanted: RunFilter, after: str | None, limit: int) -> Sequence[TrainingRun | UnreadableRow]:
        """Return the runs that follow the place `after` in the filter's order, at most `limit`."""
        filters: list[ColumnElement[bool]] = [IS_THERE]
        if wanted.states:
            filters.append(_RUNS.c.state.in_([state.value for state in wanted.states]))
        if wanted.model_name:
            filters.append(_RUNS.c.model_name == wanted.model_name)
        with reading(self._engine) as connection:
            page = page_by_time(connection, _RUNS, filters, after, limit, oldest_first=wanted.oldest_first)
            return [run_from_row(connection, row, place) for row, place in page]

    def unfinished(self) -> Sequence[TrainingRun | UnreadableRow]:
        """Return all runs that are not terminal, in the order in which they were created."""
        query = select(_RUNS).where(_RUNS.c.state.in_(_UNFINISHED)).order_by(_INSERTION)
        with reading(self._engine) as connection:
            return [run_from_row(connection, row) for row in connection.execute(query)]

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
            changes = worker_to_values(worker)
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
        """Remove a terminal run, or one that cannot be read, and its records. Raises RunNotFound, RunNotFinished.

        From its first transaction on the run is gone; the records follow in slices. What a crash leaves of them is
        removed by `recover`.
        """
        with writing(self._engine) as connection:
            run = find_run(connection, run_id)
            if isinstance(run, TrainingRun) and not run.state.is_terminal:
                text = f"run {run_id} is {run.state}: cancel it and wait for its end, then delete it"
                raise RunNotFinished(text, run_id=run_id, state=run.state)
            hidden = {"state": DELETING, "request_id": None}
            connection.execute(update(_RUNS).where(_RUNS.c.run_id == run_id).values(hidden))
            if is_id(run_id, RUN_PREFIX):  # the id of a damaged row may be anything
                announce(connection, f"runs/{run_id}", FolderChange.DELETING)
            last_sequence = _last_sequence(connection, run_id)
        self._finish_deletion(run_id, last_sequence)

    def recover(self) -> None:
        """Finish the deletions that a crash has interrupted; call it when a service starts."""
        with reading(self._engine) as connection:
            run_ids = connection.execute(select(_RUNS.c.run_id).where(_RUNS.c.state == DELETING)).scalars().all()
            last_sequences = [_last_sequence(connection, run_id) for run_id in run_ids]
        for run_id, last_sequence in zip(run_ids, last_sequences, strict=True):
            self._finish_deletion(run_id, last_sequence)

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
        """Return the records that follow, in order and without gap, at most `limit`."""
        query = (
            select(_RECORDS)
            .where(_RECORDS.c.run_id == run_id, _RECORDS.c.sequence > after_sequence)
            .order_by(_RECORDS.c.sequence)
            .limit(limit)
        )
        with reading(self._engine) as connection:
            rows = {row.sequence: row for row in connection.execute(query)}
            wanted = range(after_sequence + 1, after_sequence + 1 + len(rows))
            if list(rows) != list(wanted):
                return _filled(connection, run_id, range(wanted.start, wanted.start + limit), rows)
            return [record_from_row(connection, row) for row in rows.values()]

    def heads(self, run_ids: Iterable[str]) -> Mapping[str, RunHead]:
        """Return the heads of the runs that exist and whose heads can be read."""
        query = select(_RUNS.c.run_id, _RUNS.c.state, _RUNS.c.last_sequence).where(_RUNS.c.run_id.in_(list(run_ids)))
        with reading(self._engine) as connection:
            return {
                row.run_id: RunHead(state=RunState(row.state), last_sequence=row.last_sequence)
                for row in connection.execute(query.where(IS_THERE))
                if is_readable_head(row)
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
                connection.execute(delete(_RECORDS).where(of_run))  # those that have no number, or a negative one
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


def _run_of_key(connection: Connection, key: RequestKey) -> TrainingRun | None:
    row = connection.execute(select(_RUNS).where(_RUNS.c.request_id == key.request_id)).one_or_none()
    if row is None:
        return None
    if row.body_digest != key.body_digest:
        raise RequestIdReused(
            f"request_id {key.request_id} came before with another body, for run {row.run_id}: use a new request_id",
            request_id=key.request_id,
        )
    return require(run_from_row(connection, row))


def _last_sequence(connection: Connection, run_id: str) -> int:
    """Return the highest number that a record of the run has, whatever the run's row says; 1 if there is none."""
    numbered = (_RECORDS.c.run_id == run_id) & (func.typeof(_RECORDS.c.sequence) == "integer")
    last: int | None = connection.execute(select(func.max(_RECORDS.c.sequence)).where(numbered)).scalar()
    return last or 1


def _check_capacity(connection: Connection, max_queued: int, max_unfinished: int) -> None:
    """Raise TooManyRuns if another run would be one too many."""
    query = select(_RUNS.c.state, func.count()).where(_RUNS.c.state.in_(_UNFINISHED)).group_by(_RUNS.c.state)
    counts = {state: int(count) for state, count in connection.execute(query)}
    queued, unfinished = counts.get(RunState.QUEUED.value, 0), sum(counts.values())
    if queued >= max_queued:
        raise TooManyRuns(
            f"{queued} runs are waiting, the limit is {max_queued}, this server's --max-queued-runs: try again when "
            "one has started, or cancel one",
            queued=queued,
            limit=max_queued,
        )
    if unfinished >= max_unfinished:
        raise TooManyRuns(
            f"{unfinished} runs are waiting, paused or running, the limit is {max_unfinished}, this server's "
            "--max-unfinished-runs: try again when one has ended, or cancel one",
            unfinished=unfinished,
            limit=max_unfinished,
        )


def _check_corpus(connection: Connection, corpus_id: str) -> None:
    """Raise CorpusNotFound unless the corpus is there: within the transaction, so that no deletion comes between."""
    query = select(tables.corpora.c.corpus_id).where(tables.corpora.c.corpus_id == corpus_id)
    if connection.execute(query).one_or_none() is None:
        raise corpus_not_found(corpus_id)


def _filled(connection: Connection, run_id: str, wanted: range, rows: Mapping[Any, Row[Any]]) -> list[Record]:
    """Return the records of these numbers that the run has, and for each that is missing among them one that says so.

    Numbers beyond the run's last one are no records of it.
    """
    head = connection.execute(
        select(_RUNS.c.state, _RUNS.c.last_sequence).where(_RUNS.c.run_id == run_id)
    ).one_or_none()
    if head is None or not is_readable_head(head):
        return [record_from_row(connection, row) for number, row in rows.items() if type(number) is int]
    records = []
    present = [number for number in rows if type(number) is int and number <= head.last_sequence]
    for sequence in range(wanted.start, min(wanted.stop, max(present, default=0) + 1)):
        row = rows.get(sequence)
        if row is None:
            missing = UnreadableRow(table=_RECORDS.name, name=f"{run_id}/{sequence}", why="row is missing")
            note_unreadable(connection, missing)
            records.append(unreadable_record(sequence, time.time_ns(), missing.why))
        else:
            records.append(record_from_row(connection, row))
    return records


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
