from __future__ import annotations

import pytest

from ferryman import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, StopRecipe
from ferryman.cli.recipes import build_recipe, to_toml
from ferryman.errors import InvalidRecipe


def test_overrides_stand_over_the_preset_and_the_preset_over_the_file(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('preset = "base"\nseed = 3\n[model]\nd_model = 32\nheads = 2\n[stop]\nmax_steps = 10\n')
    assert build_recipe(file, "tiny", ["model.d_model=64", "model.norm=pre", "model.dropout = 0.25"]) == Recipe(
        preset="tiny",
        seed=3,
        model=ModelRecipe(d_model=64, heads=2, norm="pre", dropout=0.25),
        stop=StopRecipe(max_steps=10),
    )


def test_nothing_given_is_an_empty_recipe():
    assert build_recipe(None, None, []) == Recipe()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dmodel=1", r"recipe\.model\.dmodel: not a field of recipe\.model; its fields are d_model"),
        ("modle.d_model=1", r"recipe\.modle: not a field of recipe"),
        ("model=1", r"recipe\.model: is 1, must be a table"),
        ("model.d_model", "is not an override"),
        ("=1", "is not an override"),
        ("seed.a=1", r"recipe\.seed\.a: seed is a value and has no parts"),
    ],
)
def test_a_bad_override_is_explained(override, message):
    with pytest.raises(InvalidRecipe, match=message):
        build_recipe(None, None, ["seed=1", override])


def test_all_bad_overrides_are_named_at_once():
    with pytest.raises(InvalidRecipe) as caught:
        build_recipe(None, None, ["model.dmodel=1", "odd", "model.heds=2", "modle.d_model=1"])
    assert [violation.field for violation in caught.value.violations] == [
        "recipe",
        "recipe.modle",
        "recipe.model.dmodel",
        "recipe.model.heds",
    ]


@pytest.mark.parametrize("content", [b"preset = \n", b"\xff"])
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(InvalidRecipe, match=r"bad\.toml is not TOML"):
        build_recipe(file, None, [])


def test_a_recipe_that_is_printed_reads_back(tmp_path):
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
def test_an_override_that_is_no_value_is_refused(text):
    with pytest.raises(InvalidRecipe):
        build_recipe(None, None, [f"model.{text.replace(' ', '')}"])
