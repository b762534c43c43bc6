"""Wire and domain know the same names."""

import dataclasses

import pytest
from google.protobuf.duration_pb2 import Duration

from ferryman.v1 import corpus_pb2, metrics_pb2, model_pb2, recipe_pb2, training_pb2, translation_pb2
from ferryman_service.domain import recipe as recipes
from ferryman_service.domain.corpora import CorpusWarning, Side, Split
from ferryman_service.domain.models import (
    Int8Outcome,
    Int8Scores,
    ModelLineage,
    ModelScores,
    ModelVersion,
    PublishedWeights,
)
from ferryman_service.domain.recipe import resolve_recipe, resolve_schedule
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StateChange, StepMetrics, ValidationMetrics
from ferryman_service.domain.schedule import LearningRateSchedule, ScheduleKind
from ferryman_service.domain.translation import EarlyStopping, Sampling, SearchOptions
from ferryman_service.rpc import convert

ENUMS = [
    (recipes.Preset, recipe_pb2.Preset),
    (recipes.NormPlacement, recipe_pb2.NormPlacement),
    (recipes.SubwordAlgorithm, recipe_pb2.SubwordAlgorithm),
    (recipes.SelectionMetric, recipe_pb2.SelectionMetric),
    (recipes.Activation, recipe_pb2.Activation),
    (recipes.Positions, recipe_pb2.Positions),
    (recipes.Precision, recipe_pb2.Precision),
    (recipes.Averaging, recipe_pb2.Averaging),
    (ScheduleKind, recipe_pb2.ScheduleKind),
    (RunState, metrics_pb2.RunState),
    (EventLevel, metrics_pb2.EventLevel),
    (Split, corpus_pb2.Split),
    (Side, corpus_pb2.Side),
    (EarlyStopping, translation_pb2.EarlyStopping),
    (PublishedWeights, model_pb2.PublishedWeights),
]
SAME_FIELDS = [
    (recipes.Recipe, recipe_pb2.Recipe),
    (recipes.ModelRecipe, recipe_pb2.ModelRecipe),
    (recipes.DataRecipe, recipe_pb2.DataRecipe),
    (recipes.OptimizationRecipe, recipe_pb2.OptimizationRecipe),
    (recipes.StopRecipe, recipe_pb2.StopRecipe),
    (recipes.ValidationRecipe, recipe_pb2.ValidationRecipe),
    (LearningRateSchedule, recipe_pb2.LearningRateSchedule),
    (CorpusWarning, corpus_pb2.CorpusWarning),
    (StepMetrics, metrics_pb2.StepMetrics),
    (ValidationMetrics, metrics_pb2.ValidationMetrics),
    (StateChange, metrics_pb2.StateChange),
    (RunEvent, metrics_pb2.RunEvent),
    (ModelScores, model_pb2.ModelScores),
    (SearchOptions, translation_pb2.TranslateOptions),
    (Sampling, translation_pb2.Sampling),
]


@pytest.mark.parametrize(("domain", "wire"), ENUMS)
def test_enumerations_have_the_same_members(domain, wire):
    numbers = {convert.enum_to_wire(member) for member in domain}
    assert numbers == set(wire.values()) - {0}
    violations = []
    assert {convert.enum_from_wire(domain, number, "field", violations) for number in numbers} == set(domain)
    assert violations == []


@pytest.mark.parametrize(("domain", "wire"), SAME_FIELDS)
def test_messages_have_the_fields_of_their_dataclass(domain, wire):
    assert {field.name for field in dataclasses.fields(domain)} == {
        f"{field.name}_s" if field.message_type is Duration.DESCRIPTOR else field.name
        for field in wire.DESCRIPTOR.fields
    }


def overrides_of(wire):
    violations = []
    overrides = convert.recipe_overrides(wire, "recipe", violations)
    assert violations == []
    return overrides


def test_nothing_set_is_nothing_overridden():
    assert overrides_of(recipe_pb2.Recipe()) == {}


def test_zero_is_a_value_where_the_contract_lets_it_be_set():
    wire = recipe_pb2.Recipe(
        preset=recipe_pb2.PRESET_BIG,
        model=recipe_pb2.ModelRecipe(dropout=0, norm=recipe_pb2.NORM_PLACEMENT_UNSPECIFIED),
        stop=recipe_pb2.StopRecipe(max_steps=0, max_epochs=3),
        seed=0,
    )
    assert overrides_of(wire) == {
        "preset": recipes.Preset.BIG,
        "model": {"dropout": 0.0},
        "stop": {"max_steps": 0, "max_epochs": 3},
        "seed": 0,
    }


