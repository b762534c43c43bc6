import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ferryman_service.domain.recipe import Precision, ScheduleKind
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.schedule import LearningRateSchedule, learning_rate
from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.domain.translation import SearchOptions
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.session import TorchDecoder
from ferryman_service.model.transformer import Transformer
from ferryman_service.search.beam import search
from ferryman_service.search.sentence import SentenceSearch
from ferryman_service.training.batches import Batch, make_batch
from ferryman_service.training.packing import plan_epoch
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.step import new_trainee

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
        for ((index_B,),) in plan_epoch(*lengths, batch_target_tokens=512, seed=1, epoch=epoch):
            yield make_batch(pairs, index_B)


def exactly_right(model, pairs):
    sources = [pairs.source.sentence(i) for i in range(len(pairs))]
    model.eval()
    greedy = SentenceSearch(options=SearchOptions(beam_size=1), max_length=8)
    found = search(TorchDecoder(model), sources, [greedy] * len(sources), lambda: None)
    return np.mean([[*best.tokens, EOS] == pairs.target.sentence(i) for i, (best,) in enumerate(found)])


def target_as_input(batch):
    """The mistake of feeding the labels themselves."""
    labels_BT = torch.full_like(batch.decoder_input_BT, PAD)
    labels_BT.view(-1)[batch.label_positions_N] = batch.labels_N
    return dataclasses.replace(batch, decoder_input_BT=labels_BT)


def test_training_on_unshifted_targets_translates_nothing(small_recipe):
    """The counterpart of test_engine.py's run that learns to translate."""
    trainee = trainee_of(small_recipe())
    for batch in batches(reversed_tokens(2000, seed=1), epochs=12):
        outcome = trainee.step([target_as_input(batch)], batch.target_tokens).read()
    assert outcome.nll_per_token < 0.5  # copying is easy
    assert exactly_right(trainee.model, reversed_tokens(50, seed=2)) < 0.1


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
        assert trainee.step([batch], batch.target_tokens).read().learning_rate == learning_rate(schedule, step)


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
        outcome = trainee.step([batch], batch.target_tokens).read()
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
        trainee.step([batch], batch.target_tokens)
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
    outcomes = [trainee_of(small_recipe()).step([each], batch.target_tokens).read() for each in (batch, wider)]
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-5)
    assert outcomes[0].gradient_norm == pytest.approx(outcomes[1].gradient_norm, rel=1e-4)
    assert batch.target_tokens == wider.target_tokens
    assert wider.padding_share > batch.padding_share


def weights_of(trainee):
    return {name: weight.detach().clone() for name, weight in trainee.model.named_parameters()}


def test_an_update_without_a_finite_gradient_is_skipped_and_the_next_one_is_not(small_recipe):
    trainee = trainee_of(small_recipe(optimization={"ema_decay": 0.5}))
    one, two = itertools.islice(batches(reversed_tokens(400, seed=1), 1), 2)
    trainee.step([one], one.target_tokens)
    before = {group: {n: t.clone() for n, t in ts.items()} for group, ts in trainee.tensors().items() if group != "ema"}
    skipped = trainee.step([one], 0).read()  # a mean over no tokens is not finite
    assert skipped.skipped
    for group, tensors in before.items():
        assert all(torch.equal(trainee.tensors()[group][name], tensor) for name, tensor in tensors.items()), group
    assert (trainee.counters().updates_done, trainee.counters().updates_applied) == (2, 1)
    applied = trainee.step([two], two.target_tokens).read()
    assert not applied.skipped
    assert applied.learning_rate == learning_rate(small_recipe().schedule, 3)  # the schedule goes on by step
    assert not torch.equal(trainee.tensors()["weights"]["embedding.weight"], before["weights"]["embedding.weight"])


@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(small_recipe, parts):
    pairs = reversed_tokens(30, seed=4)
    whole = make_batch(pairs, np.arange(30))
    pieces = [make_batch(pairs, index_B) for index_B in np.array_split(np.arange(30), [3, 11][: parts - 1])]
    gradients = []
    for micro_batches in ([whole], pieces):
        trainee = trainee_of(small_recipe(optimization={"clip_norm": 0.0}))
        trainee.model.double()
        trainee._accumulate(micro_batches, whole.target_tokens)
        gradients.append({name: p.grad.clone() for name, p in trainee.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=1e-6)


def test_halves_are_the_batch(small_recipe):
    batch = make_batch(reversed_tokens(7, seed=4), np.arange(7))
    one = trainee_of(small_recipe()).step([batch], batch.target_tokens).read()
    two = trainee_of(small_recipe()).step(batch.halves(), batch.target_tokens).read()
    assert sum(half.target_tokens for half in batch.halves()) == batch.target_tokens
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)


