"""`make bench-corpora`: memory for a large corpus, and start-up time of a second run on it.

A synthetic corpus (words of Zipf's frequencies, sentence lengths as in news text, one pair in a hundred a duplicate) is
written to disk. Then the training engine is started on it twice, each time in a process of its own, and ended after a
few updates: the first start learns subwords and tokenises everything, the second finds that done. The same is done with
a corpus of a hundredth of the size: the second start may take a few times as long with the large one. The peak of a
process's resident memory is the operating system's word, file pages that it has mapped included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.shared.local_training import ListReporter, LocalCorpus, new_job
from bench.shared.result import Result, publish, watched_machine
from ferryman_service.domain.corpora import CorpusFiles, Side, Split
from ferryman_service.domain.recipe import Recipe, resolve_recipe
from ferryman_service.domain.training import StopRequested
from ferryman_service.launch.environment import SPIN_COUNT
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine

FOLDER: Final = Path("bench-output/corpora")
PAIRS: Final = 10_000_000
MEMORY_LIMIT_MB: Final = 2048
SECOND_START_AT_MOST: Final = 5.0
"""How many times as long as with the small corpus the second start may take until its first update."""
_SMALL_SHARE: Final = 0.01
# Enough words for the preset's subwords.
_LEAST_PAIRS: Final = 5_000
UPDATES: Final = 20

_WORDS: Final = 200_000
_ZIPF: Final = 1.1
_MEAN_WORDS: Final = 20.0
_CHUNK_PAIRS: Final = 100_000
_DUPLICATES: Final = 0.01
_VALIDATION_PAIRS: Final = 500
_LETTERS: Final = "etaoinsrhldcumfpgwybvkxjqz"


def recipe() -> Recipe:
    """Return the tiny preset, which ends soon."""
    return resolve_recipe({"stop": {"max_steps": UPDATES}, "validation": {"interval_steps": UPDATES}})


def write_corpus(folder: Path, pairs: int) -> CorpusFiles:
    """Write a corpus of so many training pairs; the same one each time."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    words = [made_up_words(generator) for _ in Side]
    files = {(split, side): folder / f"{split}.{side}" for split in Split for side in Side}
    for split, count in ((Split.TRAIN, pairs), (Split.VALIDATION, _VALIDATION_PAIRS)):
        with files[split, Side.SOURCE].open("w") as source, files[split, Side.TARGET].open("w") as target:
            for sources, targets in made_up_pairs(generator, words, count):
                source.writelines(sources)
                target.writelines(targets)
    return CorpusFiles(files=files)


def made_up_words(generator: np.random.Generator) -> np.ndarray[Any, np.dtype[np.object_]]:
    """Return words, the short ones first, as languages have them."""
    weights = 1.0 / np.arange(2, len(_LETTERS) + 2)
    lengths = np.clip(2 + np.log2(np.arange(1, _WORDS + 1)) / 2 + generator.normal(0, 1, _WORDS), 1, 14).astype(int)
    letters = generator.choice(list(_LETTERS), size=int(lengths.sum()), p=weights / weights.sum())
    text, ends = "".join(letters), np.cumsum(lengths)
    return np.array([text[end - length : end] for end, length in zip(ends, lengths, strict=True)], dtype=object)


