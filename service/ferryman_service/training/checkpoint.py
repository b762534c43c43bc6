"""Checkpoints: complete or invisible, and known by their digests.

A checkpoint is a folder of weights and Adam's moments (safetensors), the position in training (JSON) and a manifest
with the digest of each file. It is written under a name that nobody looks for and then renamed. The data order and the
dropout masks are functions of (seed, position, rank), so there is no generator whose state would have to be kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Adam

from ferryman_service.model.transformer import Transformer
from ferryman_service.training.files import sync_folder, write_durably
from ferryman_service.training.scores import ValidationScores

_PREFIX: Final = "step-"
_WEIGHTS: Final = "weights.safetensors"
_POSITION: Final = "position.json"
_MANIFEST: Final = "manifest.json"
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class CheckpointDamaged(Exception):
    """A file of a checkpoint is missing, or is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where training stands: updates done, the pass over the pairs (from 1), updates done in this pass, the best
    validation with its step, and how many came after it."""

    step: int = 0
    epoch: int = 1
    updates_in_epoch: int = 0
    best: ValidationScores | None = None
    best_step: int = 0
    validations_since_best: int = 0


def save_checkpoint(folder: Path, model: Transformer, optimizer: Adam, position: Position) -> Path:
    """Write a checkpoint into the folder of checkpoints and return its path; raises OSError."""
    final = checkpoint_path(folder, position.step)
    partial = folder / f"partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_all(partial, model, optimizer, position)
    except OSError:
        # On a full disk the half-written files would leave no room to record what happened.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync_folder(folder)
    return final


def load_checkpoint(path: Path, model: Transformer, optimizer: Adam) -> Position:
    """Put the checkpoint's state into model and optimizer and return the position; raises CheckpointDamaged.

    Nothing is changed unless every file is what was written.
    """
    weights = load_weights(path)
    moments = {moment: safetensors.torch.load(_read(path, f"{moment}.safetensors")) for moment in _MOMENTS}
    position = json.loads(_read(path, _POSITION))
    if position["best"] is not None:
        position["best"] = ValidationScores(**position["best"])
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            # Adam counts updates in a tensor of its own, on the device of the parameters if it is fused.
            "step": torch.tensor(float(position["step"]), device=parameter.device),
            **{moment: tensors[name].to(parameter.device) for moment, tensors in moments.items()},
        }
    return Position(**position)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the checkpoint's weights, on the CPU; raises CheckpointDamaged."""
    return safetensors.torch.load(_read(path, _WEIGHTS))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of the folder, oldest first."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(_PREFIX))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies, if there is one."""
    return folder / f"{_PREFIX}{step:010d}"


def prune_checkpoints(folder: Path, keep_last: int, best_step: int) -> None:
    """Remove all checkpoints but the last ones and the best one."""
    best = checkpoint_path(folder, best_step)
    for path in list_checkpoints(folder)[:-keep_last]:
        if path != best:
            shutil.rmtree(path)


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the tensors in the safetensors format."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _write_all(folder: Path, model: Transformer, optimizer: Adam, position: Position) -> None:
    digests = {_WEIGHTS: _write(folder / _WEIGHTS, to_bytes(model.state_dict()))}
    for moment in _MOMENTS:
        data = to_bytes({name: optimizer.state[parameter][moment] for name, parameter in model.named_parameters()})
        digests[f"{moment}.safetensors"] = _write(folder / f"{moment}.safetensors", data)
    digests[_POSITION] = _write(folder / _POSITION, json.dumps(dataclasses.asdict(position)).encode())
    write_durably(folder / _MANIFEST, json.dumps({"sha256": digests}).encode())
    sync_folder(folder)


def _write(path: Path, data: bytes) -> str:
    write_durably(path, data)
    return hashlib.sha256(data).hexdigest()


def _read(path: Path, name: str) -> bytes:
    try:
        manifest: Any = json.loads((path / _MANIFEST).read_bytes())
        data = (path / name).read_bytes()
        intact = hashlib.sha256(data).hexdigest() == manifest["sha256"][name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{path / name} cannot be read: {error}") from error
    if not intact:
        raise CheckpointDamaged(f"{path / name} is not what was written: its digest differs from the manifest's")
    return data
