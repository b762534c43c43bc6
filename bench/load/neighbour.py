"""`make bench-neighbour`: the cost of a busy process to training and serving, and the cost of these two to each other,
on the same cores.

One service trains the preset `tiny` and translates through gRPC, with the environment and the priority that it gives
its workers itself. By turns in one run: training alone, training beside a process that computes without pause, then
translating alone, beside that process, and while training. A worker whose turn it is not is halted (SIGSTOP). The value
is the share of the conditions that hold; each compares medians over the turns.

Translations come from random weights and are forced to one length. Their arrivals are a Poisson process. While the
service trains, its rate is half of what the service answers with some calls always in flight. Beside a busy process,
the rate is a third: half of what a fair share of two cores leaves. Each is compared with the quiet service at the same
rate. The client runs on the same cores, and what it takes counts: against that rate, and against training.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.load.neighbour_training import HaltableRun, TrainingFailed, busy_process, training_run
from bench.shared.command_line import measured
from bench.shared.corpus import read_training_text
from bench.shared.made_up import made_up_text
from bench.shared.models import random_bundle
from bench.shared.process import ProcessFailed, ServingProcess
from bench.shared.result import Result
from bench.shared.server_program import ServerFailed, import_model, remove_data
from bench.shared.turns import quantile
from examples.local_service import ServiceFailed, local_service
from examples.parallel_text import ParallelLines, TextMissing
from ferryman import Client
from ferryman_service.domain.recipe import resolve_recipe

FOLDER: Final = Path("bench-output/neighbour")
SERVED: Final = "served"
PRESET: Final = "tiny"
BEAM_SIZE: Final = 5
LENGTH: Final = 15
TRAINING_AT_MOST: Final = 1.6
TRAINING_GOAL: Final = 1.4
P95_AT_MOST: Final = 2.0
TRAINING_AT_LEAST: Final = 0.5
LOAD_SHARE: Final = 1 / 2
BUSY_LOAD_SHARE: Final = 1 / 3
_IN_FLIGHT: Final = 8
_SETTLE_S: Final = 1.0
_VALIDATION_PAIRS: Final = 200
_SEED: Final = 1


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A kind of turn; calls arrive at `load_share` of the quiet capacity, 0 for none."""

    name: str
    trains: bool = False
    load_share: float = 0.0
    has_neighbour: bool = False


TRAINING: Final = Mode(name="training", trains=True)
TRAINING_BUSY: Final = Mode(name="training beside a busy process", trains=True, has_neighbour=True)
SERVING: Final = Mode(name="translating", load_share=LOAD_SHARE)
BOTH: Final = Mode(name="translating while training", trains=True, load_share=LOAD_SHARE)
SERVING_LIGHT: Final = Mode(name="translating at a lower rate", load_share=BUSY_LOAD_SHARE)
SERVING_BUSY: Final = Mode(name="translating beside a busy process", load_share=BUSY_LOAD_SHARE, has_neighbour=True)
MODES: Final = (TRAINING, TRAINING_BUSY, SERVING, BOTH, SERVING_LIGHT, SERVING_BUSY)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long is measured: rounds of turns, the seconds of a turn, and those in which the rate is found."""

    rounds: int
    turn_s: float
    capacity_s: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """The model that is trained and served: the preset with so many subwords, on a folder's text or made-up pairs."""

    data: Path | None = None
    pairs: int = 20_000
    vocabulary_size: int = resolve_recipe({"preset": PRESET}).data.vocabulary_size


