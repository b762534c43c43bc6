"""CorpusService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc

from ferryman.v1 import corpus_pb2, corpus_pb2_grpc
from ferryman_service.application.corpora import CorpusUseCases
from ferryman_service.application.ports import CorpusUpload
from ferryman_service.domain.corpora import CorpusHeader, Side, Split
from ferryman_service.domain.errors import InvalidRequest, Violation
from ferryman_service.domain.threads import Threads, ThreadsBySize
from ferryman_service.rpc import convert
from ferryman_service.rpc.pages import WirePage

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
T = TypeVar("T")


@dataclass(frozen=True)
class UploadThreads:
    """Those that write what arrives, and those that check whole corpora, which may take minutes: the smallest first."""

    writing: Threads
    checking: ThreadsBySize


class CorpusServicer(corpus_pb2_grpc.CorpusServiceServicer):
    """Adapts CorpusUseCases; see the contract for what each call means."""

    def __init__(self, use_cases: CorpusUseCases, threads: UploadThreads, writes: Threads) -> None:
        """Store; `writes` are the threads of the calls that change the database."""
        self._use_cases = use_cases
        self._writes = writes
        self._writing = threads.writing
        self._checking = threads.checking

    async def UploadCorpus(
        self, request_iterator: AsyncIterator[corpus_pb2.UploadCorpusRequest], context: Context
    ) -> corpus_pb2.UploadCorpusResponse:
        """Take a header, then text; store the corpus whole or not at all."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("upload_part") != "header":
            raise _violation("header", "is required, as the first message", "REQUIRED")
        header = convert.header_from_wire(first.header)
        async with self._opened(header, first.header.request_id) as upload:
            async for request in request_iterator:
                await _to_its_end(self._writing.run(_add, upload, request))
            # The end of the messages is also what a call looks like whose caller has gone halfway; but then nothing can
            # be sent any more: this raises, or the call's task is cancelled.
            await context.send_initial_metadata(())
            corpus = await _to_its_end(self._checking.run(upload.size_bytes, upload.finish))
        return corpus_pb2.UploadCorpusResponse(corpus=convert.corpus_to_wire(corpus))

    async def GetCorpus(self, request: corpus_pb2.GetCorpusRequest, context: Context) -> corpus_pb2.GetCorpusResponse:
        """Return a corpus."""
        corpus = await asyncio.to_thread(self._use_cases.get, request.corpus_id)
        return corpus_pb2.GetCorpusResponse(corpus=convert.corpus_to_wire(corpus))

    async def ListCorpora(
        self, request: corpus_pb2.ListCorporaRequest, context: Context
    ) -> corpus_pb2.ListCorporaResponse:
        """Return a page of corpora."""
        return await asyncio.to_thread(self._page, request)

    def _page(self, request: corpus_pb2.ListCorporaRequest) -> corpus_pb2.ListCorporaResponse:
        response = corpus_pb2.ListCorporaResponse()
        wire = WirePage(response.corpora, convert.listed_corpus_to_wire)
        page = self._use_cases.list_page(request.page_size, request.page_token, wire.takes)
        response.next_page_token = page.next_page_token
        return response

    async def DeleteCorpus(
        self, request: corpus_pb2.DeleteCorpusRequest, context: Context
    ) -> corpus_pb2.DeleteCorpusResponse:
        """Remove a corpus."""
        await self._writes.run(self._use_cases.delete, request.corpus_id)
        return corpus_pb2.DeleteCorpusResponse()

    @asynccontextmanager
    async def _opened(self, header: CorpusHeader, request_id: str) -> AsyncIterator[CorpusUpload]:
        """Begin an upload, and abort it in the end: harmless if it was finished."""
        beginning = asyncio.ensure_future(self._writing.run(self._use_cases.begin_upload, header, request_id))
        try:
            yield await asyncio.shield(beginning)
        finally:
            await _to_its_end(self._abort(beginning))

    async def _abort(self, beginning: asyncio.Future[CorpusUpload]) -> None:
        await asyncio.wait((beginning,))
        if beginning.exception() is None:
            await self._writing.run(beginning.result().abort)


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do the work; a cancellation, whenever it comes, takes effect after it: an upload has one thread at a time, and
    the last thing that happens to it is its abort."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    return task.result()


def _add(upload: CorpusUpload, request: corpus_pb2.UploadCorpusRequest) -> None:
    violations: list[Violation] = []
    match request.WhichOneof("upload_part"):
        case "pairs":
            split = convert.required_enum(Split, request.pairs.split, "pairs.split", violations)
            if split is not None:
                upload.add_pairs(split, convert.pairs_from_wire(request.pairs.pairs))
        case "chunk":
            split = convert.required_enum(Split, request.chunk.split, "chunk.split", violations)
            side = convert.required_enum(Side, request.chunk.side, "chunk.side", violations)
            if split is not None and side is not None:
                upload.add_chunk(split, side, request.chunk.data)
        case "header":
            raise _violation("header", "may only be the first message", "UNEXPECTED")
        case _:
            raise _violation("upload_part", "is required: one of pairs and chunk", "REQUIRED")
    if violations:
        raise InvalidRequest(violations)


def _violation(field: str, description: str, reason: str) -> InvalidRequest:
    return InvalidRequest([Violation(field=field, description=description, reason=reason)])
