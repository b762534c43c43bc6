"""A download whose caller leaves."""

import asyncio
import threading

import pytest

from ferryman.v1 import model_pb2
from ferryman_service.domain.threads import Threads
from ferryman_service.rpc.models import ModelServicer


class SlowUseCases:
    """Opening a bundle takes until `released`; it is a reader that notes that it was closed."""

    def __init__(self):
        self.begun, self.released, self.closed = threading.Event(), threading.Event(), threading.Event()

    def open_bundle(self, model):
        self.begun.set()
        assert self.released.wait(60)
        return self

    def close(self):
        self.closed.set()


async def test_a_bundle_that_is_opened_for_a_caller_who_has_left_is_closed():
    use_cases, threads = SlowUseCases(), Threads(1, "write")
    download = ModelServicer(use_cases, threads).DownloadModel(model_pb2.DownloadModelRequest(model="m"), None)
    first = asyncio.ensure_future(anext(download))
    assert await asyncio.to_thread(use_cases.begun.wait, 60)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    use_cases.released.set()
    assert await asyncio.to_thread(use_cases.closed.wait, 60)
    threads.close()
