"""The embedding matrix, outside the graphs: encoder and decoder look their tokens up in the same memory.

Shape suffixes: S sentences, L source positions, R rows, D model width, V vocabulary, N any number of tokens, T
positions.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.bundle.manifest import (
    EMBEDDING_FILE,
    EMBEDDING_INT8_FILE,
    EMBEDDING_SCALES_FILE,
    Architecture,
)
from ferryman_service.domain.translation import ComputeType

_FIRST_TABLE_LENGTH: Final = 512
_INT8_MAX: Final = 127


class Embedding:
    """Looks tokens up and adds their positions. Safe to use from several threads at once."""

    def __init__(self, matrix_VD: NDArray[Any], scale_V1: NDArray[np.float32] | None, *, rotates: bool) -> None:
        """Store the matrix, float32 or int8 with a scale for each row; `rotates`: positions are not added."""
        self._matrix_VD = matrix_VD
        self._scale_V1 = scale_V1
        self._rotates = rotates
        self._table_TD = sinusoids(_FIRST_TABLE_LENGTH, matrix_VD.shape[1])
        self._lock = threading.Lock()

    @classmethod
    def open(cls, bundle: Path, compute_type: ComputeType, architecture: Architecture) -> Embedding:
        """Map the bundle's file into memory. Raises OSError, and ValueError if it is not what the manifest says."""
        shape = architecture.vocabulary_size, architecture.d_model
        if compute_type is ComputeType.INT8:
            matrix_VD = _map(bundle / EMBEDDING_INT8_FILE, shape, np.int8)
            scale_V1 = np.array(_map(bundle / EMBEDDING_SCALES_FILE, (shape[0], 1), np.float32))
            return cls(matrix_VD, scale_V1, rotates=architecture.rotates)
        return cls(_map(bundle / EMBEDDING_FILE, shape, np.float32), None, rotates=architecture.rotates)

    @property
    def size_bytes(self) -> int:
        """How much memory the matrix takes once all of it was used."""
        scales = 0 if self._scale_V1 is None else self._scale_V1.nbytes
        return self._matrix_VD.nbytes + scales

    def of_sources(self, source_SL: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return x_SLD of sentences that begin at position 0."""
        x_SLD = self._look_up(source_SL)
        if not self._rotates:
            x_SLD += self._table(source_SL.shape[1])[: source_SL.shape[1]]
        return x_SLD

    def of_rows(
        self, token_R: NDArray[np.int64], position_R: NDArray[np.int32], longest: int, out_RD: NDArray[np.float32]
    ) -> None:
        """Write x_RD of one token a row into `out_RD`; `longest` is the largest of the positions."""
        if self._scale_V1 is None:
            self._matrix_VD.take(token_R, 0, out_RD, "clip")
        else:
            np.multiply(self._matrix_VD.take(token_R, 0), self._scale_V1.take(token_R, 0), out_RD)
        if not self._rotates:
            out_RD += self._table(longest + 1).take(position_R, 0)

    def _look_up(self, token_N: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._matrix_VD.take(token_N, 0)
        return found if self._scale_V1 is None else found * self._scale_V1.take(token_N, 0)

    def _table(self, length: int) -> NDArray[np.float32]:
        """Return sinusoids of at least `length` positions."""
        if length > len(self._table_TD):
            with self._lock:
                if length > len(self._table_TD):
                    self._table_TD = sinusoids(2 * length, self._table_TD.shape[1])
        return self._table_TD


def write_embedding(bundle: Path, weight_VD: NDArray[np.float32]) -> None:
    """Write the matrix, multiplied by sqrt(d_model) as the paper has it (section 3.4)."""
    np.save(bundle / EMBEDDING_FILE, _scaled(weight_VD), allow_pickle=False)


def write_int8_embedding(bundle: Path, weight_VD: NDArray[np.float32]) -> None:
    """Write the same matrix as int8 with a scale for each token."""
    matrix_VD = _scaled(weight_VD)
    scale_V1 = np.maximum(np.abs(matrix_VD).max(axis=1, keepdims=True), np.float32(1e-12)) / np.float32(_INT8_MAX)
    np.save(bundle / EMBEDDING_INT8_FILE, np.rint(matrix_VD / scale_V1).astype(np.int8), allow_pickle=False)
    np.save(bundle / EMBEDDING_SCALES_FILE, scale_V1, allow_pickle=False)


def sinusoids(length: int, d_model: int) -> NDArray[np.float32]:
    """Return positions_TD: sin(t / 10000^(2i/d_model)) in column 2i, the cosine of the same angle in column 2i + 1."""
    frequency = np.exp(np.arange(0, d_model, 2) * (-math.log(10_000.0) / d_model))
    angle = np.arange(length)[:, None] * frequency
    return np.stack((np.sin(angle), np.cos(angle)), axis=-1).reshape(length, d_model).astype(np.float32)


def _scaled(weight_VD: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(weight_VD * np.float32(math.sqrt(weight_VD.shape[1])), dtype=np.float32)


def _map(path: Path, shape: tuple[int, int], dtype: type[np.generic]) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path.name} holds {array.dtype} of {array.shape}, not {np.dtype(dtype)} of {shape}")
    return np.asarray(array)  # a plain view of the mapped memory: numpy.memmap's own methods are slow
