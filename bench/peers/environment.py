"""The environments in which peers run, each made once in bench-output/peers/."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path("bench-output/peers")
FAIRSEQ: Final = "fairseq-fixed==0.12.3.1"
CTRANSLATE2: Final = "ctranslate2==4.8.5"


class PeerMissing(Exception):
    """The peer could not be installed."""


@dataclass(frozen=True, kw_only=True)
class PeerEnvironment:
    """A virtual environment: what it holds (another text makes it anew), the arguments of each `pip install`, a module
    that can be imported when all went well, and what a first installation takes."""

    name: str
    holds: str
    installs: Sequence[Sequence[str]]
    module: str
    takes: str


def fairseq_python() -> Path:
    """Return the interpreter of fairseq's environment, making it if need be; raises PeerMissing.

    It gets the same torch as this environment, from the same places.
    """
    torch = importlib.metadata.version("torch")
    torch_pin = f"torch=={torch.partition('+')[0]}"
    return _python(
        PeerEnvironment(
            name="fairseq",
            holds=f"{FAIRSEQ}, torch {torch}",
            installs=(("pip>=25",), (torch_pin,), (FAIRSEQ, torch_pin)),
            module="fairseq_cli.train",
            takes="some minutes: fairseq compiles C++",
        )
    )


def ctranslate2_python() -> Path:
    """Return the interpreter of CTranslate2's environment, making it if need be; raises PeerMissing.

    Beside it are SentencePiece, what reads our weights, and our client for the stubs: the same versions as here.
    """
    others = ("numpy", "safetensors", "sentencepiece", "grpcio", "protobuf")
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in others]
    return _python(
        PeerEnvironment(
            name="ctranslate2",
            holds=", ".join((CTRANSLATE2, *pins)),
            installs=(("pip>=25",), (CTRANSLATE2, *pins, "-c", "constraints.txt", "-e", ".")),
            module="ctranslate2, ferryman.v1",
            takes="half a minute",
        )
    )


def _python(environment: PeerEnvironment) -> Path:
    folder = FOLDER / environment.name
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists() and ready.read_text() == environment.holds:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing {environment.holds} into {folder}, once: {environment.takes}", flush=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    commands = (
        [sys.executable, "-m", "venv", str(folder)],
        *([*pip, *install] for install in environment.installs),
        [str(python), "-c", f"import {environment.module}"],
    )
    for command in commands:
        if (ended := subprocess.run(command, capture_output=True, text=True)).returncode:
            raise PeerMissing(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
    ready.write_text(environment.holds)
    return python
