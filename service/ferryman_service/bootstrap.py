"""The composition root of the service: the one file that names its concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

from prometheus_client import CollectorRegistry
from sqlalchemy import Engine

from ferryman_service.application.corpora import CorpusUseCases
from ferryman_service.application.housekeeping import Duty, Housekeeping
from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.application.metrics_feed import FeedConfig, MetricsFeed
from ferryman_service.application.models import ModelUseCases
from ferryman_service.application.paging import Pager
from ferryman_service.application.ports import BundleLoader
from ferryman_service.application.readiness import Readiness
from ferryman_service.application.run_limits import RunLimits
from ferryman_service.application.supervisor import Supervisor, SupervisorConfig
from ferryman_service.application.training import TrainingUseCases
from ferryman_service.application.translating import TranslationLimits, TranslationUseCases
from ferryman_service.config import open_files
from ferryman_service.config.automatic import with_automatic
from ferryman_service.config.resources import find_machine
from ferryman_service.config.service_config import ComputeChoice, Device, Role, ServiceConfig, host_names
from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.models import ModelVersion
from ferryman_service.domain.threads import Threads, ThreadsBySize
from ferryman_service.domain.tracing import Tracer
from ferryman_service.domain.translation import ComputeType
from ferryman_service.launch.launcher import LaunchConfig, ProcessLauncher, worker_command
from ferryman_service.launch.trial import examine_bundle
from ferryman_service.observability.engine import EngineCollector
from ferryman_service.observability.gpu import GpuCollector, gpu_memory_bytes, open_nvml
from ferryman_service.observability.http import MetricsEndpoint, new_registry
from ferryman_service.observability.launcher import LaunchMetrics
from ferryman_service.observability.models import LoadedModelsCollector, LoadMetrics
from ferryman_service.observability.process import DataFolderCollector, HealthCollector, tell_build
from ferryman_service.observability.rpc import RpcMetrics
from ferryman_service.observability.store import StoreMetrics
from ferryman_service.observability.tracing import TraceConfig, open_tracer
from ferryman_service.observability.training import ObserverConfig, RunObserver
from ferryman_service.observability.translation import TranslationMetrics
from ferryman_service.rpc import health
from ferryman_service.rpc import server as rpc
from ferryman_service.rpc.answer_budget import AnswerBudget
from ferryman_service.rpc.bounds import RequestBounds, element_bounds
from ferryman_service.rpc.call_scope import CallScopes
from ferryman_service.rpc.corpora import CorpusServicer, UploadThreads
from ferryman_service.rpc.interceptors import CallInterceptor
from ferryman_service.rpc.messages import MESSAGE_THREADS, Messages
from ferryman_service.rpc.models import ModelServicer
from ferryman_service.rpc.request_limits import RequestLimits
from ferryman_service.rpc.shutdown import Shutdown
from ferryman_service.rpc.training import TrainingServicer
from ferryman_service.rpc.translation import TranslationServicer
from ferryman_service.rpc.translation_watch import TranslationWatch
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import open_database, upgrade
from ferryman_service.stores.free_space import FreeSpace
from ferryman_service.stores.integrity import DatabaseIntegrity, refuse_damaged
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.lock import FolderLock
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.probe import DatabaseProbe
from ferryman_service.stores.retention import limit_prepared, remove_old_checkpoints
from ferryman_service.stores.run_folders import FileRunFolders
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.stores.sweep import finish_deletions, is_new, refuse_new_database, sweep
from ferryman_service.text.sentences import SentencexSplitter
from ferryman_service.translation.cache_memory import CacheMemory
from ferryman_service.translation.counts import EngineCounts
from ferryman_service.trash import empty_trash

_log = logging.getLogger(__name__)
_RESTART_PAUSE_S: Final = 1.0
_MAX_RESTART_PAUSE_S: Final = 60.0
_CLOSE_S: Final = 3.0
"""What is left to do after the last call has ended, at most."""
_BYTES_PER_MIB: Final = 2**20
_HOUR_S: Final = 3600.0
_DAY_S: Final = 24 * _HOUR_S
_FEED_THREADS: Final = 2
_WRITING_THREADS: Final = 4
_UPLOAD_WRITING_THREADS: Final = 4
_UPLOAD_CHECKING_THREADS: Final = 2
_SMALL_UPLOAD_BYTES: Final = 16 * _BYTES_PER_MIB
"""One of these threads is kept for uploads below this."""


_Part: TypeAlias = Supervisor | RunObserver | health.HealthProber | Housekeeping


@dataclass(frozen=True)
class _Stores:
    folder: DataFolder
    space: FreeSpace
    database: Engine
    integrity: DatabaseIntegrity
    runs: SqlRunStore
    folders: FileRunFolders
    corpora: FileCorpusStore
    models: FileModelStore


@dataclass(frozen=True)
class _UseCases:
    training: TrainingUseCases
    feed: MetricsFeed
    corpora: CorpusUseCases
    models: ModelUseCases
    translation: TranslationUseCases
    loaded: LoadedModels | None

    def close(self) -> None:
        """Wait for translations and loads in hand, then free the models."""
        self.translation.close()
        self.models.close()
        if self.loaded is not None:
            self.loaded.close()


@dataclass(frozen=True)
class _Threads:
    """What each kind of work has for itself; what is over in a moment shares the event loop's own."""

    probe: Threads
    supervisor: Threads
    observer: Threads
    feed: Threads
    messages: Threads
    housekeeping: Threads
    writes: Threads
    uploads: UploadThreads

    def others(self) -> tuple[Threads | ThreadsBySize, ...]:
        """Return all but the supervisor's."""
        return (
            self.probe,
            self.observer,
            self.feed,
            self.messages,
            self.housekeeping,
            self.writes,
            self.uploads.writing,
            self.uploads.checking,
        )


