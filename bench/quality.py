"""What `make bench-quality` runs: how good is a model after so many minutes of training?

The corpus is trained on through the service, selected on its validation set, and its test set translated through
Translate with beam 5. The value is sacreBLEU (cased, 13a).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from ferryman.types import MetricRecord, Recipe, RunState, StateChange, StopRecipe, TrainingRun, ValidationMetrics

OUTPUT: Final = Path("bench-output/quality")
DEFAULT_DATA: Final = Path("../shared/data/multi30k")
MODEL_NAME: Final = "bench"
BEAM_SIZE: Final = 5

MINUTES: Final = 15.0
QUICK_MINUTES: Final = 5.0
TEST_NAMES: Final = ("test_2016_flickr", "test")
# Recorded, not run: a loop over torch.nn.Transformer with the tiny preset's sizes, 10,000 subwords, on two cores.
PEER: Final = Peer(name="plain PyTorch loop, 12 min, 2 cores", value=34.0)
PEER_TASK: Final = ("test_2016_flickr", "en", "de")
TARGET_BLEU: Final = 35.0
QUICK_TARGET_BLEU: Final = 27.0


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


def train(client: Client, corpus: Corpus, arguments: argparse.Namespace) -> TrainingRun:
    """Train through the service; returns the run that SUCCEEDED."""
    uploaded = client.upload_corpus(
        corpus.test_name,
        arguments.source,
        arguments.target,
        train=(corpus.train.source, corpus.train.target),
        validation=(corpus.validation.source, corpus.validation.target),
    )
    recipe = Recipe(preset=arguments.preset, stop=StopRecipe(max_time_seconds=60 * arguments.minutes))
    run = client.start_training(uploaded.corpus_id, MODEL_NAME, recipe)
    run = follow(client, run.run_id, Console())
    if run.state is not RunState.SUCCEEDED:
        sys.exit(f"bench-quality: training ended {run.state}: {run.error}")
    return run


def show_progress(records: Sequence[MetricRecord]) -> None:
    """Print validation BLEU against the time since the worker began."""
    started = next(
        record.time
        for record in records
        if isinstance(record.payload, StateChange) and record.payload.state is RunState.RUNNING
    )
    print("seconds  step    validation BLEU  nats/token")
    for record in records:
        if isinstance(validation := record.payload, ValidationMetrics):
            seconds = (record.time - started).total_seconds()
            print(f"{seconds:7.0f}  {validation.step:6}  {validation.bleu:15.2f}  {validation.nll_per_token:10.4f}")


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
    print(f"{corpus.test_name}: sacreBLEU {bleu:.2f} (cased, 13a), chrF {chrf:.2f}, beam {BEAM_SIZE}")
    has_peer = (corpus.test_name, arguments.source, arguments.target) == PEER_TASK
    target = QUICK_TARGET_BLEU if arguments.quick else TARGET_BLEU
    return Result(
        bench="quality-quick" if arguments.quick else "quality",
        value=bleu,
        target=target if has_peer else None,
        peer=PEER if has_peer else None,
        details={
            "chrf": round(chrf, 2),
            "minutes": arguments.minutes,
            "steps": run.progress.step,
            "preset": arguments.preset,
            "test": f"{corpus.test_name} {arguments.source}-{arguments.target}",
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-quality", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with train, val and test files")
    parser.add_argument("--source", default="en", help="source language (default: en)")
    parser.add_argument("--target", default="de", help="target language (default: de)")
    parser.add_argument("--preset", default="tiny", help="recipe (default: tiny)")
    parser.add_argument("--minutes", type=float, help=f"minutes of training (default: {MINUTES:g})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MINUTES:g} minutes, and a lower target")
    arguments = parser.parse_args(argv)
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
