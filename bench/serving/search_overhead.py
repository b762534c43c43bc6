"""The cost of a search step beside the model: choosing among candidates that are there already.

    python -m bench.serving.search_overhead

A model that answers at once is searched by traffic that keeps the batch full: sentences that are done leave and others
join. `step_us` is the median time of a step; `turn_us`, that of a turn in which sentences leave and join: reading their
results back, leaving, joining. `plain_us` is the median time of the plainest step in NumPy, measured by turns in the
same run: it adds scores and takes the best of each sentence, but ends no sentence and keeps no translation. A step may
take a certain number of times as long; the value is that limit over the measured ratio, the worst of the shapes that
have a limit.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.shared.result import Result, publish, watched_machine
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.translation import SearchOptions
from ferryman_service.search.beam import Searches
from ferryman_service.search.decoder import Candidates
from ferryman_service.search.sentence import SentenceSearch

AT_MOST: Final[Mapping[tuple[int, int], float | None]] = {
    (1, 1): 1.25,
    (64, 1): None,
    (1, 5): None,
    (64, 5): 1.9,
}
"""(sentences, rows of each): how many times as long as the plainest step a step may take."""

_STEPS: Final = 2000
_WARMUP_STEPS: Final = 200
_ANSWERS: Final = 50
_VOCABULARY: Final = 8000
_MAX_LENGTH: Final = 60
_END_FIRST: Final = 1 / 30
_END_ELSEWHERE: Final = 1 / 5


class ReadyAnswers:
    """A RunningBatch that has its answers before it is asked: the end symbol is a row's best candidate with probability
    1/30, and among the others with 1/5."""

    def __init__(self, sentences: int, width: int, k: int) -> None:
        self.width = width
        self.sentences = sentences
        self._asked = 0
        self._answers = [_answer(np.random.default_rng(seed), (sentences, width, k)) for seed in range(_ANSWERS)]

    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        """Do nothing: the batch is full."""

    def keep(self, kept_S: NDArray[np.int64]) -> None:
        """Do nothing."""

    @property
    def size_bytes(self) -> int:
        """Nothing: there are no caches."""
        return 0

    def step(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64], k: int) -> Candidates:
        """Return the next answer."""
        self._asked += 1
        return self.last

    @property
    def last(self) -> Candidates:
        """The answer that was given last."""
        return self._answers[self._asked % _ANSWERS]

    def step_logits(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> NDArray[np.float32]:
        """Refuse: nobody asks."""
        raise NotImplementedError

    def attention(self) -> NDArray[np.float32]:
        """Refuse: nobody asks."""
        raise NotImplementedError


def _answer(generator: np.random.Generator, shape: tuple[int, int, int]) -> Candidates:
    rows, k = shape[0] * shape[1], shape[2]
    token_RK = np.stack([generator.choice(np.arange(EOS + 1, _VOCABULARY), k, replace=False) for _ in range(rows)])
    place_R = np.where(generator.random(rows) < _END_FIRST, 0, generator.integers(1, k, rows))
    ends_R = (place_R == 0) | (generator.random(rows) < _END_ELSEWHERE)
    token_RK[np.flatnonzero(ends_R), place_R[ends_R]] = EOS
    log_prob_RK = -np.sort(generator.exponential(1.0, (rows, k)).cumsum(axis=1), axis=1)
    return Candidates(log_prob_RK.reshape(shape).astype(np.float32), token_RK.reshape(shape))


def measure(sentences: int, width: int, steps: int = _STEPS) -> dict[str, float]:
    """Return the microseconds of a step, of the plainest step and of a turn, and how many sentences leave and join in a
    turn."""
    batch, searches = ReadyAnswers(sentences, width, width + 3), Searches(width, logits=False, attention=False)
    search = SentenceSearch(options=SearchOptions(beam_size=width), max_length=_MAX_LENGTH)
    searches.admit([search] * sentences)
    step_us, plain_us, turn_us, left = [], [], [], 0
    score_SW = np.zeros((sentences, width), dtype=np.float32)
    for number in range(_WARMUP_STEPS + steps):
        start_s = time.perf_counter()
        searches.step(batch)
        stepped_s = time.perf_counter()
        done_N = searches.done()
        if len(done_N):
            for sentence in done_N.tolist():
                searches.results(sentence)
            searches.keep(np.delete(np.arange(searches.sentences), done_N))
            searches.admit([search] * len(done_N))
        turned_s = time.perf_counter()
        plainest_step(batch.last, score_SW)
        plain_s = time.perf_counter() - turned_s
        if number >= _WARMUP_STEPS:
            step_us.append(1e6 * (stepped_s - start_s))
            plain_us.append(1e6 * plain_s)
            left += len(done_N)
            if len(done_N):
                turn_us.append(1e6 * (turned_s - stepped_s))
    return {
        "step_us": round(statistics.median(step_us), 1),
        "plain_us": round(statistics.median(plain_us), 1),
        "ratio": round(statistics.median(step_us) / statistics.median(plain_us), 3),
        "turn_us": round(statistics.median(turn_us), 1),
        "sentences_per_turn": round(left / len(turn_us), 1),
    }


def plainest_step(candidates: Candidates, score_SW: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
    """Return score, token and parent of each sentence's best candidates, as many as it has rows, the best first."""
    sentences, width, k = candidates.log_probs_SWK.shape
    score_SC = (score_SW[:, :, None] + candidates.log_probs_SWK).reshape(sentences, width * k)
    best_SW = np.argpartition(-score_SC, width, axis=1)[:, :width]
    best_SW = np.take_along_axis(best_SW, np.argsort(-np.take_along_axis(score_SC, best_SW, axis=1), axis=1), axis=1)
    token_SW = np.take_along_axis(candidates.tokens_SWK.reshape(sentences, width * k), best_SW, axis=1)
    return np.take_along_axis(score_SC, best_SW, axis=1), token_SW, best_SW // k


@watched_machine()
def main() -> int:
    """Measure, print and keep the line; return the exit status."""
    measured = {shape: measure(*shape) for shape in AT_MOST}
    details: dict[str, Any] = {f"{sentences}x{width}": found for (sentences, width), found in measured.items()}
    shares = [most / measured[shape]["ratio"] for shape, most in AT_MOST.items() if most is not None]
    limits = {f"{sentences}x{width}": most for (sentences, width), most in AT_MOST.items()}
    return publish(
        Result(
            bench="search-overhead",
            value=min(shares),
            target=1.0,
            peer=None,
            details={"unit": "most_ratio over ratio", **details, "most_ratio": limits},
        )
    )


if __name__ == "__main__":
    sys.exit(main())
