"""The command `ferryman-service`: serve, health, import-model."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ferryman_service import bootstrap
from ferryman_service.config.service_config import ServiceConfig, add_arguments, config_from
from ferryman_service.domain.errors import FerrymanError
from ferryman_service.stores.database import DatabaseTooNew


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0 is success, 1 a failure, 2 a wrong command line."""
    parser = _parser(os.environ)
    arguments = parser.parse_args(argv)
    try:
        config = config_from(arguments)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # The service never forks; without this, gRPC's fork handlers run before each worker is started.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    commands = {"serve": _serve, "health": _health, "import-model": _import_model}
    try:
        return commands[arguments.command](config, arguments)
    except (FerrymanError, DatabaseTooNew, OSError) as error:
        print(f"ferryman-service: {error}", file=sys.stderr)  # noqa: T201
        return 1


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add_arguments(common, environment)
    parser = argparse.ArgumentParser(
        prog="ferryman-service",
        description="Trains encoder-decoder Transformers and serves them over gRPC. "
        "Every flag can also be set by the environment variable named beside it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", parents=[common], help="serve until SIGTERM or SIGINT")
    commands.add_parser("health", parents=[common], help="exit with 0 if the server at --host and --port is serving")
    importing = commands.add_parser(
        "import-model", parents=[common], help="publish a model bundle that was trained elsewhere"
    )
    importing.add_argument(
        "bundle", type=Path, help="its folder: a download, or DATA_DIR/models/NAME/VERSION of the other server"
    )
    importing.add_argument("name", help="the model to publish it as, such as en-de")
    return parser


def _serve(config: ServiceConfig, _: argparse.Namespace) -> int:
    return asyncio.run(_serve_until_signal(config))


async def _serve_until_signal(config: ServiceConfig) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = bootstrap.build_service(config)
    await service.start()
    # For scripts that took port 0: the addresses, on one line each, once everything serves.
    print(f"serving on {config.host}:{service.port}", flush=True)  # noqa: T201
    if service.metrics_port:
        print(f"metrics on http://{config.metrics_host}:{service.metrics_port}/metrics", flush=True)  # noqa: T201
    await stop.wait()
    await service.stop()
    return 0


def _health(config: ServiceConfig, _: argparse.Namespace) -> int:
    healthy = bootstrap.check_health(config)
    print("SERVING" if healthy else "NOT_SERVING")  # noqa: T201
    return 0 if healthy else 1


def _import_model(config: ServiceConfig, arguments: argparse.Namespace) -> int:
    version = bootstrap.import_model(config, arguments.bundle, arguments.name)
    print(f"published {version.reference}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
