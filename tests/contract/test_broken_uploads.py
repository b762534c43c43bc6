"""An upload whose caller leaves halfway stores nothing, however and whenever it leaves."""

import asyncio
import contextlib
import os
import random

import grpc
import pytest

from ferryman.v1 import corpus_pb2_grpc
from tests.fakes.loopback_service import upload_messages

ROUNDS = 600 if os.environ.get("FERRYMAN_SOAK") else 60
HEADER, TRAIN, VALIDATION = upload_messages([("one", "eins"), ("two", "zwei")])


@pytest.fixture
def nothing_is_left(make_service):
    """A service, and after the test proof that it stored nothing and is well."""
    service = make_service()
    yield service
    service.wait_for(_until(lambda: not list(service.folder.incoming.iterdir())))
    assert service.corpora.list_page(None, 10) == [], "a corpus whose caller had left was stored"
    assert [path.name for path in service.folder.corpora.iterdir()] == [service.folder.incoming.name]
    assert service.upload().train.pairs == 1


async def _until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def _pause(rng):
    """Let anything between no and some turns of the event loops pass."""
    await asyncio.sleep(rng.choice([0, 0, 0.0002, 0.001, 0.003]) * rng.random())


async def _write_some(call, rng):
    """Write enough for a good corpus, and sometimes more, but never say that this was all."""
    for message in (HEADER, TRAIN, VALIDATION, *[TRAIN] * rng.randrange(5)):
        await call.write(message)
        if rng.random() < 0.3:
            await _pause(rng)


async def test_a_cancelled_upload_is_dropped(nothing_is_left):
    async with grpc.aio.insecure_channel(nothing_is_left.address) as channel:
        stub = corpus_pb2_grpc.CorpusServiceStub(channel)

        async def leave(seed):
            rng = random.Random(seed)
            call = stub.UploadCorpus()
            await _write_some(call, rng)
            await _pause(rng)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        for first in range(0, ROUNDS, 10):
            await asyncio.gather(*(leave(seed) for seed in range(first, first + 10)))


async def test_an_upload_that_runs_out_of_time_is_dropped(nothing_is_left):
    async with grpc.aio.insecure_channel(nothing_is_left.address) as channel:
        stub = corpus_pb2_grpc.CorpusServiceStub(channel)

        async def run_out(seed):
            rng = random.Random(seed)
            call = stub.UploadCorpus(timeout=0.02 + 0.03 * rng.random())
            # A write to a call that has ended already says InvalidStateError.
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await _write_some(call, rng)
            assert await call.code() is not grpc.StatusCode.OK

        for first in range(0, ROUNDS, 30):
            await asyncio.gather(*(run_out(seed) for seed in range(first, first + 30)))


async def test_an_upload_whose_connection_breaks_is_dropped(nothing_is_left):
    """The caller dies: its packets up to some point arrive, then a FIN or a RST."""
    async with _Wire(nothing_is_left.port) as wire:
        for seed in range(ROUNDS):
            rng = random.Random(seed)
            # A channel of its own, or a broken connection would make the next round wait before it connects again.
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{wire.port}", options=options) as channel:
                call = corpus_pb2_grpc.CorpusServiceStub(channel).UploadCorpus()
                await _write_some(call, rng)
                await _pause(rng)
                await wire.cut(abruptly=rng.random() < 0.5)
                with pytest.raises(grpc.aio.AioRpcError):
                    await call


class _Wire:
    """A TCP relay to the service that can be cut."""

    def __init__(self, to_port):
        self._to_port = to_port
        self._ends = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()
        await self.cut(abruptly=True)

    async def cut(self, abruptly):
        while self._ends:
            writer = self._ends.pop()
            if abruptly:
                writer.transport.abort()
            else:
                writer.close()

    async def _relay(self, from_client, to_client):
        from_service, to_service = await asyncio.open_connection("127.0.0.1", self._to_port)
        self._ends += [to_service, to_client]
        await asyncio.gather(_copy(from_client, to_service), _copy(from_service, to_client))


async def _copy(source, target):
    try:
        while data := await source.read(65_536):
            target.write(data)
            await target.drain()
    except ConnectionError:
        pass
    finally:
        target.close()
