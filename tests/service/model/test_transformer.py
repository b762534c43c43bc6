"""The Transformer's laws: what may depend on what, and the paper's formulas."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ferryman_service.domain.recipe import NormPlacement, Positions, resolve_recipe
from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.positions import sinusoids
from ferryman_service.model.transformer import Transformer, source_mask


def sentences(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 60, (batch, length), generator=generator)


def padded(tokens, length):
    return F.pad(tokens, (0, length - tokens.shape[1]), value=PAD)


def test_shapes(transformer):
    source, target = sentences(3, 7), sentences(3, 5)
    assert transformer(source, target).shape == (3, 5, 60)
    assert transformer.encode(source).shape == (3, 7, 32)
    assert transformer.hidden(source, target).shape == (3, 5, 32)
    assert transformer.project(transformer.hidden(source, target).flatten(0, 1)[:4]).shape == (4, 60)


def test_padding_changes_nothing(transformer):
    source, target = sentences(3, 7), sentences(3, 5)
    logits = transformer(source, target)
    wide = transformer(padded(source, 12), padded(target, 9))
    torch.testing.assert_close(wide[:, :5], logits, atol=1e-5, rtol=0)


def test_a_longer_neighbour_changes_nothing(transformer):
    short, target = sentences(1, 4), sentences(1, 5)
    batch = torch.cat((padded(short, 9), sentences(1, 9, seed=2)))
    together = transformer(batch, torch.cat((target, sentences(1, 5, seed=3))))
    torch.testing.assert_close(together[:1], transformer(short, target), atol=1e-5, rtol=0)


def test_no_position_sees_the_future(transformer):
    source, target = sentences(2, 6), sentences(2, 8)
    logits = transformer(source, target)
    changed = target.clone()
    changed[:, 5] = (changed[:, 5] - 4 + 1) % 56 + 4
    other = transformer(source, changed)
    torch.testing.assert_close(other[:, :5], logits[:, :5], atol=1e-6, rtol=0)
    assert (other[:, 5:] - logits[:, 5:]).abs().amax(dim=-1).min() > 1e-3


def test_every_source_position_matters(transformer):
    source, target = sentences(1, 6), sentences(1, 3)
    logits = transformer(source, target)
    for position in range(6):
        changed = source.clone()
        changed[0, position] = (changed[0, position] - 4 + 1) % 56 + 4
        assert (transformer(changed, target) - logits).abs().max() > 1e-4


@pytest.mark.parametrize("rows_per_sentence", [1, 3])
def test_step_by_step_equals_the_whole(transformer, rows_per_sentence):
    source = padded(sentences(2, 7), 9)
    source[1, 4:] = PAD
    source_R = source.repeat_interleave(rows_per_sentence, dim=0)
    target = sentences(2 * rows_per_sentence, 6)
    logits = transformer(source_R, target)
    cross = transformer.cross_keys_values(transformer.encode(source))
    cache = transformer.empty_cache(len(target))
    for position in range(target.shape[1]):
        hidden, cache = transformer.decode_step(target[:, position], position, cache, cross, source_mask(source))
        torch.testing.assert_close(transformer.project(hidden), logits[:, position], atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", Positions)
def test_sentences_longer_than_the_first_table_of_positions(make_transformer, positions):
    transformer = make_transformer(encoder_layers=1, decoder_layers=1, positions=positions)
    source, target = sentences(1, 700), sentences(1, 600)
    logits = transformer(source, target)
    assert logits.isfinite().all()
    changed = target.clone()
    changed[0, 599] = 4 + (changed[0, 599] == 4)
    torch.testing.assert_close(transformer(source, changed)[:, :599], logits[:, :599], atol=1e-5, rtol=0)


def test_one_matrix_embeds_and_projects(make_transformer):
    transformer = make_transformer()
    vocabulary_wide = [name for name, weight in transformer.state_dict().items() if 60 in weight.shape]
    assert vocabulary_wide == ["embedding.weight"]
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(transformer.project(hidden), hidden @ transformer.embedding.weight.T)
    embedded = transformer.embed(torch.tensor([[7, 8]]))[0]
    expected = transformer.embedding.weight[[7, 8]] * math.sqrt(32) + sinusoids(2, 32)
    torch.testing.assert_close(embedded, expected)


def test_positions_are_not_in_the_state_dict(make_transformer):
    transformer = make_transformer()
    learnt = {name for name, _ in transformer.named_parameters()}
    assert set(transformer.state_dict()) == learnt


def test_sinusoids_follow_the_formula():
    table = sinusoids(50, 8)
    for position in (0, 1, 7, 49):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_initial_weights():
    torch.manual_seed(0)
    transformer = Transformer(TransformerConfig.from_recipe(resolve_recipe({}), 8000))
    embedding = transformer.embedding.weight
    assert embedding.std().item() == pytest.approx(128**-0.5, rel=0.01)
    assert embedding.mean().abs().item() < 1e-3
    packed = {"query_key_value": 3, "key_value": 2, "query": 1}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            kind = name.rpartition(".")[2]
            for block in module.weight.chunk(packed.get(kind, 1)):
                bound = math.sqrt(6 / sum(block.shape)) * (math.sqrt(0.5) if kind in packed else 1.0)
                assert block.abs().max().item() == pytest.approx(bound, rel=0.01)
                assert block.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def normalised(x, norm):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def attended_by_hand(attention, x, heads):
    query, key, value = F.linear(x, attention.query_key_value.weight, attention.query_key_value.bias).chunk(3, dim=-1)
    width = x.shape[-1] // heads
    answers = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = (query[:, part] @ key[:, part].T / math.sqrt(width)).softmax(dim=-1)
        answers.append(weights @ value[:, part])
    return F.linear(torch.cat(answers, dim=-1), attention.output.weight, attention.output.bias)


def fed_forward_by_hand(feed_forward, x):
    inner = F.linear(x, feed_forward.inner.weight, feed_forward.inner.bias).clamp(min=0)
    return F.linear(inner, feed_forward.outer.weight, feed_forward.outer.bias)


def shaken(layer):
    """Give biases and norms values that show when they are forgotten."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def test_post_norm_is_the_papers_formula(make_transformer):
    layer = shaken(make_transformer(norm=NormPlacement.POST).encoder_layers[0])
    x = torch.randn(5, 32)
    after = normalised(x + attended_by_hand(layer.self_attention, x, 4), layer.self_attention_residual.norm)
    after = normalised(after + fed_forward_by_hand(layer.feed_forward, after), layer.feed_forward_residual.norm)
    torch.testing.assert_close(layer(x[None], None)[0], after, atol=1e-5, rtol=1e-5)


