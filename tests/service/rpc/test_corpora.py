"""An upload whose caller leaves, whatever the servicer is doing at that moment."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from ferryman_service.application.corpora import CorpusUseCases
from ferryman_service.application.paging import Pager
from ferryman_service.domain.threads import Threads, ThreadsBySize
from ferryman_service.rpc.corpora import CorpusServicer, UploadThreads
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.corpus_upload import FileCorpusUpload
from ferryman_service.stores.layout import DataFolder
from tests.fakes.databases import open_migrated
from tests.fakes.loopback_service import upload_messages

MESSAGES = upload_messages([("one", "eins")])


class Caller:
    """A context whose caller is there, or is gone as grpc tells it: its messages end, and nothing can be sent."""

    def __init__(self, gone=False):
        self.gone = gone
        self.has_sent_all = asyncio.Event()

    async def messages(self):
        for message in MESSAGES:
            yield message

    async def send_initial_metadata(self, _):
        self.has_sent_all.set()
        if self.gone:
            raise grpc.aio.InternalError("the call is over")


@pytest.fixture
def store(tmp_path):
    folder = DataFolder(tmp_path)
    folder.create()
    database = open_migrated(folder.database)
    yield FileCorpusStore(database, folder, CorpusLimits())
    assert list(folder.incoming.iterdir()) == []
    database.dispose()


@pytest.fixture
def threads():
    threads = UploadThreads(writing=Threads(2, "upload"), checking=ThreadsBySize(2, "check", 1 << 24))
    yield threads
    threads.writing.close()
    threads.checking.close()


def upload(store, threads, caller):
    servicer = CorpusServicer(CorpusUseCases(corpora=store, pager=Pager(b"key")), threads, threads.writing)
    return asyncio.ensure_future(servicer.UploadCorpus(caller.messages(), caller))


async def test_upload_of_a_caller_that_has_gone_makes_no_corpus(store, threads):
    with pytest.raises(grpc.aio.InternalError):
        await upload(store, threads, Caller(gone=True))
    assert store.list_page(None, 10) == []


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("cancellations", [1, 2, 3])
async def test_a_cancellation_at_any_moment_is_clean(store, threads, gone, cancellations):
    """Cancel after the first, the second, … turn of the event loop, and again in the turns after it."""
    cancelled = 0
    for turns in range(60):
        work = upload(store, threads, Caller(gone))
        for _ in range(turns):
            await asyncio.sleep(0.0001 if turns % 2 else 0)
        for _ in range(cancellations):
            work.cancel()
            await asyncio.sleep(0)
        [outcome] = await asyncio.gather(work, return_exceptions=True)
        cancelled += isinstance(outcome, asyncio.CancelledError)
    assert cancelled > 10
    assert not gone or store.list_page(None, 10) == []


async def test_corpora_that_are_checked_hold_up_no_other_work(store, threads, monkeypatch):
    released, finish = threading.Event(), FileCorpusUpload.finish

    def slow_finish(upload):
        released.wait(60)
        return finish(upload)

    monkeypatch.setattr(FileCorpusUpload, "finish", slow_finish)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    callers, uploads = [Caller() for _ in range(4)], []
    try:
        async with asyncio.timeout(30):
            for caller in callers:
                uploads.append(upload(store, threads, caller))
                await caller.has_sent_all.wait()
                for _ in range(10):  # turns of the event loop: now the check waits for its thread, or has it
                    await asyncio.sleep(0)
            assert await asyncio.to_thread(store.list_page, None, 10) == []
    finally:
        released.set()
        await asyncio.gather(*uploads)
    assert len(store.list_page(None, 10)) == 4
