"""What health says of what the process can do, and the server that says nothing else."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ferryman.v1 import translation_pb2, translation_pb2_grpc
from ferryman_service.application.readiness import Abilities, Readiness
from ferryman_service.domain.readiness import StoreState
from ferryman_service.rpc.health import (
    ALL_SERVICES,
    CORPORA,
    MODELS,
    TRAINING,
    TRANSLATION,
    HealthProber,
    HealthServicer,
    ProberConfig,
    ProbeServer,
    address_of,
    check_health,
)
from ferryman_service.rpc.shutdown import Shutdown
from tests.fakes.store_probe import FakeStoreProbe

NOTHING = Abilities(trains=False, writes=False, reads=False, translates=False)


@pytest.fixture
async def servicer():
    servicer = HealthServicer(Shutdown())
    await servicer.start()
    return servicer


def serving(servicer):
    return {name for name, is_serving in servicer.serving().items() if is_serving}


async def test_a_well_process_serves_all_that_it_is_for():
    servicer = HealthServicer(Shutdown(), (CORPORA, MODELS, TRANSLATION))
    assert serving(servicer) == {"", "liveness", CORPORA, MODELS, TRANSLATION}
    await servicer.show(Abilities())
    assert serving(servicer) == {"", "liveness", CORPORA, MODELS, TRANSLATION}


@pytest.mark.parametrize(
    ("abilities", "well"),
    [
        (Abilities(trains=False, writes=False), {MODELS, TRANSLATION}),
        (Abilities(trains=False, writes=False, reads=False), {TRANSLATION}),
        (NOTHING, set()),
    ],
)
async def test_services_that_cannot_work_are_not_serving(servicer, abilities, well):
    await servicer.show(abilities)
    assert serving(servicer) == {"liveness", *well}
    await servicer.show(Abilities())
    assert serving(servicer) == {"", "liveness", *ALL_SERVICES}


async def test_the_whole_is_well_if_the_roles_of_the_process_are():
    servicer = HealthServicer(Shutdown(), (CORPORA, MODELS, TRANSLATION))
    await servicer.show(Abilities(trains=False, writes=False, reads=False))
    assert serving(servicer) == {"", "liveness", TRANSLATION}


async def test_nothing_counts_any_more_once_it_stops_and_liveness_stays(servicer):
    await servicer.begin_stop()
    await servicer.show(Abilities())
    assert serving(servicer) == {"liveness"}


async def test_unwell_after_two_looks_in_a_row_and_well_after_one(servicer):
    prober = HealthProber(servicer, Readiness(FakeStoreProbe(), None), ProberConfig(failures=2))
    for found, still_well in ((NOTHING, True), (Abilities(), True), (NOTHING, True), (NOTHING, False)):
        await prober.take(found)
        assert (TRAINING in serving(servicer)) is still_well
    await prober.take(Abilities())
    assert TRAINING in serving(servicer)


async def test_a_store_that_does_not_answer_is_lost_until_it_does(servicer):
    probe = FakeStoreProbe()
    probe.answers.clear()
    prober = HealthProber(servicer, Readiness(probe, None), ProberConfig(interval_s=0.01, timeout_s=0.05))
    running = asyncio.create_task(prober.run())
    await eventually(lambda: serving(servicer) == {"liveness"})
    await asyncio.sleep(0.2)
    assert probe.looks == 1, "a look that hangs is the only one"
    probe.answers.set()
    await eventually(lambda: TRAINING in serving(servicer))
    probe.state = StoreState.READ_ONLY
    await eventually(lambda: TRAINING not in serving(servicer))
    assert MODELS in serving(servicer)
    running.cancel()


async def test_the_probe_port_serves_health_alone(servicer):
    server = ProbeServer(servicer, (), "127.0.0.1", 0)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await servicer.show(Abilities(trains=False, writes=False))
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=TRAINING))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=TRAINING))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await servicer.show(Abilities())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        translation = translation_pb2_grpc.TranslationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await translation.Translate(translation_pb2.TranslateRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        address = address_of("127.0.0.1", port)
        assert await asyncio.to_thread(check_health, address, TRAINING, 5) == "SERVING"
        assert await asyncio.to_thread(check_health, address, "nobody", 5) == "SERVICE_UNKNOWN"
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        await ProbeServer(servicer, (), "127.0.0.1", port).start()
    await server.stop()
    assert await asyncio.to_thread(check_health, address, "", 5) == "no answer (UNAVAILABLE)"


def test_addresses():
    assert (address_of("::1", 5), address_of("host", 5)) == ("[::1]:5", "host:5")


async def eventually(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
