"""What the options of a network do: activations, rotations, DeepNorm, and where dropout acts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.model.attention import SelfAttention
from ferryman_service.model.layers import FeedForward, deep_norm
from ferryman_service.model.positions import rotate, sinusoids

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def sentences(batch, length, seed=1):
    return torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def linear(layer, x, rows=slice(None)):
    return x @ layer.weight[rows].T + layer.bias[rows]


def shaken(module):
    """Give biases values that show when they are forgotten."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


# Activations


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def test_relu_and_gelu_stand_between_the_maps(make_transformer):
    x = torch.randn(2, 5, 32)
    for activation, function in ((Activation.RELU, lambda x: x.clamp(min=0)), (Activation.GELU, gelu)):
        feed_forward = shaken(FeedForward(make_transformer(activation=activation).config)).eval()
        expected = linear(feed_forward.outer, function(linear(feed_forward.inner, x)))
        torch.testing.assert_close(feed_forward(x), expected, atol=1e-5, rtol=1e-5)


def test_swiglu_gates_one_half_with_the_other(make_transformer):
    """Shazeer (2020), equation 6: (Swish(x W) * x V) W2. The inner width is ffn_dim, so V adds d_model * ffn_dim."""
    config = make_transformer(activation=Activation.SWIGLU).config
    feed_forward, x = shaken(FeedForward(config)).eval(), torch.randn(2, 5, 32)
    assert feed_forward.inner.weight.shape == (2 * config.ffn_dim, config.d_model)
    assert feed_forward.outer.weight.shape == (config.d_model, config.ffn_dim)
    gate = linear(feed_forward.inner, x, slice(config.ffn_dim))
    up = linear(feed_forward.inner, x, slice(config.ffn_dim, None))
    expected = linear(feed_forward.outer, gate * torch.sigmoid(gate) * up)
    torch.testing.assert_close(feed_forward(x), expected, atol=1e-5, rtol=1e-5)


# Rotations


