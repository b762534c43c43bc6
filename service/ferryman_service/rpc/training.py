"""TrainingService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeAlias

import grpc

from ferryman.v1 import training_pb2, training_pb2_grpc
from ferryman_service.application.metrics_feed import MetricsFeed
from ferryman_service.application.training import CurveRequest, StartRequest, TrainingUseCases
from ferryman_service.domain.errors import Violation
from ferryman_service.domain.ids import RUN_PREFIX, is_id
from ferryman_service.domain.log_context import add_log_fields
from ferryman_service.domain.records import Record, RunState
from ferryman_service.domain.runs import RunFilter
from ferryman_service.domain.threads import Threads
from ferryman_service.domain.tracing import NULL_TRACER, Tracer
from ferryman_service.rpc import convert
from ferryman_service.rpc.messages import DEFAULT_THREADS
from ferryman_service.rpc.pages import WirePage
from ferryman_service.rpc.shutdown import Shutdown

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_QUICK_POINTS: Final = 1000


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Adapts TrainingUseCases and MetricsFeed; see the contract for what each call means."""

    def __init__(
        self,
        use_cases: TrainingUseCases,
        feed: MetricsFeed,
        shutdown: Shutdown,
        writes: Threads,
        tracer: Tracer = NULL_TRACER,
        threads: Threads = DEFAULT_THREADS,
    ) -> None:
        """Store; `writes` are the threads of the calls that change the database, which may have to wait for another
        writer: they keep no thread from those that read. `threads` build what is large."""
        self._use_cases = use_cases
        self._writes = writes
        self._feed = feed
        self._shutdown = shutdown
        self._tracer = tracer
        self._threads = threads

    async def StartTraining(
        self, request: training_pb2.StartTrainingRequest, context: Context
    ) -> training_pb2.StartTrainingResponse:
        """Start a run."""
        unknown: list[Violation] = []
        start = StartRequest(
            request_id=request.request_id,
            corpus_id=request.corpus_id,
            model_name=request.model_name,
            recipe=convert.recipe_overrides(request.recipe, "recipe", unknown),
            validate_only=request.validate_only,
            initial_model=request.initial_model,
            keep_optimizer=request.keep_optimizer,
            processes=request.processes,
            trace_context=self._tracer.context(),
            unknown=unknown,
        )
        run = await self._writes.run(self._use_cases.start, start)
        self._about_run(run.run_id)
        return training_pb2.StartTrainingResponse(run=convert.run_to_wire(run))

    async def StreamMetrics(
        self, request: training_pb2.StreamMetricsRequest, context: Context
    ) -> AsyncIterator[training_pb2.StreamMetricsResponse]:
        """Stream a run's records until its end, or the server's."""
        self._about_run(request.run_id)
        follow, sent = not request.history_only, request.after_sequence
        async with aclosing(self._feed.stream(request.run_id, request.after_sequence, follow=follow)) as items:
            while True:
                async with self._shutdown.ends_wait(after_sequence=sent):
                    item = await anext(items, None)
                if item is None:
                    return
                sent = item.sequence if isinstance(item, Record) else sent
                yield convert.stream_item_to_wire(item)

    async def GetLRSchedule(
        self, request: training_pb2.GetLRScheduleRequest, context: Context
    ) -> training_pb2.GetLRScheduleResponse:
        """Return a learning-rate curve."""
        subject = request.WhichOneof("subject")
        unknown: list[Violation] = []
        curve_request = CurveRequest(
            schedule=convert.recipe_overrides(request.schedule, subject, unknown) if subject == "schedule" else None,
            recipe=convert.recipe_overrides(request.recipe, subject, unknown) if subject == "recipe" else None,
            run_id=request.run_id if subject == "run_id" else None,
            first_step=request.first_step,
            last_step=request.last_step,
            max_points=request.max_points,
            unknown=unknown,
        )
        if request.max_points <= _QUICK_POINTS:
            return await asyncio.to_thread(self._curve, curve_request)
        return await self._threads.run(self._curve, curve_request)

    async def GetTrainingRun(
        self, request: training_pb2.GetTrainingRunRequest, context: Context
    ) -> training_pb2.GetTrainingRunResponse:
        """Return a run."""
        self._about_run(request.run_id)
        run = await asyncio.to_thread(self._use_cases.get, request.run_id)
        return training_pb2.GetTrainingRunResponse(run=convert.run_to_wire(run))

    async def ListTrainingRuns(
        self, request: training_pb2.ListTrainingRunsRequest, context: Context
    ) -> training_pb2.ListTrainingRunsResponse:
        """Return a page of runs."""
        unknown: list[Violation] = []
        states = convert.all_enums(RunState, request.states, "states", unknown)
        order = convert.known_number(training_pb2.RunOrder, request.order, "order", unknown)
        oldest_first = order == training_pb2.RUN_ORDER_OLDEST_FIRST
        wanted = RunFilter(states=states, model_name=request.model_name, oldest_first=oldest_first)
        return await asyncio.to_thread(self._page, request, wanted, unknown)

    async def CancelTraining(
        self, request: training_pb2.CancelTrainingRequest, context: Context
    ) -> training_pb2.CancelTrainingResponse:
        """Ask a run to stop."""
        self._about_run(request.run_id)
        run = await self._writes.run(self._use_cases.cancel, request.run_id)
        return training_pb2.CancelTrainingResponse(run=convert.run_to_wire(run))

    async def PauseTraining(
        self, request: training_pb2.PauseTrainingRequest, context: Context
    ) -> training_pb2.PauseTrainingResponse:
        """Ask a run to rest."""
        self._about_run(request.run_id)
        run = await self._writes.run(self._use_cases.pause, request.run_id)
        return training_pb2.PauseTrainingResponse(run=convert.run_to_wire(run))

    async def ResumeTraining(
        self, request: training_pb2.ResumeTrainingRequest, context: Context
    ) -> training_pb2.ResumeTrainingResponse:
        """Let a paused run go on."""
        self._about_run(request.run_id)
        run = await self._writes.run(self._use_cases.resume, request.run_id)
        return training_pb2.ResumeTrainingResponse(run=convert.run_to_wire(run))

    async def ListCheckpoints(
        self, request: training_pb2.ListCheckpointsRequest, context: Context
    ) -> training_pb2.ListCheckpointsResponse:
        """Return a run's checkpoints."""
        self._about_run(request.run_id)
        checkpoints = await asyncio.to_thread(self._use_cases.checkpoints, request.run_id)
        return training_pb2.ListCheckpointsResponse(checkpoints=map(convert.checkpoint_to_wire, checkpoints))

    async def DeleteTrainingRun(
        self, request: training_pb2.DeleteTrainingRunRequest, context: Context
    ) -> training_pb2.DeleteTrainingRunResponse:
        """Remove a run."""
        self._about_run(request.run_id)
        await self._writes.run(self._use_cases.delete, request.run_id)
        return training_pb2.DeleteTrainingRunResponse()

    def _curve(self, request: CurveRequest) -> training_pb2.GetLRScheduleResponse:
        return convert.curve_to_wire(self._use_cases.learning_rate_curve(request))

    def _page(
        self, request: training_pb2.ListTrainingRunsRequest, wanted: RunFilter, unknown: Sequence[Violation]
    ) -> training_pb2.ListTrainingRunsResponse:
        response = training_pb2.ListTrainingRunsResponse()
        wire = WirePage(response.runs, convert.listed_run_to_wire)
        page = self._use_cases.list_page(wanted, request.page_size, request.page_token, wire.takes, unknown)
        response.next_page_token = page.next_page_token
        return response

    def _about_run(self, run_id: str) -> None:
        """Say in the log and in the trace which run the call is about; what cannot be a run's id is left out."""
        if is_id(run_id, RUN_PREFIX):
            add_log_fields(run=run_id)
            self._tracer.annotate({"ferryman.run": run_id})