def test_pre_norm_leaves_a_direct_path(make_transformer):
    layer = shaken(make_transformer(norm=NormPlacement.PRE).encoder_layers[0])
    x = torch.randn(5, 32)
    after = x + attended_by_hand(layer.self_attention, normalised(x, layer.self_attention_residual.norm), 4)
    after = after + fed_forward_by_hand(layer.feed_forward, normalised(after, layer.feed_forward_residual.norm))
    torch.testing.assert_close(layer(x[None], None)[0], after, atol=1e-5, rtol=1e-5)


def test_pre_norm_ends_with_a_norm(make_transformer):
    memory = make_transformer(norm=NormPlacement.PRE).encode(sentences(2, 5))
    torch.testing.assert_close(memory.mean(dim=-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(memory.var(dim=-1, unbiased=False), torch.ones(2, 5), atol=1e-3, rtol=0)


def layer_gradient_norms(transformer):
    source, target = sentences(4, 8), sentences(4, 8)
    F.cross_entropy(transformer(source, target).flatten(0, 1), target.flatten()).backward()
    return [
        math.sqrt(sum(weight.grad.pow(2).sum().item() for weight in layer.parameters() if weight.grad is not None))
        for layer in transformer.encoder_layers
    ]


def test_gradients_reach_the_first_of_24_layers(make_transformer):
    norms = layer_gradient_norms(make_transformer(norm=NormPlacement.PRE, encoder_layers=24))
    assert 0.1 < norms[0] / norms[-1] < 10


def test_gradients_vanish_without_residuals(make_transformer):
    transformer = make_transformer(norm=NormPlacement.POST, encoder_layers=24)
    for layer in transformer.encoder_layers:
        for residual in (layer.self_attention_residual, layer.feed_forward_residual):
            residual.leave = lambda x, answer: answer
    norms = layer_gradient_norms(transformer)
    assert norms[0] / norms[-1] < 0.01


def test_dropout_only_in_training(make_transformer):
    transformer = make_transformer()
    source, target = sentences(2, 5), sentences(2, 5)
    assert torch.equal(transformer(source, target), transformer(source, target))
    transformer.train()
    assert not torch.equal(transformer(source, target), transformer(source, target))


def test_no_mask_where_nothing_is_padded():
    assert source_mask(torch.tensor([[5, EOS], [6, EOS]])) is None
    mask = source_mask(torch.tensor([[5, EOS], [EOS, PAD]]))
    assert mask.tolist() == [[[[True, True]]], [[[True, False]]]]


def test_config_survives_json():
    config = TransformerConfig.from_recipe(resolve_recipe({"model": {"norm": NormPlacement.PRE}}), 777)
    assert config.vocabulary_size == 777
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_from_before_activation_and_positions_is_read():
    config = TransformerConfig.from_recipe(resolve_recipe({}), 777)
    values = {name: value for name, value in config.to_dict().items() if name not in ("activation", "positions")}
    assert TransformerConfig.from_dict(values) == config


def test_learns_to_reverse(make_transformer):
    """All of the network at once: it takes attention to the source, positions and causality."""
    transformer = make_transformer(encoder_layers=1, decoder_layers=1, vocabulary_size=10)
    optimizer = torch.optim.Adam(transformer.parameters(), lr=5e-3)
    for step in range(150):
        source = sentences(32, 3, seed=step) % 6 + 4
        target = torch.cat((source.flip(1), torch.full((32, 1), EOS)), dim=1)
        target_input = torch.cat((torch.full((32, 1), BOS), target[:, :-1]), dim=1)
        loss = F.cross_entropy(transformer(source, target_input).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
