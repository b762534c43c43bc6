"""The neighbour benchmark: what it makes of its turns, and all of it in miniature."""

import json
import os
import statistics
import time
from pathlib import Path

import pytest

from bench.load import neighbour
from bench.load.neighbour import (
    BOTH,
    MODES,
    SERVING,
    SERVING_BUSY,
    SERVING_LIGHT,
    TRAINING,
    TRAINING_BUSY,
    Effort,
    Task,
    Turn,
    parts_of,
)
from bench.load.neighbour_training import busy_process
from bench.shared.made_up import made_up_text
from ferryman_service.config.service_config import ServiceConfig
from ferryman_service.launch.process import is_alive, process_identity, what_follows


def turn(mode, number, p95_ms=10.0, failures=0):
    return Turn(
        mode=mode, begin_s=10.0 * number, end_s=10.0 * number + 9, latencies_ms=[p95_ms] * 20, failures=failures
    )


def updates(*seconds):
    """Return updates that fill the turns, one turn after the other."""
    return [
        (10.0 * number + taken_s * place, 10.0 * number + taken_s * (place + 1))
        for number, taken_s in enumerate(seconds)
        for place in range(int(9 / taken_s))
    ]


def test_parts_compare_medians_of_turns():
    modes = [TRAINING, TRAINING_BUSY, BOTH] * 3
    turns = [turn(mode, number, p95_ms=15.0) for number, mode in enumerate(modes)]
    turns += [turn(SERVING, 9 + number, p95_ms=10.0) for number in range(3)]
    turns += [turn(SERVING_LIGHT, 12 + number, p95_ms=8.0) for number in range(3)]
    turns += [turn(SERVING_BUSY, 15, 30.0), turn(SERVING_BUSY, 16, 12.0), turn(SERVING_BUSY, 17, 11.0)]
    parts = parts_of(turns, updates(0.2, 0.3, 0.25, 0.2, 0.34, 0.5, 9.0, 0.3, 0.4))
    assert [(part.name, round(part.value, 3), part.ok) for part in parts] == [
        ("training beside a busy process", 1.5, True),
        ("translating beside a busy process", 1.5, True),
        ("translating while training", 1.5, True),
        ("training while translating", 0.5, True),
    ]


@pytest.mark.parametrize(("busy_s", "ok"), [(0.32, True), (0.33, False)])
def test_training_beside_a_busy_process_takes_at_most_sixteen_tenths(busy_s, ok):
    turns = [turn(mode, number) for number, mode in enumerate(MODES)]
    parts = parts_of(turns, updates(0.2, busy_s, 9.0, 0.3))
    assert parts[0].ok is ok
    assert parts[0].as_dict()["ok"] is ok


def test_failed_call_misses_condition():
    turns = [turn(mode, number, failures=mode is SERVING_BUSY) for number, mode in enumerate(MODES)]
    parts = parts_of(turns, updates(0.2, 0.2, 9.0, 0.2))
    assert [part.ok for part in parts] == [True, False, True, True]
    assert parts[1].as_dict()["busy"] == [None]


@pytest.mark.parametrize(("quiet", "missed"), [(SERVING, 2), (SERVING_LIGHT, 1)])
def test_failed_calls_on_quiet_service_miss_condition(quiet, missed):
    turns = [turn(mode, number, failures=mode is quiet) for number, mode in enumerate(MODES)]
    assert [part.ok for part in parts_of(turns, updates(0.2, 0.2, 9.0, 0.2))] == [index != missed for index in range(4)]


def test_partial_updates_of_turn_do_not_count():
    seen = turn(TRAINING, 1).update_s([(9.0, 11.0), (11.0, 12.0), (12.0, 14.0), (18.0, 20.0)])
    assert seen == pytest.approx(1.5)


def test_turn_without_updates_misses_condition():
    turns = [turn(mode, number) for number, mode in enumerate(MODES)]
    assert [part.ok for part in parts_of(turns, updates(0.2))] == [False, True, True, False]


def test_busy_process_computes_until_the_block_ends():
    with busy_process() as pid:
        identity = process_identity(pid)
        deadline_s = time.monotonic() + 60
        while processor_s(pid) < 0.2:
            assert time.monotonic() < deadline_s, "it does not compute"
            time.sleep(0.05)
        assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)
    assert not is_alive(identity)


def processor_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_made_up_text_is_deterministic():
    text = made_up_text(50)
    assert text == made_up_text(50)
    assert [len(line.split()) for line in text.source] == [len(line.split()) for line in text.target]
    assert 8 < statistics.mean(len(line.split()) for line in text.source) < 16


@pytest.mark.full
def test_all_modes_run_and_no_process_is_left(tmp_path):
    task, effort = Task(pairs=2_000, vocabulary_size=1_000), Effort(rounds=1, turn_s=2.0, capacity_s=1.0)
    with neighbour.scene(tmp_path, task, effort) as scene:
        shipped = scene.run.shipped_with()
        workers = [process_identity(pid) for pid in scene.run.workers()]
        for mode in MODES:
            scene.turn(mode)
        parts = parts_of(scene.turns, scene.run.updates())
    assert shipped["worker_nice"] == os.getpriority(os.PRIO_PROCESS, 0) + ServiceConfig().worker_nice
    # On a machine that does other work too, a short turn may end before an update does: its time is infinite then.
    assert [len(values) for part in parts for values in (part.quiet, part.busy)] == [1] * 8
    assert len(workers) == 1 and not is_alive(workers[0])
    assert not what_follows(("--data-dir", str((tmp_path / "data").resolve())))
    result = neighbour.result_of(parts, scene.capacity, shipped, quick=True)
    assert result.value == sum(part.ok for part in parts) / 4
    json.dumps(result.details)