def test_unknown_numbers_are_named_by_their_path():
    wire = recipe_pb2.Recipe(preset=99, schedule=recipe_pb2.LearningRateSchedule(kind=77, warmup_steps=5), seed=3)
    violations = []
    assert convert.recipe_overrides(wire, "recipe", violations) == {"schedule": {"warmup_steps": 5}, "seed": 3}
    assert [(violation.field, violation.reason) for violation in violations] == [
        ("recipe.preset", "UNKNOWN_ENUM_VALUE"),
        ("recipe.schedule.kind", "UNKNOWN_ENUM_VALUE"),
    ]


def test_unknown_elements_and_orders_are_named_and_left_out():
    violations = []
    states = convert.all_enums(RunState, [1, 0, 99, 1], "states", violations)
    assert convert.known_number(training_pb2.RunOrder, 9, "order", violations) == 0
    assert states == [RunState.QUEUED]
    assert [(violation.field, violation.reason) for violation in violations] == [
        ("states[1]", "REQUIRED"),
        ("states[2]", "UNKNOWN_ENUM_VALUE"),
        ("order", "UNKNOWN_ENUM_VALUE"),
    ]


@pytest.mark.parametrize(
    "overrides",
    [{"preset": preset, "schedule": {"kind": kind}} for preset in recipes.Preset for kind in ScheduleKind],
)
def test_a_resolved_recipe_survives_the_round_trip(overrides):
    recipe = resolve_recipe(overrides)
    wire = convert.recipe_to_wire(recipe)
    assert resolve_recipe(overrides_of(wire)) == recipe


def test_a_schedule_survives_the_round_trip():
    schedule = resolve_schedule({"kind": ScheduleKind.LINEAR, "total_steps": 9000, "peak_learning_rate": 0.1})
    assert resolve_schedule(overrides_of(convert.schedule_to_wire(schedule))) == schedule


def options(**fields):
    violations = []
    found = convert.options_from_wire(translation_pb2.TranslateOptions(**fields), "options", violations)
    return found, [(violation.field, violation.reason) for violation in violations]


def test_options_that_are_not_set_have_their_defaults():
    assert options() == (SearchOptions(), [])


def test_every_option_is_read():
    wire = {
        "beam_size": 3,
        "n_best": 2,
        "length_penalty": 0.0,
        "max_length": 50,
        "max_length_ratio": 1.5,
        "min_length": 0,
        "beam_patience": 2.0,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "return_token_scores": True,
        "return_alignment": True,
    }
    found, violations = options(**wire, early_stopping="EARLY_STOPPING_OPTIMAL")
    assert violations == []
    assert found == SearchOptions(**wire, early_stopping=EarlyStopping.OPTIMAL)


def test_sampling_keeps_no_beam():
    found, violations = options(n_best=3, sampling={"seed": 0, "temperature": 0.5})
    assert (found.sampling, found.rows, violations) == (Sampling(seed=0, temperature=0.5), 3, [])
    assert options(sampling={})[0].sampling == Sampling()
    assert options(beam_size=5, sampling={})[1] == [("options.beam_size", "CONFLICT")]


@pytest.mark.parametrize(
    ("outcome", "wire"),
    [
        (None, None),
        (Int8Outcome(scores=Int8Scores(pairs=0), kept=True), model_pb2.Int8Outcome(pairs=0, kept=True)),
        (
            Int8Outcome(scores=Int8Scores(pairs=9, fp32_bleu=30.5, int8_bleu=0.0), kept=False),
            model_pb2.Int8Outcome(pairs=9, fp32_bleu=30.5, int8_bleu=0.0, kept=False),
        ),
    ],
)
def test_a_version_says_what_int8_costs_if_that_is_known(outcome, wire):
    version = ModelVersion(
        name="m",
        version=1,
        lineage=ModelLineage(
            run_id="run_x",
            corpus_id="cor_x",
            corpus_digest="",
            source_language="en",
            target_language="de",
            recipe=resolve_recipe({}),
        ),
        scores=ModelScores(bleu=1.0, chrf=2.0, nll_per_token=3.0, weights=PublishedWeights.CHECKPOINT, step=1),
        parameters=1,
        size_bytes=1,
        digest="",
        create_time_ns=1,
        int8=outcome,
    )
    found = convert.version_to_wire(version)
    assert found.HasField("int8") is (wire is not None)
    if wire is not None:
        assert found.int8 == wire
        assert found.int8.HasField("int8_bleu") is (wire.pairs > 0)
