from __future__ import annotations

import pytest

from ferryman import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, StopRecipe
from ferryman.cli.recipes import build_recipe, to_toml
from ferryman.errors import InvalidRecipe


def test_overrides_precede_preset_and_preset_precedes_file(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('preset = "base"\nseed = 3\n[model]\nd_model = 32\nheads = 2\n[stop]\nmax_steps = 10\n')
    assert build_recipe(file, "tiny", ["model.d_model=64", "model.norm=pre", "model.dropout = 0.25"]) == Recipe(
        preset="tiny",
        seed=3,
        model=ModelRecipe(d_model=64, heads=2, norm="pre", dropout=0.25),
        stop=StopRecipe(max_steps=10),
    )


def test_no_arguments_give_empty_recipe():
    assert build_recipe(None, None, []) == Recipe()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dmodel=1", r"recipe\.model\.dmodel: is not a field of recipe\.model; its fields are d_model"),
        ("modle.d_model=1", r"recipe\.modle: is not a field of recipe"),
        ("model=1", r"recipe\.model: is 1, must be a table"),
        ("model.d_model", "is not FIELD=VALUE"),
        ("=1", "is not FIELD=VALUE"),
        ("seed.a=1", r"recipe\.seed\.a: seed is a value, not a table"),
    ],
)
def test_bad_override_is_explained(override, message):
    with pytest.raises(InvalidRecipe, match=message):
        build_recipe(None, None, ["seed=1", override])


def test_all_bad_overrides_are_reported_at_once():
    with pytest.raises(InvalidRecipe) as caught:
        build_recipe(None, None, ["model.dmodel=1", "odd", "model.heds=2", "modle.d_model=1"])
    assert [violation.field for violation in caught.value.violations] == [
        "set",
        "recipe.modle",
        "recipe.model.dmodel",
        "recipe.model.heds",
    ]


@pytest.mark.parametrize("content", [b"preset = \n", b"\xff"])
def test_invalid_toml_error_names_file(tmp_path, content):
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(InvalidRecipe, match=r"bad\.toml is not valid TOML"):
        build_recipe(file, None, [])


def test_printed_recipe_reads_back(tmp_path):
    """Every kind of value: text, whole numbers, fractions of every size, true and false."""
    recipe = Recipe(
        preset="tiny",
        seed=-1,
        model=ModelRecipe(d_model=64, dropout=0.0, norm="pre"),
        data=DataRecipe(split_digits=True, character_coverage=0.9995),
        optimization=OptimizationRecipe(adam_epsilon=1e-09, clip_norm=float("inf")),
        stop=StopRecipe(max_duration_s=1e16),
    )
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    assert build_recipe(file, None, []) == recipe


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = \udcff"])
def test_override_without_value_is_refused(text):
    with pytest.raises(InvalidRecipe):
        build_recipe(None, None, [f"model.{text.replace(' ', '')}"])
