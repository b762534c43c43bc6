"""`make bench-quality-tok`: BLEU on lowercased, tokenised Multi30k, the scale of the published figures.

One recipe, several seeds. Everything is selected on the validation set: checkpoints and averages by training itself,
the length penalty here. The test set is translated once for each seed, with beam 5, and scored as multi-bleu.perl does:
sacreBLEU without a tokeniser of its own.

A run may take several sittings. Each seed trains in a process of its own, which leaves a checkpoint when the time that
it was given is over, or on SIGTERM or Ctrl-C; the next call resumes there and reaches the same result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import sacrebleu
import torch

from bench.shared.local_training import ListReporter, LocalCorpus, new_job, open_corpus, write_corpus
from bench.shared.result import Peer, Result, publish, results_folder, watched_machine
from examples.parallel_text import ParallelLines, TextMissing, find_files, read_lines
from ferryman_service.config.resources import usable_cpus
from ferryman_service.domain.recipe import (
    Averaging,
    Preset,
    Recipe,
    SubwordAlgorithm,
    recipe_to_dict,
    resolve_recipe,
)
from ferryman_service.domain.records import ValidationMetrics
from ferryman_service.domain.schedule import ScheduleKind
from ferryman_service.domain.training import StopRequested, TrainedModel
from ferryman_service.domain.translation import CancelToken, SearchOptions
from ferryman_service.launch.environment import SPIN_COUNT
from ferryman_service.model.session import TorchDecoder
from ferryman_service.pipeline.translator import MicroBatchLimit, TextTranslator
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
from ferryman_service.training.export import load_transformer

DEFAULT_DATA: Final = Path("../shared/data/multi30k-tok")
FOLDER: Final = Path("bench-output/quality-tok")
SUFFIX: Final = ".lc.norm.tok"
SEEDS: Final = 3
TARGET_BLEU: Final = 42.0
PEER: Final = Peer(name="Transformer-Tiny, text only (Wu et al., 2021), published", value=41.02)

RECIPE: Final[dict[str, Any]] = {
    "preset": Preset.TINY,
    "model": {"dropout": 0.3},
    "data": {
        "vocabulary_size": 6000,
        "subword_algorithm": SubwordAlgorithm.UNIGRAM,
        "subword_regularization_alpha": 0.3,
    },
    "schedule": {"kind": ScheduleKind.INVERSE_SQRT, "peak_learning_rate": 0.005, "warmup_steps": 2000},
    "optimization": {"batch_target_tokens": 4096, "r_drop_alpha": 5.0, "ema_decay": 0.999},
    "stop": {"max_steps": 12_000, "patience": 10},
    "validation": {
        "interval_steps": 500,
        "max_translated_pairs": 1014,
        "keep_last": 10,
        "averaging": Averaging.BEST,
    },
}
BEAM_SIZE: Final = 5
LENGTH_PENALTIES: Final = (0.6, 0.8, 1.0, 1.2, 1.4)

# The processes that train at once share the cores.
_STOPPED: Final = 3
_POLL_S: Final = 0.5


def recipe_of(seed: int, max_steps: int | None) -> Recipe:
    """Return the recipe of a seed; with `max_steps` it ends, and validates, early."""
    overrides: dict[str, Any] = {**RECIPE, "seed": seed}
    if max_steps is not None:
        overrides["stop"] = {"max_steps": max_steps}
        overrides["validation"] = {**RECIPE["validation"], "interval_steps": max(1, max_steps // 2)}
    return resolve_recipe(overrides)


def run_name(recipe: Recipe) -> str:
    """Return a name that contains a digest of the recipe, so that another recipe restarts."""
    text = json.dumps(recipe_to_dict(recipe), sort_keys=True)
    return f"seed-{recipe.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def read_split(data: Path, name: str, arguments: argparse.Namespace) -> ParallelLines:
    """Return a split of the data. Raises TextMissing."""
    return read_lines(find_files(str(data / f"{name}{SUFFIX}"), arguments.source, arguments.target))


def train_and_test(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a seed, going on where it was left, and score the test set. Raises StopRequested."""
    recipe = recipe_of(seed, arguments.max_steps)
    corpus = open_corpus(arguments.folder / "corpus")
    trained = train(recipe, corpus, arguments)
    device = torch.device(arguments.device)
    translator = TextTranslator(
        Subwords.load(trained.subwords),
        TorchDecoder(load_transformer(trained).to(device)),
        recipe.data.max_sentence_tokens,
        MicroBatchLimit(max_positions=8192 if device.type == "cpu" else 2**18),
    )
    validation, test = (read_split(arguments.data, name, arguments) for name in ("val", "test_2016_flickr"))
    by_penalty = {penalty: bleu(translator, validation, penalty) for penalty in LENGTH_PENALTIES}
    penalty = max(by_penalty, key=lambda penalty: by_penalty[penalty])
    return {
        "seed": seed,
        "test_bleu": bleu(translator, test, penalty),
        "validation_bleu": by_penalty[penalty],
        "validation_bleu_by_length_penalty": by_penalty,
        "length_penalty": penalty,
        "weights": trained.scores.weights,
        "step": trained.scores.step,
        "parameters": trained.parameters,
    }


