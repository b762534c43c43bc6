"""How large a recipe's network is, and the memory that training it takes at least."""

from __future__ import annotations

from typing import Final

from ferryman_service.domain.recipe import Activation, ModelRecipe, NormPlacement

_STATE_BYTES: Final = 16
"""Of each parameter: the weight, its gradient and Adam's two moments, each four bytes."""
_EMA_BYTES: Final = 4


def parameter_count(model: ModelRecipe, vocabulary_size: int) -> int:
    """Return the number of trained weights of the recipe's network over a vocabulary of this size."""
    width, inner = model.d_model, model.ffn_dim
    maps = 2 if model.activation is Activation.SWIGLU else 1
    attention = 4 * (width * width + width)
    feed_forward = width * maps * inner + maps * inner + inner * width + width
    norm = 2 * width
    encoder = model.encoder_layers * (attention + feed_forward + 2 * norm)
    decoder = model.decoder_layers * (2 * attention + feed_forward + 3 * norm)
    last_norms = 2 * norm if model.norm is NormPlacement.PRE else 0
    return vocabulary_size * width + encoder + decoder + last_norms


def training_state_bytes(parameters: int, *, averages: bool) -> int:
    """Return the memory of weights, gradients and moments, in each process; `averages`: a moving average is kept, too.

    Activations, which depend on the batch, come on top.
    """
    return parameters * (_STATE_BYTES + (_EMA_BYTES if averages else 0))
