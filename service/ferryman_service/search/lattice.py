"""What every step chose, kept so that hypotheses can be read back to their beginning; no step copies what is past.

Shape suffixes: P places (a sentence has one), T steps, W rows, S sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

_FIRST_PLACES: Final = 16
_FIRST_STEPS: Final = 64

_Number = TypeVar("_Number", bound=np.generic)


class Lattice:
    """For each sentence and step, the token and the parent of each row. The log-probability of each row, and the source
    position that each parent attended to most, are stored only where somebody asks.

    A path is a list of rows: the row that a hypothesis is after each step. In its first step all rows are equal, so
    parent 0 serves.
    """

    def __init__(self, width: int) -> None:
        self._free: list[int] = []
        shape = 0, _FIRST_STEPS, width
        self._token_PTW = np.zeros(shape, dtype=np.int32)
        self._parent_PTW = np.zeros(shape, dtype=np.uint8)
        self._log_prob_PTW: NDArray[np.float64] | None = None
        self._attended_PTW: NDArray[np.int32] | None = None

    def take_places(self, count: int) -> list[int]:
        """Return places for new sentences."""
        if len(self._free) < count:
            places, steps, _ = self._token_PTW.shape
            self._grow(max(_FIRST_PLACES, 2 * places, places + count), steps)
            self._free.extend(range(places, self._token_PTW.shape[0]))
        return [self._free.pop() for _ in range(count)]

    def free_places(self, places: Sequence[int]) -> None:
        """Take back the places of sentences that leave."""
        self._free.extend(places)

    def make_room(self, steps: int) -> None:
        """Make sure that so many steps fit."""
        if steps > self._token_PTW.shape[1]:
            self._grow(self._token_PTW.shape[0], 2 * steps)

    def write(
        self,
        place_S: NDArray[np.int64],
        step_S: NDArray[np.int64],
        token_SW: NDArray[np.int64],
        parent_SW: NDArray[np.int64],
    ) -> None:
        """Store what a step chose."""
        self._token_PTW[place_S, step_S] = token_SW
        self._parent_PTW[place_S, step_S] = parent_SW

    def write_greedy(self, place_S: NDArray[np.int64], step_S: NDArray[np.int64], token_S: NDArray[np.int64]) -> None:
        """Store the tokens of sentences with one row, which is its own parent."""
        self._token_PTW[place_S, step_S, 0] = token_S

    def write_log_probs(
        self, place_S: NDArray[np.int64], step_S: NDArray[np.int64], log_prob_SW: NDArray[np.float64]
    ) -> None:
        """Store the log-probabilities that the rows have after the step."""
        if self._log_prob_PTW is None:
            self._log_prob_PTW = np.zeros(self._token_PTW.shape)
        self._log_prob_PTW[place_S, step_S] = log_prob_SW

    def write_attended(
        self, place_S: NDArray[np.int64], step_S: NDArray[np.int64], attended_SW: NDArray[np.int64]
    ) -> None:
        """Store the source positions that the step's parents attended to most."""
        if self._attended_PTW is None:
            self._attended_PTW = np.zeros(self._token_PTW.shape, dtype=np.int32)
        self._attended_PTW[place_S, step_S] = attended_SW

    def path(self, place: int, steps: int, row: int) -> tuple[list[int], list[int]]:
        """Return the tokens and the path of the hypothesis that is row `row` after so many steps."""
        token_TW, parent_TW = self._token_PTW[place, :steps].tolist(), self._parent_PTW[place, :steps].tolist()
        tokens, rows = [0] * steps, [0] * steps
        for step in range(steps - 1, -1, -1):
            tokens[step], rows[step] = token_TW[step][row], row
            row = parent_TW[step][row]
        return tokens, rows

    def log_probs(self, place: int, path: Sequence[int]) -> list[float]:
        """Return the log-probabilities that a hypothesis had after each step of its path."""
        assert self._log_prob_PTW is not None, "nobody asked for log-probabilities"
        found: list[float] = self._log_prob_PTW[place, np.arange(len(path)), path].tolist() if path else []
        return found

    def attended(self, place: int, parents: Sequence[int]) -> list[int]:
        """Return the source position that each step's parent attended to most."""
        assert self._attended_PTW is not None, "nobody asked for attention"
        found: list[int] = self._attended_PTW[place, np.arange(len(parents)), parents].tolist()
        return found

    def _grow(self, places: int, steps: int) -> None:
        self._token_PTW = _grown(self._token_PTW, places, steps)
        self._parent_PTW = _grown(self._parent_PTW, places, steps)
        self._log_prob_PTW = None if self._log_prob_PTW is None else _grown(self._log_prob_PTW, places, steps)
        self._attended_PTW = None if self._attended_PTW is None else _grown(self._attended_PTW, places, steps)


def _grown(old_PTW: NDArray[_Number], places: int, steps: int) -> NDArray[_Number]:
    """Return a larger array that begins with the old one."""
    new_PTW = np.zeros((places, steps, old_PTW.shape[2]), dtype=old_PTW.dtype)
    new_PTW[: old_PTW.shape[0], : old_PTW.shape[1]] = old_PTW
    return new_PTW
