from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman import _convert, errors, types
from ferryman._mapping import fill_message, from_message
from ferryman.testing import training_script
from ferryman.v1 import metrics_pb2, model_pb2, recipe_pb2, training_pb2, translation_pb2

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
NUMBER = st.floats(allow_nan=False)
TEXT = st.text(max_size=20)
TIME = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))
SECONDS = st.integers(0, 10**9).map(lambda ms: ms / 1000)

RECIPES = st.builds(
    types.Recipe,
    preset=st.none() | st.sampled_from(types.Preset),
    model=st.none()
    | st.builds(
        types.ModelRecipe,
        d_model=st.none() | INT32,
        dropout=st.none() | NUMBER,
        norm=st.none() | st.sampled_from(types.NormPlacement),
        activation=st.none() | st.sampled_from(types.Activation),
        positions=st.none() | st.sampled_from(types.Positions),
    ),
    data=st.none() | st.builds(types.DataRecipe, subword_algorithm=st.none() | st.sampled_from(types.SubwordAlgorithm)),
    schedule=st.none()
    | st.builds(
        types.LearningRateSchedule,
        kind=st.none() | st.sampled_from(types.ScheduleKind),
        total_steps=st.none() | INT64,
        factor=st.none() | NUMBER,
    ),
    optimization=st.none()
    | st.builds(
        types.OptimizationRecipe,
        clip_norm=st.none() | NUMBER,
        accumulation_steps=st.none() | INT32,
        ema_decay=st.none() | NUMBER,
        precision=st.none() | st.sampled_from(types.Precision),
        max_rollbacks=st.none() | INT32,
    ),
    stop=st.none() | st.builds(types.StopRecipe, max_steps=st.none() | INT64),
    validation=st.none()
    | st.builds(
        types.ValidationRecipe,
        metric=st.none() | st.sampled_from(types.SelectionMetric),
        averaging=st.none() | st.sampled_from(types.Averaging),
        checkpoint_interval_steps=st.none() | INT64,
    ),
    seed=st.none() | INT64,
)
VALIDATIONS = st.builds(
    types.ValidationMetrics,
    step=INT64,
    epoch=INT32,
    loss=NUMBER,
    nll_per_token=NUMBER,
    perplexity=NUMBER,
    bleu=NUMBER,
    chrf=NUMBER,
    translated_pairs=INT32,
    duration_s=SECONDS,
)
RUNS = st.builds(
    types.TrainingRun,
    run_id=TEXT,
    state=st.sampled_from([state for state in types.RunState if state is not types.RunState.UNKNOWN]),
    corpus_id=TEXT,
    model_name=TEXT,
    recipe=RECIPES,
    model_version=st.none() | st.integers(1, 2**62),
    progress=st.builds(types.RunProgress, step=INT64, epoch=INT32, target_tokens=INT64,
                       target_tokens_per_second=NUMBER, fraction=NUMBER, remaining_s=st.none() | SECONDS,
                       best_validation=st.none() | VALIDATIONS, skipped_updates=INT64),
    error=st.none() | st.builds(types.RunError, reason=TEXT, message=TEXT, log_tail=TEXT),
    attempt=INT32,
    last_sequence=INT64,
    create_time=st.none() | TIME,
    start_time=st.none() | TIME,
    end_time=st.none() | TIME,
    pause_requested=st.booleans(),
    restarts=INT32,
    initial_model=st.none() | TEXT.filter(bool),
    processes=INT32,
    keep_optimizer=st.booleans(),
)  # fmt: skip


@given(RECIPES)
def test_recipe_round_trips(recipe):
    message = recipe_pb2.Recipe()
    assert fill_message(recipe, message) == []
    assert from_message(types.Recipe, recipe_pb2.Recipe.FromString(message.SerializeToString())) == recipe


