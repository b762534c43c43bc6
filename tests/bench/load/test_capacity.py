"""The load test: its arrivals, its search, and what it makes of what a client saw."""

import asyncio
import itertools

import grpc
import pytest

from bench.load import capacity as load
from bench.load.alone import AloneTimes, alone_times, drift_warning
from bench.load.capacity import QUICK, Measurement, measure_servers, result_of
from bench.load.client import Window, arrivals, drive, drive_one_at_a_time
from bench.load.rate_search import Probe, RateSearch, SearchConfig, print_probes
from bench.load.setup import OURS, PEER, mixed_sentences
from bench.shared.server_program import ServerFailed
from ferryman.v1 import translation_pb2, translation_pb2_grpc

CONFIG = SearchConfig(first_rate=20.0, growth=2.0, tolerance=1.05, least_rate=0.5)
LIMIT_MS = 250.0
WINDOW = Window(rate=200.0, warm_up_s=1.0, seconds=20.0, seed=7)


def probe(rate, p95_ms=10.0, failures=None, answered=100):
    return Probe(
        server="server",
        rate=rate,
        limit_ms=LIMIT_MS,
        answered=answered,
        failures=failures or {},
        p50_ms=5.0,
        p95_ms=p95_ms,
        p99_ms=p95_ms,
        means_ms={},
        worst_late_ms=0.0,
    )


def searched(limit, config=CONFIG):
    search = RateSearch(config)
    while (rate := search.next_rate()) is not None:
        search.note(probe(rate, p95_ms=10.0 if rate <= limit else 1000.0))
    return search


@pytest.mark.parametrize("limit", [3.0, 20.0, 57.0, 640.0, 1234.5])
def test_highest_held_rate_is_found_within_tolerance(limit):
    search = searched(limit)
    assert search.held <= limit < search.held * CONFIG.tolerance


def test_server_that_holds_no_rate_ends_search():
    search = searched(0.0)
    assert search.held == 0.0
    assert min(found.rate for found in search.probes) >= CONFIG.least_rate


def test_missed_rate_is_tried_twice():
    search = RateSearch(CONFIG)
    search.note(probe(20.0, p95_ms=1000.0))
    assert search.next_rate() == 20.0
    search.note(probe(20.0))
    assert (search.held, search.next_rate()) == (20.0, 40.0)


def test_failures_and_silence_miss_rate():
    assert probe(1.0, p95_ms=LIMIT_MS - 1).is_held
    assert not probe(1.0, p95_ms=LIMIT_MS).is_held
    assert not probe(1.0, failures={"UNAVAILABLE": 1}).is_held
    assert not probe(1.0, answered=0, p95_ms=float("inf")).is_held
    assert "p95_ms" not in probe(1.0, answered=0, p95_ms=float("inf")).as_dict()


def test_table_shows_missed_rates(capsys):
    print_probes([probe(1.0), probe(2.0, failures={"UNAVAILABLE": 3})])
    held, missed = capsys.readouterr().out.splitlines()[-2:]
    assert held.endswith("held") and missed.endswith("missed, 3 UNAVAILABLE")


def test_arrivals_are_poisson_process_of_seed():
    calls = list(arrivals(WINDOW, ["a", "b"]))
    assert calls == list(arrivals(WINDOW, ["a", "b"]))
    assert len(calls) == pytest.approx(200 * 21, rel=0.05)
    gaps = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(calls)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.15)  # as of exponential gaps
    several = [call for call in calls if len(call.sentences) > 1]
    assert len(several) / len(calls) == pytest.approx(WINDOW.several_share, abs=0.03)
    assert max(len(call.sentences) for call in calls) == 8


def test_same_seed_gives_same_sentences_at_every_rate():
    slow, fast = (arrivals(Window(rate=rate, warm_up_s=0, seconds=20 / rate, seed=3), "abc") for rate in (1.0, 9.0))
    assert [call.sentences for call in slow] == [call.sentences for call in fast]


def test_captions_and_news_are_mixed_half_and_half():
    assert mixed_sentences(["a caption", "a second", "a third"], ["some news", "x" * 301, "", "more news"]) == [
        "a caption",
        "a second",
        "some news",
        "more news",
    ]


def test_captions_are_used_alone_without_news():
    assert mixed_sentences(["a caption", "a second"], []) == ["a caption", "a second"]
    assert mixed_sentences(["a caption"], ["x" * 301]) == ["a caption"]


class SlowServicer(translation_pb2_grpc.TranslationServiceServicer):
    """Answers one call at a time, each after so many seconds; refuses calls that hold the word "bad"."""

    def __init__(self, seconds):
        self._seconds = seconds
        self._lock = asyncio.Lock()

    async def Translate(self, request, context):
        if "bad" in request.sentences:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad")
        async with self._lock:
            await asyncio.sleep(self._seconds)
        response = translation_pb2.TranslateResponse(
            translations=[translation_pb2.Translation()] * len(request.sentences)
        )
        response.timings.queue.FromMilliseconds(7)
        return response


