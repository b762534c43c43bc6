"""Rows of runs and records <-> domain, and the one way in which a run changes state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, insert, select, update

from ferryman_service.domain.errors import AttemptFenced, RunNotFound
from ferryman_service.domain.recipe import recipe_from_dict, recipe_to_dict
from ferryman_service.domain.records import (
    ACTIVE_STATES,
    EventLevel,
    Payload,
    Record,
    RunEvent,
    RunState,
    StateChange,
    StepMetrics,
    ValidationMetrics,
    decay_plan_from_dict,
    payload_from_dict,
    payload_to_dict,
)
from ferryman_service.domain.runs import FailureReason, ProcessIdentity, RunFailure, RunProgress, TrainingRun
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.stores import tables
from ferryman_service.stores.readable import parse_row, read_row, require, shown

DELETING: Final = "deleting"
"""In place of a state: the run was deleted, and its records are being removed. Nobody sees it any more."""

IS_THERE: Final = tables.runs.c.state.is_distinct_from(DELETING)
"""Whether a run was not deleted. Also true of a row whose state is missing: it is damaged, not gone."""

_STATES: Final = frozenset(state.value for state in RunState)
_HEAD: Final = [
    tables.runs.c[name]
    for name in (
        "run_id",
        "state",
        "attempt",
        "last_sequence",
        "cancel_requested",
        "pause_requested",
        "restarts",
        "model_name",
        "worker_pid",
        "start_time_ns",
    )
]
# Built once: a statement takes longer to build than to run, and training waits for the interpreter meanwhile.
_HEAD_OF_RUN: Final = select(*_HEAD).where(tables.runs.c.run_id == bindparam("of_run"), IS_THERE).with_for_update()
_INSERT_RECORDS: Final = insert(tables.records)


def run_to_values(run: TrainingRun) -> dict[str, Any]:
    """Return the row of a run, without its request id."""
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    worker = values.pop("worker")
    values.pop("corpus_deleted")
    return (
        values
        | worker_to_values(worker)
        | {
            "state": run.state.value,
            "recipe": recipe_to_dict(run.recipe),
            "progress": dataclasses.asdict(run.progress),
            "failure": failure_to_value(run.failure),
        }
    )


def worker_to_values(worker: ProcessIdentity | None) -> dict[str, Any]:
    """Return the columns of a worker."""
    if worker is None:
        return {"worker_pid": None, "worker_start_ticks": None, "worker_boot_id": None}
    return {
        "worker_pid": worker.pid,
        "worker_start_ticks": worker.start_ticks,
        "worker_boot_id": worker.boot_id,
    }


def failure_to_value(failure: RunFailure | None) -> dict[str, Any] | None:
    """Return the JSON of a failure."""
    return None if failure is None else dataclasses.asdict(failure)


def run_from_row(connection: Connection, row: Row[Any], place: str = "") -> TrainingRun | UnreadableRow:
    """Return the run of a whole row, if it can be read; `place` is where it stands in its list."""
    return read_row(connection, tables.runs, row, _parse_run, shown(row.run_id), place)


def parse_run_row(row: Row[Any]) -> TrainingRun:
    """Return the run of a whole row; raises one of `UNPARSABLE`."""
    return parse_row(tables.runs, row, _parse_run)


def _parse_run(row: Row[Any]) -> TrainingRun:
    worker = None
    if row.worker_pid is not None:
        worker = ProcessIdentity(pid=row.worker_pid, start_ticks=row.worker_start_ticks, boot_id=row.worker_boot_id)
    return TrainingRun(
        run_id=row.run_id,
        state=RunState(row.state),
        corpus_id=row.corpus_id,
        model_name=row.model_name,
        recipe=recipe_from_dict(row.recipe),
        create_time_ns=row.create_time_ns,
        attempt=row.attempt,
        last_sequence=row.last_sequence,
        cancel_requested=row.cancel_requested,
        model_version=row.model_version,
        progress=_progress_from_value(row.progress),
        failure=_failure_from_value(row.failure),
        worker=worker,
        start_time_ns=row.start_time_ns,
        end_time_ns=row.end_time_ns,
        pause_requested=row.pause_requested,
        restarts=row.restarts,
        not_before_ns=row.not_before_ns,
        processes=row.processes,
        initial_model=row.initial_model,
        keep_optimizer=row.keep_optimizer,
        trace_context=row.trace_context,
    )


def record_from_row(connection: Connection, row: Row[Any]) -> Record:
    """Return the record of a row; one that cannot be read is a remark which says so, so that no number is missing."""
    record = read_row(connection, tables.records, row, _parse_record, f"{shown(row.run_id)}/{shown(row.sequence)}")
    if isinstance(record, UnreadableRow):
        return unreadable_record(row.sequence, row.time_ns if type(row.time_ns) is int else 0, record.why)
    return record


def unreadable_record(sequence: int, time_ns: int, why: str) -> Record:
    """Return what stands in the place of a record that cannot be read."""
    text = f"record {sequence} cannot be read: in the database its {why}"
    remark = RunEvent(level=EventLevel.ERROR, code="RECORD_UNREADABLE", message=text)
    return Record(sequence=sequence, time_ns=max(0, time_ns), payload=remark)


def parse_record_row(row: Row[Any]) -> Record:
    """Return the record of a whole row; raises one of `UNPARSABLE`."""
    return parse_row(tables.records, row, _parse_record)


def _parse_record(row: Row[Any]) -> Record:
    return Record(sequence=row.sequence, time_ns=row.time_ns, payload=payload_from_dict(row.kind, row.payload))


def read_run(connection: Connection, run_id: str) -> TrainingRun:
    """Return the run; raises RunNotFound, RowUnreadable."""
    return require(find_run(connection, run_id))


def find_run(connection: Connection, run_id: str) -> TrainingRun | UnreadableRow:
    """Return the run, if it can be read; raises RunNotFound."""
    query = select(tables.runs).where(tables.runs.c.run_id == run_id, IS_THERE)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise run_not_found(run_id)
    return run_from_row(connection, row)


def lock_head(connection: Connection, run_id: str) -> Row[Any]:
    """Return the moving part of a run's row, locked until the transaction ends; raises RunNotFound, RowUnreadable."""
    head = connection.execute(_HEAD_OF_RUN, {"of_run": run_id}).one_or_none()
    if head is None:
        raise run_not_found(run_id)
    if not is_readable_head(head):
        require(find_run(connection, run_id))
    return head