@given(RUNS)
def test_run_round_trips(run):
    message = training_pb2.TrainingRun()
    assert fill_message(run, message) == []
    assert from_message(types.TrainingRun, training_pb2.TrainingRun.FromString(message.SerializeToString())) == run


CHECKPOINTS = st.builds(
    types.Checkpoint,
    step=INT64,
    epoch=INT32,
    create_time=TIME,
    size_bytes=INT64,
    best=st.booleans(),
    bleu=st.none() | NUMBER,
    chrf=st.none() | NUMBER,
    nll_per_token=st.none() | NUMBER,
)


@given(CHECKPOINTS)
def test_checkpoint_round_trips(checkpoint):
    message = training_pb2.Checkpoint()
    assert fill_message(checkpoint, message) == []
    assert from_message(types.Checkpoint, training_pb2.Checkpoint.FromString(message.SerializeToString())) == checkpoint


@pytest.mark.parametrize(
    "payload", [*training_script(), types.RunEvent(level=types.EventLevel.INFO, code="A", message="b")]
)
def test_record_round_trips(payload):
    record = types.MetricRecord(sequence=7, time=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), payload=payload)
    assert _convert.record_from_message(_convert.record_to_message(record)) == record


MESSAGES = {
    types.Recipe: recipe_pb2.Recipe,
    types.ModelRecipe: recipe_pb2.ModelRecipe,
    types.DataRecipe: recipe_pb2.DataRecipe,
    types.LearningRateSchedule: recipe_pb2.LearningRateSchedule,
    types.OptimizationRecipe: recipe_pb2.OptimizationRecipe,
    types.StopRecipe: recipe_pb2.StopRecipe,
    types.ValidationRecipe: recipe_pb2.ValidationRecipe,
    types.StepMetrics: metrics_pb2.StepMetrics,
    types.ValidationMetrics: metrics_pb2.ValidationMetrics,
    types.StateChange: metrics_pb2.StateChange,
    types.RunEvent: metrics_pb2.RunEvent,
    types.Heartbeat: metrics_pb2.Heartbeat,
    types.TrainingRun: training_pb2.TrainingRun,
    types.RunProgress: training_pb2.RunProgress,
    types.RunError: training_pb2.RunError,
    types.Checkpoint: training_pb2.Checkpoint,
    types.LearningRateCurve: training_pb2.GetLRScheduleResponse,
    types.Model: model_pb2.Model,
    types.ModelVersion: model_pb2.ModelVersion,
    types.ModelScores: model_pb2.ModelScores,
    types.ModelAlias: model_pb2.ModelAlias,
    types.LoadedModel: model_pb2.LoadedModel,
    types.DownloadHeader: model_pb2.DownloadHeader,
    types.DownloadFile: model_pb2.DownloadFile,
    types.DownloadChunk: model_pb2.DownloadChunk,
    types.Translation: translation_pb2.Translation,
    types.Hypothesis: translation_pb2.Hypothesis,
    types.TranslationResult: translation_pb2.TranslateResponse,
    types.TranslateTimings: translation_pb2.TranslateTimings,
    types.Sampling: translation_pb2.Sampling,
    types.StreamTranslateResponse: translation_pb2.StreamTranslateResponse,
    types.StreamTranslation: translation_pb2.StreamTranslation,
    types.SentenceError: translation_pb2.SentenceError,
    types.StreamSentence: translation_pb2.StreamSentence,
    _convert.SearchOptions: translation_pb2.TranslateOptions,
}


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_dataclass_has_fields_of_its_message(cls):
    names = {field.name.removesuffix("_s") for field in dataclasses.fields(cls) if field.metadata.get("wire", True)}
    assert names == {field.name for field in MESSAGES[cls].DESCRIPTOR.fields}


