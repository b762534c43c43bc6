"""What `make bench-quality` runs: how good is a model after so many minutes of training?

The corpus is trained on through the service, selected on its validation set, and its test set translated through
Translate with beam 5. The value is sacreBLEU (cased, 13a).

The short form asks how soon a model is good: the clock runs from StartTraining until the model is published, subwords,
validations, export and all; within six minutes it must translate as well as a plain PyTorch loop does after twelve.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import sacrebleu
from rich.console import Console

from bench.result import Peer, Result, publish
from examples import run_report
from examples.local_service import local_service
from examples.parallel_text import ParallelFiles, ParallelLines, TextMissing, find_files, read_lines
from examples.translating import translate_all
from ferryman import Client
from ferryman.cli.progress import follow
from ferryman.types import (
    DataRecipe,
    LearningRateSchedule,
    MetricRecord,
    ModelRecipe,
    Recipe,
    RunState,
    StateChange,
    StopRecipe,
    TrainingRun,
    ValidationMetrics,
    ValidationRecipe,
)

OUTPUT: Final = Path("bench-output/quality")
DEFAULT_DATA: Final = Path("../shared/data/multi30k")
MODEL_NAME: Final = "bench"
BEAM_SIZE: Final = 5

MINUTES: Final = 15.0
QUICK_MINUTES: Final = 6.0
# What follows the training itself: the start of the worker, the export and its check, the publication.
QUICK_RESERVE_S: Final = 40.0
# What the time of two cores is best spent on (docs/lab-log.md): about five passes over Multi30k.
QUICK_STEPS: Final = 2400
QUICK_RECIPE: Final = Recipe(
    preset="tiny",
    model=ModelRecipe(norm="pre", dropout=0.0),
    data=DataRecipe(vocabulary_size=4000),
    schedule=LearningRateSchedule(kind="linear", peak_learning_rate=0.004, warmup_steps=400, total_steps=QUICK_STEPS),
    validation=ValidationRecipe(interval_steps=QUICK_STEPS // 2, max_translated_pairs=200, averaging="none"),
)
TEST_NAMES: Final = ("test_2016_flickr", "test")
# Recorded, not run: a loop over torch.nn.Transformer with the tiny preset's sizes, 10,000 subwords, on two cores.
PEER: Final = Peer(name="plain PyTorch loop, 12 min, 2 cores", value=34.0)
PEER_TASK: Final = ("test_2016_flickr", "en", "de")
TARGET_BLEU: Final = 35.0
QUICK_TARGET_BLEU: Final = 34.0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus in files; `test_name` is the prefix of its test set."""

    train: ParallelFiles
    validation: ParallelFiles
    test: ParallelLines
    test_name: str


