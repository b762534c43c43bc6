"""The names of the graphs' inputs and outputs, and what they hold: what export writes and serving calls.

Tokens are embedded outside: x is `embedding[token] * sqrt(d_model)`, plus the sinusoid of its position unless the model
rotates. So one matrix in memory serves both graphs.

encoder.onnx: x_SLD, positions_1L (int64, 0 to L - 1, only if the model rotates) and source_lengths_S (int32) to
cross_keys_SHLE and cross_values_SHLE of each decoder layer; what stands at padding is finite and never looked at.

decoder.onnx, one step of all rows: x_SWD, past_lengths_R and total_length (int32: positions that a row's cache holds;
the longest of them and one), positions_R1 (int64, only if the model rotates), source_lengths_S (int32), the cross
keys and values, and each layer's past_keys_RHTC and past_values_RHTC. Returns logits_RV; log_probs_RK and tokens_RK
(int64), the k_1 (int64) best of each row; attention_SHWL, the last layer's attention to the source; and
present_keys_RHTC and present_values_RHTC, which must be bound to the memory of the past ones: the new position is
written in place.

encoder.fp16.onnx and decoder.fp16.onnx are for a GPU: keys, values and attention are float16, and nothing asks for a
shape, since that would be asked on the CPU. So both take shape_3 (int64: the shape of x), and the decoder
source_positions_L (int32, 0 to L - 1). It also returns best_RQ, float32, Q = 2 K: log_probs_RK and beside them
tokens_RK, so that one copy brings both to the CPU. shape, k and total_length are read on the CPU, where a captured step
does not look again: total_length is T there in every step.

reorder.fp16.onnx: data_GNX and index_M to moved_GMX, where moved[g, m] is data[g, index[m]]; all int64, for it moves
memory and does not look at what is in it.

Shape suffixes: S sentences, L source positions, W rows per sentence, R = S * W rows, T positions that the cache has
room for, H heads, E head width, C head width in the cache (`cache_width`), D model width, V vocabulary and padding, K
candidates per row. What is not said to be something else is float32.
"""

from __future__ import annotations

from typing import Final

EMBEDDED: Final = "x"
SOURCE_LENGTHS: Final = "source_lengths"
PAST_LENGTHS: Final = "past_lengths"
TOTAL_LENGTH: Final = "total_length"
POSITIONS: Final = "positions"
K: Final = "k"
LOGITS: Final = "logits"
LOG_PROBS: Final = "log_probs"
TOKENS: Final = "tokens"
ATTENTION: Final = "attention"
SHAPE: Final = "shape"
SOURCE_POSITIONS: Final = "source_positions"
BEST: Final = "best"
DATA: Final = "data"
INDEX: Final = "index"
MOVED: Final = "moved"

MAX_TARGET_LENGTH: Final = 4096
"""The longest max_length a caller may ask for, and how many positions rotations are made for."""


def cache_width(head_dim: int) -> int:
    """Return how wide a head is in self-attention and its cache: GroupQueryAttention takes multiples of 8 alone."""
    return -(-head_dim // 8) * 8


def keys_values_names(kind: str, layers: int) -> list[str]:
    """Return the names of each layer's keys and values in turn; `kind` is "cross", "past" or "present"."""
    return [f"{kind}_{part}_{layer}" for layer in range(layers) for part in ("keys", "values")]
