"""The folders of runs: what training keeps beside the records.

Training writes `checkpoints/step-NNNNNNNNNN/` whole or not at all; its `position.json` says where training stood.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from ferryman_service.domain.runs import CheckpointInfo
from ferryman_service.stores.folders import remove_folder
from ferryman_service.stores.layout import DataFolder

_PREFIX: Final = "step-"
_POSITION: Final = "position.json"


class FileRunFolders:
    """The RunFolders."""

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder

    def checkpoints(self, run_id: str) -> Sequence[CheckpointInfo]:
        """Return the complete checkpoints, by rising step; one that is pruned meanwhile is left out."""
        found = [(path, position) for path in self._paths(run_id) if (position := _read_position(path)) is not None]
        best_step = found[-1][1]["best_step"] if found else 0
        return [_describe(path, position, best_step) for path, position in found]

    def last_checkpoint(self, run_id: str) -> Path | None:
        """Return the folder of the newest complete checkpoint."""
        return next(iter(reversed(self._paths(run_id))), None)

    def delete(self, run_id: str) -> None:
        """Remove the run's folder, if there is one."""
        remove_folder(self._folder.run_dir(run_id))

    def delete_orphans(self, run_ids: Iterable[str]) -> None:
        """Remove the folders of all runs but these: what a crash in the middle of a deletion leaves."""
        known = set(run_ids)
        for path in self._folder.runs.iterdir():
            if path.name not in known:
                remove_folder(path)

    def _paths(self, run_id: str) -> list[Path]:
        return sorted((self._folder.run_dir(run_id) / "checkpoints").glob(f"{_PREFIX}*"))


def _read_position(path: Path) -> dict[str, Any] | None:
    try:
        position: dict[str, Any] = json.loads((path / _POSITION).read_bytes())
    except (OSError, ValueError):
        return None
    return position


def _describe(path: Path, position: dict[str, Any], best_step: int) -> CheckpointInfo:
    scores = position["validated"] or {}
    return CheckpointInfo(
        step=position["step"],
        epoch=position["epoch"],
        create_time_ns=path.stat().st_mtime_ns,
        size_bytes=sum(file.stat().st_size for file in path.iterdir()),
        is_best=position["step"] == best_step,
        bleu=scores.get("bleu"),
        chrf=scores.get("chrf"),
        nll_per_token=scores.get("nll_per_token"),
    )
