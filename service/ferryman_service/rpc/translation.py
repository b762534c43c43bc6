"""TranslationService."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc

from ferryman.v1 import translation_pb2, translation_pb2_grpc
from ferryman_service.application.translating import TranslateRequest, TranslationUseCases
from ferryman_service.observability.translation import TranslationMetrics
from ferryman_service.rpc import convert

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class TranslationServicer(translation_pb2_grpc.TranslationServiceServicer):
    """Adapts TranslationUseCases; see the contract for what each call means."""

    def __init__(self, use_cases: TranslationUseCases, metrics: TranslationMetrics) -> None:
        self._use_cases = use_cases
        self._metrics = metrics

    async def Translate(
        self, request: translation_pb2.TranslateRequest, context: Context
    ) -> translation_pb2.TranslateResponse:
        """Translate sentences; the caller's deadline and cancellation end the work."""
        work = TranslateRequest(
            model=request.model,
            sentences=list(request.sentences),
            options=convert.options_from_wire(request.options),
            timeout_s=context.time_remaining(),
        )
        result = await self._use_cases.translate(work)
        self._metrics.observe(result.translations, result.timings)
        return convert.result_to_wire(result)