async def driven(seconds, window, sentences, drive=drive, **arguments):
    server = grpc.aio.server()
    translation_pb2_grpc.add_TranslationServiceServicer_to_server(SlowServicer(seconds), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        return await drive(f"127.0.0.1:{port}", "model", window, sentences, **arguments)
    finally:
        await server.stop(None)


async def test_latency_counts_from_scheduled_begin():
    """A server of 20 calls a second that gets 60: who comes last has waited for all before, though it was sent late."""
    seen = await driven(0.05, Window(rate=60.0, warm_up_s=0.0, seconds=0.5, seed=1), ["a"])
    assert max(seen.latencies_ms) > 50 * len(seen.latencies_ms) - 600
    assert seen.as_dict()["means_ms"]["queue"] == 7.0
    assert not seen.failures


async def test_failures_count_and_warm_up_does_not():
    seen = await driven(0.0, Window(rate=200.0, warm_up_s=0.25, seconds=0.25, seed=1, several_share=0.0), ["a", "bad"])
    assert seen.failures["INVALID_ARGUMENT"] > 20
    assert 5 < len(seen.latencies_ms) < 50


async def test_calls_one_at_a_time_do_not_wait_for_each_other():
    window = Window(rate=1000.0, warm_up_s=0.0, seconds=0.0, seed=1)
    seen = await driven(0.02, window, ["a"], drive_one_at_a_time, warm_up=2, calls=10)
    assert len(seen.latencies_ms) == 10
    assert 20 <= sorted(seen.latencies_ms)[5] < 40
    assert seen.as_dict()["means_ms"]["queue"] == 7.0


async def test_single_failed_call_is_counted():
    window = Window(rate=1.0, warm_up_s=0.0, seconds=0.0, seed=1)
    seen = await driven(0.0, window, ["bad"], drive_one_at_a_time, warm_up=0, calls=3)
    assert (seen.failures["INVALID_ARGUMENT"], seen.latencies_ms) == (3, [])


class FakeServer:
    """A server of a machine: the milliseconds of a call alone, and the highest rate that it holds."""

    def __init__(self, name, alone_ms, holds):
        self.name, self.address = name, name
        self.alone_ms, self.holds = alone_ms, holds


class FakeClient:
    """Asks fake servers, and keeps what it was asked for."""

    def __init__(self, *servers):
        self._servers = {server.address: server for server in servers}
        self.asked = []

    def ask(self, command, *, address, **arguments):
        self.asked.append((command, address, arguments))
        server, failures = self._servers[address], {}
        if command == "one_at_a_time":
            # 94 of 100 calls take half of the time.
            calls = arguments["calls"]
            latencies_ms = [server.alone_ms / 2] * int(0.94 * calls) + [server.alone_ms] * (calls - int(0.94 * calls))
            failures = {} if server.alone_ms else {"UNAVAILABLE": calls}
        else:
            latencies_ms = [server.alone_ms if arguments["rate"] <= server.holds else 100 * server.alone_ms]
        return {"latencies_ms": latencies_ms, "failures": failures, "means_ms": {}, "worst_late_ms": 0.0}


def measured_with(peer_ms, peer_holds, *, ours_holds=30.0):
    servers = FakeServer(OURS, peer_ms / 2, ours_holds), FakeServer(PEER, peer_ms, peer_holds)
    client = FakeClient(*servers)
    return measure_servers(client, servers, QUICK), client


@pytest.mark.parametrize("machine_ms", [10.0, 1000.0])
def test_limit_is_twice_p95_of_single_peer_calls(machine_ms):
    measured, client = measured_with(machine_ms, 1200 / machine_ms, ours_holds=2400 / machine_ms)
    assert measured.limit_ms == 2 * machine_ms
    assert {found.limit_ms for search in measured.searches.values() for found in search.probes} == {2 * machine_ms}
    assert measured.searches[OURS].held / measured.searches[PEER].held == pytest.approx(2.0, rel=QUICK.tolerance - 1)
    commands = [command for command, _, _ in client.asked]
    assert commands[:2] == commands[-2:] == ["one_at_a_time"] * 2
    windows = [arguments for command, _, arguments in client.asked if command == "window"]
    assert all(window["seconds"] * window["rate"] >= QUICK.calls for window in windows)
    assert all(window["timeout_s"] * 1000 >= 10 * measured.limit_ms for window in windows)


def test_peer_that_holds_no_rate_invalidates_benchmark(capsys):
    measured, _ = measured_with(100.0, 0.0)
    found = result_of(measured, load.parse([]))
    assert (found.value, found.ok, found.exit_status) == (None, False, 3)
    assert found.invalid_because.startswith("the peer holds no rate: at 1.17 requests/s")


def test_service_that_holds_no_rate_misses_target():
    measured, _ = measured_with(100.0, 10.0, ours_holds=0.0)
    found = result_of(measured, load.parse([]))
    assert (found.value, found.exit_status) == (0.0, 1)


def test_result_explains_limit():
    measured, _ = measured_with(100.0, 10.0)
    found = result_of(measured, load.parse(["--quick"]))
    assert (found.bench, found.ok, found.details["limit_ms"], found.details["drift"]) == (
        "load-quick",
        True,
        200.0,
        1.0,
    )
    assert found.details["one_call_in_flight"]["before"][PEER] == {"mean_ms": 53.33, "p50_ms": 50.0, "p95_ms": 100.0}
    assert set(found.details["one_call_in_flight"]["after"]) == {OURS, PEER}


def test_slower_machine_is_reported(capsys):
    fast, slow = (AloneTimes(mean_ms=ms, p50_ms=ms, p95_ms=ms) for ms in (10.0, 20.0))
    search = RateSearch(CONFIG)
    search.note(probe(20.0))
    measured = Measurement(
        searches={OURS: search, PEER: search}, limit_ms=20.0, before={PEER: fast}, after={PEER: slow}
    )
    assert result_of(measured, load.parse([])).details["drift"] == 2.0
    assert "2.00 times" in capsys.readouterr().err
    assert drift_warning(1.2) is None and drift_warning(0.5) is not None


def test_failure_of_single_call_ends_benchmark():
    server = FakeServer(PEER, 0.0, 0.0)
    with pytest.raises(ServerFailed, match="fails with one call in flight"):
        alone_times(FakeClient(server), server, "model", calls=5, seed=1)