class ShortOfMemory(torch.nn.Module):
    """Lets the first `failures` passes fail as a GPU does."""

    def __init__(self, failures):
        super().__init__()
        self.failures = failures

    def forward(self, x):
        self.failures -= 1
        if self.failures >= 0:
            raise torch.OutOfMemoryError
        return x


@pytest.mark.parametrize("failures", [1, 2])
def test_a_batch_that_does_not_fit_is_split_once(small_recipe, failures):
    batch = make_batch(reversed_tokens(8, seed=4), np.arange(8))
    expected = trainee_of(small_recipe()).step([batch], batch.target_tokens).read()
    trainee = trainee_of(small_recipe())
    trainee.model.decoder_norm = ShortOfMemory(failures)
    if failures == 2:
        with pytest.raises(TrainingFailed, match="batch_target_tokens") as caught:
            trainee.step([batch], batch.target_tokens)
        assert caught.value.reason is FailureReason.OUT_OF_MEMORY
        return
    outcome = trainee.step([batch], batch.target_tokens).read()
    assert outcome.split
    assert outcome.loss == pytest.approx(expected.loss, rel=1e-5)


def test_weights_decay_and_biases_and_norms_do_not(small_recipe):
    batch = next(batches(reversed_tokens(100, seed=1), 1))
    trainees = [trainee_of(small_recipe(optimization={"weight_decay": decay})) for decay in (0.0, 0.5)]
    first = weights_of(trainees[0])
    rates = [trainee.step([batch], batch.target_tokens).read().learning_rate for trainee in trainees]
    plain, decayed = (weights_of(trainee) for trainee in trainees)
    for name, weight in first.items():
        shrunk = 0.5 * rates[0] * weight if weight.ndim > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(decayed[name], plain[name] - shrunk, atol=1e-7, rtol=1e-5)


def test_the_moving_average_follows_and_is_what_is_published(small_recipe):
    trainee = trainee_of(small_recipe(optimization={"ema_decay": 0.9}))
    expected = weights_of(trainee)
    for step, batch in enumerate(batches(reversed_tokens(1000, seed=1), 1), 1):
        trainee.step([batch], batch.target_tokens)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {n: decay * e + (1 - decay) * weights_of(trainee)[n] for n, e in expected.items()}
    now = weights_of(trainee)
    with trainee.published():
        for name, weight in weights_of(trainee).items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
    assert all(torch.equal(weight, now[name]) for name, weight in weights_of(trainee).items())


def test_half_precision_learns_nearly_as_full_precision_does(small_recipe):
    losses, pairs = {}, reversed_tokens(400, seed=1)
    for each in (Precision.FP32, Precision.BF16, Precision.FP16):
        trainee = trainee_of(small_recipe(optimization={"precision": each}))
        assert all(weight.dtype is torch.float32 for weight in trainee.model.parameters())
        losses[each] = [trainee.step([batch], batch.target_tokens).read().loss for batch in batches(pairs, 3)]
        assert all(moment.dtype is torch.float32 for moment in trainee.tensors()["exp_avg"].values())
    for precision in (Precision.BF16, Precision.FP16):
        assert losses[precision] != losses[Precision.FP32]
        assert losses[precision] == pytest.approx(losses[Precision.FP32], rel=0.02)


def test_the_loss_scale_halves_when_a_gradient_overflows(small_recipe):
    trainee = trainee_of(small_recipe(optimization={"precision": Precision.FP16}))
    batch = next(batches(reversed_tokens(100, seed=1), 1))
    assert trainee.counters().loss_scale == 2.0**16
    trainee.step([batch], batch.target_tokens)
    assert trainee.counters().loss_scale_good_steps == 1
    assert trainee.step([batch], 0).read().skipped
    assert (trainee.counters().loss_scale, trainee.counters().loss_scale_good_steps) == (2.0**15, 0)


def test_r_drop_pulls_two_passes_together(small_recipe):
    """The same dropout-free model twice has no divergence; with dropout there is one, and it counts."""
    batch = next(batches(reversed_tokens(100, seed=1), 1))

    def loss(alpha, dropout):
        recipe = small_recipe(model={"dropout": dropout}, optimization={"r_drop_alpha": alpha})
        return trainee_of(recipe).step([batch], batch.target_tokens).read().loss

    assert loss(5.0, 0.0) == pytest.approx(loss(0.0, 0.0), rel=1e-5)
    assert loss(5.0, 0.3) > loss(1e-6, 0.3) + 0.01
