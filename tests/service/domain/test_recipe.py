"""Recipes: presets, overrides, and a named violation for every broken rule."""

import dataclasses
import json

import pytest

from ferryman_service.domain.errors import InvalidRecipe
from ferryman_service.domain.recipe import (
    NormPlacement,
    Positions,
    Precision,
    Preset,
    SelectionMetric,
    SubwordAlgorithm,
    recipe_from_dict,
    recipe_to_dict,
    resolve_recipe,
    resolve_schedule,
)
from ferryman_service.domain.schedule import DecayShape, ScheduleKind, learning_rate


def violations_of(overrides):
    with pytest.raises(InvalidRecipe) as caught:
        resolve_recipe(overrides)
    assert caught.value.reason == "INVALID_RECIPE"
    return {violation.field: violation.reason for violation in caught.value.violations}


@pytest.mark.parametrize(
    ("preset", "shape"),
    [
        (Preset.TINY, (4, 4, 128, 256, 4)),
        (Preset.SMALL, (6, 6, 256, 1024, 4)),
        (Preset.BASE, (6, 6, 512, 2048, 8)),
        (Preset.BIG, (6, 6, 1024, 4096, 16)),
        (Preset.DEEP_SHALLOW, (12, 2, 512, 2048, 8)),
    ],
)
def test_presets_have_their_published_shapes(preset, shape):
    model = resolve_recipe({"preset": preset}).model
    assert (model.encoder_layers, model.decoder_layers, model.d_model, model.ffn_dim, model.heads) == shape
    # Twelve layers of the paper's form would not train without more care.
    assert model.norm is (NormPlacement.PRE if preset is Preset.DEEP_SHALLOW else NormPlacement.POST)


def test_the_defaults_are_the_papers_recipe():
    recipe = resolve_recipe({"preset": Preset.BASE})
    optimization = recipe.optimization
    assert (optimization.adam_beta1, optimization.adam_beta2, optimization.adam_epsilon) == (0.9, 0.98, 1e-9)
    assert optimization.label_smoothing == 0.1
    assert (recipe.schedule.kind, recipe.schedule.factor, recipe.schedule.d_model) == (ScheduleKind.NOAM, 1.0, 512)
    assert recipe.schedule.warmup_steps == 4000


def test_any_field_overrides_the_preset():
    recipe = resolve_recipe(
        {"model": {"d_model": 64, "norm": NormPlacement.PRE}, "validation": {"metric": SelectionMetric.LOSS}, "seed": 9}
    )
    assert (recipe.model.d_model, recipe.model.norm, recipe.model.heads) == (64, NormPlacement.PRE, 4)
    assert recipe.schedule.d_model == 64
    assert (recipe.validation.metric, recipe.seed) == (SelectionMetric.LOSS, 9)


def test_only_a_default_vocabulary_is_reduced():
    assert resolve_recipe({"data": {"split_digits": True}}).data.reduce_vocabulary
    assert not resolve_recipe({"data": {"vocabulary_size": 8000}}).data.reduce_vocabulary
    assert resolve_recipe({"data": {"vocabulary_size": 8000, "reduce_vocabulary": True}}).data.reduce_vocabulary
    assert not resolve_recipe({"data": {"reduce_vocabulary": False}}).data.reduce_vocabulary


def test_another_limit_lifts_the_presets_step_limit():
    assert resolve_recipe({"stop": {"max_duration_s": 60}}).stop.max_steps == 0
    assert resolve_recipe({"stop": {"max_duration_s": 60, "max_steps": 5}}).stop.max_steps == 5
    assert resolve_recipe({"stop": {"patience": 3}}).stop.max_steps > 0


