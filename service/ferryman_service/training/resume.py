"""Where training goes on: the newest checkpoint that is what was written."""

from __future__ import annotations

from pathlib import Path

from ferryman_service.training.checkpoint import CheckpointDamaged, list_checkpoints, load_checkpoint


def newest_usable(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose every file is intact, None if there is none, and why newer ones were passed
    over."""
    damages = []
    for path in reversed(list_checkpoints(folder)):
        try:
            load_checkpoint(path)
        except CheckpointDamaged as error:
            damages.append(str(error))
        else:
            return path, damages
    return None, damages
