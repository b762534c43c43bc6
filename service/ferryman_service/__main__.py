"""The command `ferryman-service`: serve, health, config, import-model, verify, repair, trash.

What only some commands need is imported by them: a health check every few seconds must not cost a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ferryman_service.config import open_files
from ferryman_service.config.automatic import automatic_lines
from ferryman_service.config.resources import Machine, find_machine
from ferryman_service.config.service_config import ConfigMistakes, LogFormat, ServiceConfig
from ferryman_service.config.sources import Settings, add_arguments, load, plain_value
from ferryman_service.domain.errors import FerrymanError
from ferryman_service.domain.log_context import FIELDS
from ferryman_service.observability.logs import LogConfig, configure_logging

if TYPE_CHECKING:
    from ferryman_service import bootstrap
    from ferryman_service.stores.layout import DataFolder

_log = logging.getLogger(__name__)
_SWITCH_INTERVAL_S: Final = 0.001
"""A thread that computes in Python gives way after this: a translation asks for the interpreter some times a step."""
_STOP_S: Final = 5.0
"""What stopping may take beyond drain_s and grace_s."""
_HURRY_S: Final = 3.0
"""What it may take from the second signal on."""
_HEALTH_TIMEOUT_S: Final = 5.0
_LOGGING_COMMANDS: Final = ("serve", "import-model", "verify", "repair", "trash")
_PACKAGES: Final = (
    "alembic",
    "grpc_health",
    "grpc_reflection",
    "numpy",
    "prometheus_client",
    "sentencepiece",
    "sentencex",
    "sqlalchemy",
)
"""What the extra `server` brings; `config` does without."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0 is success, 1 a failure, 2 a wrong command line or configuration."""
    arguments = _parser().parse_args(argv)
    if arguments.command != "config" and (missing := [name for name in _PACKAGES if find_spec(name) is None]):
        text = f"ferryman-service: not installed: {', '.join(missing)}; run: pip install 'ferryman[server]'"
        print(text, file=sys.stderr)  # noqa: T201
        return 1
    try:
        settings = load(arguments, os.environ)
    except ConfigMistakes as error:
        return _report(error, arguments.command)
    if arguments.command == "config":
        return _config(settings, arguments)
    if arguments.command == "health":
        return _health(settings.config, arguments)
    return _use_stores(settings, arguments)


def _use_stores(settings: Settings, arguments: argparse.Namespace) -> int:
    config = settings.config
    configure_logging(LogConfig(format=config.log_format, level=config.log_level, sentences=config.log_sentences))
    _set_up_grpc(config)
    from ferryman_service.stores.database import DatabaseTooNew

    for warning in settings.warnings:
        _log.warning(warning)
    try:
        return _STORE_COMMANDS[arguments.command](config, arguments)
    except (FerrymanError, DatabaseTooNew, OSError) as error:
        return _fail(config, error)


def _set_up_grpc(config: ServiceConfig) -> None:
    """To be called before gRPC is imported for the first time."""
    # The service never forks; without this, gRPC's fork handlers run before each worker is started.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    if config.log_format is LogFormat.JSON:
        # gRPC's own lines are no JSON. What they tell of a failed start, ours do.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _fail(config: ServiceConfig, error: Exception | str) -> int:
    if config.log_format is LogFormat.JSON:
        _log.error(str(error))
    else:
        print(f"ferryman-service: {error}", file=sys.stderr)  # noqa: T201
    return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add_arguments(common)
    parser = argparse.ArgumentParser(
        prog="ferryman-service",
        description="Train encoder-decoder Transformers and serve them over gRPC. Each flag has an environment "
        "variable, shown in brackets, and a key in the configuration file. VARIABLE_FILE names a file that holds the "
        "value of VARIABLE. Flags take precedence over environment variables, and these over the configuration file.",
    )
    parser.add_argument("--version", action="version", version=f"ferryman-service {version('ferryman')}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "serve", parents=[common], help="Run the service until SIGTERM or SIGINT. A second signal stops it at once."
    )
    health = commands.add_parser(
        "health", parents=[common], help="Check the health of the service at --host and --port. Exit with 0 if SERVING."
    )
    health.add_argument("--probe", action="store_true", help="Ask the probe port, at --probe-host and --probe-port.")
    health.add_argument(
        "--service", default="", help="Check this gRPC service, or liveness. (default: all services of the process)"
    )
    config = commands.add_parser("config", parents=[common], help="Check or show the configuration.")
    what = config.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--check", action="store_true", help="List every error with its source. Exit with 2 if there is one."
    )
    what.add_argument(
        "--show", action="store_true", help="Print each value and its source as TOML, then the CPUs and memory found."
    )
    importing = commands.add_parser(
        "import-model", parents=[common], help="Publish a model bundle that was trained elsewhere."
    )
    importing.add_argument(
        "bundle",
        type=Path,
        help="Folder of the bundle: a download, or DATA_DIR/models/NAME/VERSION of the other server.",
    )
    importing.add_argument("name", help="Name of the model to publish, such as en-de.")
    _add_folder_commands(commands, common)
    return parser


