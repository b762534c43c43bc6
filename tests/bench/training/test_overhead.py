"""The overhead benchmark in small: that it still fits the training loop that it looks at."""

from bench.training import overhead
from ferryman_service.domain.recipe import resolve_recipe


def test_turns_with_the_store_and_without_are_measured(tmp_path):
    recipe = resolve_recipe(
        {
            "model": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 16},
            "optimization": {"batch_target_tokens": 256},
            "stop": {"max_steps": 8},
            "validation": {"interval_steps": 10**9},
        }
    )
    measured = overhead.measure(recipe, tmp_path / "overhead", 2)
    assert [turn.with_store for turn in measured.turns] == [True, False]
    assert all(0 < turn.updates_s < turn.whole_s for turn in measured.turns)
    assert measured.writing_s > 0
    assert 0 < overhead.result(measured).value < 100
