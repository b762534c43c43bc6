"""Loads a bundle and translates a word with it, in a process that may die of it: `launch/trial.py` starts it.

    python -m ferryman_service.trial_load BUNDLE MEMORY_BYTES CPU_S

Every compute type that the bundle has is tried, on the CPU. The verdict is one JSON object on standard output.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.launch.process import die_with_parent
from ferryman_service.launch.trial import DAMAGED, MOST_VERDICT_BYTES, UNABLE


def main() -> int:
    """Load the bundle within the limits; the status is 0, DAMAGED or UNABLE."""
    bundle, memory_bytes, cpu_s = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    die_with_parent()
    _limit(resource.RLIMIT_DATA, memory_bytes)
    _limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)  # SIGXCPU says which limit it was, SIGKILL would not
    _limit(resource.RLIMIT_FSIZE, MOST_VERDICT_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    try:
        _load(bundle)
    except ModelDamaged as error:
        return _tell(DAMAGED, error.message, **error.metadata)
    except ImportError as error:
        return _tell(UNABLE, f"{error}: install the extra cpu or gpu")
    except MemoryError:
        return _tell(DAMAGED, f"the bundle cannot be loaded within {memory_bytes >> 20} MiB of memory")
    except Exception as error:  # noqa: BLE001 (whatever a bundle makes of the engine, it is not published)
        return _tell(DAMAGED, f"the bundle is loaded, but cannot be translated with: {type(error).__name__}")
    return 0


def _limit(resource_number: int, soft: int, hard: int | None = None) -> None:
    """Set a limit of this process, unless it has a lower one."""
    _, present = resource.getrlimit(resource_number)
    wanted = soft if hard is None else hard
    hard = wanted if present == resource.RLIM_INFINITY else min(wanted, present)
    resource.setrlimit(resource_number, (min(soft, hard), hard))


def _load(bundle: Path) -> None:
    from ferryman_service.bundle.manifest import read_manifest
    from ferryman_service.domain.translation import ComputeType
    from ferryman_service.translation.loader import OnnxBundleLoader
    from ferryman_service.translation.onnx_model import OnnxConfig
    from ferryman_service.translation.scheduler import SchedulerConfig

    manifest = read_manifest(bundle)
    loader = OnnxBundleLoader(OnnxConfig(), SchedulerConfig(threads=1))
    for compute_type, is_there in (
        (ComputeType.FP32, True),
        (ComputeType.INT8, manifest.has_int8),
        (ComputeType.FP16, manifest.has_fp16),
    ):
        if is_there:
            engine = loader.load(bundle, compute_type)
            try:
                engine.warm_up()
            finally:
                engine.close()


def _tell(status: int, message: str, **metadata: str) -> int:
    print(json.dumps({"message": message[:2000], "metadata": metadata}), flush=True)  # noqa: T201
    return status


if __name__ == "__main__":
    # A native thread that a bundle has left running must not keep the process, or undo the verdict.
    status = main()
    sys.stdout.flush()
    os._exit(status)