def _add_folder_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    verifying = commands.add_parser(
        "verify", parents=[common], help="Check the data folder without changing it. Exit with 1 if it is damaged."
    )
    verifying.add_argument("--deep", action="store_true", help="Read every file and compare it with its digest.")
    repairing = commands.add_parser(
        "repair",
        parents=[common],
        help="Rebuild missing database rows from the data folder, and move other folders without a row to the trash. "
        "Stop all services first.",
    )
    repairing.add_argument("--dry-run", action="store_true", help="Print the repairs without making them.")
    commands.add_parser(
        "trash", parents=[common], help="List the trash of the data folder, with the reason for each entry."
    )


def _report(error: ConfigMistakes, command: str) -> int:
    count = len(error.mistakes)
    if error.log_format is LogFormat.JSON and command in _LOGGING_COMMANDS:
        configure_logging(LogConfig(format=LogFormat.JSON))
        for mistake in error.mistakes:
            _log.error(mistake.text)
        return 2
    print(f"ferryman-service: {count} error{'s' * (count > 1)} in the configuration", file=sys.stderr)  # noqa: T201
    for mistake in error.mistakes:
        print(f"  {mistake.text}", file=sys.stderr)  # noqa: T201
    return 2


def _config(settings: Settings, arguments: argparse.Namespace) -> int:
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
    lines = _shown(settings, find_machine()) if arguments.show else ["the configuration is valid"]
    for line in lines:
        print(line)  # noqa: T201
    return 0


def _shown(settings: Settings, machine: Machine) -> Iterator[str]:
    """Yield the configuration as TOML, then, as comments, what the machine has and what automatic options become."""
    yield from settings.lines()
    for line in (*machine.lines(), *automatic_lines(settings.config, machine)):
        yield f"# {line}"


def _serve(config: ServiceConfig, _: argparse.Namespace) -> int:
    open_files.raise_limit()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return asyncio.run(_serve_until_signal(config))


def _say(config: ServiceConfig, line: str) -> None:
    if config.log_format is LogFormat.JSON:  # then all output is
        _log.info(line)
    else:
        print(line, flush=True)  # noqa: T201


async def _serve_until_signal(config: ServiceConfig) -> int:
    from ferryman_service import bootstrap

    signals = _StopSignals(asyncio.get_running_loop(), config.drain_s + config.grace_s + _STOP_S)
    signals.heed()
    _log.info("starting", extra={FIELDS: _told_at_start(config)})
    service = bootstrap.build_service(config)
    try:
        await service.start()
    except OSError as error:
        # Here, since the servers that it holds must end before the loop does.
        signals.hurry.set()
        await service.stop(signals.hurry)
        return _fail(config, error)
    # What serving needs from start to end is no longer searched for garbage: a full collection would halt every thread
    # for 0.1 s and more.
    gc.collect()
    gc.freeze()
    # For scripts that took port 0: the addresses, on one line each, once everything serves.
    _say(config, f"serving on {config.host}:{service.port}")
    if service.probe_port:
        _say(config, f"probes on {config.probe_host}:{service.probe_port}")
    if service.metrics_port:
        _say(config, f"metrics on http://{config.metrics_host}:{service.metrics_port}/metrics")
    why = await _reason_to_stop(signals, service)
    ended = await service.stop(signals.hurry)
    if ended:
        _log.info("stopped")
    status = _fail(config, why) if why else 0
    if not ended:
        _end_process(status)
    return status


async def _reason_to_stop(signals: _StopSignals, service: bootstrap.Service) -> str:
    """Wait until the service must stop; return "" if it was told to, else why it cannot go on."""
    told, lost = asyncio.ensure_future(signals.stop.wait()), asyncio.ensure_future(service.folder_lost())
    await asyncio.wait((told, lost), return_when=asyncio.FIRST_COMPLETED)
    why = "" if told.done() else lost.result()
    for task in (told, lost):
        task.cancel()
    if why:
        signals.stop_by_itself()
    return why


def _told_at_start(config: ServiceConfig) -> Mapping[str, object]:
    """Return what tells one start from another; the ports are those that were asked for."""
    return {
        "version": version("ferryman"),
        "roles": plain_value(config.roles),
        "data_dir": str(config.data_dir.absolute()),
        "port": config.port,
        "probe_port": config.probe_port,
        "metrics_port": config.metrics_port,
        "device": config.device.value,
        "compute_type": config.compute_type.value,
        **find_machine().fields(),
        "open_files": open_files.limit(),
    }