@dataclass(frozen=True)
class _Metrics:
    """What the parts fill; what is only looked at when Prometheus asks is added by `_export_state`."""

    registry: CollectorRegistry
    store: StoreMetrics
    loads: LoadMetrics
    launches: LaunchMetrics
    engines: EngineCounts


@dataclass(frozen=True)
class _CallParts:
    """What is around every call, whatever its service."""

    shutdown: Shutdown
    limits: RequestLimits
    interceptor: CallInterceptor
    probe_interceptor: CallInterceptor
    health: health.HealthServicer
    tracer: Tracer


class Service:
    """Everything that runs in the service's process. `start` and `stop` are called once each, from one event loop."""

    def __init__(
        self,
        *,
        config: ServiceConfig,
        lock: FolderLock | None,
        server: rpc.RpcServer,
        health_servicer: health.HealthServicer,
        probes: health.ProbeServer,
        endpoint: MetricsEndpoint,
        background: tuple[_Part, ...],
        use_cases: _UseCases,
        threads: _Threads,
        tracer: Tracer,
        supervisor: Supervisor | None,
        stop_check: Callable[[], None],
    ) -> None:
        """Store the parts."""
        self._config = config
        self._lock = lock
        self._server = server
        self._health = health_servicer
        self._probes = probes
        self._endpoint = endpoint
        self._background = background
        self._use_cases = use_cases
        self._threads = threads
        self._tracer = tracer
        self._supervisor = supervisor
        self._stop_check = stop_check
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0
        self.probe_port = 0
        self.metrics_port = 0

    async def start(self) -> None:
        """Listen, then begin to work; raises OSError if an address is taken."""
        self.port = await self._server.start()
        if self._config.probe_port:
            self.probe_port = await self._probes.start()
        if self._config.metrics_port:
            self.metrics_port = self._endpoint.start()
        self._tasks = [asyncio.create_task(_run_for_ever(part)) for part in self._background]

    async def folder_lost(self) -> str:
        """Return, as a sentence, that another folder is in the place of the data folder; in most lives, never."""
        if self._supervisor is None:
            await asyncio.Event().wait()
        else:
            await self._supervisor.folder_lost()
        return (
            f"the data folder {self._config.data_dir.absolute()} was removed or replaced while this service was using "
            "it; nothing was changed in the new one. Start the service again to use that one"
        )

    async def stop(self, hurry: asyncio.Event) -> bool:
        """Say NOT_SERVING, wait for the balancers to notice, take no more calls, let those in flight end, stop. Workers
        go on without us. Once `hurry` is set, nothing is waited for.

        Return whether everything has ended; if not, a thread is stuck, and only the end of the process ends it. Takes
        at most drain_s, grace_s and a few seconds.
        """
        self._health.begin_stop()
        await _wait(hurry, self._config.drain_s)
        self._stop_check()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        ended = await self._server.stop(self._config.grace_s, hurry)
        closes = (
            self._threads.supervisor.close,
            *(threads.close for threads in self._threads.others()),
            self._use_cases.close,
            self._endpoint.stop,
            self._tracer.close,
        )
        supervised, *others = await asyncio.gather(*(ends_in_time(close, _CLOSE_S) for close in closes))
        if self._config.probe_port:
            await self._probes.stop()
        # A tick that is still at work may start a worker: the folder is free when it has ended, or the process has.
        if self._lock is not None and supervised:
            self._lock.release()
        return ended and supervised and all(others)


