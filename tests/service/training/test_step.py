import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ferryman_service.domain.recipe import ScheduleKind
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.schedule import LearningRateSchedule, learning_rate
from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.session import TorchDecoder
from ferryman_service.model.transformer import Transformer
from ferryman_service.search.beam import BeamOptions, search
from ferryman_service.training.batches import Batch, make_batch, plan_epoch
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.step import new_trainee, training_step

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def trainee_of(recipe, vocabulary_size=16):
    torch.manual_seed(1)
    return new_trainee(Transformer(TransformerConfig.from_recipe(recipe, vocabulary_size)).train(), recipe, RANKS)


def reversed_tokens(count, seed):
    generator = np.random.default_rng(seed)
    sources = [generator.integers(4, 16, generator.integers(2, 5)).tolist() for _ in range(count)]
    return TokenPairs(TokenSide.from_sentences(sources), TokenSide.from_sentences([s[::-1] for s in sources]))


def batches(pairs, epochs):
    for epoch in range(epochs):
        lengths = pairs.source.lengths_P, pairs.target.lengths_P
        for (index_B,) in plan_epoch(*lengths, batch_target_tokens=512, seed=1, epoch=epoch):
            yield make_batch(pairs, index_B)


def exactly_right(model, pairs):
    sources = [pairs.source.sentence(i) for i in range(len(pairs))]
    model.eval()
    found = search(
        TorchDecoder(model).encode(sources),
        BeamOptions(beam_size=1, n_best=1, length_penalty=1.0),
        np.full(len(sources), 8),
        lambda: None,
    )
    return np.mean([[*best.tokens, EOS] == pairs.target.sentence(i) for i, (best,) in enumerate(found)])


def target_as_input(batch):
    """The mistake of feeding the labels themselves."""
    labels_BT = torch.full_like(batch.decoder_input_BT, PAD)
    labels_BT.view(-1)[batch.label_positions_N] = batch.labels_N
    return dataclasses.replace(batch, decoder_input_BT=labels_BT)


def train_to_reverse(recipe, change=lambda batch: batch):
    trainee = trainee_of(recipe)
    for batch in batches(reversed_tokens(2000, seed=1), epochs=30):
        outcome = training_step(trainee, change(batch), batch.target_tokens)
    return outcome, exactly_right(trainee.model, reversed_tokens(50, seed=2))


def test_a_model_learns_to_reverse(small_recipe):
    outcome, share_right = train_to_reverse(small_recipe())
    assert outcome.nll_per_token < 0.5
    assert share_right > 0.6


def test_the_same_training_on_unshifted_targets_translates_nothing(small_recipe):
    outcome, share_right = train_to_reverse(small_recipe(), target_as_input)
    assert outcome.nll_per_token < 0.5  # copying is easy
    assert share_right < 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        LearningRateSchedule(kind=ScheduleKind.NOAM, warmup_steps=3, factor=2.0, d_model=32),
        LearningRateSchedule(
            kind=ScheduleKind.COSINE, warmup_steps=2, peak_learning_rate=0.01, minimum_learning_rate=0.0, total_steps=6
        ),
        LearningRateSchedule(kind=ScheduleKind.CONSTANT, warmup_steps=1, peak_learning_rate=0.01),
    ],
)
def test_update_n_has_the_schedules_rate_to_the_last_bit(small_recipe, schedule):
    trainee = trainee_of(dataclasses.replace(small_recipe(), schedule=schedule))
    batch = next(batches(reversed_tokens(100, seed=1), 1))
    for step in range(1, 8):
        assert trainee.optimizer.param_groups[0]["lr"] == learning_rate(schedule, step)
        assert training_step(trainee, batch, batch.target_tokens).learning_rate == learning_rate(schedule, step)


def test_an_update_is_adam_on_the_mean_over_target_tokens(small_recipe):
    """Against torch's own loss, unfused Adam and clipping, on a batch with padding.

    The large epsilon keeps Adam from blowing up the rounding errors of gradients that are zero, as those of key biases.
    """
    recipe = small_recipe(optimization={"clip_norm": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3})
    trainee, reference = trainee_of(recipe), trainee_of(recipe).model
    optimizer = torch.optim.Adam(reference.parameters(), betas=(0.9, 0.9), eps=1e-3, foreach=False)
    pairs = TokenPairs(TokenSide.from_sentences([[7], [8, 9, 10]]), TokenSide.from_sentences([[11, 12, 13], [14]]))
    batch = make_batch(pairs, np.array([0, 1]))
    labels_BT = torch.tensor([[11, 12, 13, EOS], [14, EOS, PAD, PAD]])
    assert batch.decoder_input_BT.tolist() == [[BOS, 11, 12, 13], [BOS, 14, PAD, PAD]]
    for step in range(1, 4):
        outcome = training_step(trainee, batch, batch.target_tokens)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe.schedule, step)
        optimizer.zero_grad()
        logits_BVT = reference(batch.source_BS, batch.decoder_input_BT).transpose(1, 2)
        loss = F.cross_entropy(logits_BVT, labels_BT, label_smoothing=0.1, ignore_index=PAD)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)
        assert outcome.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
        assert outcome.gradient_norm > 0.5  # it is the norm before clipping
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(trainee.model.state_dict()[name], weight, atol=1e-6, rtol=1e-4)


def test_a_clip_norm_of_zero_clips_nothing(small_recipe):
    batch = next(batches(reversed_tokens(100, seed=1), 1))
    norms = []
    for clip_norm in (0.0, 1e-6):
        trainee = trainee_of(small_recipe(optimization={"clip_norm": clip_norm}))
        training_step(trainee, batch, batch.target_tokens)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trainee.model.parameters()]).item())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-6, rel=1e-2)


def test_padding_changes_nothing(small_recipe):
    """More padding at the end of source and target: the same loss and gradient."""
    pairs = reversed_tokens(6, seed=3)
    batch = make_batch(pairs, np.arange(6))
    rows, width = batch.decoder_input_BT.shape
    more = torch.full((rows, 3), PAD)
    wider = Batch(
        source_BS=torch.cat((batch.source_BS, more), dim=1),
        decoder_input_BT=torch.cat((batch.decoder_input_BT, more), dim=1),
        label_positions_N=batch.label_positions_N + 3 * (batch.label_positions_N // width),
        labels_N=batch.labels_N,
        source_tokens=batch.source_tokens,
    )
    outcomes = [training_step(trainee_of(small_recipe()), each, batch.target_tokens) for each in (batch, wider)]
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-5)
    assert outcomes[0].gradient_norm == pytest.approx(outcomes[1].gradient_norm, rel=1e-4)
    assert batch.target_tokens == wider.target_tokens
    assert wider.padding_share > batch.padding_share


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_failure(small_recipe, value):
    trainee = trainee_of(small_recipe())
    with torch.no_grad():
        trainee.model.embedding.weight[5, 0] = value
    batch = next(batches(reversed_tokens(100, seed=1), 1))
    with pytest.raises(TrainingFailed, match="step 1: the loss is nan") as caught:
        training_step(trainee, batch, batch.target_tokens)
    assert caught.value.reason is FailureReason.NON_FINITE_LOSS
