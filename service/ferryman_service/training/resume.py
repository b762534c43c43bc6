"""Where training goes on: the newest checkpoint that is what was written."""

from __future__ import annotations

import math
from pathlib import Path

from ferryman_service.training.checkpoint import CheckpointDamaged, checkpoint_step, list_checkpoints, verify_checkpoint


def newest_usable(folder: Path, up_to_step: float = math.inf) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose every file is intact, None if there is none, and why newer ones were passed
    over. Those beyond a step are not looked at."""
    damages = []
    for path in reversed(list_checkpoints(folder)):
        if checkpoint_step(path) > up_to_step:
            continue
        try:
            verify_checkpoint(path)
        except CheckpointDamaged as error:
            damages.append(str(error))
        else:
            return path, damages
    return None, damages
