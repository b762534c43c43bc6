"""The load test: its arrivals, its search, and what it makes of what a client saw."""

import asyncio
import itertools

import grpc
import pytest

from bench.load import mixed_sentences
from bench.load_client import Window, arrivals, drive
from bench.load_search import LATENCY_AT_MOST_MS, Probe, RateSearch, SearchConfig, print_probes
from ferryman.v1 import translation_pb2, translation_pb2_grpc

CONFIG = SearchConfig(first_rate=20.0, growth=2.0, tolerance=1.05)
WINDOW = Window(rate=200.0, warm_up_s=1.0, seconds=20.0, seed=7)


def probe(rate, p95_ms=10.0, failures=None, answered=100):
    return Probe(
        server="server",
        rate=rate,
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
def test_the_highest_held_rate_is_found_within_the_tolerance(limit):
    search = searched(limit)
    assert search.held <= limit < search.held * CONFIG.tolerance


def test_a_server_that_holds_nothing_ends_the_search():
    search = searched(0.0)
    assert search.held == 0.0
    assert min(found.rate for found in search.probes) >= CONFIG.least_rate


def test_a_rate_is_tried_again_before_it_counts_as_missed():
    search = RateSearch(CONFIG)
    search.note(probe(20.0, p95_ms=1000.0))
    assert search.next_rate() == 20.0
    search.note(probe(20.0))
    assert (search.held, search.next_rate()) == (20.0, 40.0)


def test_failures_and_silence_are_not_held():
    assert probe(1.0, p95_ms=LATENCY_AT_MOST_MS - 1).is_held
    assert not probe(1.0, p95_ms=LATENCY_AT_MOST_MS).is_held
    assert not probe(1.0, failures={"UNAVAILABLE": 1}).is_held
    assert not probe(1.0, answered=0, p95_ms=float("inf")).is_held
    assert "p95_ms" not in probe(1.0, answered=0, p95_ms=float("inf")).as_dict()


def test_a_table_shows_what_was_missed(capsys):
    print_probes([probe(1.0), probe(2.0, failures={"UNAVAILABLE": 3})])
    held, missed = capsys.readouterr().out.splitlines()[-2:]
    assert held.endswith("held") and missed.endswith("missed, 3 UNAVAILABLE")


def test_arrivals_are_a_poisson_process_that_a_seed_fixes():
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


def test_captions_and_news_are_mixed_half_and_half(tmp_path):
    (tmp_path / "test.en").write_text("a news sentence\n" + "x" * 301 + "\n\nanother one\n")
    assert mixed_sentences(["a caption", "a second", "a third"], tmp_path) == [
        "a caption",
        "a second",
        "a news sentence",
        "another one",
    ]


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


async def driven(seconds, window, sentences):
    server = grpc.aio.server()
    translation_pb2_grpc.add_TranslationServiceServicer_to_server(SlowServicer(seconds), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        return await drive(f"127.0.0.1:{port}", "model", window, sentences)
    finally:
        await server.stop(None)


async def test_a_call_counts_from_when_it_was_to_begin():
    """A server of 20 calls a second that gets 60: who comes last has waited for all before, though it was sent late."""
    seen = await driven(0.05, Window(rate=60.0, warm_up_s=0.0, seconds=0.5, seed=1), ["a"])
    assert max(seen.latencies_ms) > 50 * len(seen.latencies_ms) - 600
    assert seen.as_dict()["means_ms"]["queue"] == 7.0
    assert not seen.failures


async def test_failures_are_counted_and_the_warm_up_is_not():
    seen = await driven(0.0, Window(rate=200.0, warm_up_s=0.25, seconds=0.25, seed=1, several_share=0.0), ["a", "bad"])
    assert seen.failures["INVALID_ARGUMENT"] > 20
    assert 5 < len(seen.latencies_ms) < 50
