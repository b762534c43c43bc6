"""The values of options that are 0 for "automatic", from what the process may use of its machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from ferryman_service.config.resources import Machine
from ferryman_service.config.service_config import RANGES, ServiceConfig

_BYTES_PER_MIB: Final = 2**20
MEMORY_PER_THREAD_BYTES: Final = 512 * _BYTES_PER_MIB
"""Caches of 80 rows with 64 + 64 subwords in 6 layers of width 512 take 80 x 128 x 6 x 2 x 512 x 4 bytes, 252 MB; the
same again for the model and what a step takes."""
QUEUE_TOKENS_PER_THREAD: Final = 131_072
LEAST_QUEUE_TOKENS: Final = 262_144
"""No call may cost more than the queue holds: a call that is legal on two CPUs is legal on one."""


def decoding_threads(machine: Machine) -> int:
    """Return a thread for each usable CPU, but no more than one for each 512 MiB of usable memory."""
    most = int(RANGES["translation_threads"][1])
    by_memory = most if machine.memory is None else machine.memory.value // MEMORY_PER_THREAD_BYTES
    return max(1, min(machine.cpus.value, by_memory, most))


def queue_tokens(decoding_threads: int) -> int:
    """Return what may wait for so many decoding threads, row tokens."""
    return max(LEAST_QUEUE_TOKENS, QUEUE_TOKENS_PER_THREAD * decoding_threads)


def model_memory_mib(machine: Machine) -> int:
    """Return half of the usable memory, MiB; 0, which is no limit, if the memory is unknown.

    The other half is for texts, loading and training.
    """
    return 0 if machine.memory is None else max(1, machine.memory.value // 2 // _BYTES_PER_MIB)


def cache_memory_mib(machine: Machine) -> int:
    """Return half of the usable memory, MiB; 0, which is no limit, if the memory is unknown.

    It is booked for translations of the maximum length, which hardly any reaches.
    """
    return model_memory_mib(machine)


def with_automatic(config: ServiceConfig, machine: Machine, *, on_gpu: bool) -> ServiceConfig:
    """Return the configuration with the automatic values in place of 0.

    On a GPU models are not in the memory that is counted here: model_memory_mib and cache_memory_mib stay 0, which is
    no limit.
    """
    threads = config.translation_threads or decoding_threads(machine)
    return replace(
        config,
        translation_threads=threads,
        queue_tokens=config.queue_tokens or queue_tokens(threads),
        cache_memory_mib=config.cache_memory_mib or (0 if on_gpu else cache_memory_mib(machine)),
        model_memory_mib=config.model_memory_mib or (0 if on_gpu else model_memory_mib(machine)),
    )


def automatic_lines(config: ServiceConfig, machine: Machine) -> Iterator[str]:
    """Yield a line for each automatic option of the configuration, with the value that it has on this machine."""
    resolved = with_automatic(config, machine, on_gpu=False)
    if not config.translation_threads:
        yield f"automatic translation_threads: {resolved.translation_threads}"
    if not config.queue_tokens:
        yield f"automatic queue_tokens: {resolved.queue_tokens}"
    if not config.cache_memory_mib:
        yield f"automatic cache_memory_mib: {resolved.cache_memory_mib or 'no limit'} (on a GPU: no limit)"
    if not config.model_memory_mib:
        yield f"automatic model_memory_mib: {resolved.model_memory_mib or 'no limit'} (on a GPU: no limit)"