def is_readable_head(head: Any) -> bool:  # noqa: ANN401 (a row of whatever columns)
    """Tell whether the state and the last number of a run's row are what they should be."""
    return head.state in _STATES and type(head.last_sequence) is int


def check_attempt(head: Row[Any], attempt: int) -> None:
    """Raise AttemptFenced unless this is the run's newest attempt and has not been given up."""
    if RunState(head.state) not in ACTIVE_STATES or head.attempt != attempt:
        raise AttemptFenced(
            f"attempt {attempt} of run {head.run_id} may write no more: "
            f"the run is {head.state}, its attempt {head.attempt}",
            run_id=head.run_id,
            attempt=attempt,
        )


def got_further(connection: Connection, run_id: str) -> bool:
    """Tell whether the run's present worker has reported a step. It reports none that an earlier one did."""
    records = tables.records.c
    query = (
        select(records.kind, records.payload)
        .where(records.run_id == run_id, records.kind.in_(["step", "state_change"]))
        .order_by(records.sequence.desc())
        .limit(2)
    )
    for row in connection.execute(query):  # its last steps may be followed by the change to EXPORTING
        if row.kind == "step":
            return True
        state = row.payload.get("state") if isinstance(row.payload, dict) else None
        if state != RunState.EXPORTING.value:
            return False
    return False


def add_records(connection: Connection, run_id: str, last_sequence: int, payloads: Sequence[Payload]) -> int:
    """Insert the payloads with the numbers that follow `last_sequence`; return the last one. The caller stores it."""
    time_ns = time.time_ns()
    rows = []
    for sequence, payload in enumerate(payloads, last_sequence + 1):
        kind, values = payload_to_dict(payload)
        rows.append({"run_id": run_id, "sequence": sequence, "time_ns": time_ns, "kind": kind, "payload": values})
    connection.execute(_INSERT_RECORDS, rows)
    return last_sequence + len(rows)


def enter_state(
    connection: Connection,
    head: Row[Any],
    state: RunState,
    message: str = "",
    changes: Mapping[str, Any] | None = None,
    remark: RunEvent | None = None,
) -> None:
    """Write the state, the other changed columns, and the remark before the StateChange record. The caller has checked
    the transition.

    A run keeps the worker that ended it, and forgets one that gave it up.
    """
    values: dict[str, Any] = {"attempt": head.attempt, **(changes or {})}
    if state in (RunState.QUEUED, RunState.PAUSED):
        values |= worker_to_values(None)
    if state.is_terminal:
        values |= {"end_time_ns": time.time_ns(), "cancel_requested": False}
    if state.is_terminal or state is RunState.PAUSED:
        values["pause_requested"] = False
    change = StateChange(state=state, attempt=values["attempt"], message=message)
    payloads: list[Payload] = [change] if remark is None else [remark, change]
    last_sequence = add_records(connection, head.run_id, head.last_sequence, payloads)
    values |= {"state": state.value, "last_sequence": last_sequence}
    connection.execute(update(tables.runs).where(tables.runs.c.run_id == head.run_id).values(values))


def run_not_found(run_id: str) -> RunNotFound:
    """Return the error for a run that does not exist."""
    shown = run_id[:80]
    return RunNotFound(f"there is no training run {shown!r}: ListTrainingRuns names those there are", run_id=shown)


def _progress_from_value(value: dict[str, Any]) -> RunProgress:
    step, validation = value["last_step"], value["best_validation"]
    return RunProgress(
        **value
        | {
            "last_step": step and StepMetrics(**step),
            "best_validation": validation and ValidationMetrics(**validation),
            "decays": tuple(decay_plan_from_dict(decay) for decay in value.get("decays", ())),
        }
    )


def _failure_from_value(value: dict[str, Any] | None) -> RunFailure | None:
    return None if value is None else RunFailure(**value | {"reason": FailureReason(value["reason"])})
