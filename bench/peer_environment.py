"""The environment in which fairseq runs, made once in bench-output/peers/."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import torch

FOLDER: Final = Path("bench-output/peers/fairseq")
PACKAGE: Final = "fairseq-fixed==0.12.3.1"


class PeerMissing(Exception):
    """The peer could not be installed."""


def fairseq_python() -> Path:
    """Return the interpreter of fairseq's environment, making it if need be: some minutes, fairseq compiles C++.

    It gets the same torch as this environment, from the same places. Raises PeerMissing.
    """
    python = FOLDER / "bin" / "python"
    ready = FOLDER / "ready"
    if ready.exists() and ready.read_text() == _wanted():
        return python
    shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"installing {_wanted()} into {FOLDER}: some minutes, once", flush=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    torch_pin = f"torch=={torch.__version__.partition('+')[0]}"
    commands = (
        [sys.executable, "-m", "venv", str(FOLDER)],
        [*pip, "pip>=25"],
        [*pip, torch_pin],
        [*pip, PACKAGE, torch_pin],
        [str(python), "-c", "import fairseq_cli.train"],
    )
    for command in commands:
        if (ended := subprocess.run(command, capture_output=True, text=True)).returncode:
            raise PeerMissing(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
    ready.write_text(_wanted())
    return python


def _wanted() -> str:
    return f"{PACKAGE}, torch {torch.__version__}"
