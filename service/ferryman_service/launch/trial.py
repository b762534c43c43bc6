"""The first load of a bundle from elsewhere: in a process of its own, with bounded memory and time.

ONNX Runtime and SentencePiece parse files that somebody else has written. A flaw of theirs, or a graph that is
expensive to load, then costs a process that nobody else uses. The process is a program of its own, never a fork: a fork
would inherit gRPC's threads and locks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferryman_service.bundle.graph_check import check_graphs
from ferryman_service.bundle.manifest import Manifest, read_manifest
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.translation import ComputeType

DAMAGED: Final = 3
UNABLE: Final = 4
"""Exit statuses of the program: the bundle is no good; this machine lacks what loading needs."""
MOST_VERDICT_BYTES: Final = 1 << 16

_MEMORY_BYTES: Final = 512 << 20
_MEMORY_PER_BYTE: Final = 6
"""ONNX Runtime holds a file, its weights, and the weights in the order of its kernels; 16-bit ones also as 32 bits."""
_CPU_S: Final = 60
_CPU_S_PER_MIB: Final = 1
_WALL_FACTOR: Final = 10
"""Time may pass so much faster on a busy machine than processor time."""
_KEPT_VARIABLES: Final = [
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "ORT_DISABLE_TELEMETRY",
    "PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "TMPDIR",
]


@dataclass(frozen=True, kw_only=True)
class TrialLimits:
    """What one trial may use: memory of its own in bytes, processor time and time in seconds."""

    memory_bytes: int
    cpu_s: int
    wall_s: int

    @classmethod
    def for_bundle(cls, manifest: Manifest) -> TrialLimits:
        """Return what is enough for every network of this size."""
        largest = max(manifest.size_bytes(each) for each in _compute_types(manifest))
        cpu_s = _CPU_S + _CPU_S_PER_MIB * (largest >> 20)
        memory_bytes = _MEMORY_BYTES + _MEMORY_PER_BYTE * largest
        return cls(memory_bytes=memory_bytes, cpu_s=cpu_s, wall_s=_WALL_FACTOR * cpu_s)


def examine_bundle(bundle: Path) -> None:
    """Check the graphs, then load the bundle in a process of its own and translate a word. Its files must have their
    digests. Raises ModelDamaged; OSError if this machine cannot load any bundle."""
    manifest = read_manifest(bundle)
    check_graphs(bundle, manifest)
    try_to_load(bundle, TrialLimits.for_bundle(manifest))


def try_to_load(bundle: Path, limits: TrialLimits) -> None:
    """Load the bundle in a process of its own and translate a word. Raises what `examine_bundle` does."""
    numbers = map(str, (limits.memory_bytes, limits.cpu_s))
    command = [sys.executable, "-m", "ferryman_service.trial_load", str(bundle.absolute()), *numbers]
    with tempfile.TemporaryFile() as told:
        try:
            ended = subprocess.run(  # noqa: S603 (our own program)
                command,
                env=_environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.DEVNULL,
                timeout=limits.wall_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelDamaged(f"the bundle cannot be loaded within {limits.wall_s} s") from error
        told.seek(0)
        verdict = told.read(MOST_VERDICT_BYTES)
    if ended.returncode != 0:
        raise _failure(ended.returncode, verdict, limits)


def _failure(status: int, verdict: bytes, limits: TrialLimits) -> Exception:
    if status in (DAMAGED, UNABLE):
        values = json.loads(verdict)
        return OSError(values["message"]) if status == UNABLE else ModelDamaged(values["message"], **values["metadata"])
    if -status == signal.SIGXCPU:
        return ModelDamaged(f"the bundle cannot be loaded within {limits.cpu_s} s of processor time")
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    within = f"within {limits.memory_bytes >> 20} MiB of memory"
    return ModelDamaged(f"the process that was to load the bundle {within} ended with {how}")


def _compute_types(manifest: Manifest) -> list[ComputeType]:
    there = {ComputeType.FP32: True, ComputeType.INT8: manifest.has_int8, ComputeType.FP16: manifest.has_fp16}
    return [compute_type for compute_type, is_there in there.items() if is_there]


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what Python needs, without secrets; one thread, since each takes memory for itself."""
    kept = {name: variables[name] for name in _KEPT_VARIABLES if name in variables}
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
