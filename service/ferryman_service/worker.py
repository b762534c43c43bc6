"""The training worker: a program of its own, one process per device.

    python -m ferryman_service.worker --data-dir D --run-id R --attempt N --processes 2

It takes its task from the data folder's database and writes its records, checkpoints and model there; it needs no
service to be alive. The first process, rank 0, starts the others, claims the attempt, reports and publishes; the others
train beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from ferryman_service.domain.heartbeat import Heartbeat
from ferryman_service.domain.ids import RUN_PREFIX, is_id
from ferryman_service.domain.tracing import NULL_TRACER, Tracer
from ferryman_service.launch.group import start_others
from ferryman_service.launch.heartbeat import HEARTBEAT, beat
from ferryman_service.launch.launcher import read_log_tail
from ferryman_service.launch.process import current_process_identity, die_with_parent, end_on_sigterm
from ferryman_service.observability.logs import LogConfig, configure_logging
from ferryman_service.observability.tracing import TraceConfig, open_tracer
from ferryman_service.stores.layout import DataFolder

_log = logging.getLogger(__name__)
_PATIENCE_S: Final = 20.0
"""Of the 30 seconds that SIGTERM leaves, what the work at hand gets to come to an end."""
_LEAVE_S: Final = 7.0
"""And what the database gets to take down that it did not."""
_MEETING: Final = "meeting"
"""The file by which the processes of a run find each other, in the attempt's own folder."""


def main() -> int:
    """Do one attempt of one run; the exit status is 0 if the run ended as it should, however that was."""
    arguments = _parse(sys.argv[1:])
    # A session that ends, or a service that dies while this process is stopped, is no reason to end.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    configure_logging(_log_config(arguments))
    return _lead(arguments) if arguments.rank == 0 else _follow(arguments)


def _lead(arguments: argparse.Namespace) -> int:
    """Be the first process: start the others, claim the attempt and do it."""
    folder = DataFolder(arguments.data_dir)
    scratch = folder.scratch_dir(arguments.run_id, arguments.attempt)
    heartbeat = Heartbeat()
    with _kept_while_working(scratch):
        beat(scratch / HEARTBEAT, heartbeat)
        start_others(arguments.processes)
        stop = threading.Event()
        with _environment(_private_environment() if arguments.private_environment_on_stdin else {}):
            tracer = open_tracer(_trace_config(arguments))
        ports = _build(arguments, stop, tracer, heartbeat)

        def leave() -> None:
            leave_attempt(ports, arguments.run_id, arguments.attempt)
            shutil.rmtree(scratch, ignore_errors=True)

        # The others follow the checkpoint that this process leaves after its step. Where that takes too long, as in the
        # middle of an export, the run goes on from its last checkpoint.
        end_on_sigterm(stop, leave, status=0, patience_s=_PATIENCE_S, leave_s=_LEAVE_S)
        _log.info("attempt %d of %s", arguments.attempt, arguments.run_id)
        me, run_dir = current_process_identity(), folder.run_dir(arguments.run_id)
        with contextlib.closing(tracer):
            succeeded = execute_attempt(ports, arguments.run_id, arguments.attempt, me, run_dir)
        if not succeeded:
            _log.info("nothing was published")
    return 0


def _follow(arguments: argparse.Namespace) -> int:
    """Be one of the other processes, which the first has started."""
    die_with_parent()
    stop = threading.Event()
    end_on_sigterm(stop, lambda: None, status=1, patience_s=_PATIENCE_S, leave_s=_LEAVE_S)
    ports = _build(arguments, stop, NULL_TRACER, Heartbeat())
    run_dir = DataFolder(arguments.data_dir).run_dir(arguments.run_id)
    return 0 if follow_attempt(ports, arguments.run_id, arguments.attempt, run_dir) else 1


@contextmanager
def _kept_while_working(scratch: Path) -> Iterator[None]:
    """Have the folder of the attempt's temporary files, which the launcher has made, until the attempt has ended."""
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _private_environment() -> Mapping[str, str]:
    """Return the variables that the launcher wrote to the standard input."""
    variables: dict[str, str] = json.loads(sys.stdin.buffer.read() or b"{}")
    return variables


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have the variables in the environment for a while: libraries read their settings there."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _log_config(arguments: argparse.Namespace) -> LogConfig:
    return LogConfig(
        format=arguments.log_format,
        level=arguments.log_level,
        sentences=arguments.log_sentences,
        fields={"run": arguments.run_id, "attempt": str(arguments.attempt), "rank": str(arguments.rank)},
        reads_text=True,
    )


def _trace_config(arguments: argparse.Namespace) -> TraceConfig:
    return TraceConfig(
        endpoint=arguments.trace_endpoint, sample_ratio=arguments.trace_sample_ratio, service="ferryman-worker"
    )


def _build(arguments: argparse.Namespace, stop: threading.Event, tracer: Tracer, heartbeat: Heartbeat) -> WorkerPorts:
    """The composition root of the worker. It imports what takes seconds, in which the first process may die."""
    from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
    from ferryman_service.stores.database import open_database
    from ferryman_service.stores.models import FileModelStore
    from ferryman_service.stores.reserve import free_reserve, make_reserve
    from ferryman_service.stores.run_folders import FileRunFolders
    from ferryman_service.stores.runs import SqlRunStore
    from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
    from ferryman_service.training.export import OnnxExporter
    from ferryman_service.training.ranks import ALONE, Group
    from ferryman_service.translation.loader import OnnxBundleLoader
    from ferryman_service.translation.onnx_model import OnnxConfig
    from ferryman_service.translation.scheduler import SchedulerConfig

    machine, folder = find_machine(), DataFolder(arguments.data_dir)
    group = ALONE
    if arguments.processes > 1:
        meeting = folder.scratch_dir(arguments.run_id, arguments.attempt) / _MEETING
        group = Group(rank=arguments.rank, size=arguments.processes, meeting=meeting)
    threads = torch_threads(machine, os.environ, arguments.processes)
    engine = EngineConfig(device=arguments.device.value, threads=threads, group=group)
    make_reserve(folder.reserve)
    database = open_database(folder.database)
    models = FileModelStore(database, folder)
    return WorkerPorts(
        runs=SqlRunStore(database),
        corpora=FileCorpusStore(database, folder, CorpusLimits()),
        models=models,
        engine=TorchTrainingEngine(engine, tracer=tracer, heartbeat=heartbeat),
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


def torch_threads(machine: Machine, environment: Mapping[str, str], processes: int) -> int | None:
    """Return this process's share of the usable CPUs; None if OMP_NUM_THREADS is set, which torch reads by itself.

    The launcher always sets it: this is for a worker that is started by hand.
    """
    if environment.get("OMP_NUM_THREADS"):
        return None
    return max(1, machine.cpus.value // processes)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ferryman-worker", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--private-environment-on-stdin", action="store_true")
    parser.add_argument("--device", type=Device, default=Device.AUTO)
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--log-format", type=LogFormat, default=LogFormat.CONSOLE)
    parser.add_argument("--log-sentences", action="store_true")
    parser.add_argument("--trace-endpoint", default="")
    parser.add_argument("--trace-sample-ratio", type=float, default=1.0)
    arguments = parser.parse_args(argv)
    if not is_id(arguments.run_id, RUN_PREFIX):
        parser.error(f"--run-id {arguments.run_id!r} is not the id of a run")
    if not 0 <= arguments.rank < arguments.processes:
        parser.error(f"--rank {arguments.rank} is not one of {arguments.processes} processes")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
