"""The names of the graphs' inputs and outputs, and what they hold: what export writes and serving calls.

encoder.onnx: source_SL (int64, padded with PAD) to bias_S11L (0, at padding -inf) and, of each decoder layer,
cross_keys_SHEL and cross_values_SHLE.

decoder.onnx, one step of all rows: token_SW, parent_SW (int64), position_1 (int64, from 0), bias_S11L, the keys and
values that the encoder returned, past_keys_PHTE and past_values_PHTE of each layer, and k_1 (int64) to log_probs_RK and
tokens_RK (int64), the k best, and each layer's present_keys_RHTE and present_values_RHTE, one position longer.

Shape suffixes: S sentences, L source positions, W rows per sentence, R = S * W rows, P rows of the step before, T
target positions, H heads, E head width, K candidates per row. What is not int64 is float32.
"""

from __future__ import annotations

from typing import Final

SOURCE: Final = "source"
BIAS: Final = "bias"
STEP_INPUT: Final = "token"
PARENT: Final = "parent"
POSITION: Final = "position"
K: Final = "k"
LOG_PROBS: Final = "log_probs"
TOKENS: Final = "tokens"

MAX_TARGET_LENGTH: Final = 4096
"""The decoder graph knows this many positions: the longest max_length a caller may ask for."""


def keys_values_names(kind: str, layers: int) -> list[str]:
    """Return the names of each layer's keys and values in turn; `kind` is "cross", "past" or "present"."""
    return [f"{kind}_{part}_{layer}" for layer in range(layers) for part in ("keys", "values")]
