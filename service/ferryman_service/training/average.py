"""Averaging checkpoints (Vaswani et al., 2017, section 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ferryman_service.training.checkpoint import load_weights


def average_checkpoints(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Return the mean of the checkpoints' published weights, summed in float64 and rounded once.

    Raises CheckpointDamaged.
    """
    assert paths, "nothing to average"
    first = load_weights(paths[0])
    sums = {name: tensor.double() for name, tensor in first.items()}
    for path in paths[1:]:
        for name, tensor in load_weights(path).items():
            sums[name] += tensor
    return {name: (total / len(paths)).to(first[name].dtype) for name, total in sums.items()}