ENUMS = [
    (types.Preset, recipe_pb2.Preset),
    (types.NormPlacement, recipe_pb2.NormPlacement),
    (types.SubwordAlgorithm, recipe_pb2.SubwordAlgorithm),
    (types.ScheduleKind, recipe_pb2.ScheduleKind),
    (types.SelectionMetric, recipe_pb2.SelectionMetric),
    (types.Activation, recipe_pb2.Activation),
    (types.Positions, recipe_pb2.Positions),
    (types.Precision, recipe_pb2.Precision),
    (types.Averaging, recipe_pb2.Averaging),
    (types.RunState, metrics_pb2.RunState),
    (types.EventLevel, metrics_pb2.EventLevel),
    (types.RunOrder, training_pb2.RunOrder),
    (types.EarlyStopping, translation_pb2.EarlyStopping),
    (types.PublishedWeights, model_pb2.PublishedWeights),
]


@pytest.mark.parametrize(("cls", "wire"), ENUMS)
def test_enum_has_members_of_its_wire_type(cls, wire):
    prefix = wire.keys()[0].removesuffix("UNSPECIFIED")
    assert {member.value for member in cls} - {"unknown"} == {
        name.removeprefix(prefix).lower() for name in wire.keys()[1:]
    }


def test_strings_equal_enum_members():
    message = recipe_pb2.Recipe()
    assert fill_message(types.Recipe(preset="big", schedule=types.LearningRateSchedule(kind="cosine")), message) == []
    assert (message.preset, message.schedule.kind) == (recipe_pb2.PRESET_BIG, recipe_pb2.SCHEDULE_KIND_COSINE)


def test_all_unsendable_values_are_reported_at_once():
    recipe = types.Recipe(
        preset="huge",
        model=types.ModelRecipe(d_model=2**40, norm="unspecified"),
        stop=types.StopRecipe(max_steps="many", max_duration_s=float("inf")),
        schedule=types.LearningRateSchedule(warmup_steps=1.5),
    )
    options = _convert.StartOptions(
        request_id=None, validate_only=False, initial_model=None, keep_optimizer=False, processes=None
    )
    with pytest.raises(errors.InvalidRecipe) as caught:
        _convert.start_training("c", "m", recipe, options)
    assert [violation.field for violation in caught.value.violations] == [
        "recipe.preset",
        "recipe.model.d_model",
        "recipe.model.norm",
        "recipe.schedule.warmup_steps",
        "recipe.stop.max_steps",
        "recipe.stop.max_duration",
    ]
    assert "'huge', must be one of tiny, small, base, big, deep_shallow" in str(caught.value)


def test_unknown_wire_values_are_tolerated():
    assert from_message(types.StateChange, metrics_pb2.StateChange(state=99)).state is types.RunState.UNKNOWN
    assert from_message(types.Recipe, recipe_pb2.Recipe(preset=99)).preset is None
    record = _convert.record_from_message(metrics_pb2.MetricRecord(sequence=3))
    assert (record.sequence, record.payload.code) == (3, "UNKNOWN_RECORD")


def test_start_options_have_fields_of_request():
    names = {field.name for field in dataclasses.fields(_convert.StartOptions)}
    assert names | {"corpus_id", "model_name", "recipe"} == {
        field.name for field in training_pb2.StartTrainingRequest.DESCRIPTOR.fields
    }


def test_duration_is_seconds():
    message = metrics_pb2.Heartbeat(state=metrics_pb2.RUN_STATE_RUNNING)
    message.interval.FromTimedelta(timedelta(milliseconds=2500))
    assert from_message(types.Heartbeat, message).interval_s == 2.5


def test_translation_without_hypotheses_has_empty_text():
    assert types.Translation(hypotheses=(), source_tokens=3).text == ""


@pytest.mark.parametrize("seconds", [1e-10, -1e-10, 1e12, float("nan")])
def test_seconds_that_no_duration_holds_are_refused(seconds):
    [violation] = fill_message(types.StopRecipe(max_duration_s=seconds), recipe_pb2.StopRecipe())
    assert violation.field == "max_duration"
    assert "0 or from 1e-9 to 315,576,000,000" in violation.description
