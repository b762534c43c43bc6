"""A run that dies anywhere resumes to identical weights and an identical series of reports."""

import contextlib
import copy
import dataclasses
import errno
import itertools
import os
import shutil

import pytest
import safetensors.torch
import torch

from ferryman_service.domain.recipe import Precision, resolve_schedule
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.schedule import DecayPlan, ScheduleKind, learning_rate
from ferryman_service.domain.training import DiskIsFull, InitialWeights, PauseRequested, StopRequested, TrainingJob
from ferryman_service.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
from ferryman_service.training.files import Disk
from ferryman_service.training.optimizer import MOMENTS
from ferryman_service.training.step import Trainee
from tests.service.training.conftest import make_small_recipe, reversed_pairs, write_corpus_to

CONFIG = EngineConfig(device="cpu", threads=1)
SOAK = bool(os.environ.get("FERRYMAN_SOAK"))
# Every seventh change to the disk, others without and with its half done; `make soak` takes every one.
_EVERY = {half: (1, 1) if SOAK else (1 + 3 * half, 7) for half in (False, True)}
WALL_CLOCK = {"duration_s": 0, "target_tokens_per_second": 0, "memory_bytes": 0}


class Crash(BaseException):
    """The process dies: no `except Exception` sees it."""


class DurableReporter:
    """What a store keeps of the reports: those that were flushed, and others up to the crash if `eager`."""

    def __init__(self, *, eager=True):
        self.series, self.remarks, self._waiting, self._known, self._eager = [], [], [], 0, eager
        self.raise_at, self.raise_after_step = {}, {}
        self._checks = self._last_step = 0

    def _report(self, item):
        if self._known:
            self._known -= 1
            return
        self._waiting.append(item)
        if self._eager:
            self.flush()

    def step(self, metrics):
        self._last_step = metrics.step
        self._report(dataclasses.replace(metrics, **WALL_CLOCK))

    def validation(self, metrics):
        self._report(dataclasses.replace(metrics, duration_s=0))

    def decay_plan(self, plan):
        self._report(plan)

    def event(self, level, code, message, *, repeats=False):
        if repeats:
            self._report((code, message))
        else:
            self.remarks.append(code)

    def resume(self, reports):
        self._waiting.clear()
        self._known = len(self.series) - reports
        assert self._known >= 0, "a checkpoint knows of reports that are lost"

    def flush(self):
        self.series += self._waiting
        self._waiting.clear()

    def check(self):
        error = self.raise_at.pop(self._checks, None) or self.raise_after_step.pop(self._last_step, None)
        self._checks += 1
        if error is not None:
            raise error


