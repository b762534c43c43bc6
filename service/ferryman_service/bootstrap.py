"""The composition root of the service: the one file that names its concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ferryman_service.application.corpora import CorpusUseCases
from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.application.metrics_feed import FeedConfig, MetricsFeed
from ferryman_service.application.models import ModelUseCases
from ferryman_service.application.paging import Pager
from ferryman_service.application.ports import BundleLoader
from ferryman_service.application.supervisor import Supervisor, SupervisorConfig
from ferryman_service.application.training import RunLimits, TrainingUseCases
from ferryman_service.application.translating import TranslationLimits, TranslationUseCases
from ferryman_service.config.service_config import ComputeChoice, Device, Role, ServiceConfig
from ferryman_service.domain.models import ModelVersion
from ferryman_service.domain.translation import ComputeType
from ferryman_service.launch.torchrun import LaunchConfig, TorchrunLauncher, torchrun_command
from ferryman_service.observability.http import MetricsEndpoint, new_registry
from ferryman_service.observability.rpc import RpcMetrics
from ferryman_service.observability.training import ObserverConfig, RunObserver
from ferryman_service.observability.translation import TranslationMetrics
from ferryman_service.rpc import server as rpc
from ferryman_service.rpc.corpora import CorpusServicer
from ferryman_service.rpc.interceptors import CallInterceptor
from ferryman_service.rpc.models import ModelServicer
from ferryman_service.rpc.shutdown import Shutdown
from ferryman_service.rpc.training import TrainingServicer
from ferryman_service.rpc.translation import TranslationServicer
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import open_database, upgrade
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.lock import FolderLock
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.run_folders import FileRunFolders
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.text.sentences import SentencexSplitter

_log = logging.getLogger(__name__)
_HEALTH_TIMEOUT_S: Final = 5.0
_RESTART_PAUSE_S: Final = 1.0
_BYTES_PER_MIB: Final = 2**20


@dataclass(frozen=True)
class _Stores:
    folder: DataFolder
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


class Service:
    """Everything that runs in the service's process. `start` and `stop` are called once each, from one event loop."""

    def __init__(
        self,
        *,
        config: ServiceConfig,
        lock: FolderLock | None,
        server: rpc.RpcServer,
        endpoint: MetricsEndpoint,
        background: tuple[Supervisor | RunObserver, ...],
        use_cases: _UseCases,
    ) -> None:
        """Store the parts."""
        self._config = config
        self._lock = lock
        self._server = server
        self._endpoint = endpoint
        self._background = background
        self._use_cases = use_cases
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0
        self.metrics_port = 0

    async def start(self) -> None:
        """Listen, then begin to work; raises OSError if an address is taken."""
        self.port = await self._server.start()
        if self._config.metrics_port:
            self.metrics_port = self._endpoint.start()
        self._tasks = [asyncio.create_task(_run_for_ever(part)) for part in self._background]

    async def stop(self) -> None:
        """Stop taking calls, let those in flight end, stop. Workers go on without us."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._server.stop(self._config.grace_s)
        await asyncio.to_thread(self._use_cases.close)
        self._endpoint.stop()
        if self._lock is not None:
            self._lock.release()


def build_service(config: ServiceConfig) -> Service:
    """Put the service together and make its data folder ready; must be called inside the event loop that will run it.

    Raises OSError if the folder cannot be used, DatabaseTooNew if a newer version has written it.
    """
    _require_packages(config)
    trains = Role.TRAINING in config.roles
    folder = DataFolder(config.data_dir)
    folder.create()
    lock = FolderLock(folder.root / "training-service.lock") if trains else None
    if lock is not None:
        lock.acquire()
    stores = _open_stores(folder, config)
    stores.models.recover()
    if trains:
        stores.corpora.recover()
        stores.runs.recover()
        stores.folders.delete_orphans(stores.runs.ids())
    registry = new_registry()
    use_cases = _build_use_cases(stores, config)
    observer = RunObserver(stores.runs, registry, ObserverConfig())
    return Service(
        config=config,
        lock=lock,
        server=_build_server(
            use_cases,
            RpcMetrics(registry),
            TranslationMetrics(registry, use_cases.translation.queued_tokens),
            config,
        ),
        endpoint=MetricsEndpoint(registry, config.metrics_host, config.metrics_port),
        background=(_build_supervisor(stores, config), observer) if trains else (),
        use_cases=use_cases,
    )


def import_model(config: ServiceConfig, bundle: Path, name: str) -> ModelVersion:
    """Publish a bundle that was trained elsewhere."""
    folder = DataFolder(config.data_dir)
    folder.create()
    return _open_stores(folder, config).models.import_bundle(bundle, name)


def check_health(config: ServiceConfig) -> bool:
    """Ask the server at the configured address whether it serves."""
    return rpc.check_health(f"{config.host}:{config.port}", _HEALTH_TIMEOUT_S)


def _open_stores(folder: DataFolder, config: ServiceConfig) -> _Stores:
    database = open_database(folder.database)
    upgrade(database)
    return _Stores(
        folder=folder,
        runs=SqlRunStore(database),
        folders=FileRunFolders(folder),
        corpora=FileCorpusStore(database, folder, CorpusLimits(max_bytes=config.max_corpus_bytes)),
        models=FileModelStore(database, folder),
    )


def _build_use_cases(stores: _Stores, config: ServiceConfig) -> _UseCases:
    pager = Pager(stores.folder.page_token_key())
    loaded = _build_loaded_models(stores, config) if Role.TRANSLATION in config.roles else None
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
            ),
        ),
        feed=MetricsFeed(stores.runs, FeedConfig(heartbeat_s=config.heartbeat_s)),
        corpora=CorpusUseCases(corpora=stores.corpora, pager=pager),
        models=ModelUseCases(models=stores.models, loaded=loaded, pager=pager),
        translation=TranslationUseCases(
            models=stores.models,
            loaded=loaded,
            splitter=SentencexSplitter(),
            limits=TranslationLimits(max_sentences=config.max_sentences, queue_tokens=config.queue_tokens),
        ),
        loaded=loaded,
    )


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


def _build_loaded_models(stores: _Stores, config: ServiceConfig) -> LoadedModels:
    limits = LoadingLimits(
        max_loaded_models=config.max_loaded_models, memory_bytes=config.model_memory_mib * _BYTES_PER_MIB
    )
    return LoadedModels(stores.models, _build_loader(config), limits)


def _build_loader(config: ServiceConfig) -> BundleLoader:
    """Import ONNX Runtime only where it is used: a service without the translation role starts sooner."""
    from ferryman_service.translation.device_model import cuda_is_available
    from ferryman_service.translation.loader import ON_A_GPU, OnnxBundleLoader
    from ferryman_service.translation.onnx_model import CUDA, OnnxConfig
    from ferryman_service.translation.scheduler import SchedulerConfig

    scheduler, on_a_gpu = SchedulerConfig(threads=config.translation_threads), ON_A_GPU
    if config.max_batch_rows:
        scheduler, on_a_gpu = (replace(each, max_rows=config.max_batch_rows) for each in (scheduler, on_a_gpu))
    onnx_config = OnnxConfig(compute_type=ComputeType.FP16, device=CUDA)
    if not translates_on_gpu(config, cuda_is_available):
        int8 = config.compute_type is ComputeChoice.INT8
        onnx_config = OnnxConfig(compute_type=ComputeType.INT8 if int8 else ComputeType.FP32)
    return OnnxBundleLoader(onnx_config, scheduler, on_a_gpu, rows_by_size=not config.max_batch_rows)


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


def _build_supervisor(stores: _Stores, config: ServiceConfig) -> Supervisor:
    def command(processes: int) -> tuple[str, ...]:
        return (*torchrun_command(processes), "--device", config.device.value, "--log-level", config.log_level)

    launcher = TorchrunLauncher(LaunchConfig(data_dir=stores.folder.root, command=command), stores.folder.worker_log)
    supervisor = SupervisorConfig(
        max_concurrent_runs=config.max_concurrent_runs,
        max_restarts=config.max_restarts,
        backoff_s=config.restart_backoff_s,
        pause_grace_s=config.pause_grace_s,
    )
    return Supervisor(stores.runs, launcher, supervisor)


def _build_server(
    use_cases: _UseCases, calls: RpcMetrics, translations: TranslationMetrics, config: ServiceConfig
) -> rpc.RpcServer:
    shutdown = Shutdown()
    servicers = rpc.Servicers(
        training=TrainingServicer(use_cases.training, use_cases.feed, shutdown),
        corpora=CorpusServicer(use_cases.corpora),
        models=ModelServicer(use_cases.models),
        translation=TranslationServicer(use_cases.translation, translations, shutdown),
    )
    by_role = {Role.TRAINING: rpc.TRAINING, Role.TRANSLATION: rpc.TRANSLATION}
    rpc_config = rpc.RpcConfig(
        host=config.host,
        port=config.port,
        reflection=config.reflection,
        serving=(rpc.CORPORA, rpc.MODELS, *(by_role[role] for role in config.roles)),
    )
    return rpc.RpcServer(servicers, CallInterceptor(calls), shutdown, rpc_config)


async def _run_for_ever(part: Supervisor | RunObserver) -> None:
    """Run a part in the background; a bug in it is logged, and must not leave the runs without a supervisor."""
    while True:
        try:
            await part.run()
        except Exception:  # noqa: BLE001
            _log.exception("%s failed, starting it again", type(part).__name__)
            await asyncio.sleep(_RESTART_PAUSE_S)
