"""The demo's steps, against the SDK's fake service."""

import argparse
import dataclasses
import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from examples import demo, demo_training
from examples.demo import DemoFailed, Task
from examples.parallel_text import ParallelLines, TextMissing
from ferryman import Client
from ferryman.testing import FakeFerryman
from ferryman.types import (
    DecayPlan,
    DecayReason,
    MetricRecord,
    Recipe,
    RunProgress,
    RunState,
    StateChange,
    StepMetrics,
    StopRecipe,
    TrainingRun,
    ValidationMetrics,
)

PAIRS = [("a", "A"), ("b", "B")]


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    (tmp_path / "demo-output").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "demo-output"


@pytest.fixture
def task():
    def upload(client):
        return client.upload_corpus("letters", "en", "de", train=PAIRS, validation=PAIRS).corpus_id

    test = ParallelLines(source=["a b", "c", "d"], target=["A  B ", "C", "x"])
    recipe = Recipe(stop=StopRecipe(max_duration_s=60.0))
    return Task(model_name="letters", upload=upload, test=test, recipe=recipe, expected_share=0.5, expected_steps=None)


def printed(console):
    return console.file.getvalue()


def test_train_follows_run_until_publication(task, console):
    with FakeFerryman() as fake, Client(fake.target) as client:
        run, _ = demo.train(client, fake.target, task, console)
        assert (run.state, run.model_name, run.model_version) == (RunState.SUCCEEDED, "letters", 1)
        assert "BLEU" in printed(console)


def test_failed_run_fails_demo_with_reason(task, console):
    script = [StateChange(state=RunState.QUEUED), StateChange(state=RunState.FAILED)]
    failure = pytest.raises(DemoFailed, match="training ended failed")
    with FakeFerryman(script=script) as fake, Client(fake.target) as client, failure:
        demo.train(client, fake.target, task, console)


def test_interrupted_demo_cancels_run(task, monkeypatch, console):
    def interrupted(client, run_id, console, on_record):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_training, "follow", interrupted)
    with FakeFerryman(hold_after=2) as fake, Client(fake.target) as client:
        with pytest.raises(KeyboardInterrupt):
            demo.train(client, fake.target, task, console)
        assert [run.state for run in client.list_training_runs()] == [RunState.CANCELLED]


def test_schedule_is_plotted_in_terminal_and_file(task, output, console):
    with FakeFerryman() as fake, Client(fake.target) as client:
        demo.show_learning_rate(client, task.recipe, console)
    assert "at step" in printed(console)
    assert "training step" in printed(console)
    assert (output / "learning-rate.png").stat().st_size > 1000


def test_records_are_saved_as_files(task, output, console):
    with FakeFerryman() as fake, Client(fake.target) as client:
        run, _ = demo.train(client, fake.target, task, console)
        demo.save_run(client, run.run_id)
    assert len((output / "metrics.csv").read_text().splitlines()) == 1 + 4 + 1
    assert (output / "training.png").stat().st_size > 1000


def test_exact_match_ignores_white_space():
    assert demo.is_exact(" A  B", "A B\t")
    assert not demo.is_exact("A b", "A B")


def test_table_shows_wrong_translations_first(task, console):
    share = demo.show_translations(task.test, ["A B", "C", "D"], console)
    assert share == pytest.approx(2 / 3)
    assert printed(console).index("✗") < printed(console).index("A B")
    assert printed(console).count("✗") == 1


def test_summary_is_exact_share_or_scores(task):
    assert demo.summary(task, ["A B", "C", "D"], 2 / 3) == "66.7 % of 3 held-out sentences exactly right"
    own = dataclasses.replace(task, expected_share=0.0)
    assert demo.summary(own, list(task.test.target), 1.0).startswith("BLEU ")


def test_output_paths_name_exact_version(console):
    demo.show_output_paths("letters/3", console)
    assert "demo-output/data/models/letters/3" in printed(console)
    assert "ferryman translate letters/3 " in printed(console)


