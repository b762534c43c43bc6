"""What the operator allows a run to take, and what of a request is over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ferryman_service.domain.errors import Violation
from ferryman_service.domain.footprint import parameter_count, training_state_bytes
from ferryman_service.domain.recipe import OptimizationRecipe, Overrides, recipe_parts

_SECONDS_PER_HOUR: Final = 3600
_BYTES_PER_GIB: Final = 2**30


@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """How many runs may wait, and how many may be unfinished in all; how many processes train one: what a caller gets
    who does not say, and the most. The largest model, batch and time of a run, and the memory (bytes) that its
    processes have together; 0 is no limit."""

    max_queued: int = 100
    max_unfinished: int = 1000
    processes: int = 1
    max_processes: int = 1
    max_parameters: int = 0
    max_batch_tokens: int = 0
    max_hours: float = 0.0
    memory_bytes: int = 0


def limit_violations(overrides: Overrides, processes: int, limits: RunLimits) -> Iterator[Violation]:
    """Yield what of a recipe is over the limits, whatever else is wrong with it; a part that is no legal one is left
    out."""
    parts = recipe_parts(overrides)
    if parts.model is not None and parts.vocabulary_size is not None:
        parameters = parameter_count(parts.model, parts.vocabulary_size)
        yield from _size_violations(parameters, parts.optimization, processes or limits.processes, limits)
    if parts.optimization is not None and 0 < limits.max_batch_tokens < parts.optimization.batch_target_tokens:
        text = (
            f"is {parts.optimization.batch_target_tokens:,}, must be at most {limits.max_batch_tokens:,}, which is "
            "this server's --max-batch-tokens"
        )
        yield _over_limit("recipe.optimization.batch_target_tokens", text)
    if parts.max_duration_s is not None and limits.max_hours:
        yield from _time_violations(parts.max_duration_s, limits.max_hours)


def _size_violations(
    parameters: int, optimization: OptimizationRecipe | None, processes: int, limits: RunLimits
) -> Iterator[Violation]:
    if 0 < limits.max_parameters < parameters:
        text = (
            f"and data.vocabulary_size make a model of {parameters:,} parameters, at most {limits.max_parameters:,} "
            "are allowed by this server's --max-parameters: make it narrower, shallower, or its vocabulary smaller"
        )
        yield _over_limit("recipe.model", text)
    averages = optimization is not None and optimization.ema_decay > 0
    needed = processes * training_state_bytes(parameters, averages=averages)
    if 0 < limits.memory_bytes < needed:
        text = (
            f"and data.vocabulary_size make a model of {parameters:,} parameters, whose weights, gradients and moments "
            f"take {needed / _BYTES_PER_GIB:.1f} GiB in {_counted(processes)}, but this server has "
            f"{limits.memory_bytes / _BYTES_PER_GIB:.1f} GiB of memory for training: make it smaller"
        )
        yield _over_limit("recipe.model", text)


def _time_violations(max_duration_s: float, max_hours: float) -> Iterator[Violation]:
    most_s = max_hours * _SECONDS_PER_HOUR
    if 0 < max_duration_s <= most_s:
        return
    value = f"is {max_duration_s:.15g} seconds" if max_duration_s else "is not set"
    text = (
        f"{value}, must be at most {most_s:.15g} seconds, which is this server's --max-run-hours ({max_hours:g} hours)"
    )
    yield _over_limit("recipe.stop.max_duration", text)


def _over_limit(field: str, description: str) -> Violation:
    return Violation(field=field, description=description, reason="OVER_LIMIT")


def _counted(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"
