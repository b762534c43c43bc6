"""The environment of a training process: a chosen part of the service's own, and what training needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

INHERITED: Final = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "LC_*"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_*"),
    *("PYTHON*", "VIRTUAL_ENV", "XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "GRPC_*", "ORT_*"),
    *("CC", "CXX", "CPATH", "C_INCLUDE_PATH", "LIBRARY_PATH"),
    *("CUDA_*", "CUBLAS_*", "CUDNN_*", "NVIDIA_*", "NCCL_*", "GLOO_*"),
    *("TORCH_*", "TORCHINDUCTOR_*", "TORCHDYNAMO_*", "PYTORCH_*", "TRITON_*"),
    *("OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*"),
)
"""The variables that a training process inherits from the service; a star stands for any end of the name."""
PRIVATE: Final = (
    *("OTEL_*", "http_proxy", "https_proxy", "grpc_proxy", "no_grpc_proxy", "no_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""Variables of trace export that may hold credentials. The first process of a run reads them from its standard input:
unlike an environment or a command line, a pipe is not visible in /proc."""
SPIN_COUNT: Final = "100"
# glibc would give the memory of large tensors back at every update, and the kernel would clear it anew: 5 to 8 % of a
# small model's step (docs/lab-log.md).
_ALLOCATOR: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
_ONLY_LOOPBACK: Final = {
    # All processes of a run are on this machine.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "=lo",
    # InfiniBand listens for other machines; the status server of NCCL (RAS) answers whoever connects.
    "NCCL_IB_DISABLE": "1",
    "NCCL_RAS_ENABLE": "0",
}


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the part of the service's environment that its training processes get."""
    return _chosen(environment, INHERITED)


def private(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the part of the service's environment that only trace export needs, and that may hold credentials."""
    return _chosen(environment, PRIVATE)


def training_defaults(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return the environment with the settings of training added; `threads` is for OMP_NUM_THREADS.

    A setting that is there already is kept, except those that decide where processes listen.
    """
    defaults = {"OMP_NUM_THREADS": str(threads), **_ALLOCATOR}
    # OpenMP's threads spin while they wait for each other, also for one that has no core because another process is
    # busy. Left alone they spin so long that this makes training 45 times slower; this bound costs nothing on a quiet
    # machine (docs/lab-log.md; make bench-neighbour).
    if "OMP_WAIT_POLICY" not in environment:
        defaults["GOMP_SPINCOUNT"] = SPIN_COUNT
    return {**defaults, **environment, **_ONLY_LOOPBACK, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


def _chosen(environment: Mapping[str, str], patterns: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if any(_fits(name, pattern) for pattern in patterns)}


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