def made_up_pairs(
    generator: np.random.Generator, words: Sequence[np.ndarray[Any, np.dtype[np.object_]]], count: int
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield lines in chunks. A target has the words of its source, of the other language, in another order."""
    shares = 1.0 / np.arange(1, _WORDS + 1) ** _ZIPF
    cumulative = np.cumsum(shares / shares.sum())
    for first in range(0, count, _CHUNK_PAIRS):
        size = min(_CHUNK_PAIRS, count - first)
        lengths = np.clip(generator.lognormal(np.log(_MEAN_WORDS), 0.5, size), 1, 120).astype(int)
        ids = np.minimum(np.searchsorted(cumulative, generator.random(int(lengths.sum()))), _WORDS - 1)
        starts = np.cumsum(lengths) - lengths
        spans = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        for copy in range(int(size * _DUPLICATES)):
            spans[-1 - copy] = spans[copy]
        source, target = words[0][ids], words[1][ids]
        yield (
            [" ".join(source[span]) + "\n" for span in spans],
            [" ".join(target[span][::-1]) + "\n" for span in spans],
        )


def start(folder: Path, run: str) -> None:
    """Be the process of a run: train until the first updates are done, and print what that took."""
    files = {(split, side): folder / "corpus" / f"{split}.{side}" for split in Split for side in Side}
    began_s = time.monotonic()
    first_update_s = 0.0
    reporter = ListReporter()

    def check() -> None:
        nonlocal first_update_s
        if reporter.steps and not first_update_s:
            first_update_s = time.monotonic() - began_s
        if len(reporter.steps) >= UPDATES:
            raise StopRequested

    reporter = ListReporter(check=check)
    job = new_job(run, recipe(), LocalCorpus(CorpusFiles(files=files), "synthetic"), folder)
    with contextlib.suppress(StopRequested):
        TorchTrainingEngine(EngineConfig(device="cpu")).train(job, reporter)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    padding = float(np.mean([step.padding_share for step in reporter.steps]))
    print(json.dumps({"first_update_s": first_update_s, "peak_memory_mb": peak_mb, "padding_share": padding}))


def started(folder: Path, run: str) -> dict[str, float]:
    """Return what a start in a process of its own has measured."""
    command = [sys.executable, "-m", "bench.training.corpora", "--folder", str(folder), "--run", run]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ})
    if ended.returncode:
        sys.exit(f"bench-corpora: the {run} start failed")
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    print(f"{run} start: {found}", flush=True)
    return found


def two_starts(folder: Path, pairs: int) -> tuple[float, dict[str, float], dict[str, float]]:
    """Write a corpus and start on it twice; return its size in MB and what both starts measured."""
    shutil.rmtree(folder, ignore_errors=True)
    began_s = time.monotonic()
    files = write_corpus(folder / "corpus", pairs)
    size_mb = sum(path.stat().st_size for path in files.files.values()) / 1e6
    print(f"wrote {pairs:,} pairs, {size_mb:,.0f} MB, in {time.monotonic() - began_s:.0f} s", flush=True)
    first, second = (started(folder, run) for run in ("first", "second"))
    shutil.rmtree(folder)
    return size_mb, first, second


def measure(folder: Path, pairs: int) -> Result:
    """Start twice on a small corpus, and twice on the large one."""
    _, _, small = two_starts(folder, max(_LEAST_PAIRS, round(_SMALL_SHARE * pairs)))
    size_mb, first, second = two_starts(folder, pairs)
    return result_of(pairs, size_mb, small=small, first=first, second=second)


def result_of(
    pairs: int,
    size_mb: float,
    *,
    small: Mapping[str, float],
    first: Mapping[str, float],
    second: Mapping[str, float],
) -> Result:
    """Return the line to publish."""
    ratio = second["first_update_s"] / small["first_update_s"]
    return Result(
        bench="corpora" if pairs == PAIRS else "corpora-short",
        value=MEMORY_LIMIT_MB / max(first["peak_memory_mb"], second["peak_memory_mb"]),
        target=1.0,
        peer=None,
        in_time=ratio <= SECOND_START_AT_MOST,
        details={
            "unit": f"{MEMORY_LIMIT_MB} MiB over the peak of resident memory; and the second start takes at most "
            f"{SECOND_START_AT_MOST:g} times as long as with a hundredth of the pairs",
            "pairs": pairs,
            "corpus_mb": round(size_mb),
            "first": first,
            "second": second,
            "small_second": small,
            "second_ratio": round(ratio, 2),
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if memory and second start keep their limits."""
    parser = argparse.ArgumentParser(prog="make bench-corpora", description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"number of sentence pairs (default: {PAIRS:,})")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="working folder; it is removed before and after")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.run:
        start(arguments.folder, arguments.run)
        return 0
    with watched_machine():
        return publish(measure(arguments.folder, arguments.pairs))


if __name__ == "__main__":
    sys.exit(main())
