"""What all engines together have done and hold."""

import threading

from ferryman_service.translation.counts import ROW_BOUNDS, EngineCounts
from ferryman_service.translation.scheduler import Scheduler, SchedulerConfig
from tests.fakes.scripted_decoder import BYTES_PER_ROW, Results, ScriptedDecoder, ScriptedText, work


def test_steps_are_counted_by_their_rows():
    counts = EngineCounts()
    for rows in (1, 2, 3, 5, 1280, 1281):
        counts.step(rows)
    steps, rows = counts.steps_by_rows()
    assert len(steps) == len(ROW_BOUNDS) + 1
    assert {bound: count for bound, count in zip((*ROW_BOUNDS, "more"), steps, strict=True) if count} == {
        1: 1,
        2: 1,
        5: 2,
        1280: 1,
        "more": 1,
    }
    assert rows == 1 + 2 + 3 + 5 + 1280 + 1281


def test_no_step_is_lost_among_threads():
    counts = EngineCounts()
    threads = [threading.Thread(target=lambda: [counts.step(7) for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps, rows = counts.steps_by_rows()
    assert (sum(steps), rows) == (20_000, 140_000)


def test_engines_count_their_steps_and_caches_and_leave_the_steps_behind():
    counts, decoder, results = EngineCounts(), ScriptedDecoder(), Results()
    first, second = (Scheduler(decoder, ScriptedText(), SchedulerConfig(), counts) for _ in range(2))
    first.submit([work(6, results.of("a"))])
    results.wait(1)
    second.submit([work(3, results.of("b"))])
    results.wait(2)
    steps, rows = counts.steps_by_rows()
    assert (sum(steps), rows) == (9, 9)
    decoder.gate.clear()
    entered = threading.Event()
    decoder.on_admit = lambda sources: entered.set()
    first.submit([work(2, results.of("c"))])
    assert entered.wait(10)
    wait_until(lambda: counts.cache_bytes() == 3 * BYTES_PER_ROW)
    decoder.gate.set()
    first.close()
    second.close()
    assert (counts.cache_bytes(), counts.waiting()) == (0, {})
    assert sum(counts.steps_by_rows()[0]) == 11


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not happen")
