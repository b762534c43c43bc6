"""The entry point of the command `ferryman`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line, or say what is missing for it."""
    if find_spec("typer") is None or find_spec("rich") is None:
        sys.exit("ferryman: the command line needs typer and rich: install the extra ferryman[cli]")
    # gRPC's own log lines have no place between ours; it reads this when it is first imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from ferryman.cli.ending import run_process

    run_process(_command)


def _command() -> None:
    from ferryman.cli.app import app

    app(prog_name="ferryman")


if __name__ == "__main__":
    main()
