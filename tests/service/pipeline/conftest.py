"""Real subwords of a tiny language, and models that are functions."""

import math

import numpy as np
import pytest

from ferryman_service.domain.recipe import SubwordAlgorithm
from ferryman_service.domain.tokens import EOS
from ferryman_service.text.subwords import train_subwords

LINES = ["one two three four five six seven eight nine ten"] * 3
VOCABULARY_SIZE = 32


@pytest.fixture(scope="session")
def subwords(tmp_path_factory):
    return train_subwords(
        LINES,
        tmp_path_factory.mktemp("subwords") / "subwords.model",
        vocabulary_size=VOCABULARY_SIZE,
        algorithm=SubwordAlgorithm.BPE,
        character_coverage=1.0,
        seed=1,
    )


def _only(token):
    log_probs = np.full(VOCABULARY_SIZE, math.log(1e-6), dtype=np.float32)
    log_probs[EOS] = math.log(1e-9)  # else beams would be full of short translations
    log_probs[token] = math.log1p(-(VOCABULARY_SIZE - 1) * 1e-6)
    return log_probs


@pytest.fixture(scope="session")
def copy():
    """A model that copies its source."""
    return lambda source, prefix: _only(source[min(len(prefix), len(source)) - 1])


@pytest.fixture(scope="session")
def never_ends():
    """A model that says the same token for ever."""
    return lambda source, prefix: _only(5)
