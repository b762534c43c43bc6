"""ModelService."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc

from ferryman.v1 import model_pb2, model_pb2_grpc
from ferryman_service.application.models import ModelUseCases
from ferryman_service.rpc import convert

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Adapts ModelUseCases; see the contract for what each call means."""

    def __init__(self, use_cases: ModelUseCases) -> None:
        self._use_cases = use_cases

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        """Return a page of models."""
        page = await asyncio.to_thread(self._use_cases.list_page, request.page_size, request.page_token)
        return model_pb2.ListModelsResponse(
            models=[convert.model_to_wire(model) for model in page.items], next_page_token=page.next_page_token
        )

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        """Return a model and one of its versions."""
        model, version = await asyncio.to_thread(self._use_cases.get, request.model)
        return model_pb2.GetModelResponse(model=convert.model_to_wire(model), version=convert.version_to_wire(version))
