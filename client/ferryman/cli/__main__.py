"""The entry point of the command `ferryman`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line. Exits with a message if the extra `cli` is not installed."""
    if find_spec("typer") is None or find_spec("rich") is None:
        sys.exit("ferryman: the command line needs typer and rich; run `pip install 'ferryman[cli]'`")
    # Silences gRPC's log lines. gRPC reads the variable when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from ferryman.cli.ending import run_process

    run_process(_command)


def _command() -> None:
    from ferryman.cli.app import app

    app(prog_name="ferryman")


if __name__ == "__main__":
    main()
