"""Which checkpoints are kept: those that the end of training may want, and those to fall back to."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ferryman_service.domain.recipe import Averaging, ValidationRecipe
from ferryman_service.training.checkpoint import Candidate, Position, checkpoint_path, checkpoint_step, list_checkpoints
from ferryman_service.training.files import Disk

_NEWEST_KEPT: Final = 2


def with_candidate(
    candidates: tuple[Candidate, ...], step: int, rank: tuple[float, ...], recipe: ValidationRecipe
) -> tuple[Candidate, ...]:
    """Return the validated steps that averaging may want, by rising step, now that one more was validated."""
    all_steps = sorted({**dict(candidates), step: rank}.items())
    if recipe.averaging is Averaging.BEST:
        best = sorted(all_steps, key=lambda item: (item[1], -item[0]), reverse=True)[: recipe.keep_last]
        return tuple(sorted(best))
    return tuple(all_steps[-recipe.keep_last :])


def remove_newer(folder: Path, step: int, disk: Disk) -> None:
    """Remove the checkpoints beyond a step, for good."""
    for path in list_checkpoints(folder):
        if checkpoint_step(path) > step:
            disk.remove(path)
    disk.sync(folder)


def prune_checkpoints(folder: Path, position: Position, disk: Disk) -> None:
    """Remove all checkpoints but the averaging's, the best, the one that a divergence leads back to, and the newest
    two, the older of which a damaged newest one falls back to. What is newer than the position is of no use any
    more."""
    wanted = {step for step, _ in position.candidates} | {position.best_step, position.scheduled_step}
    old = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= position.step]
    keep = {checkpoint_path(folder, step) for step in wanted} | set(old[-_NEWEST_KEPT:])
    for path in list_checkpoints(folder):
        if path not in keep:
            disk.remove(path)
