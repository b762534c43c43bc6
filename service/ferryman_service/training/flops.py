"""How much arithmetic training is, and what share of a device's peak it reaches.

Only matrix products are counted, forward once and backward twice (Kaplan et al., 2020, appendix B; Chowdhery et al.,
2022, appendix B for the utilization).
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import torch

from ferryman_service.domain.recipe import Activation, Precision
from ferryman_service.model.config import TransformerConfig


class _Peak(NamedTuple):
    """A device's dense peaks, FLOP/s: of 16 bits, of FP32 multiplied as TF32, and of FP32 as it is."""

    half: float
    tf32: float
    fp32: float


# By words of the device's name, the first that fit, from the makers' data sheets. V100 and T4 have no TF32.
_PEAKS: Final = {
    ("H200",): _Peak(989e12, 494e12, 67e12),
    ("GH200",): _Peak(989e12, 494e12, 67e12),
    ("H100", "PCIe"): _Peak(756e12, 378e12, 51e12),
    ("H100", "NVL"): _Peak(835e12, 417e12, 60e12),
    ("H100",): _Peak(989e12, 494e12, 67e12),
    ("A100",): _Peak(312e12, 156e12, 19.5e12),
    ("L40S",): _Peak(362e12, 183e12, 91.6e12),
    ("L40",): _Peak(181e12, 90.5e12, 90.5e12),
    ("A10G",): _Peak(70e12, 35e12, 35e12),
    ("L4",): _Peak(121e12, 60e12, 30.3e12),
    ("V100",): _Peak(125e12, 15.7e12, 15.7e12),
    ("T4",): _Peak(65e12, 8.1e12, 8.1e12),
}


def training_flops(config: TransformerConfig, source_tokens: int, target_tokens: int, pairs: int) -> float:
    """Return the floating-point operations of one pass over an update's pairs, without padding: each multiplication is
    one, and each addition.

    Sentences are taken to be of equal length, which matters for attention alone.
    """
    width, inner = config.d_model, config.ffn_dim
    feed_forward = (3 if config.activation is Activation.SWIGLU else 2) * width * inner
    encoder = config.encoder_layers * (4 * width * width + feed_forward)
    decoder = config.decoder_layers * (6 * width * width + feed_forward) + width * config.vocabulary_size
    cross = config.decoder_layers * 2 * width * width
    products = source_tokens * (encoder + cross) + target_tokens * decoder
    source_length, target_length = source_tokens / pairs, target_tokens / pairs
    scores = config.encoder_layers * source_tokens * source_length
    # A target position sees half of the others on average, and the whole source.
    scores += config.decoder_layers * target_tokens * (target_length / 2 + source_length)
    return 3 * 2 * (products + 2 * width * scores)


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Return the device's peak in the precision, FLOP/s; None if it is not known.

    FP32 has two: training leaves torch's default, full FP32, as it is, so that a run's losses are those of a CPU; where
    somebody has allowed TF32, its peak counts.
    """
    if device.type != "cuda":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    if peak is None or precision is not Precision.FP32:
        return peak.half if peak else None
    return peak.tf32 if torch.backends.cuda.matmul.allow_tf32 else peak.fp32


def peak_of(device_name: str) -> _Peak | None:
    """Return the peaks of a device of this name; None if they are not known, as those of a part of a GPU (MIG)."""
    words = set(re.split(r"[\s-]+", device_name))
    if "MIG" in words:
        return None
    return next((peak for wanted, peak in _PEAKS.items() if words.issuperset(wanted)), None)
