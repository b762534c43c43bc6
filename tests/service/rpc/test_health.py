"""What health says of what the process can do, and the server that says nothing else."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ferryman.v1 import translation_pb2, translation_pb2_grpc
from ferryman_service.application.readiness import Abilities, Readiness
from ferryman_service.domain.errors import ServerShuttingDown
from ferryman_service.domain.readiness import StoreState
from ferryman_service.domain.threads import Threads
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
from tests.fakes.busy_threads import busy_threads
from tests.fakes.store_probe import FakeStoreProbe

NOTHING = Abilities(trains=False, writes=False, reads=False, translates=False)


@pytest.fixture
async def servicer():
    return HealthServicer(Shutdown())


def serving(servicer):
    return {name for name, is_serving in servicer.serving().items() if is_serving}


async def test_a_well_process_serves_all_that_it_is_for():
    servicer = HealthServicer(Shutdown(), (CORPORA, MODELS, TRANSLATION))
    assert serving(servicer) == {"", "liveness", CORPORA, MODELS, TRANSLATION}
    servicer.show(Abilities())
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
    servicer.show(abilities)
    assert serving(servicer) == {"liveness", *well}
    servicer.show(Abilities())
    assert serving(servicer) == {"", "liveness", *ALL_SERVICES}


async def test_the_whole_is_well_if_the_roles_of_the_process_are():
    servicer = HealthServicer(Shutdown(), (CORPORA, MODELS, TRANSLATION))
    servicer.show(Abilities(trains=False, writes=False, reads=False))
    assert serving(servicer) == {"", "liveness", TRANSLATION}


async def test_nothing_counts_any_more_once_it_stops_and_liveness_stays(servicer):
    servicer.begin_stop()
    servicer.show(Abilities())
    assert serving(servicer) == {"liveness"}


async def test_unwell_after_two_looks_in_a_row_and_well_after_one(servicer):
    prober = HealthProber(servicer, Readiness(FakeStoreProbe(), None, Threads(1, "probe")), ProberConfig(failures=2))
    for found, still_well in ((NOTHING, True), (Abilities(), True), (NOTHING, True), (NOTHING, False)):
        prober.take(found)
        assert (TRAINING in serving(servicer)) is still_well
    prober.take(Abilities())
    assert TRAINING in serving(servicer)


async def test_a_store_that_does_not_answer_is_lost_until_it_does(servicer):
    probe = FakeStoreProbe()
    probe.answers.clear()
    prober = HealthProber(
        servicer, Readiness(probe, None, Threads(1, "probe")), ProberConfig(interval_s=0.01, timeout_s=0.05)
    )
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


class Watcher:
    """The context of a Watch whose caller reads what it is told, or nothing at all."""

    def __init__(self, reads=True):
        self.reads, self.told = reads, []
        self._never = asyncio.Event()

    async def write(self, message):
        self.told.append(message.status)
        if not self.reads:
            await self._never.wait()


async def test_a_watcher_that_does_not_read_holds_up_nobody():
    shutdown = Shutdown()
    servicer = HealthServicer(shutdown)
    deaf, other = Watcher(reads=False), Watcher()
    request = health_pb2.HealthCheckRequest(service=TRAINING)
    watches = [asyncio.create_task(servicer.Watch(request, context)) for context in (deaf, other)]
    await eventually(lambda: len(deaf.told) == len(other.told) == 1)
    for change in (lambda: servicer.show(NOTHING), lambda: servicer.show(Abilities()), servicer.begin_stop):
        told = len(other.told)
        change()
        await eventually(lambda told=told: len(other.told) > told)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert other.told == [serving, not_serving, serving, not_serving]
    assert deaf.told == [serving]
    shutdown.begin()
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*watches, return_exceptions=True)
    assert [type(end) for end in ends] == [ServerShuttingDown] * 2


async def test_a_watch_of_a_name_that_is_not_there_goes_on(servicer):
    watcher = Watcher()
    watch = asyncio.create_task(servicer.Watch(health_pb2.HealthCheckRequest(service="nobody"), watcher))
    await eventually(lambda: watcher.told == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN])
    servicer.show(NOTHING)
    await asyncio.sleep(0)
    assert not watch.done()
    assert len(watcher.told) == 1
    watch.cancel()


async def test_the_probe_is_not_starved_by_what_keeps_the_common_threads():
    readiness = Readiness(FakeStoreProbe(), None, Threads(1, "probe"))
    async with busy_threads(), asyncio.timeout(30):
        assert await readiness.look() == Abilities()


async def test_the_probe_port_serves_health_alone(servicer):
    server = ProbeServer(servicer, (), "127.0.0.1", 0)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        servicer.show(Abilities(trains=False, writes=False))
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=TRAINING))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=TRAINING))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        servicer.show(Abilities())
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


async def test_no_proxy_is_asked_for_health(servicer, monkeypatch):
    """The proxy that the environment names does not exist: whoever asks it gets no answer."""
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server = ProbeServer(servicer, (), "127.0.0.1", 0)
    address = address_of("127.0.0.1", await server.start())
    servicer.show(Abilities())
    assert await asyncio.to_thread(check_health, address, "", 5) == "SERVING"
    await server.stop()


def test_addresses():
    assert (address_of("::1", 5), address_of("host", 5)) == ("[::1]:5", "host:5")


async def eventually(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
