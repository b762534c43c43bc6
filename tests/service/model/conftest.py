import pytest
import torch

from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer

KINDS = {
    "post": {"norm": NormPlacement.POST},
    "pre": {"norm": NormPlacement.PRE},
    "deep": {"norm": NormPlacement.DEEP},
    "gelu": {"activation": Activation.GELU},
    "swiglu": {"activation": Activation.SWIGLU},
    "rope": {"positions": Positions.ROPE},
    "all": {"norm": NormPlacement.PRE, "activation": Activation.SWIGLU, "positions": Positions.ROPE},
}


@pytest.fixture
def make_transformer():
    """Return small transformers in evaluation mode, weights drawn by seed; keyword arguments override the config."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        values = {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "heads": 4,
            "ffn_dim": 48,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "norm": NormPlacement.POST,
            "vocabulary_size": 60,
        }
        return Transformer(TransformerConfig(**{**values, **changes})).eval()

    return make


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def transformer(request, make_transformer):
    return make_transformer(**request.param)