FULL: Final = Effort(rounds=3, turn_s=20.0, capacity_s=8.0)
QUICK: Final = Effort(rounds=3, turn_s=7.0, capacity_s=4.0)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A turn's time, in seconds of the epoch; milliseconds of the calls that were answered, and how many were not."""

    mode: Mode
    begin_s: float
    end_s: float
    latencies_ms: Sequence[float] = ()
    failures: int = 0

    @property
    def p95_ms(self) -> float:
        """The 95th percentile; infinite if a call failed."""
        return quantile(self.latencies_ms, 0.95) if self.latencies_ms and not self.failures else float("inf")

    def update_s(self, updates: Sequence[tuple[float, float]]) -> float:
        """Return the mean time of the updates that began and ended in the turn; infinite if none did."""
        inside = [end_s - begin_s for begin_s, end_s in updates if begin_s >= self.begin_s and end_s <= self.end_s]
        return statistics.fmean(inside) if inside else float("inf")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A condition on the ratio of two medians over turns, of one mode and of another. `at_most` or, if that is None,
    `at_least` bounds it; `goal` is what we would like."""

    name: str
    unit: str
    quiet: Sequence[float]
    busy: Sequence[float]
    at_most: float | None = None
    at_least: float = 0.0
    goal: float | None = None

    @property
    def value(self) -> float:
        """Busy over quiet where that must not be large, else quiet over busy."""
        quiet, busy = statistics.median(self.quiet), statistics.median(self.busy)
        return busy / quiet if self.at_most is not None else quiet / busy

    @property
    def ok(self) -> bool:
        """Whether the condition holds; never after a turn in which nothing, or not everything, was done."""
        if not all(map(math.isfinite, (*self.quiet, *self.busy))):
            return False
        return self.value <= self.at_most if self.at_most is not None else self.value >= self.at_least

    @property
    def target(self) -> str:
        """The bound in words."""
        return f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"

    def as_dict(self) -> dict[str, Any]:
        """Return it for a line of JSON."""
        return {
            "name": self.name,
            "unit": self.unit,
            "value": _finite(self.value),
            "target": self.target,
            "goal": self.goal,
            "ok": self.ok,
            "quiet": [*map(_finite, self.quiet)],
            "busy": [*map(_finite, self.busy)],
        }


@dataclass
class Scene:
    """Everything that takes part: the service with its capacity in requests/s, the client process, the run; and the
    turns so far."""

    address: str
    client: ServingProcess
    run: HaltableRun
    capacity: float
    effort: Effort
    turns: list[Turn] = field(default_factory=list)

    def turn(self, mode: Mode) -> None:
        """Let a mode have a turn; raises ProcessFailed, TrainingFailed."""
        with contextlib.ExitStack() as running:
            if mode.has_neighbour:
                running.enter_context(busy_process())
            if mode.trains:
                self.run.proceed()
                running.callback(self.run.halt)
            time.sleep(_SETTLE_S)
            begin_s = time.time()
            seen = self._translate(mode.load_share * self.capacity) if mode.load_share else self._wait()
            turn = Turn(mode=mode, begin_s=begin_s, end_s=time.time(), **seen)
        self.turns.append(turn)

    def of(self, mode: Mode) -> list[Turn]:
        """Return the turns of a mode."""
        return [turn for turn in self.turns if turn.mode is mode]

    def _wait(self) -> dict[str, Any]:
        time.sleep(self.effort.turn_s)
        return {}

    def _translate(self, rate: float) -> dict[str, Any]:
        window = {"rate": rate, "warm_up_s": 0.0, "seconds": self.effort.turn_s, "seed": _SEED + len(self.turns)}
        window |= {"beam_size": BEAM_SIZE, "length": LENGTH, "several_share": 0.0, "timeout_s": 60.0}
        seen = self.client.ask("window", address=self.address, model=SERVED, **window)
        return {"latencies_ms": seen["latencies_ms"], "failures": sum(seen["failures"].values())}


def parts_of(turns: Sequence[Turn], updates: Sequence[tuple[float, float]]) -> list[Part]:
    """Return the conditions."""
    update_s = {mode: [turn.update_s(updates) for turn in turns if turn.mode is mode] for mode in MODES}
    p95_ms = {mode: [turn.p95_ms for turn in turns if turn.mode is mode] for mode in MODES}
    return [
        Part(
            name=TRAINING_BUSY.name,
            unit="s an update",
            quiet=update_s[TRAINING],
            busy=update_s[TRAINING_BUSY],
            at_most=TRAINING_AT_MOST,
            goal=TRAINING_GOAL,
        ),
        Part(
            name=SERVING_BUSY.name,
            unit="p95, ms",
            quiet=p95_ms[SERVING_LIGHT],
            busy=p95_ms[SERVING_BUSY],
            at_most=P95_AT_MOST,
        ),
        Part(name=BOTH.name, unit="p95, ms", quiet=p95_ms[SERVING], busy=p95_ms[BOTH], at_most=P95_AT_MOST),
        Part(
            name="training while translating",
            unit="s an update; the value is throughput",
            quiet=update_s[TRAINING],
            busy=update_s[BOTH],
            at_least=TRAINING_AT_LEAST,
        ),
    ]


def text_of(task: Task) -> tuple[ParallelLines, ParallelLines]:
    """Return training and validation text; raises TextMissing."""
    if task.data is not None:
        return read_training_text(task.data, "en", "de")
    text = made_up_text(task.pairs + _VALIDATION_PAIRS)
    train = ParallelLines(source=text.source[: task.pairs], target=text.target[: task.pairs])
    return train, ParallelLines(source=text.source[task.pairs :], target=text.target[task.pairs :])


def import_served_model(data_dir: Path, train: ParallelLines, held_out: Sequence[str], vocabulary_size: int) -> None:
    """Publish the preset with random weights as the model to translate with; raises ServerFailed."""
    recipe = resolve_recipe({"preset": PRESET, "data": {"vocabulary_size": vocabulary_size}})
    bundle = random_bundle(recipe, [*train.source, *train.target], held_out, data_dir.with_name("random"))
    import_model(bundle, data_dir, SERVED)


@contextlib.contextmanager
def scene(folder: Path, task: Task, effort: Effort) -> Iterator[Scene]:
    """Start the service, measure what it can answer while nothing else runs, then start training and halt it.

    Raises TextMissing, ServerFailed, ServiceFailed, ProcessFailed, TrainingFailed.
    """
    data_dir = folder / "data"
    remove_data(data_dir)
    train, validation = text_of(task)
    import_served_model(data_dir, train, validation.source, task.vocabulary_size)
    command = [sys.executable, "-m", "bench.load.neighbour_client"]
    with (
        local_service(data_dir, folder / "service.log", ["--device", "cpu", "--worker-silence-s", "86400"]) as address,
        Client(address) as calls,
        ServingProcess("client", command, {"PYTHONPATH": os.getcwd()}, folder / "client.log") as client,
    ):
        client.ask("sentences", texts=list(validation.source))
        capacity = _capacity(client, address, effort.capacity_s)
        corpus = calls.upload_corpus(
            "neighbour",
            "en",
            "de",
            train=zip(train.source, train.target, strict=True),
            validation=zip(validation.source, validation.target, strict=True),
        )
        print(f"{capacity:.1f} requests/s are answered; starting to train", flush=True)
        with training_run(calls, corpus.corpus_id, data_dir, PRESET, task.vocabulary_size) as run:
            run.halt()
            yield Scene(address=address, client=client, run=run, capacity=capacity, effort=effort)


def measure(arguments: argparse.Namespace) -> Result:
    """Run the benchmark; raises TextMissing, ServerFailed, ServiceFailed, ProcessFailed, TrainingFailed."""
    effort: Effort = QUICK if arguments.quick else FULL
    with scene(FOLDER, Task(data=arguments.data), effort) as running:
        shipped = running.run.shipped_with()
        for number in range(1, effort.rounds + 1):
            for mode in MODES:
                running.turn(mode)
            print(f"round {number} of {effort.rounds}", flush=True)
        parts = parts_of(running.turns, running.run.updates())
        capacity = running.capacity
    return result_of(parts, capacity, shipped, quick=arguments.quick)


def result_of(parts: Sequence[Part], capacity: float, shipped: Mapping[str, object], *, quick: bool) -> Result:
    """Print the conditions as a table, and return the line to publish."""
    print(f"\n{'':36} {'quiet':>9} {'busy':>9} {'value':>7}  target")
    for part in parts:
        quiet, busy = (statistics.median(numbers) for numbers in (part.quiet, part.busy))
        verdict = "ok" if part.ok else "missed"
        print(f"{part.name:36} {quiet:9.3f} {busy:9.3f} {part.value:7.2f}  {part.target}: {verdict} ({part.unit})")
    return Result(
        bench="neighbour-quick" if quick else "neighbour",
        value=sum(part.ok for part in parts) / len(parts),
        target=1.0,
        peer=None,
        details={
            "unit": "share of the conditions that hold; each is a ratio of medians over turns in one run",
            "parts": [part.as_dict() for part in parts],
            "preset": PRESET,
            **shipped,
            "capacity_requests_per_s": round(capacity, 2),
            "load": f"while training {LOAD_SHARE:.2f}, beside a busy process {BUSY_LOAD_SHARE:.2f} of the capacity, "
            f"which is what is answered with {_IN_FLIGHT} calls in flight; one sentence, beam {BEAM_SIZE}, random "
            f"weights, {LENGTH} subwords forced; the client runs on the same cores",
            "neighbour": "one spinning process, not pinned, nice 0, in a session of its own",
        },
    )


def _finite(number: float) -> float | None:
    """Return the number for JSON, which has none that is not finite."""
    return round(number, 3) if math.isfinite(number) else None


def _capacity(client: ServingProcess, address: str, seconds: float) -> float:
    """Return the requests a second that the service answers; the first time loads the model and fills caches."""
    options = {"model": SERVED, "beam_size": BEAM_SIZE, "length": LENGTH, "in_flight": _IN_FLIGHT}
    client.ask("capacity", address=address, seconds=seconds / 4, **options)
    return float(client.ask("capacity", address=address, seconds=seconds, **options))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-neighbour", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with train and val files (default: made-up words)")
    parser.add_argument("--quick", action="store_true", help="run shorter turns, with the same targets")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if every condition holds."""
    arguments = parse(argv)
    failures = (TextMissing, ServiceFailed, ServerFailed, ProcessFailed, TrainingFailed)
    return measured("bench-neighbour", lambda: measure(arguments), failures)


if __name__ == "__main__":
    sys.exit(main())
