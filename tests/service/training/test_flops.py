"""How much arithmetic an update is, and which device's peak it is held against."""

import dataclasses

import numpy as np
import pytest
import torch

from ferryman_service.domain.recipe import Activation, Precision
from ferryman_service.model.config import TransformerConfig
from ferryman_service.training.batches import make_batch
from ferryman_service.training.flops import peak_flops, peak_of, training_flops
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.updates import StepMeter

CPU = torch.device("cpu")


def tiny_config(recipe, **changes):
    config = TransformerConfig.from_recipe(recipe, 10)
    sizes = {"d_model": 4, "ffn_dim": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    return dataclasses.replace(config, **sizes | changes)


def test_an_update_is_six_operations_a_weight_and_token_and_its_attention(small_recipe):
    """Two pairs of three source and two target tokens, counted by hand."""
    projections, feed_forward = 4 * 4 * 4, 2 * 4 * 8
    query_and_output, keys_and_values, vocabulary = 2 * 4 * 4, 2 * 4 * 4, 10 * 4
    of_source = projections + feed_forward + keys_and_values
    of_target = projections + query_and_output + feed_forward + vocabulary
    # A score and what it weighs: 4 multiplications and 4 additions each. Causal attention looks at half.
    scores = 6 * 3 + 4 * 2 / 2 + 4 * 3
    expected = 6 * (6 * of_source + 4 * of_target) + 3 * scores * 16
    assert training_flops(tiny_config(small_recipe()), source_tokens=6, target_tokens=4, pairs=2) == expected == 12_192


def test_a_gate_is_a_third_matrix(small_recipe):
    plain, gated = (
        training_flops(tiny_config(small_recipe(), activation=activation), 6, 4, 2)
        for activation in (Activation.RELU, Activation.SWIGLU)
    )
    assert gated - plain == 6 * (6 + 4) * 4 * 8


def test_every_layer_counts(small_recipe):
    def flops(**layers):
        return training_flops(tiny_config(small_recipe(), **layers), 6, 4, 2)

    encoder, decoder = (flops(**{kind: 2}) - flops() for kind in ("encoder_layers", "decoder_layers"))
    assert flops(encoder_layers=3, decoder_layers=3) == flops() + 2 * encoder + 2 * decoder


def test_r_drop_goes_twice_over_a_batch_whose_padding_is_no_work(small_recipe):
    pairs = TokenPairs(TokenSide.from_sentences([[7], [8, 9, 10]]), TokenSide.from_sentences([[11, 12, 13], [14]]))
    batch = make_batch(pairs, np.array([0, 1]))
    config = tiny_config(small_recipe())
    once, twice = (
        StepMeter(CPU, small_recipe(optimization={"r_drop_alpha": alpha}).optimization, config).flops([batch])
        for alpha in (0.0, 5.0)
    )
    assert batch.padding_share > 0
    assert once == training_flops(config, source_tokens=6, target_tokens=6, pairs=2)
    assert twice == 2 * once


def test_a_rank_without_a_batch_has_no_work(small_recipe):
    assert StepMeter(CPU, small_recipe().optimization, tiny_config(small_recipe())).flops([]) == 0


@pytest.mark.parametrize(
    ("name", "half", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("Tesla T4", 65e12, 8.1e12),
    ],
)
def test_a_device_is_known_by_the_words_of_its_name(name, half, fp32):
    assert (peak_of(name).half, peak_of(name).fp32) == (half, fp32)


@pytest.mark.parametrize("name", ["NVIDIA T400", "NVIDIA RTX A4000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""])
def test_unknown_device_has_no_peak(name):
    assert peak_of(name) is None


def test_a_cpu_has_no_peak():
    assert peak_flops(CPU, Precision.FP32) is None
