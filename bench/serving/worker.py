"""Our engine as a process that answers commands; see `shared.commands`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.serving.engine import FerrymanEngine, open_engine
from bench.shared.commands import Commands
from bench.shared.process import answer_commands
from ferryman_service.domain.translation import ComputeType


def main() -> None:
    """Load, and answer until no command follows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--compute-type", type=ComputeType, required=True, help="fp32 or int8")
    parser.add_argument("--threads", type=int, default=1, help="decoding threads")
    arguments = parser.parse_args()
    engine = FerrymanEngine(open_engine(arguments.bundle, arguments.compute_type, arguments.threads))
    assert "torch" not in sys.modules, "serving must not import torch"
    answer_commands(Commands(engine).handlers(), compute_type=arguments.compute_type)


if __name__ == "__main__":
    main()
