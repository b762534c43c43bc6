"""Runs and their records."""

import dataclasses
import itertools
import math
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from sqlalchemy import event, func, select

from ferryman_service.domain.errors import (
    AttemptFenced,
    DiskFull,
    FerrymanError,
    IllegalTransition,
    RequestIdReused,
    RunNotFinished,
    RunNotFound,
    StoreUnavailable,
    TooManyRuns,
)
from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StateChange, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import (
    FailureReason,
    Handover,
    ProcessIdentity,
    RequestKey,
    RunFailure,
    RunFilter,
    RunHead,
    RunProgress,
)
from ferryman_service.domain.schedule import DecayPlan, DecayReason
from ferryman_service.stores import tables
from ferryman_service.stores.database import open_database
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.stores.sqlite import create_sqlite_engine, has_room
from tests.fakes.failpoints import CRASHED, in_child

STEP = StepMetrics(
    step=3,
    epoch=1,
    loss=1 / 3,
    nll_per_token=math.inf,
    perplexity=math.nan,
    learning_rate=6.987712429686843e-4,
    gradient_norm=5e-324,
    target_tokens=2048,
    target_tokens_per_second=12345.678901234567,
    duration_s=0.1,
    padding_share=0.1 + 0.2,
    memory_bytes=1 << 40,
)
VALIDATION = ValidationMetrics(
    step=3,
    epoch=1,
    loss=2.5,
    nll_per_token=2.25,
    perplexity=9.5,
    bleu=35.0,
    chrf=60.5,
    translated_pairs=500,
    duration_s=1.5,
    best=True,
)
DECAY = DecayPlan(first_step=4, last_step=9, reason=DecayReason.TARGET_SCORE)
NOTE = RunEvent(level=EventLevel.WARNING, code="NOTE", message="Größe → ✓")

CREATE = """
import sys, time
from pathlib import Path
from ferryman_service.domain.ids import new_id
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import RequestKey, TrainingRun
from ferryman_service.stores.database import open_database
from ferryman_service.stores.runs import SqlRunStore
runs = SqlRunStore(open_database(Path(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
for i in range(20):
    run = TrainingRun(run_id=new_id("run"), state=RunState.QUEUED, corpus_id="cor_x", model_name="m",
                      recipe=resolve_recipe({}), create_time_ns=time.time_ns())
    print(runs.create(run, RequestKey(request_id=f"request {i}", body_digest="d"), 1000).run_id, flush=True)
"""

APPEND = """
import sys
from pathlib import Path
from ferryman_service.domain.records import EventLevel, RunEvent
from ferryman_service.stores.database import open_database
from ferryman_service.stores.runs import SqlRunStore
runs = SqlRunStore(open_database(Path(sys.argv[1])))
notes = [RunEvent(level=EventLevel.INFO, code="NOTE", message="x" * 500)] * 7
while True:
    print(runs.append(sys.argv[2], 1, notes, None).last_sequence, flush=True)
"""


def in_threads(count, work):
    """Run `work(index)` in threads that begin together; return the results, errors among them."""
    results = [None] * count
    barrier = threading.Barrier(count)

    def run(index):
        barrier.wait()
        try:
            results[index] = work(index)
        except FerrymanError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def sequences(runs, run_id):
    return [record.sequence for record in runs.records_after(run_id, 0, 100_000)]


def test_a_created_run_is_stored_with_its_first_record(runs, make_run):
    run = make_run()
    created = runs.create(run, None, 1)
    assert created == dataclasses.replace(run, last_sequence=1)
    assert runs.get(run.run_id) == created
    (record,) = runs.records_after(run.run_id, 0, 10)
    assert (record.sequence, record.payload) == (1, StateChange(state=RunState.QUEUED, attempt=0))
    assert abs(record.time_ns - time.time_ns()) < 60e9


def test_a_run_that_does_not_exist_is_not_found(runs, worker):
    unknown = new_id(RUN_PREFIX)
    for call in (
        lambda: runs.get(unknown),
        lambda: runs.request_cancel(unknown),
        lambda: runs.begin_attempt(unknown, 0),
        lambda: runs.claim_attempt(unknown, 1, worker),
        lambda: runs.append(unknown, 1, [], None),
        lambda: runs.change_state(unknown, 1, RunState.FAILED),
    ):
        with pytest.raises(RunNotFound, match=unknown):
            call()
    assert runs.heads([unknown]) == {}