def build_service(config: ServiceConfig) -> Service:
    """Put the service together and make its data folder ready; must be called inside the event loop that will run it.

    Raises OSError if the folder cannot be used or the database is not the one that belongs to it, DatabaseDamaged,
    DatabaseTooNew if a newer version has written it.
    """
    _require_packages(config)
    on_gpu = Role.TRANSLATION in config.roles and _finds_gpu(config)
    config = with_automatic(config, find_machine(), on_gpu=on_gpu)
    trains = Role.TRAINING in config.roles
    folder = DataFolder(config.data_dir)
    folder.create()
    os.umask(folder.umask())  # of this process and its workers
    lock = FolderLock(folder.root / "training-service.lock") if trains else None
    if lock is not None:
        lock.acquire()
    metrics = _build_metrics(config)
    stores = _open_stores(folder, config, metrics.store)
    metrics.store.watch_damage(stores.integrity.damage)
    stores.models.recover()
    if trains:
        stores.runs.recover()
        sweep(stores.database, folder)
        stores.corpora.recover()
        empty_trash(folder.trash, time.time_ns())
    tracer = open_tracer(TraceConfig(endpoint=config.trace_endpoint, sample_ratio=config.trace_sample_ratio))
    threads = _build_threads()
    use_cases = _build_use_cases(stores, config, metrics, threads, tracer)
    observer = RunObserver(
        stores.runs, stores.folders, metrics.registry, metrics.store, ObserverConfig(), threads.observer
    )
    around = _build_call_parts(RpcMetrics(metrics.registry), tracer, threads, config)
    translations = TranslationMetrics(metrics.registry, use_cases.translation.queued_tokens, config.queue_tokens)
    _export_state(metrics, folder, use_cases, around.health, config)
    supervisor = _build_supervisor(stores, config, metrics.launches, threads.supervisor, lock) if trains else None
    return Service(
        config=config,
        lock=lock,
        server=_build_server(use_cases, around, translations, threads, config),
        health_servicer=around.health,
        probes=health.ProbeServer(around.health, (around.probe_interceptor,), config.probe_host, config.probe_port),
        endpoint=MetricsEndpoint(
            metrics.registry, config.metrics_host, config.metrics_port, host_names=host_names(config.metrics_host_names)
        ),
        background=(
            _build_prober(stores, use_cases, around.health, threads.probe, config, supervisor),
            _build_housekeeping(stores, config, threads.housekeeping, trains=trains),
            *(() if supervisor is None else (supervisor, observer)),
        ),
        use_cases=use_cases,
        threads=threads,
        tracer=tracer,
        supervisor=supervisor,
        stop_check=stores.integrity.stop,
    )