def test_rotation_turns_each_pair_by_its_angle():
    x, turned = torch.randn(1, 1, 6, 8), torch.empty(1, 1, 6, 8)
    for t in range(6):
        for i in range(4):
            angle = t / 10_000 ** (2 * i / 8)
            pair = complex(*x[0, 0, t, 2 * i : 2 * i + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
            turned[0, 0, t, 2 * i], turned[0, 0, t, 2 * i + 1] = pair.real, pair.imag
    torch.testing.assert_close(rotate(x, sinusoids(6, 8)), turned, atol=1e-6, rtol=0)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.integers(0, 2**31))
def test_scores_of_rotated_vectors_depend_on_the_distance_alone(first, second, shift, seed):
    generator, table = torch.Generator().manual_seed(seed), sinusoids(201, 16).double()
    query, key = (torch.randn(1, 1, 1, 16, dtype=torch.float64, generator=generator) for _ in range(2))

    def score(t, s):
        return (rotate(query, table[t : t + 1]) * rotate(key, table[s : s + 1])).sum()

    torch.testing.assert_close(score(first + shift, second + shift), score(first, second), atol=1e-5, rtol=0)


def test_rope_adds_no_positions(make_transformer):
    transformer = make_transformer(positions=Positions.ROPE)
    embedded = transformer.embed(torch.tensor([[7, 7, 7]]), first_position=5)
    torch.testing.assert_close(embedded[0], transformer.embedding.weight[[7, 7, 7]] * math.sqrt(32))


def test_rope_rotates_queries_and_keys_and_leaves_values(make_transformer):
    plain = shaken(SelfAttention(make_transformer().config))
    rotating = SelfAttention(make_transformer(positions=Positions.ROPE).config)
    rotating.load_state_dict(plain.state_dict())
    x, table = torch.randn(2, 4, 32), sinusoids(9, 8)
    query, (keys, values) = plain.project(x)
    rotated_query, (rotated_keys, same_values) = rotating.project(x, first_position=5)
    torch.testing.assert_close(rotated_query, rotate(query, table[5:]))
    torch.testing.assert_close(rotated_keys, rotate(keys, table[5:]))
    assert torch.equal(same_values, values)


def test_attention_to_the_source_knows_no_positions(make_transformer):
    """Only self-attention is rotated: a source whose memory is put into another order is the same source."""
    transformer = make_transformer(positions=Positions.ROPE)
    memory, target, order = torch.randn(1, 6, 32), sentences(1, 5), torch.tensor([3, 1, 5, 0, 2, 4])
    hidden = transformer.decode_hidden(target, memory, None)
    torch.testing.assert_close(transformer.decode_hidden(target, memory[:, order], None), hidden, atol=1e-5, rtol=0)


def test_with_rope_the_order_of_the_source_matters(make_transformer):
    transformer, source = make_transformer(positions=Positions.ROPE), sentences(1, 6)
    turned = transformer.encode(source.flip(1)).flip(1)
    assert (turned - transformer.encode(source)).abs().max() > 1e-2


# DeepNorm


def test_the_constants_of_deep_norm(make_transformer):
    """Wang et al. (2022), figure 2, for 18 encoder layers and 6 decoder layers."""
    config = make_transformer(norm=NormPlacement.DEEP, encoder_layers=18, decoder_layers=6).config
    constants = deep_norm(config)
    assert constants.encoder_alpha == pytest.approx(0.81 * (18**4 * 6) ** (1 / 16))
    assert constants.encoder_beta == pytest.approx(0.87 * (18**4 * 6) ** (-1 / 16))
    assert constants.decoder_alpha == pytest.approx((3 * 6) ** (1 / 4))
    assert constants.decoder_beta == pytest.approx((12 * 6) ** (-1 / 4))


def test_deep_norm_weighs_the_residual(make_transformer):
    transformer = make_transformer(norm=NormPlacement.DEEP)
    constants, x, answer = deep_norm(transformer.config), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    sides = (transformer.encoder_layers, constants.encoder_alpha), (transformer.decoder_layers, constants.decoder_alpha)
    for layers, alpha in sides:
        residual = layers[0].feed_forward_residual
        assert residual.enter(x) is x
        torch.testing.assert_close(residual.leave(x, answer), F.layer_norm(alpha * x + answer, (32,)))


def test_deep_norm_scales_values_outputs_and_feed_forward_at_the_start(make_transformer):
    transformer = make_transformer(norm=NormPlacement.DEEP, d_model=128, ffn_dim=256, encoder_layers=3)
    constants = deep_norm(transformer.config)
    for side, beta in (("encoder", constants.encoder_beta), ("decoder", constants.decoder_beta)):
        layer = transformer.get_submodule(f"{side}_layers.1")
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                kinds = {"query_key_value": "qkv", "key_value": "kv", "query": "q"}.get(name.rpartition(".")[2], "o")
                for kind, block in zip(kinds, module.weight.chunk(len(kinds)), strict=True):
                    gain = (beta if kind in "vo" else 1.0) * (math.sqrt(0.5) if kind in "qkv" else 1.0)
                    bound = gain * math.sqrt(6 / sum(block.shape))
                    assert block.abs().max().item() == pytest.approx(bound, rel=0.01), (name, kind)


def losses_of_reversing(transformer, steps, rate):
    """Train on turning sentences round, with a learning rate at which shallow networks do well."""
    optimizer = torch.optim.Adam(transformer.parameters(), lr=rate, betas=(0.9, 0.98))
    losses = []
    for step in range(steps):
        source = sentences(16, 4, seed=step) % 6 + 4
        target = torch.cat((source.flip(1), torch.full((16, 1), EOS)), dim=1)
        target_input = torch.cat((torch.full((16, 1), BOS), target[:, :-1]), dim=1)
        loss = F.cross_entropy(transformer(source, target_input).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.full
def test_deep_norm_trains_what_post_norm_cannot(make_transformer):
    shape = {"encoder_layers": 12, "decoder_layers": 12, "d_model": 32, "ffn_dim": 32, "vocabulary_size": 10}
    last = {}
    for norm in (NormPlacement.DEEP, NormPlacement.POST):
        transformer = make_transformer(norm=norm, **shape, **NO_DROPOUT).train()
        losses = losses_of_reversing(transformer, steps=60, rate=3e-3)
        assert all(map(math.isfinite, losses))
        last[norm] = sum(losses[-10:]) / 10
    assert last[NormPlacement.DEEP] < 1.2
    assert last[NormPlacement.DEEP] < last[NormPlacement.POST] - 0.3


# Dropout


@pytest.mark.parametrize("kind", NO_DROPOUT)
def test_each_dropout_acts_in_training_alone(make_transformer, kind):
    source, target = sentences(2, 5), sentences(2, 5)
    calm = make_transformer(**NO_DROPOUT).train()
    assert torch.equal(calm(source, target), calm(source, target))
    noisy = make_transformer(**{**NO_DROPOUT, kind: 0.5}).train()
    assert not torch.equal(noisy(source, target), noisy(source, target))
    noisy.eval()
    torch.testing.assert_close(noisy(source, target), calm.eval()(source, target))


def test_attention_dropout_drops_weights_of_attention(make_transformer):
    """With weights dropped and nothing else, every answer is a sum of values over the positions kept, twice as big."""
    attention = SelfAttention(make_transformer(**{**NO_DROPOUT, "attention_dropout": 0.5}).config)
    with torch.no_grad():
        attention.query_key_value.weight[:64].zero_()  # all scores are equal: each weight is 1/4
        attention.query_key_value.bias.zero_()
        attention.output.weight.copy_(torch.eye(32))
        attention.output.bias.zero_()
    x = torch.zeros(200, 4, 32)
    x[:, range(4), range(4)] = 1.0
    attention.query_key_value.weight.data[64:].copy_(torch.eye(32))
    torch.manual_seed(3)
    kept = attention.train()(x, None)[:, :, :4] * 4  # head 0; column s: what became of the weight of position s
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert (kept == 0.0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert attention.eval()(x, None)[:, :, :4].mul(4).unique().tolist() == [1.0]


def test_activation_dropout_drops_what_the_activation_gives(make_transformer):
    feed_forward = FeedForward(make_transformer(**{**NO_DROPOUT, "activation_dropout": 0.25}, ffn_dim=32).config)
    with torch.no_grad():
        for layer in (feed_forward.inner, feed_forward.outer):
            layer.weight.copy_(torch.eye(32))
            layer.bias.zero_()
    torch.manual_seed(3)
    answer = feed_forward.train()(torch.full((10, 100, 32), 3.0))
    assert answer.unique().tolist() == [0.0, 4.0]
    assert (answer == 0.0).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_dropout_acts_on_embeddings_and_on_each_sublayers_answer(make_transformer):
    transformer = make_transformer(**{**NO_DROPOUT, "dropout": 0.5}, norm=NormPlacement.PRE).train()
    torch.manual_seed(3)
    embedded = transformer.embed(sentences(20, 50))
    assert (embedded == 0.0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    x, answer = torch.randn(20, 50, 32), torch.full((20, 50, 32), 3.0)
    residuals = [module for module in transformer.modules() if type(module).__name__ == "Residual"]
    assert len(residuals) == 2 * 2 + 2 * 3
    for residual in residuals:
        added = residual.leave(x, answer) - x
        dropped = added.abs() < 1e-5
        assert dropped.double().mean().item() == pytest.approx(0.5, abs=0.02)
        torch.testing.assert_close(added[~dropped], torch.full_like(added[~dropped], 6.0), atol=1e-5, rtol=0)


def test_a_table_that_a_validation_made_grow_serves_training(make_transformer):
    transformer = make_transformer(positions=Positions.ROPE).train()
    with torch.inference_mode():
        transformer.hidden(sentences(1, 600), sentences(1, 3))
    transformer.hidden(sentences(2, 600), sentences(2, 3)).sum().backward()
    assert transformer.embedding.weight.grad is not None