def test_a_known_request_returns_its_run_in_its_present_state(runs, make_run):
    key = RequestKey(request_id="r", body_digest="d")
    first = runs.create(make_run(), key, 1)
    runs.begin_attempt(first.run_id, 0)
    again = runs.create(make_run(), key, 0)
    assert (again.run_id, again.state) == (first.run_id, RunState.STARTING)
    with pytest.raises(RequestIdReused, match="r came before"):
        runs.create(make_run(), RequestKey(request_id="r", body_digest="other"), 1)
    assert len(runs.list_page(RunFilter(), None, 10)) == 1


def test_one_request_one_run_however_many_threads(runs, make_run):
    key = RequestKey(request_id="r", body_digest="d")
    made = in_threads(20, lambda _: runs.create(make_run(), key, 100))
    assert len({run.run_id for run in made}) == 1
    assert len(runs.unfinished()) == 1


def test_one_request_one_run_however_many_processes(folder, database, runs):
    command = [sys.executable, "-c", CREATE, str(folder.database)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == len(runs.unfinished()) == 20


def test_the_queue_has_a_limit_that_running_runs_do_not_count_for(runs, make_run):
    runs.begin_attempt(runs.create(make_run(), None, 1).run_id, 0)
    runs.create(make_run(), None, 1)
    with pytest.raises(TooManyRuns, match="1 runs are waiting"):
        runs.create(make_run(), None, 1)
    made = in_threads(8, lambda _: runs.create(make_run(), None, 4))
    assert sum(isinstance(result, TooManyRuns) for result in made) == 5


def test_pages_follow_one_another_in_both_orders(runs, make_run):
    made = [runs.create(make_run(create_time_ns=time_ns), None, 100) for time_ns in (10, 30, 20, 20, 40)]
    ids = [run.run_id for run in sorted(made, key=lambda run: (run.create_time_ns, run.run_id))]
    for oldest_first in (True, False):
        wanted = RunFilter(oldest_first=oldest_first)
        after, seen = None, []
        while page := runs.list_page(wanted, after, 2):
            assert len(page) <= 2
            seen += [run.run_id for run in page]
            after = page[-1].place
        assert seen == (ids if oldest_first else ids[::-1])
    assert [run.run_id for run in runs.unfinished()] == [run.run_id for run in made]


def test_lists_are_filtered(runs, make_run):
    a = runs.create(make_run(model_name="a"), None, 9)
    b = runs.create(make_run(model_name="b"), None, 9)
    runs.request_cancel(b.run_id)
    assert [run.run_id for run in runs.list_page(RunFilter(model_name="a"), None, 9)] == [a.run_id]
    cancelled = RunFilter(states=(RunState.CANCELLED, RunState.FAILED))
    assert [run.run_id for run in runs.list_page(cancelled, None, 9)] == [b.run_id]
    assert [run.run_id for run in runs.unfinished()] == [a.run_id]


def test_an_attempt_begins_once(runs, make_run, worker):
    run = runs.create(make_run(), None, 9)
    started = [result for result in in_threads(6, lambda _: runs.begin_attempt(run.run_id, 0)) if result is not None]
    assert [(result.state, result.attempt, result.worker) for result in started] == [(RunState.STARTING, 1, None)]
    again = runs.begin_attempt(run.run_id, 1)
    assert (again.state, again.attempt) == (RunState.STARTING, 2)
    runs.claim_attempt(run.run_id, 2, worker)
    assert runs.begin_attempt(run.run_id, 2) is None
    changes = [record.payload for record in runs.records_after(run.run_id, 1, 9)]
    assert changes == [
        StateChange(state=RunState.STARTING, attempt=1),
        StateChange(state=RunState.STARTING, attempt=2),
        StateChange(state=RunState.RUNNING, attempt=2),
    ]


def test_an_attempt_is_claimed_by_one_worker(runs, make_run):
    run = runs.create(make_run(), None, 9)
    runs.begin_attempt(run.run_id, 0)
    with pytest.raises(AttemptFenced):
        runs.claim_attempt(run.run_id, 2, ProcessIdentity(pid=1, start_ticks=1, boot_id="b"))
    claims = in_threads(
        6, lambda i: runs.claim_attempt(run.run_id, 1, ProcessIdentity(pid=i, start_ticks=i, boot_id="b"))
    )
    (won,) = [claim for claim in claims if not isinstance(claim, Exception)]
    assert all(isinstance(claim, AttemptFenced) for claim in claims if claim is not won)
    stored = runs.get(run.run_id)
    assert stored == won
    assert (stored.state, claims[stored.worker.pid]) == (RunState.RUNNING, won)
    assert stored.start_time_ns is not None


def test_records_come_back_as_they_were(runs, running):
    run = running()
    progress = RunProgress(
        step=3,
        epoch=1,
        target_tokens=9,
        fraction=0.5,
        remaining_s=1.5,
        last_step=STEP,
        best_validation=VALIDATION,
        decays=(DECAY,),
    )
    ack = runs.append(run.run_id, 1, [STEP, VALIDATION, NOTE, DECAY], progress)
    assert (ack.last_sequence, ack.cancel_requested) == (7, False)
    payloads = [record.payload for record in runs.records_after(run.run_id, 3, 9)]
    assert repr(payloads) == repr([STEP, VALIDATION, NOTE, DECAY])  # NaN is not equal to itself
    assert repr(runs.get(run.run_id).progress) == repr(progress)
    assert [record.sequence for record in runs.records_after(run.run_id, 2, 2)] == [3, 4]
    assert runs.records_after(run.run_id, 7, 9) == []


def test_an_append_of_nothing_asks_for_the_ack(runs, running):
    run = running()
    assert runs.append(run.run_id, 1, [], None).last_sequence == 3
    runs.request_cancel(run.run_id)
    assert runs.append(run.run_id, 1, [], None).cancel_requested
    assert runs.append(run.run_id, 1, [NOTE], None).cancel_requested
    assert runs.append(run.run_id, 1, [], RunProgress(step=9)).last_sequence == 4
    assert runs.get(run.run_id).progress.step == 9


def test_state_changes_are_not_appended(runs, running):
    with pytest.raises(AssertionError):
        runs.append(running().run_id, 1, [StateChange(state=RunState.FAILED, attempt=1)], None)


def test_sequences_have_no_gap_whoever_writes(runs, running):
    run = running()
    acks = in_threads(8, lambda i: [runs.append(run.run_id, 1, [NOTE] * (i + 1), None).last_sequence for _ in range(5)])
    total = 3 + 5 * sum(range(1, 9))
    assert sequences(runs, run.run_id) == list(range(1, total + 1))
    assert len({ack for one in acks for ack in one}) == 40
    assert runs.heads([run.run_id]) == {run.run_id: RunHead(state=RunState.RUNNING, last_sequence=total)}


def test_a_head_never_runs_ahead_of_its_records(runs, running):
    run = running()
    done = threading.Event()

    def write():
        for _ in range(30):
            runs.append(run.run_id, 1, [NOTE] * 5, None)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        head = runs.heads([run.run_id])[run.run_id].last_sequence
        assert len(runs.records_after(run.run_id, 0, head)) == head
    writer.join()


def test_killed_writer_leaves_an_unbroken_series(folder, runs, running):
    run = running()
    acknowledged = 3
    for acks in (3, 12):
        command = [sys.executable, "-c", APPEND, str(folder.database), run.run_id]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(acks):
                acknowledged = int(writer.stdout.readline())
            writer.kill()
            rest = [int(line) for line in writer.stdout.read().split("\n")[:-1]]
            acknowledged = max([acknowledged, *rest])
        found = sequences(runs, run.run_id)
        assert found == list(range(1, len(found) + 1))
        assert len(found) == runs.get(run.run_id).last_sequence
        assert acknowledged <= len(found) <= acknowledged + 7
    assert runs.append(run.run_id, 1, [NOTE], None).last_sequence == len(found) + 1


def test_an_old_attempt_writes_nothing(runs, make_run, worker):
    run = runs.create(make_run(), None, 9)
    runs.begin_attempt(run.run_id, 0)
    runs.begin_attempt(run.run_id, 1)
    runs.claim_attempt(run.run_id, 2, worker)
    before = runs.get(run.run_id)
    for call in (
        lambda: runs.append(run.run_id, 1, [NOTE], None),
        lambda: runs.append(run.run_id, 1, [], None),
        lambda: runs.append(run.run_id, 1, [], RunProgress(step=9)),
        lambda: runs.change_state(run.run_id, 1, RunState.FAILED),
        lambda: runs.claim_attempt(run.run_id, 1, worker),
    ):
        with pytest.raises(AttemptFenced, match="its attempt 2"):
            call()
    assert runs.get(run.run_id) == before
    assert len(sequences(runs, run.run_id)) == before.last_sequence


def test_an_ended_run_takes_nothing_more(runs, running):
    run = running()
    runs.request_cancel(run.run_id)
    failure = RunFailure(reason=FailureReason.WORKER_DIED, message="it died", log_tail="last words\n")
    failed = runs.change_state(run.run_id, 1, RunState.FAILED, "it died", failure)
    assert (failed.state, failed.failure, failed.cancel_requested) == (RunState.FAILED, failure, False)
    assert failed.end_time_ns >= failed.start_time_ns
    last = runs.records_after(run.run_id, failed.last_sequence - 1, 9)[0].payload
    assert last == StateChange(state=RunState.FAILED, attempt=1, message="it died")
    with pytest.raises(AttemptFenced):
        runs.append(run.run_id, 1, [NOTE], None)
    with pytest.raises(AttemptFenced):
        runs.change_state(run.run_id, 1, RunState.CANCELLED)
    with pytest.raises(IllegalTransition, match="is failed and cannot become cancelled"):
        runs.request_cancel(run.run_id)
    assert runs.get(run.run_id) == failed


def test_only_legal_changes(runs, running):
    run = running()
    with pytest.raises(IllegalTransition, match="running and cannot become succeeded"):
        runs.change_state(run.run_id, 1, RunState.SUCCEEDED)
    assert runs.change_state(run.run_id, 1, RunState.EXPORTING).end_time_ns is None


def test_cancelling(runs, make_run, running):
    queued = runs.create(make_run(), None, 9)
    cancelled = runs.request_cancel(queued.run_id)
    assert (cancelled.state, cancelled.cancel_requested) == (RunState.CANCELLED, False)
    assert cancelled.end_time_ns is not None
    assert len(sequences(runs, queued.run_id)) == cancelled.last_sequence == 2
    assert runs.request_cancel(queued.run_id) == cancelled
    assert runs.begin_attempt(queued.run_id, 0) is None
    active = running()
    asked = runs.request_cancel(active.run_id)
    assert (asked.state, asked.cancel_requested) == (RunState.RUNNING, True)
    ended = runs.change_state(active.run_id, 1, RunState.CANCELLED)
    assert not ended.cancel_requested


def test_a_full_disk_is_told_and_loses_nothing(runs, running, fill_disk, free_disk):
    run = running()
    fill_disk()
    large = [RunEvent(level=EventLevel.INFO, code="LARGE", message="x" * 100_000)]
    with pytest.raises(DiskFull):
        runs.append(run.run_id, 1, large, None)
    assert runs.get(run.run_id) == run
    free_disk()
    assert runs.append(run.run_id, 1, large, None).last_sequence == 4
    assert sequences(runs, run.run_id) == [1, 2, 3, 4]


@pytest.mark.parametrize(("has_room", "error"), [(has_room, StoreUnavailable), (lambda folder: False, DiskFull)])
def test_an_io_error_without_any_room_is_a_full_disk(folder, runs, has_room, error):
    engine = create_sqlite_engine(folder.database, 1.0, has_room)

    def fail(cursor, statement, parameters, context):
        failed = sqlite3.OperationalError("disk I/O error")
        failed.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        raise failed

    event.listen(engine, "do_execute", fail)
    with pytest.raises(error):
        SqlRunStore(engine).unfinished()


@pytest.mark.parametrize(
    ("payloads", "state", "restarts"),
    [
        ([], RunState.RUNNING, 3),
        ([NOTE, VALIDATION], RunState.RUNNING, 3),
        ([NOTE, STEP, NOTE], RunState.RUNNING, 0),
        ([STEP], RunState.EXPORTING, 0),
        ([NOTE], RunState.EXPORTING, 3),
    ],
)
def test_an_attempt_that_got_further_is_forgiven_its_end(runs, running, payloads, state, restarts):
    run = running(restarts=2)
    if payloads:
        runs.append(run.run_id, 1, payloads, None)
    if state is RunState.EXPORTING:
        runs.change_state(run.run_id, 1, state)
    handover = Handover(state=RunState.QUEUED, message="", restarts=3, forgiven=True)
    assert runs.give_up_attempt(run.run_id, 1, handover).restarts == restarts


def test_the_steps_of_an_earlier_attempt_forgive_nothing(runs, running, worker):
    run = running()
    runs.append(run.run_id, 1, [STEP], None)
    handover = Handover(state=RunState.QUEUED, message="", restarts=1, forgiven=True)
    runs.give_up_attempt(run.run_id, 1, handover)
    runs.begin_attempt(run.run_id, 1)
    assert runs.give_up_attempt(run.run_id, 2, handover).restarts == 1


def test_a_waiting_run_can_fail(runs, make_run, running):
    failure = RunFailure(reason=FailureReason.WORKER_DIED, message="too many", log_tail="last words\n")
    waiting = runs.create(make_run(), None, 9)
    with pytest.raises(AttemptFenced):
        runs.fail_waiting(waiting.run_id, 1, failure)
    failed = runs.fail_waiting(waiting.run_id, 0, failure)
    assert (failed.state, failed.failure) == (RunState.FAILED, failure)
    assert runs.records_after(waiting.run_id, 1, 9)[0].payload.message == "too many"
    active = running()
    with pytest.raises(AttemptFenced):
        runs.fail_waiting(active.run_id, 1, failure)
    assert runs.get(active.run_id) == active


def ended_run(runs, running, records=12_000):
    run = running()
    runs.append(run.run_id, 1, [NOTE] * (records - 4), None)
    return runs.change_state(run.run_id, 1, RunState.FAILED)


def count_rows(database, run_id):
    with database.connect() as connection:
        return [
            connection.execute(select(func.count()).select_from(table).where(table.c.run_id == run_id)).scalar_one()
            for table in (tables.runs, tables.records)
        ]


def test_only_a_run_that_has_ended_is_deleted(runs, running):
    run = running()
    with pytest.raises(RunNotFinished):
        runs.delete(run.run_id)
    assert runs.get(run.run_id) == run


def test_a_deletion_is_many_short_transactions_and_its_readers_find_no_gap(folder, database, runs, running):
    run, other = ended_run(runs, running), running()
    reader = open_database(folder.database)
    seen = []

    def look(_connection):
        found = sequences(SqlRunStore(reader), run.run_id)
        assert found == list(range(1, len(found) + 1))
        seen.append(len(found))

    event.listen(database, "commit", look)
    runs.delete(run.run_id)
    event.remove(database, "commit", look)
    reader.dispose()
    assert seen == [12_000, 12_000, 10_000, 5_000, 0], "before each commit"
    assert count_rows(database, run.run_id) == [0, 0]
    assert sequences(runs, other.run_id) == [1, 2, 3]


def test_a_clock_that_is_set_back_lets_no_later_run_go_first(runs, make_run):
    first = runs.create(make_run(create_time_ns=2 * 10**18), None, 9)
    later = runs.create(make_run(create_time_ns=10**18), None, 9)
    assert [run.run_id for run in runs.unfinished()] == [first.run_id, later.run_id]


@pytest.mark.parametrize("commit", [1, 3])
def test_interrupted_deletion_is_finished_at_the_next_start(folder, database, runs, running, commit):
    run, other = ended_run(runs, running), running()
    database.dispose()  # no connection may pass through a fork

    def delete_and_die():
        mine, commits = open_database(folder.database), itertools.count()
        event.listen(mine, "commit", lambda _: next(commits) == commit and os._exit(CRASHED))
        SqlRunStore(mine).delete(run.run_id)

    assert in_child(delete_and_die) == CRASHED
    assert count_rows(database, run.run_id)[0] == 1
    for call in (runs.get, runs.delete, runs.request_cancel):
        with pytest.raises(RunNotFound):
            call(run.run_id)
    assert runs.heads([run.run_id]) == {}
    assert [found.run_id for found in runs.list_page(RunFilter(), None, 9)] == [other.run_id]
    runs.recover()
    assert count_rows(database, run.run_id) == [0, 0]
    assert runs.get(other.run_id) == other


def test_the_request_of_a_deleted_run_is_forgotten(runs, make_run):
    key = RequestKey(request_id="r", body_digest="d")
    run = runs.create(make_run(), key, 1)
    runs.request_cancel(run.run_id)
    runs.delete(run.run_id)
    assert runs.create(make_run(), key, 1).run_id != run.run_id


def test_a_row_that_cannot_be_read_is_told_once(folder, database, runs, make_run, caplog):
    run = runs.create(make_run(), None, 1)
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE runs SET recipe = '{'")
        connection.exec_driver_sql("UPDATE records SET payload = '{'")
    found = []
    looking = open_database(folder.database, on_unreadable=found.append)
    for _ in range(2):
        [row] = SqlRunStore(looking).unfinished()
        assert (row.name, row.table) == (run.run_id, "runs")
        SqlRunStore(looking).records_after(run.run_id, 0, 9)
    looking.dispose()
    assert found == ["runs", "records"]
    assert [record.levelname for record in caplog.records if run.run_id in record.message] == ["ERROR", "ERROR"]