def import_model(config: ServiceConfig, bundle: Path, name: str) -> ModelVersion:
    """Publish a bundle that was trained elsewhere."""
    folder = DataFolder(config.data_dir)
    folder.create()
    os.umask(folder.umask())  # of this process and its workers
    return _open_stores(folder, config).models.import_bundle(bundle, name)


def _build_threads() -> _Threads:
    return _Threads(
        probe=Threads(1, "probe"),
        supervisor=Threads(1, "supervisor"),
        observer=Threads(1, "observer"),
        feed=Threads(_FEED_THREADS, "feed"),
        messages=Threads(MESSAGE_THREADS, "messages"),
        housekeeping=Threads(1, "housekeeping"),
        writes=Threads(_WRITING_THREADS, "write"),
        uploads=UploadThreads(
            writing=Threads(_UPLOAD_WRITING_THREADS, "upload"),
            checking=ThreadsBySize(_UPLOAD_CHECKING_THREADS, "check", _SMALL_UPLOAD_BYTES),
        ),
    )


def _build_metrics(config: ServiceConfig) -> _Metrics:
    registry = new_registry()
    return _Metrics(
        registry=registry,
        store=StoreMetrics(registry),
        loads=LoadMetrics(registry),
        launches=LaunchMetrics(registry),
        engines=EngineCounts(CacheMemory(config.cache_memory_mib * _BYTES_PER_MIB)),
    )


def _export_state(
    metrics: _Metrics,
    folder: DataFolder,
    use_cases: _UseCases,
    servicer: health.HealthServicer,
    config: ServiceConfig,
) -> None:
    """Export what the parts know themselves, each time Prometheus asks."""
    registry, loaded = metrics.registry, use_cases.loaded
    tell_build(registry, config.roles)
    DataFolderCollector(registry, folder.root)
    HealthCollector(registry, servicer.serving)
    EngineCollector(registry, metrics.engines)
    LoadedModelsCollector(registry, tuple if loaded is None else loaded.loaded)
    if (nvml := open_nvml()) is not None:
        GpuCollector(registry, nvml)


def _open_stores(folder: DataFolder, config: ServiceConfig, metrics: StoreMetrics | None = None) -> _Stores:
    refuse_new_database(folder)
    if not is_new(folder.database):
        refuse_damaged(folder.database)
    integrity = DatabaseIntegrity(folder.database)
    database = open_database(
        folder.database,
        on_failure=None if metrics is None else metrics.failed,
        on_damage=integrity.met,
        on_unreadable=None if metrics is None else metrics.found_unreadable,
    )
    upgrade(database)
    space = FreeSpace(folder.root, config.min_free_mib)
    return _Stores(
        folder=folder,
        space=space,
        database=database,
        integrity=integrity,
        runs=SqlRunStore(database),
        folders=FileRunFolders(folder),
        corpora=FileCorpusStore(database, folder, CorpusLimits(max_bytes=config.max_corpus_bytes), space),
        models=FileModelStore(database, folder, space, examine=examine_bundle),
    )


