"""The size of a network, known from its recipe."""

import itertools

import pytest

from ferryman_service.domain.footprint import parameter_count
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions, resolve_recipe
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.engine import count_parameters


@pytest.mark.parametrize(("norm", "activation"), list(itertools.product(NormPlacement, Activation)))
def test_the_count_is_that_of_the_network(norm, activation):
    model = {"d_model": 24, "heads": 4, "ffn_dim": 40, "encoder_layers": 3, "decoder_layers": 2}
    recipe = resolve_recipe({"model": {**model, "norm": norm, "activation": activation, "positions": Positions.ROPE}})
    network = Transformer(TransformerConfig.from_recipe(recipe, 77))
    assert parameter_count(recipe.model, 77) == count_parameters(network)
