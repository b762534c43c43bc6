"""The comparison of schedules under a limit of time, in small."""

import dataclasses
import random

import pytest

from bench.quality import schedules
from bench.quality.schedules import Row, recipe_of
from examples.parallel_text import ParallelLines
from ferryman_service.domain.schedule import ScheduleKind


def test_row_text_round_trips():
    for text in (*schedules.ROWS, *schedules.QUICK_ROWS):
        assert str(Row.parse(text)) == text
    with pytest.raises(ValueError, match="must be like"):
        Row.parse("news 5")


def test_recipes_differ_in_schedule_only():
    row = Row.parse("multi30k 5")
    wsd, noam = (recipe_of(row, kind) for kind in schedules.SCHEDULES)
    assert (wsd.schedule.kind, noam.schedule.kind) == (ScheduleKind.WSD, ScheduleKind.NOAM)
    assert wsd.model == noam.model and wsd.stop == noam.stop and wsd.optimization == noam.optimization
    assert wsd.stop.max_duration_s == 300


@pytest.mark.parametrize("kind", schedules.SCHEDULES)
def test_only_wsd_ends_with_a_low_rate(tmp_path, kind):
    """Two seconds of a network that fits into them."""
    recipe = recipe_of(Row(corpus="phrases", minutes=2 / 60), kind)
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, d_model=16, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=16),
        data=dataclasses.replace(recipe.data, vocabulary_size=36, max_sentence_tokens=32),
        schedule=dataclasses.replace(recipe.schedule, warmup_steps=5),
        validation=dataclasses.replace(recipe.validation, max_translated_pairs=4),
    )
    words = ["alo", "beki", "cumi", "dena", "efu", "gira", "hoso", "ila", "jupe", "kenu", "lam", "mori"]
    lines = [" ".join(random.Random(seed).choices(words, k=5)) for seed in range(200)]
    pairs = ParallelLines(source=lines, target=lines)
    found = schedules.run_one(recipe, pairs, ParallelLines(source=lines[:4], target=lines[:4]), tmp_path)
    assert found["steps"] > 5
    assert (found["last_rate_share"] == 0.0) is (kind is ScheduleKind.WSD)