OUT_OF_RANGE = [
    ("model", "d_model", 4),
    ("model", "encoder_layers", 0),
    ("model", "dropout", -0.1),
    ("model", "dropout", 1.0),
    ("model", "attention_dropout", float("nan")),
    ("data", "vocabulary_size", 5),
    ("data", "character_coverage", 1.01),
    ("data", "subword_regularization_alpha", 1.01),
    ("schedule", "warmup_steps", 0),
    ("schedule", "factor", 0.0),
    ("optimization", "accumulation_steps", 0),
    ("optimization", "weight_decay", -0.1),
    ("optimization", "r_drop_alpha", 101.0),
    ("optimization", "ema_decay", 1.0),
    ("optimization", "max_skipped_updates", -1),
    ("optimization", "max_rollbacks", 101),
    ("optimization", "rollback_rate_scale", 0.0),
    ("optimization", "label_smoothing", 1.0),
    ("optimization", "clip_norm", -1.0),
    ("optimization", "adam_epsilon", 0.0),
    ("stop", "max_steps", -1),
    ("validation", "interval_steps", 0),
    ("validation", "keep_last", 0),
    ("validation", "checkpoint_interval_steps", -1),
]


@pytest.mark.parametrize(("part", "name", "value"), OUT_OF_RANGE)
def test_values_out_of_range_are_named(part, name, value):
    assert violations_of({part: {name: value}})[f"recipe.{part}.{name}"] == "OUT_OF_RANGE"


def test_bpe_dropout_leaves_something_of_the_subwords():
    overrides = {"data": {"subword_algorithm": SubwordAlgorithm.BPE, "bpe_dropout": 1.0}}
    assert violations_of(overrides) == {"recipe.data.bpe_dropout": "OUT_OF_RANGE"}


CONFLICTS = [
    ({"model": {"heads": 3}}, "recipe.model.heads"),
    ({"model": {"d_model": 129, "heads": 3}}, "recipe.model.d_model"),
    ({"model": {"d_model": 36, "heads": 4, "positions": Positions.ROPE}}, "recipe.model.heads"),
    ({"data": {"bpe_dropout": 0.1}}, "recipe.data.bpe_dropout"),
    (
        {"data": {"subword_algorithm": SubwordAlgorithm.BPE, "subword_regularization_alpha": 0.1}},
        "recipe.data.subword_regularization_alpha",
    ),
    (
        {"optimization": {"precision": Precision.FP16, "max_skipped_updates": 0}},
        "recipe.optimization.max_skipped_updates",
    ),
    ({"optimization": {"batch_target_tokens": 100}}, "recipe.optimization.batch_target_tokens"),
    ({"optimization": {"accumulation_steps": 5}}, "recipe.optimization.accumulation_steps"),
    ({"stop": {"max_steps": 0}}, "recipe.stop"),
    ({"schedule": {"d_model": 64}}, "recipe.schedule.d_model"),
    ({"schedule": {"peak_learning_rate": 0.1}}, "recipe.schedule.peak_learning_rate"),
    ({"schedule": {"kind": ScheduleKind.CONSTANT, "factor": 2.0}}, "recipe.schedule.factor"),
    ({"schedule": {"kind": ScheduleKind.COSINE, "total_steps": 800}}, "recipe.schedule.total_steps"),
    (
        {"schedule": {"kind": ScheduleKind.LINEAR, "minimum_learning_rate": 0.1}},
        "recipe.schedule.minimum_learning_rate",
    ),
]


@pytest.mark.parametrize(("overrides", "field"), CONFLICTS)
def test_conflicts_are_named(overrides, field):
    assert violations_of(overrides)[field] == "CONFLICT"


def test_all_violations_come_at_once():
    found = violations_of({"model": {"heads": 3, "dropout": -1}, "schedule": {"warmup_steps": 0}, "seed": -1})
    assert set(found) == {"recipe.model.heads", "recipe.model.dropout", "recipe.schedule.warmup_steps", "recipe.seed"}


def test_annealing_without_an_end_is_refused():
    overrides = {"schedule": {"kind": ScheduleKind.COSINE}, "stop": {"max_duration_s": 60}}
    assert violations_of(overrides) == {"recipe.schedule.total_steps": "REQUIRED"}
    with pytest.raises(InvalidRecipe):
        resolve_schedule({"kind": ScheduleKind.COSINE})


def test_an_end_of_annealing_that_is_0_is_out_of_range_not_unset():
    assert violations_of({"schedule": {"kind": ScheduleKind.COSINE, "total_steps": 0}}) == {
        "recipe.schedule.total_steps": "OUT_OF_RANGE"
    }


