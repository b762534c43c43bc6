"""Checkpoints: complete or invisible, and known by their digests.

A checkpoint is a folder of tensors (safetensors, a file for each group: weights, Adam's moments, the moving average),
the position in training (JSON) and a manifest with the digest of each file. It is written under a name that nobody
looks for and then renamed; one that is replaced is put aside until then. The data order and the dropout masks are
functions of (seed, position, rank), so there is no generator whose state would have to be kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.os_errors import refuse_if_exhausted
from ferryman_service.domain.records import decay_plan_from_dict
from ferryman_service.domain.schedule import DecayPlan
from ferryman_service.training.files import Disk
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.step import TraineeCounters

_PREFIX: Final = "step-"
_PARTIAL: Final = "partial-"
_REPLACED: Final = "replaced-"
_POSITION: Final = "position.json"
_MANIFEST: Final = "manifest.json"
_SUFFIX: Final = ".safetensors"

Candidate = tuple[int, tuple[float, ...]]
"""A validated step and its rank: higher is better."""

TensorGroups = Mapping[str, Mapping[str, Tensor]]


class CheckpointDamaged(Exception):
    """A file of a checkpoint is missing, is not what was written, or is of another release's form."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where training stands.

    Updates done; the pass over the pairs (from 1) and updates done in it; the scores of this step, if it was validated;
    the best validation with its step, and how many came after it; the validated steps that averaging may want, with
    their ranks; how many reports of the series were made; seconds spent, and those that a validation takes; returns
    after a divergence, and skipped updates in a row; the step of the last checkpoint that was not left by a pause, to
    which a divergence leads back; the limit that was reached, as (code, message); seconds that an update takes; the
    decays of the learning rate that were planned; the key of the prepared corpus (prepared.py), whose subwords and
    order of pairs all the rest means.
    """

    step: int = 0
    epoch: int = 1
    updates_in_epoch: int = 0
    validated: ValidationScores | None = None
    best: ValidationScores | None = None
    best_step: int = 0
    validations_since_best: int = 0
    candidates: tuple[Candidate, ...] = ()
    reports: int = 0
    elapsed_s: float = 0.0
    validation_s: float | None = None
    rollbacks: int = 0
    skipped_in_a_row: int = 0
    scheduled_step: int = 0
    ending: tuple[str, str] | None = None
    update_s: float | None = None
    decays: tuple[DecayPlan, ...] = ()
    prepared: str = ""

    @property
    def is_beginning(self) -> bool:
        """Whether nothing was done yet."""
        return dataclasses.replace(self, prepared="") == Position()


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. Tensors are on the CPU, in groups, by parameter name."""

    tensors: TensorGroups
    counters: TraineeCounters
    position: Position


