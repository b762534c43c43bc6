"""`make bench-quality`: BLEU after some minutes of training, beside a plain loop around torch.nn.Transformer, which
trains for the same time.

Both train on the same pairs in the same subwords, in turns, each alone with all cores and for the same wall time: ours
through the service (StartTraining, PauseTraining, ResumeTraining), the plain loop as a program that waits meanwhile.
Weights are selected on the validation set. The test set is translated once by each, with beam 5, ours through
Translate. The value is sacreBLEU (cased, 13a); what it must reach follows from the plain loop in the same run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import sacrebleu

from bench.quality.peer import (
    SUBWORDS,
    PlainLoop,
    PlainRecipe,
    Point,
    contestant,
    plain_job,
    prepare,
    read_outcome,
)
from bench.quality.turns import (
    OurRun,
    RunFailed,
    engine_seconds,
    measure_start,
    our_curve,
    seconds_to,
    take_turns,
)
from bench.shared.command_line import add_corpus
from bench.shared.corpus import Corpus, find_corpus
from bench.shared.process import ProcessFailed
from bench.shared.result import Peer, Result, publish, watched_machine
from bench.shared.trained_model import QUALITY_MODEL_NAME, QUALITY_OUTPUT
from bench.shared.turns import started
from examples import run_report
from examples.local_service import ServiceFailed, local_service
from examples.parallel_text import ParallelLines, TextMissing, read_lines
from examples.translating import translate_all
from ferryman import Client
from ferryman.types import (
    DataRecipe,
    LearningRateSchedule,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    StopRecipe,
    TrainingRun,
    ValidationRecipe,
)
from ferryman_service.bundle.manifest import SUBWORDS_FILE
from ferryman_service.domain.recipe import Recipe as ResolvedRecipe
from ferryman_service.domain.recipe import recipe_from_dict
from ferryman_service.stores.layout import DataFolder

CHOICE_OUTPUT: Final = Path("bench-output/quality-choice")
BEAM_SIZE: Final = 5

FULL_MINUTES: Final = 15.0
FULL_TURNS: Final = 3
# The run plans its decay so that it ends with the time, on any machine.
SCHEDULE: Final = LearningRateSchedule(kind="wsd", peak_learning_rate=0.004, warmup_steps=300, decay_share=0.7)
FULL_RECIPE: Final = Recipe(
    preset="tiny",
    model=ModelRecipe(norm="pre", positions="rope", dropout=0.1),
    data=DataRecipe(vocabulary_size=6000),
    schedule=SCHEDULE,
    optimization=OptimizationRecipe(batch_target_tokens=768),
    validation=ValidationRecipe(interval_steps=250, max_translated_pairs=500, averaging="none"),
)
QUICK_MINUTES: Final = 6.0
QUICK_TURNS: Final = 2
QUICK_RECIPE: Final = Recipe(
    preset="tiny",
    model=ModelRecipe(norm="pre", positions="rope", dropout=0.0),
    data=DataRecipe(vocabulary_size=4000),
    schedule=SCHEDULE,
    optimization=OptimizationRecipe(batch_target_tokens=768),
    validation=ValidationRecipe(interval_steps=150, max_translated_pairs=200, averaging="none"),
)
# Chosen on the validation set: `python -m bench.quality.bleu --choose-peak --norm pre --seconds 200` (docs/quality.md).
PLAIN_RECIPE: Final = PlainRecipe(peak_learning_rate=0.002, norm_first=True)
CHOICES: Final = tuple(
    PlainRecipe(peak_learning_rate=peak, norm_first=norm_first)
    for norm_first in (False, True)
    for peak in (0.001, 0.002, 0.004)
)
CHOICE_S: Final = 60.0

TARGET_TASK: Final = ("test_2016_flickr", "en", "de")
TARGET_ADVANTAGE_BLEU: Final = 1.0
# Not more: the rates of both end with the time, and so does most of the gain.
TARGET_TIME_RATIO: Final = 1.0
PEER_NAME: Final = "a loop around torch.nn.Transformer, as long, in turns in the same run"
_START_PAIRS: Final = 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The comparison: our recipe and the plain loop's, for so many seconds each, in turns.

    `recipe` gets its limit from the time, unless it has one. With `has_target` the plain loop sets the target.
    """

    name: str
    source: str
    target: str
    recipe: Recipe
    plain: PlainRecipe
    seconds: float
    turns: int
    has_target: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one of the two: its validations, and the scores of its one translation of the test set."""

    seconds: float
    steps: int
    curve: Sequence[Point]
    bleu: float
    chrf: float


@dataclass(frozen=True, kw_only=True)
class TimeToEqual:
    """When ours first had the validation BLEU that the plain loop selected, and when the plain loop had it."""

    validation_bleu: float
    ours_s: float | None
    peer_s: float

    @property
    def ratio(self) -> float:
        """How many times as long the plain loop took; 0 if ours never got there."""
        return self.peer_s / self.ours_s if self.ours_s else 0.0


def plan_of(arguments: argparse.Namespace, corpus: Corpus) -> Plan:
    """Return what the command line asks for."""
    recipe = QUICK_RECIPE if arguments.quick else FULL_RECIPE
    return Plan(
        name=bench_name(arguments),
        source=arguments.source,
        target=arguments.target,
        recipe=Recipe(preset=arguments.preset) if arguments.preset else recipe,
        plain=PLAIN_RECIPE,
        seconds=60 * arguments.minutes,
        turns=QUICK_TURNS if arguments.quick else FULL_TURNS,
        has_target=has_target(arguments, corpus),
    )


def has_target(arguments: argparse.Namespace, corpus: Corpus) -> bool:
    """Tell whether this is the known task, with our own recipe and the usual time."""
    minutes = QUICK_MINUTES if arguments.quick else FULL_MINUTES
    task = corpus.test_name, arguments.source, arguments.target
    return task == TARGET_TASK and arguments.minutes == minutes and not arguments.preset


def resolved(client: Client, corpus_id: str, recipe: Recipe) -> ResolvedRecipe:
    """Return the recipe with every value set."""
    run = client.start_training(corpus_id, QUALITY_MODEL_NAME, recipe, validate_only=True)
    return recipe_from_dict(asdict(run.recipe))


def upload(client: Client, corpus: Corpus, plan: Plan) -> str:
    """Store the corpus; returns its id."""
    return client.upload_corpus(
        corpus.test_name,
        plan.source,
        plan.target,
        train=(corpus.train.source, corpus.train.target),
        validation=(corpus.validation.source, corpus.validation.target),
    ).corpus_id


def worker_start_s(client: Client, corpus: Corpus, plan: Plan) -> float:
    """Return how long a worker takes to start on this machine, tried with a few pairs."""
    splits = [
        list(islice(zip(lines.source, lines.target, strict=True), _START_PAIRS))
        for lines in map(read_lines, (corpus.train, corpus.validation))
    ]
    few = client.upload_corpus("start", plan.source, plan.target, train=splits[0], validation=splits[1])
    return measure_start(client, few.corpus_id, Recipe(stop=StopRecipe(max_steps=1)))


def with_time(plan: Plan, start_s: float) -> Recipe:
    """Return our recipe with the limit of time that leaves room for what the limit does not count, unless it has limits
    of its own."""
    if plan.recipe.stop is not None:
        return plan.recipe
    seconds = engine_seconds(plan.seconds, plan.turns, start_s)
    return replace(plan.recipe, stop=StopRecipe(max_duration_s=round(seconds, 1)))


def plain_folder(output: Path, corpus: Corpus, recipe: ResolvedRecipe) -> Path:
    """Write what the plain loop needs; returns the folder."""
    folder = output / "plain-loop"
    prepare(folder, recipe, read_lines(corpus.train), read_lines(corpus.validation), corpus.test.source)
    return folder


def measure(corpus: Corpus, plan: Plan, output: Path = QUALITY_OUTPUT) -> Result:
    """Run the benchmark. Raises RunFailed, ProcessFailed, ServiceFailed."""
    shutil.rmtree(output, ignore_errors=True)
    with local_service(output / "data", output / "service.log") as address, Client(address) as client:
        start_s = worker_start_s(client, corpus, plan)
        corpus_id = upload(client, corpus, plan)
        recipe = with_time(plan, start_s)
        in_full = resolved(client, corpus_id, recipe)
        folder = plain_folder(output, corpus, in_full)
        ours = OurRun(client, lambda: client.start_training(corpus_id, QUALITY_MODEL_NAME, recipe))
        job = plain_job(folder, in_full, plan.plain, plan.seconds, BEAM_SIZE)
        program = contestant(folder, job)
        print(f"{plan.seconds:.0f} s each in {plan.turns} turns; a worker starts in {start_s:.1f} s", flush=True)
        with started([program]):
            peer = PlainLoop(program)
            with ours.cancelled_on_error():
                take_turns(
                    ours, peer, total_s=plan.seconds, turns=plan.turns, report=lambda turn: report(turn, ours, peer)
                )
        records = list(client.stream_metrics(ours.run.run_id, follow=False))
        model = f"{QUALITY_MODEL_NAME}/{ours.run.model_version}"
        translations = translate_all(client, model, corpus.test.source, beam_size=BEAM_SIZE)
    check_subwords(output, ours.run, folder)
    run_report.save_metrics(records, output / "metrics.csv")
    (output / "translations.txt").write_text("\n".join(translations) + "\n")
    found = read_outcome(folder)
    return result(
        plan,
        corpus,
        outcome(ours.seconds, ours.run.progress.step, our_curve(records), translations, corpus.test),
        outcome(peer.seconds, found.curve[-1].step, found.curve, found.translations, corpus.test),
        selected=found.selected,
        details={"worker_start_s": round(start_s, 2), "recipe": asdict(ours.run.recipe), "plain_job": asdict(job)},
    )


def report(turn: int, ours: OurRun, peer: PlainLoop) -> None:
    """Print how far both are."""
    best = ours.run.progress.best_validation
    print(
        f"turn {turn}: ferryman {ours.seconds:.0f} s, {ours.run.progress.step:,} updates, validation BLEU "
        f"{best.bleu if best else 0.0:.2f}; plain loop {peer.seconds:.0f} s, validation BLEU {peer.bleu:.2f}",
        flush=True,
    )


def check_subwords(output: Path, run: TrainingRun, folder: Path) -> None:
    """Make sure that both had the same subwords."""
    assert run.model_version is not None
    bundle = DataFolder(output / "data").bundle_dir(QUALITY_MODEL_NAME, run.model_version)
    assert (bundle / SUBWORDS_FILE).read_bytes() == (folder / SUBWORDS).read_bytes(), "both learn the same subwords"


def outcome(
    seconds: float, steps: int, curve: Sequence[Point], translations: Sequence[str], test: ParallelLines
) -> Outcome:
    """Score the test set."""
    references = [list(test.target)]
    return Outcome(
        seconds=seconds,
        steps=steps,
        curve=curve,
        bleu=sacrebleu.corpus_bleu(translations, references).score,
        chrf=sacrebleu.corpus_chrf(translations, references).score,
    )


def result(
    plan: Plan, corpus: Corpus, ours: Outcome, peer: Outcome, *, selected: Point, details: Mapping[str, Any]
) -> Result:
    """Compare the two, print the comparison, and return the result.

    Ours must be better by `TARGET_ADVANTAGE_BLEU` after the same time, and as good `TARGET_TIME_RATIO` times as soon.
    """
    equal = TimeToEqual(
        validation_bleu=selected.bleu, ours_s=seconds_to(ours.curve, selected.bleu), peer_s=selected.seconds
    )
    show(corpus.test_name, ours, peer, equal)
    return Result(
        bench=plan.name,
        value=ours.bleu,
        target=round(peer.bleu + TARGET_ADVANTAGE_BLEU, 4) if plan.has_target else None,
        peer=Peer(name=PEER_NAME, value=round(peer.bleu, 4)),
        in_time=equal.ratio >= TARGET_TIME_RATIO and ours.seconds <= peer.seconds,
        details={
            "advantage_bleu": round(ours.bleu - peer.bleu, 2),
            "target_advantage_bleu": TARGET_ADVANTAGE_BLEU,
            "time_ratio": round(equal.ratio, 2),
            "target_time_ratio": TARGET_TIME_RATIO,
            "time_to_equal_validation_bleu": asdict(equal),
            "minutes": round(plan.seconds / 60, 2),
            "turns": plan.turns,
            "beam_size": BEAM_SIZE,
            "test": f"{corpus.test_name} {plan.source}-{plan.target}",
            "ferryman": described(ours),
            "plain_loop": described(peer),
            **details,
        },
    )


def described(found: Outcome) -> dict[str, Any]:
    """Return an outcome for the line of JSON."""
    return {
        "seconds": round(found.seconds, 1),
        "steps": found.steps,
        "test_bleu": round(found.bleu, 2),
        "test_chrf": round(found.chrf, 2),
        "validation": [[point.seconds, point.step, round(point.bleu, 2)] for point in found.curve],
    }


def show(test_name: str, ours: Outcome, peer: Outcome, equal: TimeToEqual) -> None:
    """Print both courses and how they ended."""
    for name, found in (("ferryman", ours), ("plain loop", peer)):
        print(f"\n{name}: seconds    step  validation BLEU  nats/token")
        for point in found.curve:
            numbers = f"{point.step:8,}{point.bleu:17.2f}{point.nll_per_token:12.4f}"
            print(f"{point.seconds:{len(name) + 9}.0f}{numbers}")
    print(f"\n{test_name}, beam {BEAM_SIZE}: sacreBLEU (cased, 13a) and chrF")
    for name, found in (("ferryman", ours), ("plain loop", peer)):
        print(f"{name:12}{found.bleu:6.2f}{found.chrf:7.2f} after {found.seconds:.1f} s, {found.steps:,} updates")
    when = f"after {equal.ours_s:.0f} s, {equal.ratio:.2f} times as soon" if equal.ours_s else "never"
    print(
        f"validation BLEU {equal.validation_bleu:.2f}, which the plain loop had after {equal.peer_s:.0f} s: "
        f"ferryman {when}\n"
    )


def choose_peak(
    corpus: Corpus, plan: Plan, seconds: float, output: Path, choices: Sequence[PlainRecipe] = CHOICES
) -> None:
    """Train the plain loop with each recipe, and print what validation says of it. The test set is not looked at."""
    shutil.rmtree(output, ignore_errors=True)
    with local_service(output / "data", output / "service.log") as address, Client(address) as client:
        recipe = resolved(client, upload(client, corpus, plan), with_time(plan, start_s=0.0))
    folder = plain_folder(output, corpus, recipe)
    print("norm  peak    updates  validation BLEU  nats/token", flush=True)
    for plain in choices:
        job = plain_job(folder, recipe, replace(plain, validations=1), seconds, BEAM_SIZE)
        program = contestant(folder, replace(job, has_test=False))
        with started([program]):
            program.turn(seconds)
        found = read_outcome(folder).selected
        norm = "pre" if plain.norm_first else "post"
        row = f"{norm:5} {plain.peak_learning_rate:<7} {found.step:7,} {found.bleu:16.2f} {found.nll_per_token:11.4f}"
        print(row, flush=True)


def bench_name(arguments: argparse.Namespace) -> str:
    """Return the result's name: that of the task for other languages than the target's."""
    name = "quality-quick" if arguments.quick else "quality"
    languages = (arguments.source, arguments.target)
    return name if languages == TARGET_TASK[1:] else f"{name}-{'-'.join(languages)}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-quality", description=__doc__)
    add_corpus(parser)
    parser.add_argument("--preset", help="train this preset as it is (default: tiny with a recipe of its own)")
    parser.add_argument("--minutes", type=float, help=f"minutes of training for each (default: {FULL_MINUTES:g})")
    parser.add_argument(
        "--quick", action="store_true", help=f"train for {QUICK_MINUTES:g} minutes each, with a smaller recipe"
    )
    parser.add_argument(
        "--choose-peak", action="store_true", help="compare peak learning rates of the plain loop, and stop"
    )
    parser.add_argument("--norm", choices=("pre", "post"), help="placement of the norms to compare (default: both)")
    parser.add_argument(
        "--seconds", type=float, default=CHOICE_S, help="training time for each peak (default: %(default)g)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.preset:
        parser.error("the short form has a recipe of its own: leave --preset (PRESET=) out")
    if arguments.minutes is None:
        arguments.minutes = QUICK_MINUTES if arguments.quick else FULL_MINUTES
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached."""
    arguments = parse(argv)
    try:
        corpus = find_corpus(arguments.data, arguments.source, arguments.target)
        plan = plan_of(arguments, corpus)
        if arguments.choose_peak:
            choices = [plain for plain in CHOICES if arguments.norm in (None, "pre" if plain.norm_first else "post")]
            choose_peak(corpus, plan, arguments.seconds, CHOICE_OUTPUT, choices)
            return 0
        with watched_machine():
            return publish(measure(corpus, plan))
    except (TextMissing, RunFailed, ProcessFailed, ServiceFailed) as error:
        sys.exit(f"bench-quality: {error}")


if __name__ == "__main__":
    sys.exit(main())
