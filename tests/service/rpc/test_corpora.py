"""An upload whose caller leaves, whatever the servicer is doing at that moment."""

import asyncio

import grpc
import pytest

from ferryman_service.application.corpora import CorpusUseCases
from ferryman_service.application.paging import Pager
from ferryman_service.rpc.corpora import CorpusServicer
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import open_database, upgrade
from ferryman_service.stores.layout import DataFolder
from tests.fakes.loopback_service import upload_messages

MESSAGES = upload_messages([("one", "eins")])


class Caller:
    """A context whose caller is there, or is gone as grpc tells it: its messages end, and nothing can be sent."""

    def __init__(self, gone=False):
        self.gone = gone

    async def messages(self):
        for message in MESSAGES:
            yield message

    async def send_initial_metadata(self, _):
        if self.gone:
            raise grpc.aio.InternalError("the call is over")


@pytest.fixture
def store(tmp_path):
    folder = DataFolder(tmp_path)
    folder.create()
    database = open_database(folder.database)
    upgrade(database)
    yield FileCorpusStore(database, folder, CorpusLimits())
    assert list(folder.incoming.iterdir()) == []
    database.dispose()


def upload(store, caller):
    servicer = CorpusServicer(CorpusUseCases(corpora=store, pager=Pager(b"key")))
    return asyncio.ensure_future(servicer.UploadCorpus(caller.messages(), caller))


async def test_who_is_gone_at_the_end_gets_no_corpus(store):
    with pytest.raises(grpc.aio.InternalError):
        await upload(store, Caller(gone=True))
    assert store.list_page(None, 10) == []


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("cancellations", [1, 2, 3])
async def test_a_cancellation_at_any_moment_is_clean(store, gone, cancellations):
    """Cancel after the first, the second, … turn of the event loop, and again in the turns after it."""
    cancelled = 0
    for turns in range(60):
        work = upload(store, Caller(gone))
        for _ in range(turns):
            await asyncio.sleep(0.0001 if turns % 2 else 0)
        for _ in range(cancellations):
            work.cancel()
            await asyncio.sleep(0)
        [outcome] = await asyncio.gather(work, return_exceptions=True)
        cancelled += isinstance(outcome, asyncio.CancelledError)
    assert cancelled > 10
    assert not gone or store.list_page(None, 10) == []