def find_corpus(data: Path, source: str, target: str) -> Corpus:
    """Return the corpus in a folder with train, val and test files. Raises TextMissing."""
    for name in TEST_NAMES:
        if any((data / f"{name}.{source}{suffix}").exists() for suffix in ("", ".gz")):
            return Corpus(
                train=find_files(str(data / "train"), source, target),
                validation=find_files(str(data / "val"), source, target),
                test=read_lines(find_files(str(data / name), source, target)),
                test_name=name,
            )
    raise TextMissing(f"{data} has none of {', '.join(f'{name}.{source}' for name in TEST_NAMES)}: pass DATA=folder")


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe that ends in time."""
    seconds = 60 * arguments.minutes
    if arguments.quick:
        stop = StopRecipe(max_steps=QUICK_STEPS, max_time_seconds=seconds - QUICK_RESERVE_S)
        return replace(QUICK_RECIPE, stop=stop)
    return Recipe(preset=arguments.preset or "tiny", stop=StopRecipe(max_time_seconds=seconds))


def train(client: Client, corpus: Corpus, arguments: argparse.Namespace) -> TrainingRun:
    """Train through the service; returns the run that SUCCEEDED."""
    uploaded = client.upload_corpus(
        corpus.test_name,
        arguments.source,
        arguments.target,
        train=(corpus.train.source, corpus.train.target),
        validation=(corpus.validation.source, corpus.validation.target),
    )
    run = client.start_training(uploaded.corpus_id, MODEL_NAME, recipe_of(arguments))
    run = follow(client, run.run_id, Console())
    if run.state is not RunState.SUCCEEDED:
        sys.exit(f"bench-quality: training ended {run.state}: {run.error}")
    return run


def show_progress(records: Sequence[MetricRecord]) -> None:
    """Print validation BLEU against the time since StartTraining."""
    print("seconds  step    validation BLEU  nats/token")
    for record in records:
        if isinstance(validation := record.payload, ValidationMetrics):
            seconds = (record.time - records[0].time).total_seconds()
            print(f"{seconds:7.0f}  {validation.step:6}  {validation.bleu:15.2f}  {validation.nll_per_token:10.4f}")


def minutes_until_published(records: Sequence[MetricRecord]) -> float:
    """Return the time from StartTraining, the first record, until the run SUCCEEDED."""
    published = next(
        record.time
        for record in records
        if isinstance(record.payload, StateChange) and record.payload.state is RunState.SUCCEEDED
    )
    return (published - records[0].time).total_seconds() / 60


def measure(corpus: Corpus, arguments: argparse.Namespace) -> Result:
    """Run the benchmark. What it leaves behind lies in bench-output/quality."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with local_service(OUTPUT / "data", OUTPUT / "service.log") as address, Client(address) as client:
        run = train(client, corpus, arguments)
        records = list(client.stream_metrics(run.run_id, follow=False))
        model = f"{run.model_name}/{run.model_version}"
        translations = translate_all(client, model, corpus.test.source, beam_size=BEAM_SIZE)
    run_report.save_metrics(records, OUTPUT / "metrics.csv")
    (OUTPUT / "translations.txt").write_text("\n".join(translations) + "\n")
    show_progress(records)
    bleu = sacrebleu.corpus_bleu(translations, [corpus.test.target]).score
    chrf = sacrebleu.corpus_chrf(translations, [corpus.test.target]).score
    minutes = minutes_until_published(records)
    print(f"{minutes * 60:7.0f}  published: {corpus.test_name} sacreBLEU {bleu:.2f} (cased, 13a), chrF {chrf:.2f}")
    has_peer = (corpus.test_name, arguments.source, arguments.target) == PEER_TASK
    target = QUICK_TARGET_BLEU if arguments.quick else TARGET_BLEU
    return Result(
        bench=bench_name(arguments),
        value=bleu,
        target=target if has_peer else None,
        peer=PEER if has_peer else None,
        in_time=not arguments.quick or minutes <= arguments.minutes,
        details={
            "chrf": round(chrf, 2),
            "minutes": arguments.minutes,
            "minutes_until_published": round(minutes, 2),
            "beam_size": BEAM_SIZE,
            "steps": run.progress.step,
            "recipe": asdict(run.recipe),
            "test": f"{corpus.test_name} {arguments.source}-{arguments.target}",
        },
    )


def bench_name(arguments: argparse.Namespace) -> str:
    """Return the result's name: that of the task for other languages than the peer's."""
    name = "time-to-quality" if arguments.quick else "quality"
    languages = (arguments.source, arguments.target)
    return name if languages == PEER_TASK[1:] else f"{name}-{'-'.join(languages)}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-quality", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with train, val and test files")
    parser.add_argument("--source", default="en", help="source language (default: en)")
    parser.add_argument("--target", default="de", help="target language (default: de)")
    parser.add_argument("--preset", help="recipe (default: tiny; the short form has its own)")
    parser.add_argument("--minutes", type=float, help=f"minutes of training (default: {MINUTES:g})")
    parser.add_argument("--quick", action="store_true", help=f"good after {QUICK_MINUTES:g} minutes?")
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.preset:
        parser.error("the short form has a recipe of its own: leave --preset (PRESET=) out")
    if arguments.minutes is None:
        arguments.minutes = QUICK_MINUTES if arguments.quick else MINUTES
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached."""
    arguments = parse(argv)
    try:
        corpus = find_corpus(arguments.data, arguments.source, arguments.target)
    except TextMissing as error:
        sys.exit(f"bench-quality: {error}")
    return publish(measure(corpus, arguments))


if __name__ == "__main__":
    sys.exit(main())