def test_own_text_is_checked_before_service_starts(tmp_path):
    arguments = argparse.Namespace(train="t", valid="t", test="t", source="en", target="de")
    with pytest.raises(TextMissing, match=r"t\.en\.gz is a file"):
        demo.own_text_task(arguments, 1.0)


def test_own_text_limits_vocabulary_size(tmp_path):
    for language in ("en", "de"):
        (tmp_path / f"t.{language}").write_text("word\n" * 4000)
    arguments = argparse.Namespace(train="t", valid="t", test="t", source="en", target="de")
    task = demo.own_text_task(arguments, 1.5)
    assert task.recipe.data.vocabulary_size == 1000
    assert task.recipe.stop.max_duration_s == 90
    assert task.model_name == "own-en-de"


def test_file_options_require_each_other(capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.parse(["--train", "x"])
    assert stopped.value.code == 2
    assert "pass all of TRAIN, VALID, TEST, SOURCE and TARGET" in capsys.readouterr().err


class PausedClient:
    """Keeps which runs it was asked to pause and to resume."""

    def __init__(self):
        self.calls = []

    def pause_training(self, run_id):
        self.calls.append(("pause", run_id))

    def resume_training(self, run_id):
        self.calls.append(("resume", run_id))


def record(payload):
    return MetricRecord(sequence=1, time=datetime.now(UTC), payload=payload)


def step_of(number, seconds):
    numbers = {field.name: 0.0 for field in dataclasses.fields(StepMetrics)}
    return StepMetrics(**numbers | {"step": number, "duration_s": seconds})


@pytest.mark.parametrize(
    ("step_s", "expected_steps", "said"),
    [
        (0.06, 2000, "about 2 minutes on this machine, until the validation reaches its target"),
        (0.015, 2000, "about 1 minute on"),
        (3.0, 2000, "about 8 minutes on this machine"),
        (0.06, None, "about 8 minutes on this machine."),
    ],
)
def test_estimate_follows_measured_speed(console, step_s, expected_steps, said):
    watched = demo_training.DemoRun(
        PausedClient(), "run_1", console, expected_steps=expected_steps, max_duration_s=480.0
    )
    for number in range(demo_training.MEASURED_STEPS):
        assert "about" not in printed(console)
        watched.on_record(record(step_of(number, 30.0 if number < 10 else step_s)))
    assert said in printed(console)


def test_run_pauses_after_first_validation_and_resumes_once(console):
    client = PausedClient()
    watched = demo_training.DemoRun(client, "run_1", console, expected_steps=None, max_duration_s=60.0)
    numbers = {field.name: 0 for field in dataclasses.fields(ValidationMetrics)}
    for payload in (ValidationMetrics(**numbers), StateChange(state=RunState.PAUSED), ValidationMetrics(**numbers)):
        watched.on_record(record(payload))
    assert client.calls == [("pause", "run_1"), ("resume", "run_1")]


@pytest.mark.parametrize(
    ("share", "reason", "steps", "fails", "hint"),
    [
        (0.96, DecayReason.TARGET_SCORE, 2000, False, ""),
        (0.94, DecayReason.TARGET_SCORE, 2000, False, "training ended as planned"),
        (0.89, DecayReason.TARGET_SCORE, 2000, True, "training ended as planned"),
        (0.70, DecayReason.TIME, 900, False, "The machine is slow or busy"),
        (0.70, DecayReason.TIME, 5000, True, "The machine is slow or busy"),
    ],
)
def test_slow_machine_does_not_fail_demo(task, console, share, reason, steps, fails, hint):
    """A slow machine is told what to do, and is no failure."""
    task = dataclasses.replace(task, expected_share=0.95)
    run = TrainingRun(
        run_id="run_1",
        state=RunState.SUCCEEDED,
        corpus_id="cor_1",
        model_name="m",
        recipe=task.recipe,
        progress=RunProgress(step=steps),
    )
    decay = DecayPlan(first_step=1, last_step=steps, reason=reason)
    if fails:
        with pytest.raises(DemoFailed, match="at least 90 % are required"):
            demo.check_result(task, share, run, decay, console)
    else:
        demo.check_result(task, share, run, decay, console)
    assert hint in printed(console) and bool(printed(console)) == bool(hint)
