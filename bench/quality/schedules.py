"""`make bench-schedules`: validation BLEU of the schedules WSD and NOAM in runs that only time limits.

The preset `tiny` trains with the schedule WSD, which such a run has by default, and with the paper's (NOAM), which it
would have otherwise; nothing else differs. Both train at the same time, each on a processor of its own with one thread,
so that whatever disturbs the machine disturbs both. The value is the smallest difference in validation BLEU over the
rows; scores are those of the weights that each run would publish.

Rows are "corpus minutes", with "busy" behind it for a process that spins on every processor meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.shared.command_line import measured
from bench.shared.corpus import DEFAULT_DATA, read_training_text
from bench.shared.local_training import ListReporter, new_job, write_corpus
from bench.shared.result import Result
from examples import demo, phrases
from examples.parallel_text import ParallelLines, TextMissing
from ferryman_service.domain.recipe import Recipe, resolve_recipe
from ferryman_service.domain.schedule import ScheduleKind
from ferryman_service.launch.launcher import LaunchConfig, worker_environment

SCHEDULES: Final = (ScheduleKind.WSD, ScheduleKind.NOAM)
ROWS: Final = ("phrases 2", "multi30k 5", "multi30k 15", "multi30k 5 busy")
QUICK_ROWS: Final = ("phrases 1",)
PHRASES_VOCABULARY: Final = 600
_SPIN: Final = "while True: pass"


class RunFailed(Exception):
    """A run ended badly. The message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A corpus ("phrases" is the demo's), the minutes of training, and whether other processes are busy meanwhile."""

    corpus: str
    minutes: float
    busy: bool = False

    @classmethod
    def parse(cls, text: str) -> Row:
        """Return the row that a text such as "multi30k 5 busy" names; raises ValueError."""
        corpus, minutes, *rest = text.split()
        if rest not in ([], ["busy"]) or corpus not in ("phrases", "multi30k"):
            raise ValueError(f"row is {text!r}, must be like 'phrases 2' or 'multi30k 5 busy'")
        return cls(corpus=corpus, minutes=float(minutes), busy=bool(rest))

    def __str__(self) -> str:
        return f"{self.corpus} {self.minutes:g}" + (" busy" if self.busy else "")


def recipe_of(row: Row, kind: ScheduleKind) -> Recipe:
    """Return the preset `tiny`, limited by time alone, with the schedule."""
    data = {"vocabulary_size": PHRASES_VOCABULARY} if row.corpus == "phrases" else {}
    return resolve_recipe({"data": data, "stop": {"max_duration_s": 60 * row.minutes}, "schedule": {"kind": kind}})


def corpus_lines(row: Row, data: Path) -> tuple[ParallelLines, ParallelLines]:
    """Return the training and validation pairs; raises TextMissing."""
    if row.corpus == "phrases":
        corpus = phrases.generate(seed=demo.SEED)
        train, validation = (
            ParallelLines(source=[pair.source for pair in pairs], target=[pair.target for pair in pairs])
            for pairs in (corpus.train, corpus.validation)
        )
        return train, validation
    return read_training_text(data, "en", "de")


def run_one(recipe: Recipe, train: ParallelLines, validation: ParallelLines, folder: Path) -> dict[str, Any]:
    """Train once in this process; return scores, steps, and the last learning rate over its peak."""
    from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine  # needs torch

    reporter = ListReporter()
    corpus = write_corpus(folder / "corpus", train, validation)
    engine = TorchTrainingEngine(EngineConfig(device="cpu", threads=1))
    scores = engine.train(new_job("run", recipe, corpus, folder), reporter).scores
    rates = [step.learning_rate for step in reporter.steps]
    return {
        "bleu": round(scores.bleu, 2),
        "chrf": round(scores.chrf, 2),
        "nll_per_token": round(scores.nll_per_token, 4),
        "steps": len(rates),
        "last_rate_share": round(rates[-1] / max(rates), 3),
    }


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep so many processors busy for the length of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_side_by_side(row: Row, data: Path, processors: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Train with both schedules at the same time; raises RunFailed."""
    folder = Path(tempfile.mkdtemp(prefix="schedules-"))
    # Workers import nothing from the working folder, where this program is.
    environment = worker_environment(LaunchConfig(data_dir=folder, threads_per_worker=1), 1) | {"PYTHONSAFEPATH": ""}
    programs = {}
    try:
        with neighbours(len(processors) if row.busy else 0):
            for kind, processor in zip(SCHEDULES, processors, strict=True):
                arguments = ["--one", str(row), "--kind", str(kind), "--data", str(data)]
                arguments += ["--folder", str(folder / kind)]
                with (folder / f"{kind}.log").open("wb") as log:
                    programs[kind] = subprocess.Popen(
                        ["taskset", "-c", str(processor), sys.executable, "-m", "bench.quality.schedules", *arguments],
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=environment,
                    )
            answers = {kind: program.communicate()[0] for kind, program in programs.items()}
        for kind, program in programs.items():
            if program.returncode:
                tail = (folder / f"{kind}.log").read_text(errors="replace")[-2000:]
                raise RunFailed(f"{kind} ended with exit status {program.returncode}; its log ends with:\n{tail}")
        return {str(kind): json.loads(answer.splitlines()[-1]) for kind, answer in answers.items()}
    finally:
        for program in programs.values():
            program.kill()
        shutil.rmtree(folder, ignore_errors=True)


def measure(rows: Sequence[Row], data: Path) -> Result:
    """Run all rows, print them as a table, and return the line to publish. Raises RunFailed, TextMissing."""
    processors = sorted(os.sched_getaffinity(0))[: len(SCHEDULES)]
    if len(processors) < len(SCHEDULES):
        raise RunFailed(f"only {len(processors)} processor may be used, {len(SCHEDULES)} are needed")
    found = {}
    print("| corpus, minutes | WSD: BLEU, nats/token, steps | NOAM: BLEU, nats/token, steps |\n| --- | --- | --- |")
    for row in rows:
        found[str(row)] = scores = run_side_by_side(row, data, processors)
        cells = (f"{s['bleu']:.1f}, {s['nll_per_token']:.3f}, {s['steps']:,}" for s in scores.values())
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
    return Result(
        bench="schedules",
        value=min(scores[ScheduleKind.WSD]["bleu"] - scores[ScheduleKind.NOAM]["bleu"] for scores in found.values()),
        target=0.0,
        peer=None,
        details={"unit": "validation BLEU of WSD over NOAM's, the smallest of the rows", "rows": found},
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-schedules", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with Multi30k's train and val files")
    parser.add_argument("--rows", type=Row.parse, nargs="+", help=f"rows to run (default: {', '.join(ROWS)})")
    parser.add_argument(
        "--quick", action="store_true", help=f"run the row {', '.join(QUICK_ROWS)} only, without Multi30k"
    )
    parser.add_argument("--one", type=Row.parse, help=argparse.SUPPRESS)
    parser.add_argument("--kind", type=ScheduleKind, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if WSD is never worse."""
    arguments = parse(argv)
    if arguments.one:
        recipe = recipe_of(arguments.one, arguments.kind)
        print(json.dumps(run_one(recipe, *corpus_lines(arguments.one, arguments.data), arguments.folder)))
        return 0
    rows = arguments.rows or [Row.parse(text) for text in (QUICK_ROWS if arguments.quick else ROWS)]
    return measured("bench-schedules", lambda: measure(rows, arguments.data), (RunFailed, TextMissing))


if __name__ == "__main__":
    sys.exit(main())
