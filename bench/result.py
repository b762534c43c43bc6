"""A benchmark's last line: one JSON object, printed and kept in bench/results/."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ferryman_service.config.resources import usable_cpus

RESULTS: Final = Path("bench/results")
_PACKAGES: Final = ("ferryman", "torch", "onnxruntime", "onnxruntime-gpu", "sentencepiece", "sacrebleu", "numpy")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What the value is held against: another system's value for the same task."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """A measured value. `target` None: there is nothing that it must reach. `details` are more fields of the line."""

    bench: str
    value: float
    target: float | None
    peer: Peer | None
    details: Mapping[str, Any]
    in_time: bool = True

    @property
    def ok(self) -> bool:
        """Whether the target is reached, and in time where there is a limit."""
        return self.target is None or (self.in_time and self.value >= self.target)


def publish(result: Result, folder: Path = RESULTS) -> int:
    """Write the line to FOLDER/BENCH.json and print it; return the exit status, 0 if the target is reached."""
    peer = result.peer
    line = json.dumps(
        {
            "bench": result.bench,
            "value": round(result.value, 4),
            "peer": peer.value if peer else None,
            "peer_name": peer.name if peer else None,
            "ratio": round(result.value / peer.value, 4) if peer else None,
            "target": result.target,
            "ok": result.ok,
            **result.details,
            "device": device(),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result.bench}.json").write_text(line + "\n")
    print(line)
    return 0 if result.ok else 1


def results_folder() -> Path:
    """Return the folder for results: that of the environment's OUT, for a machine whose files do not stay, or ours."""
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter; of those that are installed."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device() -> str:
    """Return what the benchmark runs on, such as "2 cores of Intel(R) Xeon(R), Linux x86_64"."""
    model = "an unnamed CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{usable_cpus().value} cores of {model}, {platform.system()} {platform.machine()}"