def train(recipe: Recipe, corpus: LocalCorpus, arguments: argparse.Namespace) -> TrainedModel:
    """Train until the recipe's end. Raises StopRequested when the sitting's is reached first."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    started_s = time.monotonic()

    def check() -> None:
        if stop.is_set() or (arguments.minutes and time.monotonic() - started_s > 60 * arguments.minutes):
            raise StopRequested

    def show(metrics: ValidationMetrics) -> None:
        minutes = (time.monotonic() - started_s) / 60
        print(
            f"seed {recipe.seed}: {minutes:6.1f} min, step {metrics.step:6}: validation BLEU {metrics.bleu:.2f} (13a, "
            f"greedy), {metrics.nll_per_token:.4f} nats/token",
            flush=True,
        )

    engine = TorchTrainingEngine(EngineConfig(device=arguments.device, threads=arguments.threads))
    return engine.train(
        new_job(run_name(recipe), recipe, corpus, arguments.folder), ListReporter(check=check, on_validation=show)
    )


def bleu(translator: TextTranslator, lines: ParallelLines, length_penalty: float) -> float:
    """Return BLEU on the scale of multi-bleu.perl."""
    options = SearchOptions(beam_size=BEAM_SIZE, length_penalty=length_penalty)
    translations, _ = translator.translate(lines.source, options, CancelToken())
    texts = [translation.hypotheses[0].text for translation in translations]
    score: float = sacrebleu.corpus_bleu(texts, [list(lines.target)], tokenize="none", force=True).score
    return score


@watched_machine()
def run_seeds(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is left of each seed, `jobs` at once; return the results there are."""
    files = {seed: result_file(seed, arguments) for seed in range(1, arguments.seeds + 1)}
    waiting = [seed for seed, file in files.items() if not file.exists()]
    running: dict[int, subprocess.Popen[bytes]] = {}
    ended: dict[int, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                running[waiting[0]] = start_seed(waiting.pop(0), arguments)
            time.sleep(_POLL_S)
            ended |= {seed: status for seed, child in running.items() if (status := child.poll()) is not None}
            running = {seed: child for seed, child in running.items() if seed not in ended}
    except BaseException:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
        raise
    if failed := [seed for seed, status in ended.items() if status not in (0, _STOPPED)]:
        sys.exit(f"bench-quality-tok: seeds {failed} failed; see their output above")
    return [json.loads(file.read_text()) for file in files.values() if file.exists()]


def result_file(seed: int, arguments: argparse.Namespace) -> Path:
    """Return where the result of a seed is kept."""
    folder: Path = arguments.folder / "runs" / run_name(recipe_of(seed, arguments.max_steps))
    return folder / "result.json"


def start_seed(seed: int, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the process of a seed."""
    threads = max(1, usable_cpus().value // arguments.jobs)
    options = {
        "data": arguments.data,
        "source": arguments.source,
        "target": arguments.target,
        "folder": arguments.folder,
        "device": arguments.device,
        "minutes": arguments.minutes,
        "threads": arguments.threads or threads,
        "seed": seed,
    }
    command = [sys.executable, "-m", "bench.quality.bleu_tokenized"]
    command += [f"--{name}={value}" for name, value in options.items()]
    if arguments.max_steps is not None:
        command.append(f"--max-steps={arguments.max_steps}")
    return subprocess.Popen(command, env={"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ})


def run_seed(arguments: argparse.Namespace) -> int:
    """Be the process of a seed; the exit status is 0 once its result is written."""
    try:
        found = train_and_test(arguments.seed, arguments)
    except StopRequested:
        return _STOPPED
    file = result_file(arguments.seed, arguments)
    file.with_suffix(".part").write_text(json.dumps(found))
    file.with_suffix(".part").rename(file)
    print(f"seed {arguments.seed}: test BLEU {found['test_bleu']:.2f} (length penalty {found['length_penalty']})")
    return 0


def summarise(found: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> Result:
    """Return the mean over the seeds, and print a table."""
    print("seed  test BLEU  validation BLEU  length penalty  weights")
    for row in found:
        print(
            f"{row['seed']:4}  {row['test_bleu']:9.2f}  {row['validation_bleu']:15.2f}  {row['length_penalty']:14}  "
            f"{row['weights']} at step {row['step']}"
        )
    scores = [row["test_bleu"] for row in found]
    is_whole = arguments.max_steps is None and (arguments.source, arguments.target) == ("en", "de")
    recipe = recipe_to_dict(recipe_of(1, arguments.max_steps))
    del recipe["seed"]
    return Result(
        bench="quality-tok" if is_whole else "quality-tok-short",
        value=statistics.fmean(scores),
        target=TARGET_BLEU if is_whole else None,
        peer=PEER if is_whole else None,
        details={
            "unit": "BLEU, lowercased and tokenised, as multi-bleu.perl; mean over seeds; Multi30k test 2016",
            "seeds": len(scores),
            "standard_deviation": round(statistics.stdev(scores), 3) if len(scores) > 1 else None,
            "runs": list(found),
            "trained_on": arguments.device,
            "recipe": recipe,
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-quality-tok", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"folder with train{SUFFIX}.en and so on")
    parser.add_argument("--source", default="en", help="source language (default: en)")
    parser.add_argument("--target", default="de", help="target language (default: de)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder for runs and checkpoints")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds 1 to this (default: {SEEDS})")
    parser.add_argument("--jobs", type=int, default=1, help="train this many seeds at the same time (default: 1)")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="time limit for each seed in this call (default: none)"
    )
    parser.add_argument("--max-steps", type=int, help="stop after this many updates, to try the program")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached."""
    arguments = parse(argv)
    if arguments.seed is not None:
        return run_seed(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench-quality-tok: stopped; run it again to resume"))
    try:
        write_corpus(
            arguments.folder / "corpus", *(read_split(arguments.data, name, arguments) for name in ("train", "val"))
        )
        read_split(arguments.data, "test_2016_flickr", arguments)
    except TextMissing as error:
        sys.exit(f"bench-quality-tok: {error}")
    found = run_seeds(arguments)
    if len(found) < arguments.seeds:
        sys.exit(f"bench-quality-tok: {len(found)} of {arguments.seeds} seeds are done; run it again to resume")
    return publish(summarise(found, arguments), results_folder())


if __name__ == "__main__":
    sys.exit(main())
