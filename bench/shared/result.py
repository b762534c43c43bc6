"""A benchmark's last line: one JSON object, printed and kept in bench/results/.

Importing this module reads the counters of the machine a first time, so that every line says what else the machine did
meanwhile. In a block of `watched_machine` they are read every few seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.shared.machine import MachineWatch, busy_warning, cpu_model
from ferryman_service.config.resources import usable_cpus

RESULTS: Final = Path("bench/results")
INVALID_STATUS: Final = 3
"""The exit status of a benchmark that could not measure: neither reached (0) nor missed (1)."""
_PACKAGES: Final = ("ferryman", "torch", "onnxruntime", "onnxruntime-gpu", "sentencepiece", "sacrebleu", "numpy")
_WATCH: Final = MachineWatch().read()


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The value to compare with: another system's value for the same task."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """A measured value. `target` None: there is nothing that it must reach. `details` are more fields of the line.

    `value` is None, and `invalid_because` says why, if the benchmark could not measure.
    """

    bench: str
    value: float | None
    target: float | None
    peer: Peer | None
    details: Mapping[str, Any]
    in_time: bool = True
    invalid_because: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.invalid_because is not None), "a result is a value or a reason"

    @property
    def ok(self) -> bool:
        """Whether the target is reached, and in time where there is a limit."""
        if self.value is None:
            return False
        return self.target is None or (self.in_time and self.value >= self.target)

    @property
    def exit_status(self) -> int:
        """0 if the target is reached, 1 if it is missed, 3 if nothing was measured."""
        if self.value is None:
            return INVALID_STATUS
        return 0 if self.ok else 1


@contextlib.contextmanager
def watched_machine() -> Iterator[None]:
    """Read the counters of the machine every few seconds during the block, and now for half a second; warn if other
    processes are busy now."""
    with _WATCH.watching():
        if warning := busy_warning(_WATCH.as_dict()):
            print(warning, file=sys.stderr, flush=True)
        yield


def publish(result: Result, folder: Path = RESULTS) -> int:
    """Write the line to FOLDER/BENCH.json and print it, after a warning if other processes were busy meanwhile; return
    the exit status."""
    peer, value, machine = result.peer, result.value, _WATCH.as_dict()
    line = json.dumps(
        {
            "bench": result.bench,
            "value": None if value is None else round(value, 4),
            "peer": peer.value if peer else None,
            "peer_name": peer.name if peer else None,
            "ratio": None if peer is None or value is None else round(value / peer.value, 4),
            "target": result.target,
            "ok": result.ok,
            "valid": result.value is not None,
            **({"invalid_because": result.invalid_because} if result.invalid_because else {}),
            **result.details,
            "machine": machine,
            "device": device(),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result.bench}.json").write_text(line + "\n")
    for warning in (busy_warning(machine), result.invalid_because and f"INVALID: {result.invalid_because}"):
        if warning:
            print(warning, file=sys.stderr, flush=True)
    print(line)
    return result.exit_status


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
    return f"{usable_cpus().value} cores of {cpu_model()}, {platform.system()} {platform.machine()}"
