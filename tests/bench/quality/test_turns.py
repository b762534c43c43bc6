"""Turns of the quality benchmark: who trains when, for how long, and what a course of training looks like."""

from datetime import UTC, datetime, timedelta

import pytest

from bench.quality import turns as quality_turns
from bench.quality.turns import OurRun, RunFailed, engine_seconds, our_curve, seconds_to, take_turns
from ferryman import Client
from ferryman.testing import FakeFerryman
from ferryman.types import MetricRecord, RunState, StateChange, ValidationMetrics

START = datetime(2026, 3, 3, tzinfo=UTC)


class FakeTime:
    """A clock that only sleeping moves; `then` is called once at its moment."""

    def __init__(self, then_s=float("inf"), then=lambda: None):
        self.now_s = 100.0
        self.then_s, self.then = then_s, then

    def sleep(self, seconds):
        self.now_s += seconds
        if self.now_s >= self.then_s:
            self.then_s = float("inf")
            self.then()

    def clock(self):
        return self.now_s


class FakeTrainer:
    """Takes a second more than it is told to, in its last turn `last_s` in all."""

    def __init__(self, name, log, last_s=None):
        self.name, self.log, self.last_s = name, log, last_s
        self.seconds = 0.0

    def turn(self, until_s, *, last):
        self.log.append((self.name, until_s, last))
        self.seconds = self.last_s if last and self.last_s else until_s + 1


@pytest.fixture
def service():
    """A service whose run works until it is released, or paused."""
    with FakeFerryman(hold_after=3) as fake, Client(fake.target) as client:
        corpus = client.upload_corpus("text", "en", "de", train=[("a", "b")], validation=[("a", "b")])
        yield fake, client, lambda: client.start_training(corpus.corpus_id, "model")


def test_plain_loop_gets_as_much_time_as_ours_took():
    log = []
    ours, peer = FakeTrainer("ours", log, last_s=28.0), FakeTrainer("peer", log)
    take_turns(ours, peer, total_s=30.0, turns=3, sleep=lambda _: None)
    assert log == [
        ("ours", 10.0, False),
        ("peer", 11.0, False),
        ("ours", 20.0, False),
        ("peer", 21.0, False),
        ("ours", 30.0, True),
        ("peer", 30.0, True),
    ]


def test_plain_loop_gets_overtime_of_our_run():
    log = []
    ours, peer = FakeTrainer("ours", log, last_s=33.0), FakeTrainer("peer", log)
    take_turns(ours, peer, total_s=30.0, turns=2, sleep=lambda _: None)
    assert log[-1] == ("peer", 33.0, True)


def test_turn_ends_paused_after_its_time(service):
    fake, client, start = service
    time = FakeTime()
    ours = OurRun(client, start, time.clock, time.sleep)
    ours.turn(10.0, last=False)
    assert ours.run.state is RunState.PAUSED
    assert ours.seconds == pytest.approx(10.0, abs=0.5)
    time.sleep(50.0)  # the plain loop's turn
    ours.turn(20.0, last=False)
    assert client.get_training_run(ours.run.run_id).state is RunState.PAUSED
    assert ours.seconds == pytest.approx(20.0, abs=0.5)
    assert fake.calls.count("PauseTraining") == 2
    assert fake.calls.count("ResumeTraining") == 1


def test_last_turn_waits_for_the_end_of_the_run(service):
    fake, client, start = service
    time = FakeTime(then_s=130.0, then=lambda: fake.release(ours.run.run_id))
    ours = OurRun(client, start, time.clock, time.sleep)
    ours.turn(10.0, last=True)
    assert ours.run.state is RunState.SUCCEEDED
    assert ours.seconds == pytest.approx(30.0, abs=0.5)
    assert "PauseTraining" not in fake.calls


def test_run_that_ends_early_takes_no_further_turn(service):
    fake, client, start = service
    time = FakeTime(then_s=105.0, then=lambda: fake.release(ours.run.run_id))
    ours = OurRun(client, start, time.clock, time.sleep)
    ours.turn(10.0, last=False)
    ours.turn(20.0, last=True)
    assert ours.run.state is RunState.SUCCEEDED
    assert ours.seconds == pytest.approx(5.0, abs=0.5)


@pytest.mark.parametrize(("call", "state"), [("cancel_training", "cancelled"), ("pause_training", "paused")])
def test_interference_with_the_run_fails_the_benchmark(service, call, state):
    _, client, start = service
    time = FakeTime(then_s=105.0, then=lambda: getattr(client, call)(ours.run.run_id))
    ours = OurRun(client, start, time.clock, time.sleep)
    with pytest.raises(RunFailed, match=state):
        ours.turn(10.0, last=False)


def test_start_of_a_worker_is_measured_and_its_run_cancelled(service):
    _, client, start = service
    seconds = quality_turns.measure_start(client, start().corpus_id, None, sleep=lambda _: None)
    assert 0 <= seconds < 60
    states = [run.state for run in client.list_training_runs(model_name="start")]
    assert states == [RunState.CANCELLED]


def test_time_limit_of_engine_excludes_starts_and_ends():
    assert engine_seconds(900.0, turns=3, start_s=8.0) == 900 - 3 * 11
    assert engine_seconds(30.0, turns=3, start_s=8.0) == 15.0


def validation(step, bleu):
    return ValidationMetrics(
        step=step,
        epoch=1,
        loss=2.4,
        nll_per_token=2.25,
        perplexity=9.5,
        bleu=bleu,
        chrf=30.0,
        translated_pairs=100,
        duration_s=1.5,
        best=True,
    )


def recorded(*payloads):
    return [
        MetricRecord(sequence=number, time=START + timedelta(seconds=seconds), payload=payload)
        for number, (seconds, payload) in enumerate(payloads, start=1)
    ]


def test_curve_leaves_out_the_time_between_paused_and_resumed():
    curve = our_curve(
        recorded(
            (0, StateChange(state=RunState.QUEUED)),
            (5, StateChange(state=RunState.RUNNING)),
            (60, validation(100, 12.5)),
            (100, StateChange(state=RunState.PAUSED)),
            (400, StateChange(state=RunState.QUEUED)),
            (450, StateChange(state=RunState.QUEUED)),  # a worker died: its time counts
            (470, validation(200, 20.0)),
        )
    )
    assert [(each.seconds, each.step, each.bleu) for each in curve] == [(60.0, 100, 12.5), (170.0, 200, 20.0)]


def test_time_to_bleu_is_first_validation_reaching_it():
    curve = our_curve(
        recorded(
            (0, StateChange(state=RunState.QUEUED)),
            (10, validation(1, 10.0)),
            (20, validation(2, 21.0)),
            (30, validation(3, 20.0)),
        )
    )
    assert seconds_to(curve, 20.0) == 20.0
    assert seconds_to(curve, 10.0) == 10.0
    assert seconds_to(curve, 21.1) is None
