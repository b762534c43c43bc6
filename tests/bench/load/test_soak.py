"""The soak's account: what is lost, doubled, wrong or slower in the end is seen."""

import asyncio
import json

import grpc
import pytest

from bench.load import soak as load_soak
from bench.load.alone import AloneTimes
from bench.load.setup import OURS
from bench.load.soak_client import SoakPlan, _soak
from ferryman.v1 import translation_pb2, translation_pb2_grpc

PLAN = SoakPlan(model="model", rate=150.0, stream_rate=150.0, seconds=0.4, seed=3)
SENTENCES = [f"sentence {number}" for number in range(30)]
SEEN = dict.fromkeys((*load_soak.FAULTS, *load_soak.COUNTS), 0) | {
    "failures": {},
    "latencies": [(1.0, 5.0), (9.0, 5.0)],
}


def translation(text):
    return translation_pb2.Translation(hypotheses=[translation_pb2.Hypothesis(text=text)])


class UpperServicer(translation_pb2_grpc.TranslationServiceServicer):
    """Translates into capitals, with the faults that a test wants."""

    def __init__(self, *, wrong_after=None, doubled=False, drops=False, fails=False):
        self._wrong_after = wrong_after
        self._doubled, self._drops, self._fails = doubled, drops, fails
        self._calls = 0

    async def Translate(self, request, context):
        self._calls += 1
        if self._fails and self._calls > 2 * len(SENTENCES):
            await context.abort(grpc.StatusCode.INTERNAL, "a bug")
        await asyncio.sleep(0.001)
        is_wrong = self._wrong_after is not None and self._calls > self._wrong_after
        texts = ["" if is_wrong else sentence.upper() for sentence in request.sentences]
        return translation_pb2.TranslateResponse(translations=map(translation, texts))

    async def StreamTranslate(self, request_iterator, context):
        async for request in request_iterator:
            for item in request.sentences.sentences:
                if self._drops and item.id == "1":
                    continue
                answer = translation_pb2.StreamTranslation(id=item.id, translation=translation(item.sentence.upper()))
                for _ in range(2 if self._doubled else 1):
                    yield translation_pb2.StreamTranslateResponse(translations=[answer])


async def soaked(**faults):
    server = grpc.aio.server()
    translation_pb2_grpc.add_TranslationServiceServicer_to_server(UpperServicer(**faults), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        return (await _soak(f"127.0.0.1:{port}", SENTENCES, PLAN)).as_dict()
    finally:
        await server.stop(None)


async def test_sound_server_has_no_faults():
    seen = await soaked()
    assert [seen[name] for name in load_soak.FAULTS] == [0, 0, 0, 0]
    assert seen["answered"] > 30 and seen["streamed"] > 30
    assert len(seen["latencies"]) <= seen["answered"]
    assert set(load_soak.COUNTS) <= set(seen)


@pytest.mark.parametrize(
    ("faults", "name"),
    [
        ({"wrong_after": len(SENTENCES)}, "wrong"),
        ({"doubled": True}, "doubled"),
        ({"drops": True}, "lost"),
        ({"fails": True}, "failed"),
    ],
)
async def test_fault_is_counted(faults, name):
    assert (await soaked(**faults))[name] > 0


def test_memory_growth_counts_after_warm_up():
    assert load_soak.memory_growth_percent([10, 100, 100, 100, 105]) == 5.0
    assert load_soak.memory_growth_percent([100] * 5 + [120] * 5) == 20.0
    assert load_soak.memory_growth_percent([]) == 0.0


def test_last_third_is_compared_with_first():
    steady = [(float(second), 10.0) for second in range(90)]
    slower = [(at_s, 10.0 if at_s < 60 else 20.0) for at_s, _ in steady]
    assert load_soak.p99_row(steady).ok
    assert not load_soak.p99_row(slower).ok


@pytest.mark.parametrize("change", [{"lost": 1}, {"wrong": 1}, {"latencies": [(1.0, 5.0), (9.0, 50.0)]}])
def test_every_missed_condition_fails_soak(change):
    assert load_soak.result_of(SEEN, [100.0] * 10, rate=1.0, minutes=1.0).ok
    assert not load_soak.result_of(SEEN | change, [100.0] * 10, rate=1.0, minutes=1.0).ok


def test_soak_rate_scales_with_speed_of_machine(tmp_path, monkeypatch):
    """The last run held four times as many calls as with one in flight, on a machine that was twice as fast."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench/results").mkdir(parents=True)
    line = {"requests_per_s": {OURS: 80.0}, "one_call_in_flight": {"before": {OURS: {"mean_ms": 50.0}}}}
    (tmp_path / "bench/results/load.json").write_text(json.dumps(line))
    alone = AloneTimes(mean_ms=100.0, p50_ms=0.0, p95_ms=0.0)
    assert load_soak.soak_rate(alone) == pytest.approx(0.6 * 4 * 10)


@pytest.mark.parametrize("line", [None, {"requests_per_s": {OURS: 41.8}}])
def test_soak_rate_without_result_is_rate_of_single_calls(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    if line:
        (tmp_path / "bench/results").mkdir(parents=True)
        (tmp_path / "bench/results/load.json").write_text(json.dumps(line))
    assert load_soak.soak_rate(AloneTimes(mean_ms=100.0, p50_ms=0.0, p95_ms=0.0)) == pytest.approx(6.0)