def _build_housekeeping(stores: _Stores, config: ServiceConfig, thread: Threads, *, trains: bool) -> Housekeeping:
    """Every process clears away what calls have left. The one that trains also deletes what nobody needs any more."""
    database, folder = stores.database, stores.folder

    def clear_away() -> None:
        clean_up(stores.corpora.sweep, stores.models.sweep)

    def hourly(name: str, work: Callable[[], None]) -> Duty:
        return Duty(name=name, work=work, interval_s=_HOUR_S, first_s=_HOUR_S)

    duties = [
        Duty(name="check the database", work=stores.integrity.check, interval_s=_DAY_S, first_s=_HOUR_S),
        hourly("clear away", clear_away),
        hourly("delete", lambda: finish_deletions(database, folder)),
    ]
    if trains:
        duties.append(hourly("empty the trash", lambda: empty_trash(folder.trash, time.time_ns())))
        if days := config.keep_checkpoints_days:
            duties.append(
                hourly("remove old checkpoints", lambda: remove_old_checkpoints(database, folder, days, time.time_ns()))
            )
        if limit_mib := config.max_prepared_mib:
            duties.append(
                hourly(
                    "limit the prepared corpora", lambda: limit_prepared(folder.prepared, limit_mib * _BYTES_PER_MIB)
                )
            )
    return Housekeeping(duties, thread)


def _build_use_cases(
    stores: _Stores, config: ServiceConfig, metrics: _Metrics, threads: _Threads, tracer: Tracer
) -> _UseCases:
    pager = Pager(stores.folder.page_token_key())
    loaded = _build_loaded_models(stores, config, metrics) if Role.TRANSLATION in config.roles else None
    return _UseCases(
        training=TrainingUseCases(
            runs=stores.runs,
            folders=stores.folders,
            corpora=stores.corpora,
            models=stores.models,
            pager=pager,
            served=Role.TRAINING in config.roles,
            limits=RunLimits(
                max_queued=config.max_queued_runs,
                processes=config.processes_per_run,
                max_processes=config.max_processes_per_run,
                max_unfinished=config.max_unfinished_runs,
                max_parameters=config.max_parameters,
                max_batch_tokens=config.max_batch_tokens,
                max_hours=config.max_run_hours,
                memory_bytes=_training_memory_bytes(config),
            ),
            require_space=stores.space.require,
        ),
        feed=MetricsFeed(stores.runs, FeedConfig(heartbeat_s=config.heartbeat_s), threads.feed),
        corpora=CorpusUseCases(corpora=stores.corpora, pager=pager),
        models=ModelUseCases(models=stores.models, loaded=loaded, pager=pager),
        translation=TranslationUseCases(
            models=stores.models,
            loaded=loaded,
            splitter=SentencexSplitter(),
            limits=TranslationLimits(
                max_sentences=config.max_sentences,
                queue_tokens=config.queue_tokens,
                max_translation_tokens=config.max_translation_tokens,
            ),
            tracer=tracer,
        ),
        loaded=loaded,
    )


def _training_memory_bytes(config: ServiceConfig) -> int:
    """Return the memory that a run's processes have together: that of the GPUs, if there are any to train on, else the
    usable memory; 0 if nothing tells it."""
    nvml = None if config.device is Device.CPU else open_nvml()
    if nvml is not None and (of_gpus := gpu_memory_bytes(nvml)):
        return of_gpus
    memory = find_machine().memory
    return 0 if memory is None else memory.value


def _require_packages(config: ServiceConfig) -> None:
    """Refuse to start without what the roles need, instead of failing each run or call. Loads nothing."""
    needed = {Role.TRANSLATION: ("onnxruntime",), Role.TRAINING: ("torch", "onnx", "onnxruntime")}
    for role in sorted(config.roles):
        missing = [name for name in needed[role] if importlib.util.find_spec(name) is None]
        if missing:
            extras = "train and cpu (or gpu)" if role is Role.TRAINING else "cpu (or gpu)"
            raise OSError(
                f"the role {role.value} needs {', '.join(missing)}: install the extras {extras}, "
                "or leave the role out of --roles"
            )


def _build_loaded_models(stores: _Stores, config: ServiceConfig, metrics: _Metrics) -> LoadedModels:
    limits = LoadingLimits(
        max_loaded_models=config.max_loaded_models, memory_bytes=config.model_memory_mib * _BYTES_PER_MIB
    )
    return LoadedModels(stores.models, _build_loader(config, metrics.engines), limits, metrics.loads)


