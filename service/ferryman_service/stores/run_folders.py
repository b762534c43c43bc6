"""The folders of runs: what training keeps beside the records.

Training writes `checkpoints/step-NNNNNNNNNN/` whole or not at all; its `position.json` says where training stood.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.ids import RUN_PREFIX, is_id
from ferryman_service.domain.os_errors import refuse_if_exhausted
from ferryman_service.domain.runs import CheckpointInfo
from ferryman_service.stores.folders import remove_folder
from ferryman_service.stores.layout import DataFolder

_log = logging.getLogger(__name__)
_PREFIX: Final = "step-"
_POSITION: Final = "position.json"
_SCORES: Final = ("bleu", "chrf", "nll_per_token")


class FileRunFolders:
    """The RunFolders."""

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder

    def checkpoints(self, run_id: str) -> Sequence[CheckpointInfo]:
        """Return the complete checkpoints, by rising step; damaged ones, and one that is pruned meanwhile, are left
        out."""
        found = [found for path in self._paths(run_id) if (found := _read(path)) is not None]
        best_step = found[-1][1] if found else 0
        return [dataclasses.replace(info, is_best=info.step == best_step) for info, _ in found]

    def last_checkpoint(self, run_id: str) -> Path | None:
        """Return the folder of the newest complete checkpoint."""
        return next(iter(reversed(self._paths(run_id))), None)

    def delete(self, run_id: str) -> None:
        """Remove the run's folder, if there is one; what cannot be removed now was announced, and
        is deleted later."""
        if is_id(run_id, RUN_PREFIX):  # the id of a damaged row may be anything
            clean_up(partial(remove_folder, self._folder.run_dir(run_id)))

    def _paths(self, run_id: str) -> list[Path]:
        return checkpoint_paths(self._folder, run_id)


def checkpoint_paths(folder: DataFolder, run_id: str) -> list[Path]:
    """Return the folders of the run's complete checkpoints, by rising step."""
    if not is_id(run_id, RUN_PREFIX):
        return []  # the lineage of a model from elsewhere may name anything
    found = (folder.run_dir(run_id) / "checkpoints").glob(f"{_PREFIX}*")
    return sorted(path for path in found if path.name.removeprefix(_PREFIX).isdigit() and path.is_dir())


def _read(path: Path) -> tuple[CheckpointInfo, int] | None:
    """Return what a checkpoint is, and which step was the best when it was written; None if it was pruned just now, or
    is damaged."""
    try:
        position = json.loads((path / _POSITION).read_bytes())
        size_bytes = sum(file.stat().st_size for file in path.iterdir())
        create_time_ns = path.stat().st_mtime_ns
        return _info(position, size_bytes, create_time_ns), int(position["best_step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse_if_exhausted(error)
        _log.warning("%s is left out: its %s cannot be read: %r", path, _POSITION, error)
        return None


def _info(position: Mapping[str, Any], size_bytes: int, create_time_ns: int) -> CheckpointInfo:
    step, epoch = int(position["step"]), int(position["epoch"])
    # Checkpoints of the release without restarts do not hold the scores of their step.
    scores = dict(position.get("validated") or {})
    return CheckpointInfo(
        step=step,
        epoch=epoch,
        create_time_ns=create_time_ns,
        size_bytes=size_bytes,
        is_best=False,
        **{name: float(scores[name]) for name in _SCORES if name in scores},
        translated_pairs=int(scores["translated_pairs"]) if "translated_pairs" in scores else None,
    )
