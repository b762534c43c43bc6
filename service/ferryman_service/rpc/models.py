"""ModelService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import grpc

from ferryman.v1 import model_pb2, model_pb2_grpc
from ferryman_service.application.models import ModelUseCases
from ferryman_service.application.ports import BundleReader
from ferryman_service.domain.threads import Threads
from ferryman_service.rpc import convert
from ferryman_service.rpc.pages import WirePage

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_CHUNK_BYTES: Final = 1 << 20


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Adapts ModelUseCases; see the contract for what each call means."""

    def __init__(self, use_cases: ModelUseCases, writes: Threads) -> None:
        """Store; `writes` are the threads of the calls that change the database."""
        self._use_cases = use_cases
        self._writes = writes

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        """Return a page of models."""
        return await asyncio.to_thread(self._page, request)

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        """Return a model and one of its versions."""
        model, version = await asyncio.to_thread(self._use_cases.get, request.model)
        return model_pb2.GetModelResponse(model=convert.model_to_wire(model), version=convert.version_to_wire(version))

    async def SetModelAlias(
        self, request: model_pb2.SetModelAliasRequest, context: Context
    ) -> model_pb2.SetModelAliasResponse:
        """Let an alias point at a version."""
        model = await self._use_cases.set_alias(request.name, request.alias, request.version)
        return model_pb2.SetModelAliasResponse(model=convert.model_to_wire(model))

    async def DeleteModelAlias(
        self, request: model_pb2.DeleteModelAliasRequest, context: Context
    ) -> model_pb2.DeleteModelAliasResponse:
        """Remove an alias."""
        await self._writes.run(self._use_cases.delete_alias, request.name, request.alias)
        return model_pb2.DeleteModelAliasResponse()

    async def DeleteModelVersion(
        self, request: model_pb2.DeleteModelVersionRequest, context: Context
    ) -> model_pb2.DeleteModelVersionResponse:
        """Remove a version."""
        await self._writes.run(self._use_cases.delete_version, request.model)
        return model_pb2.DeleteModelVersionResponse()

    async def DownloadModel(
        self, request: model_pb2.DownloadModelRequest, context: Context
    ) -> AsyncIterator[model_pb2.DownloadModelResponse]:
        """Stream the files of a version."""
        async with _opened(self._use_cases, request.model) as bundle:
            yield convert.download_header_to_wire(bundle.version, bundle.files)
            for number, file in enumerate(bundle.files):
                offset = 0
                while data := await asyncio.to_thread(bundle.read, file, _CHUNK_BYTES):
                    chunk = model_pb2.DownloadChunk(file=number, offset=offset, data=data)
                    yield model_pb2.DownloadModelResponse(chunk=chunk)
                    offset += len(data)

    async def LoadModel(self, request: model_pb2.LoadModelRequest, context: Context) -> model_pb2.LoadModelResponse:
        """Load a version into memory."""
        loaded = await self._use_cases.load(request.model)
        return model_pb2.LoadModelResponse(loaded_model=convert.loaded_model_to_wire(loaded))

    async def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Context
    ) -> model_pb2.UnloadModelResponse:
        """Take a version out of memory."""
        return model_pb2.UnloadModelResponse(was_loaded=await self._use_cases.unload(request.model))

    async def ListLoadedModels(
        self, request: model_pb2.ListLoadedModelsRequest, context: Context
    ) -> model_pb2.ListLoadedModelsResponse:
        """Return what is in memory."""
        loaded = [convert.loaded_model_to_wire(model) for model in self._use_cases.loaded()]
        return model_pb2.ListLoadedModelsResponse(loaded_models=loaded)

    def _page(self, request: model_pb2.ListModelsRequest) -> model_pb2.ListModelsResponse:
        response = model_pb2.ListModelsResponse()
        wire = WirePage(response.models, convert.model_to_wire)
        page = self._use_cases.list_page(request.page_size, request.page_token, wire.takes)
        response.next_page_token = page.next_page_token
        return response


@asynccontextmanager
async def _opened(use_cases: ModelUseCases, model: str) -> AsyncIterator[BundleReader]:
    """Open a bundle, and close it in the end, also if the caller leaves while it is being opened."""
    opening = asyncio.ensure_future(asyncio.to_thread(use_cases.open_bundle, model))
    try:
        bundle = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_opened)
        raise
    try:
        yield bundle
    finally:
        _close(bundle)


def _close_opened(opening: asyncio.Future[BundleReader]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        _close(opening.result())


def _close(bundle: BundleReader) -> None:
    """Close in a thread: it waits for a read in another one, which on a disk that hangs has no end."""
    asyncio.get_running_loop().run_in_executor(None, bundle.close)