def _build_loader(config: ServiceConfig, counts: EngineCounts) -> BundleLoader:
    """Import ONNX Runtime only where it is used: a service without the translation role starts sooner."""
    from ferryman_service.translation.loader import ON_A_GPU, OnnxBundleLoader
    from ferryman_service.translation.onnx_model import CUDA, OnnxConfig
    from ferryman_service.translation.scheduler import SchedulerConfig

    scheduler, on_a_gpu = SchedulerConfig(threads=config.translation_threads), ON_A_GPU
    if config.max_batch_rows:
        scheduler, on_a_gpu = (replace(each, max_rows=config.max_batch_rows) for each in (scheduler, on_a_gpu))
    onnx_config = OnnxConfig(compute_type=ComputeType.FP16, device=CUDA, cuda_graphs=True)
    if not _finds_gpu(config):
        int8 = config.compute_type is ComputeChoice.INT8
        onnx_config = OnnxConfig(compute_type=ComputeType.INT8 if int8 else ComputeType.FP32)
    return OnnxBundleLoader(
        onnx_config,
        scheduler,
        on_a_gpu,
        rows_by_size=not config.max_batch_rows,
        max_translation_tokens=config.max_translation_tokens,
        counts=counts,
    )


def _finds_gpu(config: ServiceConfig) -> bool:
    from ferryman_service.translation.device_model import cuda_is_available

    return translates_on_gpu(config, cuda_is_available)


def translates_on_gpu(config: ServiceConfig, cuda_is_available: Callable[[], bool]) -> bool:
    """Tell whether models are translated with on a GPU; raises OSError if that was asked for and there is none."""
    if config.device is Device.CPU or config.compute_type in (ComputeChoice.FP32, ComputeChoice.INT8):
        return False
    if cuda_is_available():
        return True
    cure = "install the extra gpu and a driver for it, or choose"
    if config.device is Device.CUDA:
        raise OSError(f"--device cuda: ONNX Runtime has no GPU here; {cure} --device cpu")
    if config.compute_type is ComputeChoice.FP16:
        raise OSError(f"--compute-type fp16 is for CUDA, and ONNX Runtime has no GPU here; {cure} fp32 or int8")
    return False


def _build_supervisor(
    stores: _Stores, config: ServiceConfig, launches: LaunchMetrics, thread: Threads, lock: FolderLock | None
) -> Supervisor:
    flags = _worker_flags(config)

    def command(processes: int) -> tuple[str, ...]:
        return (*worker_command(processes), *flags)

    launch = LaunchConfig(data_dir=stores.folder.root, command=command, nice=config.worker_nice)
    launcher = ProcessLauncher(launch, stores.folder.worker_log, stores.folder.scratch_dir)
    supervisor = SupervisorConfig(
        max_concurrent_runs=config.max_concurrent_runs,
        max_restarts=config.max_restarts,
        backoff_s=config.restart_backoff_s,
        pause_grace_s=config.pause_grace_s,
        silence_s=config.worker_silence_s,
    )
    return Supervisor(stores.runs, launcher, supervisor, thread, launches, lock, stores.space.has_room)


def _worker_flags(config: ServiceConfig) -> tuple[str, ...]:
    """Return what a worker is told of this process's configuration."""
    logs = ("--log-level", config.log_level, "--log-format", config.log_format.value)
    sentences = ("--log-sentences",) if config.log_sentences else ()
    ratio = str(config.trace_sample_ratio)
    traces = ("--trace-endpoint", config.trace_endpoint, "--trace-sample-ratio", ratio) if config.trace_endpoint else ()
    return ("--device", config.device.value, *logs, *sentences, *traces)


