"""What is known of each sentence of a running batch between two steps: one record, so that sentences join and leave by
one copy.

Shape suffixes: S sentences, W rows of each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.translation import Sampling
from ferryman_service.search.finished import FINISHED, places
from ferryman_service.search.sentence import SAMPLING, SentenceSearch

_SETTINGS: Final = np.dtype(
    [
        ("uses", "i8"),
        ("n_best", "i8"),
        ("needed", "i8"),
        ("min_length", "i8"),
        ("max_length", "i8"),
        ("length_penalty", "f8"),
        ("repetition_penalty", "f8"),
        ("ngram_size", "i8"),
        ("prefix_length", "i8"),
        ("temperature", "f8"),
        ("top_k", "i8"),
        ("top_p", "f8"),
        ("seed", "u8"),
    ]
)


@functools.cache
def state_type(width: int) -> np.dtype[np.void]:
    """Return the record: settings, place in the lattice, subwords so far, how many hypotheses have finished, those that
    are stored and how many, and of each row the log-probability that it is ranked by and the model's (-inf and anything
    if it is dead)."""
    return np.dtype(
        [
            ("settings", _SETTINGS),
            ("place", "i8"),
            ("length", "i8"),
            ("found", "i8"),
            ("stored", "i8"),
            ("finished", FINISHED, (places(width),)),
            ("ranked", "f8", (width,)),
            ("log_prob", "f8", (width,)),
        ]
    )


def new_state(searches: Sequence[SentenceSearch], lattice_places: Sequence[int], width: int) -> NDArray[np.void]:
    """Return the records of sentences before their first step: a beam has one row, samples are as many as rows."""
    state = np.zeros(len(searches), dtype=state_type(width))
    state["settings"] = np.array([_settings(search) for search in searches], dtype=_SETTINGS)
    state["place"] = lattice_places
    state["finished"]["score"] = -np.inf
    state["ranked"][:, 1:] = -np.inf
    state["ranked"][state["settings"]["uses"] & SAMPLING > 0] = 0.0
    return state


def join(state: NDArray[np.void], new: NDArray[np.void]) -> NDArray[np.void]:
    """Return the records with new ones behind them."""
    return np.concatenate((_opaque(state), _opaque(new))).view(state.dtype)


def keep(state: NDArray[np.void], kept_S: NDArray[np.int64]) -> NDArray[np.void]:
    """Return certain records."""
    return _opaque(state)[kept_S].view(state.dtype)


def _opaque(state: NDArray[np.void]) -> NDArray[np.void]:
    """Return the records as bytes: NumPy copies them one by one, not field by field, which takes ten times as long."""
    return state.view(f"V{state.dtype.itemsize}")


def _settings(search: SentenceSearch) -> tuple[float, ...]:
    """Return the values of _SETTINGS."""
    options, drawn = search.options, search.options.sampling or Sampling()
    return (
        search.uses,
        options.n_best,
        search.needed,
        search.min_length,
        search.max_length,
        options.length_penalty,
        options.repetition_penalty,
        options.no_repeat_ngram_size,
        len(search.prefix),
        drawn.temperature,
        drawn.top_k,
        drawn.top_p,
        search.seed,
    )
