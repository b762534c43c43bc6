"""The plain loop of the quality benchmark: its rate, its time, and what it selects."""

import json

import pytest
import torch

from bench.peers.plain_quality import PlainTraining, TimedTraining, learning_rate
from bench.peers.task import PeerTask, write_ids
from bench.quality.peer import SUBWORDS, TEXTS, PlainJob, PlainRecipe
from ferryman_service.domain.recipe import SubwordAlgorithm
from ferryman_service.text.subwords import train_subwords
from ferryman_service.training.pairs import TokenPairs, TokenSide
from tests.system.conftest import reversal_corpus

RECIPE = PlainRecipe(peak_learning_rate=0.002, norm_first=True, warmup_share=0.1, validations=4)


class Steps:
    """Steps that take a second each by a fake clock; validations take a hundred."""

    def __init__(self):
        self.now_s = 0.0
        self.shares, self.validated = [], []

    def step(self, share):
        self.shares.append(share)
        self.now_s += 1.0

    def validate(self, seconds, step):
        self.validated.append((seconds, step))
        self.now_s += 100.0

    def training(self, total_s):
        return TimedTraining(self.step, self.validate, total_s=total_s, validations=4, clock=lambda: self.now_s)


def test_rate_rises_to_its_peak_and_ends_at_zero_with_the_time():
    assert learning_rate(RECIPE, 0.05) == pytest.approx(0.001)
    assert learning_rate(RECIPE, 0.1) == pytest.approx(0.002)
    assert learning_rate(RECIPE, 0.55) == pytest.approx(0.001)
    assert learning_rate(RECIPE, 1.0) == 0.0
    assert learning_rate(RECIPE, 1.01) == 0.0


def test_time_of_validations_does_not_count():
    steps = Steps()
    training = steps.training(20.0)
    training.work(8.0)
    assert (training.elapsed_s, training.is_over) == (8.0, False)
    training.work(20.0)
    assert (training.elapsed_s, training.is_over) == (20.0, True)
    assert steps.shares == [number / 20 for number in range(20)]
    assert steps.validated == [(5.0, 5), (10.0, 10), (15.0, 15), (20.0, 20)]


def test_overtime_stretches_end_of_schedule():
    steps = Steps()
    training = steps.training(20.0)
    training.work(10.0)
    training.work(22.0)
    assert training.is_over
    assert steps.shares[-1] == 21 / 22
    assert steps.validated[-1] == (22.0, 22)


def test_turn_past_its_end_trains_no_further():
    steps = Steps()
    training = steps.training(20.0)
    training.work(4.5)
    training.work(4.8)
    assert (len(steps.shares), training.elapsed_s) == (5, 5.0)


@pytest.fixture
def folder(tmp_path):
    """The files of the plain loop: sentences whose translation is in upper case and reversed."""
    splits = {"train": reversal_corpus(400, 1), "validation": reversal_corpus(10, 2)}
    lines = [side for pair in splits["train"] for side in pair]
    subwords = train_subwords(
        lines,
        tmp_path / SUBWORDS,
        vocabulary_size=50,
        algorithm=SubwordAlgorithm.UNIGRAM,
        character_coverage=1.0,
        seed=1,
    )
    for split, pairs in splits.items():
        sides = [TokenSide.from_sentences(subwords.encode(list(side))) for side in zip(*pairs, strict=True)]
        write_ids(TokenPairs(*sides), tmp_path, split)
    sources, references = zip(*splits["validation"], strict=True)
    texts = {"sources": sources, "references": references, "test": ["ba ce di", "fo gu"]}
    (tmp_path / TEXTS).write_text(json.dumps(texts))
    return tmp_path


@pytest.fixture
def training(folder):
    task = PeerTask(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        heads=2,
        ffn_dim=32,
        dropout=0.1,
        vocabulary=50,
        label_smoothing=0.1,
        clip_norm=1.0,
        max_tokens=256,
        norm_first=True,
    )
    job = PlainJob(task=task, recipe=RECIPE, total_s=10.0, seed=1, max_sentence_tokens=64, beam_size=2)
    return PlainTraining(folder, job)


def test_training_lowers_the_held_out_loss(training):
    training.validate(0.0, 0)
    for number in range(60):
        training.step(number / 100)
    training.validate(1.0, 60)
    first, last = training.curve
    assert (last.seconds, last.step) == (1.0, 60)
    assert last.nll_per_token < first.nll_per_token - 0.5


def test_weights_of_the_best_validation_are_tested(training):
    for number in range(30):
        training.step(number / 60)
    training.validate(1.0, 30)
    best = {name: value.clone() for name, value in training.model.state_dict().items()}
    with torch.no_grad():
        for value in training.model.parameters():
            value.normal_(std=3.0)
    training.validate(2.0, 31)
    outcome = training.finish()
    assert outcome.selected == training.curve[0]
    assert [point.step for point in outcome.curve] == [30, 31]
    assert all(torch.equal(value, best[name]) for name, value in training.model.state_dict().items())
    assert len(outcome.translations) == 2


def test_rate_follows_the_share_of_the_time(training):
    before = [value.clone() for value in training.model.parameters()]
    training.step(1.0)
    assert all(map(torch.equal, before, training.model.parameters()))
    training.step(0.1)
    assert not all(map(torch.equal, before, training.model.parameters()))