def _build_call_parts(calls: RpcMetrics, tracer: Tracer, threads: _Threads, config: ServiceConfig) -> _CallParts:
    shutdown = Shutdown()
    by_role = {Role.TRAINING: health.TRAINING, Role.TRANSLATION: health.TRANSLATION}
    serving = (health.CORPORA, health.MODELS, *(by_role[role] for role in config.roles))
    messages = Messages(
        RequestBounds(element_bounds(config.max_sentences)),
        AnswerBudget(config.answer_memory_mib * 2**20),
        threads.messages,
    )
    scopes = CallScopes(tracer, log_sentences=config.log_sentences)
    limits = _request_limits(config)
    return _CallParts(
        shutdown=shutdown,
        limits=limits,
        interceptor=CallInterceptor(calls, shutdown, scopes, limits, messages),
        probe_interceptor=CallInterceptor(calls, shutdown, scopes, health.PROBE_LIMITS, messages),
        health=health.HealthServicer(shutdown, serving),
        tracer=tracer,
    )


def _request_limits(config: ServiceConfig) -> RequestLimits:
    return RequestLimits(
        calls=config.max_calls,
        streams=config.max_streams,
        transfers=config.max_transfers,
        connections=min(config.max_connections, max(1, open_files.limit() // 4)),
        message_memory_bytes=config.message_memory_mib * _BYTES_PER_MIB,
    )


def _build_prober(
    stores: _Stores,
    use_cases: _UseCases,
    servicer: health.HealthServicer,
    thread: Threads,
    config: ServiceConfig,
    supervisor: Supervisor | None,
) -> health.HealthProber:
    writes = Role.TRAINING in config.roles
    probe = DatabaseProbe(stores.database, writes=writes, integrity=stores.integrity)
    supervises = (lambda: True) if supervisor is None else supervisor.works
    readiness = Readiness(probe, use_cases.loaded, thread, supervises, stores.space.has_room)
    return health.HealthProber(servicer, readiness, health.ProberConfig())


def _build_server(
    use_cases: _UseCases,
    around: _CallParts,
    translations: TranslationMetrics,
    threads: _Threads,
    config: ServiceConfig,
) -> rpc.RpcServer:
    shutdown = around.shutdown
    watch = TranslationWatch(around.tracer, log_sentences=config.log_sentences)
    servicers = rpc.Servicers(
        training=TrainingServicer(
            use_cases.training, use_cases.feed, shutdown, threads.writes, around.tracer, threads.messages
        ),
        corpora=CorpusServicer(use_cases.corpora, threads.uploads, threads.writes),
        models=ModelServicer(use_cases.models, threads.writes),
        translation=TranslationServicer(use_cases.translation, translations, shutdown, watch, threads.messages),
    )
    rpc_config = rpc.RpcConfig(
        host=config.host,
        port=config.port,
        reflection=config.reflection,
        max_connection_age_s=config.max_connection_age_s,
        max_connection_age_grace_s=config.max_connection_age_grace_s,
        limits=around.limits,
    )
    return rpc.RpcServer(servicers, around.health, around.interceptor, shutdown, rpc_config)


async def _wait(hurry: asyncio.Event, limit_s: float) -> None:
    """Wait for so long, or until `hurry` is set."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(hurry.wait(), limit_s)


async def ends_in_time(work: Callable[[], object], limit_s: float) -> bool:
    """Do the work in a thread that holds up nobody, and tell whether it has ended in time."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def do() -> None:
        try:
            work()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=do, name="close", daemon=True).start()
    await _wait(ended, limit_s)
    return ended.is_set()


async def _run_for_ever(part: _Part) -> None:
    """Run a part in the background; a bug in it is logged, and must not leave the runs without a supervisor, or the
    probes without news. One that fails at once is begun again after pauses that double."""
    pause_s = _RESTART_PAUSE_S
    while True:
        began_s = time.monotonic()
        try:
            await part.run()
        except Exception:  # noqa: BLE001
            if time.monotonic() - began_s > _MAX_RESTART_PAUSE_S:
                pause_s = _RESTART_PAUSE_S
            _log.exception("%s failed, starting it again in %g s", type(part).__name__, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_RESTART_PAUSE_S)