class _StopSignals:
    """SIGTERM and SIGINT: the first one sets `stop`, the second one `hurry`. Each bounds the time until the process
    ends, whatever is stuck: another thread, or the event loop itself."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._loop = loop
        self._limit_s = limit_s
        self._told = False
        self._status = 0

    def heed(self) -> None:
        """Begin to listen; to be called in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not the loop's own handlers: they run only if the loop does.
            signal.signal(number, lambda *_: self._heed())

    def stop_by_itself(self) -> None:
        """Bound the time until the process ends, with exit status 1, as the first signal would."""
        self._status = 1
        self._told = True
        self._bound(self._limit_s)

    def _heed(self) -> None:
        # This may interrupt anything, a log line too: so what is said and done is left to the loop.
        limit_s, tell = (_HURRY_S, self._tell_again) if self._told else (self._limit_s, self._tell)
        self._told = True
        self._bound(limit_s)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            # Without the log fields of the call that is interrupted.
            self._loop.call_soon_threadsafe(tell, context=contextvars.Context())

    def _bound(self, limit_s: float) -> None:
        timer = threading.Timer(limit_s, _end_process, (self._status,))
        timer.daemon = True
        timer.start()

    def _tell(self) -> None:
        _log.info("stopping")
        self.stop.set()

    def _tell_again(self) -> None:
        _log.warning("second signal: stopping at once")
        self.hurry.set()


def _end_process(status: int) -> None:
    """End the process, which must stop, with what is stuck in it; exit status 0 if it was told to: it does so."""
    _log.warning("some tasks did not end in time; exiting without them")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _health(config: ServiceConfig, arguments: argparse.Namespace) -> int:
    from ferryman_service.rpc.health import address_of, check_health

    if arguments.probe and not config.probe_port:
        print("ferryman-service: --probe-port is 0, which turns the probe port off; leave out --probe", file=sys.stderr)  # noqa: T201
        return 2
    host, port = (config.probe_host, config.probe_port) if arguments.probe else (config.host, config.port)
    status = check_health(address_of(host, port), arguments.service, _HEALTH_TIMEOUT_S)
    print(status)  # noqa: T201
    return 0 if status == "SERVING" else 1


def _import_model(config: ServiceConfig, arguments: argparse.Namespace) -> int:
    from ferryman_service import bootstrap

    if not arguments.bundle.is_dir():
        raise NotADirectoryError(f"bundle folder {arguments.bundle} not found")
    published = bootstrap.import_model(config, arguments.bundle, arguments.name)
    print(f"published {published.reference}")  # noqa: T201
    return 0


def _data_folder(config: ServiceConfig) -> DataFolder:
    from ferryman_service.stores.layout import DataFolder

    if not config.data_dir.is_dir():
        raise NotADirectoryError(f"data folder {config.data_dir.absolute()} not found; set --data-dir")
    folder = DataFolder(config.data_dir)
    folder.create()
    return folder


def _verify(config: ServiceConfig, arguments: argparse.Namespace) -> int:
    from ferryman_service.stores.verify import verify

    report = verify(_data_folder(config), deep=arguments.deep)
    checked = ", ".join(f"{what}: {count}" for what, count in report.checked.items()) or "nothing"
    lines = [*report.findings, f"checked {checked}; damaged: {len(report.findings)}"]
    print("\n".join(lines))  # noqa: T201
    return 1 if report.findings else 0


def _repair(config: ServiceConfig, arguments: argparse.Namespace) -> int:
    from ferryman_service.stores.repair import repair

    lines = repair(_data_folder(config), dry_run=arguments.dry_run)
    if not lines:
        print("nothing to repair")  # noqa: T201
    elif arguments.dry_run:
        print("dry run, nothing was changed; planned repairs:")  # noqa: T201
    for line in lines:
        print(line)  # noqa: T201
    return 0


def _trash(config: ServiceConfig, _: argparse.Namespace) -> int:
    from ferryman_service.trash import list_trash

    entries = list_trash(_data_folder(config).trash)
    for entry in entries:
        until = datetime.fromtimestamp(entry.end_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M UTC")
        mib = entry.size_bytes() / 2**20
        print(f"{entry.folder.name}\t{entry.origin}\t{mib:.1f} MiB\tuntil {until}\t{entry.reason}")  # noqa: T201
    if not entries:
        print("the trash is empty")  # noqa: T201
    return 0


_STORE_COMMANDS: Final[Mapping[str, Callable[[ServiceConfig, argparse.Namespace], int]]] = {
    "serve": _serve,
    "import-model": _import_model,
    "verify": _verify,
    "repair": _repair,
    "trash": _trash,
}


if __name__ == "__main__":
    sys.exit(main())