def test_annealing_ends_at_the_step_limit():
    recipe = resolve_recipe({"schedule": {"kind": ScheduleKind.COSINE}, "stop": {"max_steps": 5000}})
    assert recipe.schedule.total_steps == 5000


@pytest.mark.parametrize("preset", Preset)
def test_a_recipe_survives_json(preset):
    recipe = resolve_recipe({"preset": preset, "schedule": {"kind": ScheduleKind.COSINE}})
    again = recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe))))
    assert again == recipe
    assert all(type(a) is type(b) for a, b in zip(_leaves(again), _leaves(recipe), strict=True))


def _leaves(value):
    if dataclasses.is_dataclass(value):
        return [leaf for field in dataclasses.fields(value) for leaf in _leaves(getattr(value, field.name))]
    return [value]


def test_run_limited_by_time_alone_plans_its_decay():
    """NOAM never comes down, and nobody knows the number of steps."""
    schedule = resolve_recipe({"stop": {"max_duration_s": 60.0}}).schedule
    noam = resolve_recipe({}).schedule
    assert (schedule.kind, noam.kind) == (ScheduleKind.WSD, ScheduleKind.NOAM)
    assert schedule.total_steps is None
    assert schedule.warmup_steps == noam.warmup_steps
    assert schedule.peak_learning_rate == pytest.approx(learning_rate(noam, noam.warmup_steps))
    assert resolve_recipe({}).schedule == noam, "the preset itself was not changed"


@pytest.mark.parametrize(
    ("stop", "schedule"),
    [
        ({"max_duration_s": 60.0, "max_steps": 100}, {}),
        ({"max_duration_s": 60.0, "max_epochs": 1}, {}),
        ({"max_duration_s": 60.0}, {"factor": 2.0}),
        ({"max_duration_s": 60.0}, {"kind": ScheduleKind.NOAM}),
    ],
)
def test_other_limits_and_schedules_stay_as_they_are(stop, schedule):
    assert resolve_recipe({"stop": stop, "schedule": schedule}).schedule.kind is ScheduleKind.NOAM


@pytest.mark.parametrize("kind", [ScheduleKind.LINEAR, ScheduleKind.COSINE])
def test_schedule_that_needs_steps_is_refused_with_the_name_of_the_one_that_does_not(kind):
    with pytest.raises(InvalidRecipe) as caught:
        resolve_recipe({"stop": {"max_duration_s": 60.0}, "schedule": {"kind": kind}})
    (violation,) = caught.value.violations
    assert violation.field == "recipe.schedule.total_steps"
    assert "use WSD" in violation.description


def test_wsd_takes_its_steps_from_the_limit():
    schedule = resolve_recipe({"schedule": {"kind": ScheduleKind.WSD}, "stop": {"max_steps": 5000}}).schedule
    assert (schedule.total_steps, schedule.decay_share, schedule.decay_shape) == (5000, 0.3, DecayShape.LINEAR)


@pytest.mark.parametrize(
    ("overrides", "field", "reason"),
    [
        ({"schedule": {"kind": ScheduleKind.WSD}, "stop": {"max_epochs": 3}}, "schedule.total_steps", "REQUIRED"),
        (
            {
                "schedule": {"kind": ScheduleKind.WSD, "decay_share": 0.5, "warmup_steps": 600},
                "stop": {"max_steps": 1000},
            },
            "schedule.decay_share",
            "CONFLICT",
        ),
        (
            {"schedule": {"kind": ScheduleKind.WSD, "decay_share": 1.0}},
            "schedule.decay_share",
            "OUT_OF_RANGE",
        ),
        ({"schedule": {"kind": ScheduleKind.NOAM, "decay_share": 0.1}}, "schedule.decay_share", "CONFLICT"),
        ({"stop": {"target_score": 101.0}}, "stop.target_score", "CONFLICT"),
        ({"stop": {"target_score": -1.0}}, "stop.target_score", "OUT_OF_RANGE"),
    ],
)
def test_conflicting_wsd_and_targets_are_refused(overrides, field, reason):
    assert violations_of(overrides) == {f"recipe.{field}": reason}


def test_recipe_with_a_decay_survives_json():
    recipe = resolve_recipe({"stop": {"max_duration_s": 60.0, "target_score": 30.0}, "data": {"split_digits": True}})
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
