"""The training worker: a torch.distributed program of its own, started by torchrun, one process per device.

    torchrun --standalone --nproc-per-node=1 -m ferryman_service.worker --data-dir D --run-id R --attempt N

It takes its task from the data folder's database and writes its records, checkpoints and model there; it needs no
service to be alive. Rank 0 claims the attempt, reports and publishes; the others train beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from ferryman_service.application.execution import (
    WorkerPorts,
    execute_attempt,
    follow_attempt,
    initial_weights,
    leave_attempt,
)
from ferryman_service.application.reporting import ReporterConfig
from ferryman_service.config.automatic import decoding_threads
from ferryman_service.config.resources import Machine, find_machine
from ferryman_service.config.service_config import Device, LogFormat
from ferryman_service.domain.ids import RUN_PREFIX, is_id
from ferryman_service.domain.tracing import NULL_TRACER, Tracer
from ferryman_service.launch.process import current_process_identity, die_with_parent, end_on_sigterm
from ferryman_service.launch.torchrun import read_log_tail
from ferryman_service.observability.logs import LogConfig, configure_logging
from ferryman_service.observability.tracing import TraceConfig, open_tracer
from ferryman_service.stores.layout import DataFolder

_log = logging.getLogger(__name__)
_PATIENCE_S: Final = 20.0
"""Of the 30 seconds that SIGTERM leaves, what the work at hand gets to come to an end."""
_LEAVE_S: Final = 7.0
"""And what the database gets to take down that it did not."""


def main() -> int:
    """Do one attempt of one run; the exit status is 0 if the run ended as it should, however that was."""
    arguments = _parse(sys.argv[1:])
    die_with_parent()
    rank = os.environ.get("RANK", "0")
    configure_logging(_log_config(arguments, rank))
    stop = threading.Event()
    folder = DataFolder(arguments.data_dir)
    is_first = int(rank) == 0
    # The others do the same at the same time: one of them is enough.
    tracer = open_tracer(_trace_config(arguments)) if is_first else NULL_TRACER
    ports = _build(folder, arguments.device, stop, tracer)
    # torchrun passes SIGTERM on to all of its processes. The first leaves a checkpoint after its step, and the others
    # follow it. Where that takes too long, as in the middle of an export, the run goes on from its last checkpoint.
    leave = partial(leave_attempt, ports, arguments.run_id, arguments.attempt) if is_first else lambda: None
    end_on_sigterm(stop, leave, status=0 if is_first else 1, patience_s=_PATIENCE_S, leave_s=_LEAVE_S)
    run_dir = folder.run_dir(arguments.run_id)
    _log.info("attempt %d of %s", arguments.attempt, arguments.run_id)
    if not is_first:
        return 0 if follow_attempt(ports, arguments.run_id, arguments.attempt, run_dir) else 1
    with contextlib.closing(tracer):
        succeeded = execute_attempt(ports, arguments.run_id, arguments.attempt, current_process_identity(), run_dir)
    if not succeeded:
        _log.info("nothing was published")
    return 0


def _log_config(arguments: argparse.Namespace, rank: str) -> LogConfig:
    return LogConfig(
        format=arguments.log_format,
        level=arguments.log_level,
        sentences=arguments.log_sentences,
        fields={"run": arguments.run_id, "attempt": str(arguments.attempt), "rank": rank},
        reads_text=True,
    )


def _trace_config(arguments: argparse.Namespace) -> TraceConfig:
    return TraceConfig(
        endpoint=arguments.trace_endpoint, sample_ratio=arguments.trace_sample_ratio, service="ferryman-worker"
    )


def _build(folder: DataFolder, device: Device, stop: threading.Event, tracer: Tracer) -> WorkerPorts:
    """The composition root of the worker. It imports what takes seconds, in which torchrun's agent may die."""
    from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
    from ferryman_service.stores.database import open_database
    from ferryman_service.stores.models import FileModelStore
    from ferryman_service.stores.reserve import free_reserve, make_reserve
    from ferryman_service.stores.run_folders import FileRunFolders
    from ferryman_service.stores.runs import SqlRunStore
    from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
    from ferryman_service.training.export import OnnxExporter
    from ferryman_service.translation.loader import OnnxBundleLoader
    from ferryman_service.translation.onnx_model import OnnxConfig
    from ferryman_service.translation.scheduler import SchedulerConfig

    machine = find_machine()
    make_reserve(folder.reserve)
    database = open_database(folder.database)
    models = FileModelStore(database, folder)
    return WorkerPorts(
        runs=SqlRunStore(database),
        corpora=FileCorpusStore(database, folder, CorpusLimits()),
        models=models,
        engine=TorchTrainingEngine(
            EngineConfig(device=device.value, threads=torch_threads(machine, os.environ)), tracer=tracer
        ),
        exporter=OnnxExporter(),
        loader=OnnxBundleLoader(OnnxConfig(), SchedulerConfig(threads=decoding_threads(machine))),
        log_tail=lambda run_id, attempt: read_log_tail(folder.worker_log(run_id, attempt)),
        reporter=ReporterConfig(),
        prepared_dir=folder.prepared,
        trash_dir=folder.trash,
        initial=lambda run: initial_weights(models, FileRunFolders(folder), run),
        stop_requested=stop.is_set,
        free_reserve=partial(free_reserve, folder.reserve),
        tracer=tracer,
    )


def torch_threads(machine: Machine, environment: Mapping[str, str]) -> int | None:
    """Return this process's share of the usable CPUs; None if OMP_NUM_THREADS is set, which torch reads by itself.

    The launcher always sets it: this is for a worker that is started by hand.
    """
    if environment.get("OMP_NUM_THREADS"):
        return None
    return max(1, machine.cpus.value // int(environment.get("LOCAL_WORLD_SIZE", "1")))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ferryman-worker", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--device", type=Device, default=Device.AUTO)
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--log-format", type=LogFormat, default=LogFormat.CONSOLE)
    parser.add_argument("--log-sentences", action="store_true")
    parser.add_argument("--trace-endpoint", default="")
    parser.add_argument("--trace-sample-ratio", type=float, default=1.0)
    arguments = parser.parse_args(argv)
    if not is_id(arguments.run_id, RUN_PREFIX):
        parser.error(f"--run-id {arguments.run_id!r} is not the id of a run")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