def save_checkpoint(folder: Path, checkpoint: Checkpoint, disk: Disk) -> Path:
    """Write a checkpoint into the folder of checkpoints and return its path; raises OSError.

    One of the same step is replaced. On an OSError nothing is left of the new one.
    """
    final = checkpoint_path(folder, checkpoint.position.step)
    partial, replaced = folder / f"{_PARTIAL}{final.name}", folder / f"{_REPLACED}{final.name}"
    disk.remove(partial)
    disk.make_folder(partial)
    try:
        _write_all(partial, checkpoint, disk)
    except OSError:
        # On a full disk the half-written files would leave no room to record what happened.
        clean_up(lambda: disk.remove(partial))
        raise
    if final.exists():
        disk.rename(final, replaced)
    disk.rename(partial, final)
    disk.sync(folder)
    disk.remove(replaced)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint, every file checked; raises CheckpointDamaged."""
    digests = verify_checkpoint(path)
    groups = [name.removesuffix(_SUFFIX) for name in digests if name.endswith(_SUFFIX)]
    tensors = {group: safetensors.torch.load_file(path / (group + _SUFFIX)) for group in groups}
    return Checkpoint(tensors, *_read_position(path))


def verify_checkpoint(path: Path) -> Mapping[str, str]:
    """Return the digest of each file, all found as they were written and of this release's form.

    Raises CheckpointDamaged.
    """
    digests = _read_manifest(path)
    for name in {*digests, _POSITION}:
        _verify(path, name, digests)
    _read_position(path)
    return digests


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the checkpoint's weights as they are validated and published: the moving average if there is one.

    They are on the CPU; raises CheckpointDamaged.
    """
    digests = _read_manifest(path)
    name = "ema" if f"ema{_SUFFIX}" in digests else "weights"
    _verify(path, name + _SUFFIX, digests)
    return safetensors.torch.load_file(path / (name + _SUFFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of the folder, oldest first."""
    found = (path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())
    return sorted(path for path in found if path.is_dir())


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies, if there is one."""
    return folder / f"{_PREFIX}{step:010d}"


def checkpoint_step(path: Path) -> int:
    """Return the step of the checkpoint that lies there."""
    return int(path.name.removeprefix(_PREFIX))


def tidy_up(folder: Path, disk: Disk) -> None:
    """Remove what a crash has left of a checkpoint in the making, and put one back that was to be replaced."""
    for path in folder.glob(f"{_PARTIAL}*"):
        disk.remove(path)
    for path in folder.glob(f"{_REPLACED}*"):
        final = folder / path.name.removeprefix(_REPLACED)
        if final.exists():
            disk.remove(path)
        else:
            disk.rename(path, final)


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the content of a safetensors file (https://github.com/huggingface/safetensors, "Format"), in pieces that
    are views of FP32 tensors on the CPU: the library's own functions copy everything twice."""
    header, chunks, end = {}, [], 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
        values = tensor.detach().cpu().contiguous()
        begin, end = end, end + 4 * values.numel()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [begin, end]}
        chunks.append(values.numpy().reshape(-1).view(np.uint8).data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *chunks]


def _write_all(folder: Path, checkpoint: Checkpoint, disk: Disk) -> None:
    files = {group + _SUFFIX: safetensors_chunks(tensors) for group, tensors in checkpoint.tensors.items()}
    position = dataclasses.asdict(checkpoint.position) | {"counters": dataclasses.asdict(checkpoint.counters)}
    files[_POSITION] = [json.dumps(position).encode()]
    digests = {}
    for name, chunks in files.items():
        disk.write(folder / name, chunks)
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        digests[name] = digest.hexdigest()
    disk.write(folder / _MANIFEST, [json.dumps({"sha256": digests}).encode()])
    disk.sync(folder)


def _read_manifest(path: Path) -> dict[str, str]:
    try:
        manifest: Any = json.loads((path / _MANIFEST).read_bytes())
        digests: dict[str, str] = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse_if_exhausted(error)
        raise CheckpointDamaged(f"{path / _MANIFEST} cannot be read: {error}") from error
    return digests


def _read_position(path: Path) -> tuple[TraineeCounters, Position]:
    try:
        values: Any = json.loads((path / _POSITION).read_bytes())
        counters = TraineeCounters(**values.pop("counters"))
        for name in ("validated", "best"):
            values[name] = values[name] and _scores_from_dict(values[name])
        values["candidates"] = tuple((step, tuple(rank)) for step, rank in values["candidates"])
        values["ending"] = values["ending"] and tuple(values["ending"])
        values["decays"] = tuple(decay_plan_from_dict(decay) for decay in values.get("decays", ()))
        return counters, Position(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse_if_exhausted(error)
        raise CheckpointDamaged(f"{path / _POSITION} cannot be read, or is of another release: {error!r}") from error


def _scores_from_dict(values: Mapping[str, Any]) -> ValidationScores:
    return ValidationScores(**{**values, "statistics": tuple(values.get("statistics", ()))})


def _verify(path: Path, name: str, digests: Mapping[str, str]) -> None:
    try:
        with (path / name).open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == digests.get(name)
    except OSError as error:
        refuse_if_exhausted(error)
        raise CheckpointDamaged(f"{path / name} cannot be read: {error}") from error
    if not intact:
        raise CheckpointDamaged(f"{path / name} is not what was written: its digest differs from the manifest's")