class FailingDisk(Disk):
    """Fails its n-th change, before it or when half of it is done."""

    def __init__(self, number, error, *, half):
        self._left, self._error, self._half = number, error, half

    def _count(self, do_half):
        self._left -= 1
        if self._left == 0:
            if self._half:
                do_half()
            raise self._error

    def write(self, path, chunks):
        data = b"".join(chunks)
        self._count(lambda: path.write_bytes(data[: len(data) // 2]))
        super().write(path, [data])

    def make_folder(self, path):
        self._count(path.mkdir)
        super().make_folder(path)

    def rename(self, source, target):
        self._count(lambda: source.rename(target))
        super().rename(source, target)

    def remove(self, folder):
        self._count(lambda: [file.unlink() for file in sorted(folder.glob("*"))[:2]])
        super().remove(folder)

    def sync(self, folder):
        self._count(lambda: None)
        super().sync(folder)

    @property
    def was_reached(self):
        return self._left <= 0


@pytest.fixture(scope="module")
def make_job(tmp_path_factory):
    """Makes jobs over one small corpus, which is prepared once: each short run cuts all of it into new pieces."""
    folder = tmp_path_factory.mktemp("resume")
    corpus = write_corpus_to(folder, reversed_pairs(120, seed=1), reversed_pairs(10, seed=2))
    numbers = itertools.count()

    def make(recipe):
        run_dir = folder / f"run-{next(numbers)}"
        run_dir.mkdir()
        prepared_dir = folder / "prepared"
        return TrainingJob(run_id="run_1", recipe=recipe, corpus=corpus, run_dir=run_dir, prepared_dir=prepared_dir)

    return make


@pytest.fixture(scope="module")
def recipe():
    return make_small_recipe(
        model={"dropout": 0.2, "attention_dropout": 0.1},
        data={"subword_regularization_alpha": 0.5},
        optimization={"batch_target_tokens": 164, "ema_decay": 0.9, "accumulation_steps": 2},
        stop={"max_steps": 7},
        validation={"interval_steps": 3, "max_translated_pairs": 4, "checkpoint_interval_steps": 2, "keep_last": 2},
    )


def outcome(work, reporter, engine=None):
    trained = (engine or TorchTrainingEngine(CONFIG)).train(work, reporter)
    reporter.flush()
    return trained.weights.read_bytes(), reporter.series, trained.scores


def steps_of(series):
    return [item for item in series if hasattr(item, "gradient_norm")]


@pytest.fixture(scope="module")
def unbroken(make_job, recipe):
    """Weights, series and scores of an uninterrupted run."""
    weights, series, scores = outcome(make_job(recipe), DurableReporter())
    assert [item.step for item in steps_of(series)] == list(range(1, 8))
    return weights, series, scores


@pytest.mark.parametrize("half", [False, True])
def test_death_at_any_disk_change_resumes_identically(make_job, recipe, unbroken, half):
    survived = 0
    for number in itertools.count(*_EVERY[half]):
        disk, reporter, work = (
            FailingDisk(number, Crash(), half=half),
            DurableReporter(eager=number % 2),
            make_job(recipe),
        )
        try:
            assert outcome(work, reporter, TorchTrainingEngine(CONFIG, disk=disk)) == unbroken
        except Crash:
            torch.manual_seed(number)  # what another process would do before does not matter
            again = outcome(work, reporter)
            for mine, theirs in itertools.zip_longest(again[1], unbroken[1]):
                assert mine == theirs, number
            assert again == unbroken, number
            survived += 1
        if not disk.was_reached:
            break
    assert survived > 60 // _EVERY[half][1]


def test_death_at_any_step_resumes_identically(make_job, recipe, unbroken):
    """Also a second death right after the first."""
    for number in range(0, 12, 1 if SOAK else 3):
        work, reporter = make_job(recipe), DurableReporter(eager=number % 2)
        reporter.raise_at = {number: Crash(), 2 * number + 1: Crash()}
        while True:
            try:
                assert outcome(work, reporter) == unbroken, number
            except Crash:
                continue
            break


@pytest.mark.parametrize("error", [PauseRequested(), StopRequested()])
def test_pause_writes_a_checkpoint_of_the_last_step(make_job, recipe, unbroken, error):
    work, reporter = make_job(recipe), DurableReporter()
    reporter.raise_after_step = {5: error}
    with pytest.raises(type(error)):
        outcome(work, reporter)
    assert (work.run_dir / "checkpoints" / "step-0000000005").is_dir()
    assert outcome(dataclasses.replace(work, reported_step=5), reporter) == unbroken
    assert reporter.remarks.count("RESUMED") == 1


@pytest.mark.parametrize("prepared", ["", "another"])
def test_checkpoint_of_other_subwords_is_refused_and_kept(make_job, recipe, prepared):
    work, reporter = make_job(recipe), DurableReporter()
    reporter.raise_after_step = {1: PauseRequested()}
    with pytest.raises(PauseRequested):
        outcome(work, reporter)
    folder = work.run_dir / "checkpoints"
    path = max(list_checkpoints(folder))
    checkpoint = load_checkpoint(path)
    shutil.rmtree(path)
    position = dataclasses.replace(checkpoint.position, prepared=prepared)
    save_checkpoint(folder, dataclasses.replace(checkpoint, position=position), Disk())
    with pytest.raises(TrainingFailed) as caught:
        outcome(dataclasses.replace(work, reported_step=1), reporter)
    assert caught.value.reason is FailureReason.CHECKPOINT_UNUSABLE
    assert path.is_dir()


def test_full_disk_keeps_the_last_checkpoint_for_a_resume(make_job, recipe, unbroken):
    for number in (5, 20, 35):
        disk = FailingDisk(number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), half=True)
        work, reporter = make_job(recipe), DurableReporter()
        with pytest.raises(DiskIsFull, match="no space left"):
            outcome(work, reporter, TorchTrainingEngine(CONFIG, disk=disk))
        assert not list((work.run_dir / "checkpoints").glob("partial-*"))
        assert outcome(work, reporter) == unbroken


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(make_job, recipe, unbroken):
    work, reporter = make_job(recipe), DurableReporter()
    reporter.raise_at = {9: Crash()}
    with pytest.raises(Crash):
        outcome(work, reporter)
    newest = max((work.run_dir / "checkpoints").iterdir())
    data = bytearray((newest / "exp_avg.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "exp_avg.safetensors").write_bytes(bytes(data))
    assert outcome(work, reporter) == unbroken
    assert "CHECKPOINT_DAMAGED" in reporter.remarks


def test_resumed_run_counts_time_spent_and_reaches_reported_steps(make_job):
    ticks = itertools.count()
    recipe = make_small_recipe(stop={"max_steps": 0, "max_duration_s": 120.0}, validation={"interval_steps": 5})
    work, reporter = make_job(recipe), DurableReporter()
    reporter.raise_at = {12: Crash()}
    clock = lambda: float(next(ticks))  # noqa: E731
    with pytest.raises(Crash):
        outcome(work, reporter, TorchTrainingEngine(CONFIG, clock))
    spent = next(ticks)
    reported = max(item.step for item in steps_of(reporter.series))
    outcome(dataclasses.replace(work, reported_step=reported), reporter, TorchTrainingEngine(CONFIG, clock))
    assert spent < next(ticks) < 140 + spent
    assert max(item.step for item in steps_of(reporter.series)) > reported


def test_divergence_rolls_back_with_a_lower_rate_and_fails_in_the_end(make_job, monkeypatch):
    real = Trainee.step

    def step(self, micro_batches, target_tokens):
        poisoned = self.counters().updates_done >= 5 and self.counters().rate_scale > 0.3
        return real(self, micro_batches, 0 if poisoned else target_tokens)

    monkeypatch.setattr(Trainee, "step", step)
    recipe = make_small_recipe(
        optimization={"max_skipped_updates": 1, "max_rollbacks": 2, "rollback_rate_scale": 0.5},
        stop={"max_steps": 10},
        validation={"interval_steps": 4, "max_translated_pairs": 2},
    )
    work, reporter = make_job(recipe), DurableReporter()
    weights, series, _ = outcome(work, reporter)
    codes = [item[0] for item in series if isinstance(item, tuple)]
    assert codes.count("ROLLED_BACK") == 2
    assert codes.count("UPDATE_SKIPPED") == 4
    steps = [(item.step, item.skipped) for item in steps_of(series)]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, *range(5, 11)]
    rates = {item.step: item.learning_rate for item in steps_of(series)}
    assert rates[10] == pytest.approx(0.25 * rates[4] * 10 / 4)
    for number in range(6, 24, 1 if SOAK else 7):  # a death around a rollback
        work, reporter = make_job(recipe), DurableReporter(eager=number % 2)
        reporter.raise_at = {number: Crash()}
        try:
            outcome(work, reporter)
        except Crash:
            again = outcome(work, reporter)
            assert repr(again[1]) == repr(series), number  # not ==: a NaN equals nothing
            assert again[0] == weights
    stubborn = dataclasses.replace(recipe, optimization=dataclasses.replace(recipe.optimization, max_rollbacks=1))
    with pytest.raises(TrainingFailed, match="lower the learning rate") as caught:
        outcome(make_job(stubborn), DurableReporter())
    assert caught.value.reason is FailureReason.NON_FINITE_LOSS


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_death_in_half_precision_resumes_identically(make_job, recipe, precision, monkeypatch):
    """Nor in the loss scale, which a gradient that overflows in the second step halves."""
    real, deaths = Trainee.step, []

    def step(self, micro_batches, target_tokens):
        if self.counters().updates_done in deaths:
            raise Crash
        return real(self, micro_batches, 0 if self.counters().updates_done == 1 else target_tokens)

    monkeypatch.setattr(Trainee, "step", step)
    recipe = dataclasses.replace(recipe, optimization=dataclasses.replace(recipe.optimization, precision=precision))
    unbroken, broken = make_job(recipe), make_job(recipe)
    expected = outcome(unbroken, DurableReporter())
    reporter = DurableReporter()
    deaths.append(5)
    with pytest.raises(Crash):
        outcome(broken, reporter)
    deaths.clear()
    again = outcome(broken, reporter)
    assert again[0] == expected[0]
    assert repr(again[1:]) == repr(expected[1:])  # not ==: a NaN equals nothing
    assert reporter.remarks.count("RESUMED") == 1
    theirs, mine = (load_checkpoint(max((work.run_dir / "checkpoints").iterdir())) for work in (unbroken, broken))
    assert mine.counters == theirs.counters
    scale = (2.0**15, 5) if precision is Precision.FP16 else (1.0, 0)
    assert (mine.counters.loss_scale, mine.counters.loss_scale_good_steps) == scale
    for group, tensors in theirs.tensors.items():
        assert all(torch.equal(mine.tensors[group][name], tensor) for name, tensor in tensors.items()), group


@pytest.fixture(scope="module")
def published(make_job):
    """A run that has ended, and its result."""
    work = make_job(make_small_recipe())
    return work, TorchTrainingEngine(CONFIG).train(work, DurableReporter())


@pytest.mark.parametrize("is_kept", [True, False])
def test_fine_tuning_starts_from_the_weights_and_from_the_optimizer_only_if_kept(make_job, published, is_kept):
    """The checkpoint at step 0 of the new run shows its start; the moving average starts from the given weights."""
    (first, trained), recipe = published, make_small_recipe(stop={"max_steps": 1}, optimization={"ema_decay": 0.9})
    path = max((first.run_dir / "checkpoints").iterdir())
    kept = {"keep_optimizer": True, "checkpoint": path} if is_kept else {}
    initial = InitialWeights(weights=trained.weights, subwords=trained.subwords, **kept)
    second, reporter = dataclasses.replace(make_job(recipe), initial=initial), DurableReporter()
    outcome(second, reporter)
    begun, before = load_checkpoint(second.run_dir / "checkpoints" / "step-0000000000"), load_checkpoint(path)
    assert before.counters.updates_applied == 20
    assert (begun.counters.updates_applied, begun.counters.updates_done) == (20 * is_kept, 0)
    for moment in MOMENTS:
        assert any(tensor.any() for tensor in begun.tensors[moment].values()) is is_kept
        if is_kept:
            assert are_equal(begun.tensors[moment], before.tensors[moment])
    weights = safetensors.torch.load_file(trained.weights)
    assert are_equal(begun.tensors["weights"], weights)
    assert are_equal(begun.tensors["ema"], weights)
    [step] = steps_of(reporter.series)
    assert step.loss < 3.2, "the loss with which the first run ended"
    assert step.learning_rate == learning_rate(recipe.schedule, 1), "the schedule restarts"


def are_equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_initial_weights_of_another_shape_are_refused(make_job, published):
    first, trained = published
    weights = {name: tensor[..., :1] for name, tensor in safetensors.torch.load_file(trained.weights).items()}
    safetensors.torch.save_file({n: t.contiguous() for n, t in weights.items()}, first.run_dir / "other")
    initial = InitialWeights(weights=first.run_dir / "other", subwords=trained.subwords)
    with pytest.raises(TrainingFailed) as caught:
        outcome(dataclasses.replace(make_job(make_small_recipe()), initial=initial), DurableReporter())
    assert caught.value.reason is FailureReason.INITIAL_MODEL_UNUSABLE


def test_death_around_a_rollback_to_before_a_pause_resumes_identically(make_job, monkeypatch):
    """The checkpoint of the pause lies beyond the one that the divergence rolls back to."""
    real = Trainee.step

    def step(self, micro_batches, target_tokens):
        poisoned = self.counters().updates_done >= 6 and self.counters().rate_scale == 1.0
        return real(self, micro_batches, 0 if poisoned else target_tokens)

    monkeypatch.setattr(Trainee, "step", step)
    recipe = make_small_recipe(
        optimization={"max_skipped_updates": 0, "max_rollbacks": 1},
        stop={"max_steps": 8},
        validation={"interval_steps": 4, "max_translated_pairs": 2},
    )
    weights, series, _ = outcome(make_job(recipe), DurableReporter())
    paused, reporter_at_pause = make_job(recipe), DurableReporter()
    reporter_at_pause.raise_after_step = {5: StopRequested()}
    with pytest.raises(StopRequested):
        outcome(paused, reporter_at_pause)
    for number in itertools.count(1, 1 if SOAK else 5):
        work, reporter = dataclasses.replace(make_job(recipe), reported_step=5), copy.deepcopy(reporter_at_pause)
        shutil.copytree(paused.run_dir, work.run_dir, dirs_exist_ok=True)
        disk = FailingDisk(number, Crash(), half=number % 2)
        with contextlib.suppress(Crash):
            outcome(work, reporter, TorchTrainingEngine(CONFIG, disk=disk))
        if disk.was_reached:
            again = outcome(work, reporter)
            assert repr(again[1]) == repr(series), number  # not ==: a NaN equals nothing
            assert again[0] == weights, number
        else:
            break
    assert number > 20


@pytest.fixture
def timed_recipe(recipe):
    """Plans its decay by a clock that runs faster in some attempts than in others."""
    schedule = resolve_schedule({"kind": ScheduleKind.WSD, "warmup_steps": 2, "peak_learning_rate": 0.004})
    stop = dataclasses.replace(recipe.stop, max_steps=0, max_duration_s=120.0)
    return dataclasses.replace(recipe, schedule=schedule, stop=stop)


def ticking(seconds, reporter):
    """A clock that goes on whenever it is read: by so many seconds until a decay is planned, then by next to nothing.

    So there is no reason for another plan."""
    now_s = 0.0

    def clock():
        nonlocal now_s
        is_planned = any(isinstance(item, DecayPlan) for item in reporter.series)
        now_s += 1e-3 if is_planned else seconds
        return now_s

    return clock


def test_death_after_the_decay_plan_replays_the_plan(make_job, timed_recipe):
    """Every attempt has a machine of another speed, and follows the plan of the first one."""
    reporter = DurableReporter()
    whole = outcome(make_job(timed_recipe), reporter, TorchTrainingEngine(CONFIG, clock=ticking(1.0, reporter)))
    (plan,) = [item for item in whole[1] if isinstance(item, DecayPlan)]
    assert plan.last_step > plan.first_step > 3, "the checkpoint before the plan is older than the plan"
    died = 0
    for number in itertools.count(3, 20):
        work, reporter = make_job(timed_recipe), DurableReporter()
        reporter.raise_at = {number: Crash()}
        try:
            outcome(work, reporter, TorchTrainingEngine(CONFIG, clock=ticking(1.0, reporter)))
        except Crash:
            pass
        else:
            break
        plans = tuple(item for item in reporter.series if isinstance(item, DecayPlan))
        if not plans:
            continue
        died += 1
        steps = [item.step for item in steps_of(reporter.series)]
        again = dataclasses.replace(work, reported_step=max(steps, default=0), decays=plans)
        faster = TorchTrainingEngine(CONFIG, clock=itertools.count(0, 0.2).__next__)
        assert outcome(again, reporter, faster) == whole, number
    assert died
