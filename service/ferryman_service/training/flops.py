"""How much arithmetic training is, and what share of a device's peak it reaches.

Only matrix products are counted, forward once and backward twice (Kaplan et al., 2020, appendix B; Chowdhery et al.,
2022, appendix B for the utilization).
"""

from __future__ import annotations

from typing import Final

import torch

from ferryman_service.domain.recipe import Activation, Precision
from ferryman_service.model.config import TransformerConfig

# Dense peaks of the tensor cores, FLOP/s, by a part of the device's name: (16 bits, FP32 as TF32). From the makers'
# data sheets.
_PEAKS: Final = {
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "A10G": (70e12, 35e12),
    "L4": (121e12, 60e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


def training_flops(config: TransformerConfig, source_tokens: int, target_tokens: int, pairs: int) -> float:
    """Return the floating-point operations of an update without padding: multiplications and additions, each one.

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
    """Return the device's peak in the precision, FLOP/s; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    half, full = next((peaks for part, peaks in _PEAKS.items() if part in name), (None, None))
    return full if precision is Precision.FP32 else half
