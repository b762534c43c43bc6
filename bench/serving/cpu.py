"""`make bench-serving-cpu`: our engine beside CTranslate2, with the same weights, subwords and threads.

Each engine is in a process of its own. They are measured by turns: latency in blocks of sentences, throughput in
rounds. Subword splitting and loading are in no timing. CTranslate2 runs as it is fastest on CPUs like this: one thread
per batch, with two cores two batches at a time, of 32 or 64 sentences of similar length, whichever is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sacrebleu

from bench.peers.environment import CTRANSLATE2, PeerMissing, ctranslate2_python
from bench.shared.command_line import add_corpus, add_model, measured
from bench.shared.corpus import find_news
from bench.shared.models import COMPUTE_TYPES, CORES, FOLDER, PEER_TYPES, ServingTask, base_task, read_text, tiny_task
from bench.shared.process import ProcessFailed, ServingProcess
from bench.shared.result import Peer, Result
from bench.shared.rows import Row, at_least, at_most, print_rows, reported
from bench.shared.trained_model import ModelUnfit, model_facts, task_of, trained_bundle
from examples.local_service import ServiceFailed
from examples.parallel_text import TextMissing
from ferryman_service.bundle.manifest import SUBWORDS_FILE
from ferryman_service.text.subwords import Subwords

ENGINES: Final = ("ferryman", "ctranslate2")
SEARCHES: Final[Mapping[str, int]] = {"greedy": 1, "beam 5": 5}
PEER_BATCHES: Final = (32, 64)
LATENCY_AT_MOST: Final = 0.8
THROUGHPUT_AT_LEAST: Final = 1.25
MEMORY_AT_MOST: Final = 1.0
BLEU_LOSS_AT_MOST: Final = 0.3
COLD_START_AT_MOST: Final = 3.0
_WARM_UP_SENTENCES: Final = 3
_BLOCK_SENTENCES: Final = 10
_SETTLE_S: Final = 0.2
_COLD_STARTS: Final = 3


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long it is measured: sentences for latency by task, rounds for throughput, sentences of base."""

    latency_sentences: Mapping[str, int]
    rounds: int
    base_sentences: int = 256


FULL: Final = Effort(latency_sentences={"tiny": 300, "base": 40}, rounds=3)
QUICK: Final = Effort(latency_sentences={"tiny": 100, "base": 20}, rounds=2, base_sentences=64)


@dataclass(frozen=True)
class Pair:
    """Our process and the peer's, with the same sentences."""

    ours: ServingProcess
    peer: ServingProcess

    def each(self) -> tuple[ServingProcess, ServingProcess]:
        """Return both."""
        return self.ours, self.peer


Outputs = dict[tuple[str, str, str], list[dict[str, Any]]]
"""The translations, by engine, compute type and search."""


@contextlib.contextmanager
def started(task: ServingTask, compute_type: str, threads: int) -> Iterator[Pair]:
    """Start both engines and give them the sentences; raises ProcessFailed, PeerMissing."""
    logs, here = FOLDER / "logs", {"PYTHONPATH": os.getcwd()}
    own = [sys.executable, "-m", "bench.serving.worker", "--bundle", str(task.bundle)]
    own += ["--compute-type", compute_type, "--threads", str(threads)]
    peer = [str(ctranslate2_python()), "-m", "bench.peers.ctranslate2_worker", "--model", str(task.peers[compute_type])]
    peer += ["--compute-type", PEER_TYPES[compute_type], "--inter-threads", str(threads), "--intra-threads", "1"]
    name = f"{task.name}-{compute_type}-{threads}"
    with (
        ServingProcess(ENGINES[0], own, here, logs / f"ferryman-{name}.log") as ours,
        ServingProcess(ENGINES[1], peer, here, logs / f"ctranslate2-{name}.log") as theirs,
    ):
        for process in (ours, theirs):
            process.ask("sentences", ids=task.sentences)
        yield Pair(ours, theirs)


def search_of(task: ServingTask, beam_size: int) -> dict[str, Any]:
    """Return the arguments of a search."""
    return {"beam_size": beam_size, "max_length": task.max_length, "forced": task.forced}


def latency_rows(pair: Pair, task: ServingTask, label: str, sentences: int) -> list[Row]:
    """Measure one sentence after the other, one thread: the median over sentences."""
    rows = []
    for name, beam_size in SEARCHES.items():
        search = search_of(task, beam_size)
        taken_ms: dict[str, list[float]] = {process.name: [] for process in pair.each()}
        for process in pair.each():
            process.ask("latency", first=0, count=_WARM_UP_SENTENCES, **search)
        for first in range(0, sentences, _BLOCK_SENTENCES):
            for process in pair.each():
                count = min(_BLOCK_SENTENCES, sentences - first)
                taken_ms[process.name] += process.ask("latency", first=first, count=count, **search)
        ours, peer = (round(statistics.median(taken_ms[process.name]), 3) for process in pair.each())
        rows.append(at_most(f"{label} latency {name}", "ms", (ours, peer), LATENCY_AT_MOST))
    return rows


def throughput_rows(pair: Pair, task: ServingTask, label: str, rounds: int) -> list[Row]:
    """Measure all sentences at once, on two cores: medians over rounds of target subwords per second."""
    rows = []
    for name, beam_size in SEARCHES.items():
        rates: dict[tuple[str, int], list[float]] = {}
        for number in range(rounds + 1):
            for process, batch in ((pair.ours, 0), *((pair.peer, batch) for batch in PEER_BATCHES)):
                time.sleep(_SETTLE_S)
                measured = process.ask("throughput", **search_of(task, beam_size), max_batch_size=batch)
                if task.forced:
                    check_lengths(process.name, measured["tokens"], task)
                if number:  # the first round warms up
                    rates.setdefault((process.name, batch), []).append(measured["tokens"] / measured["seconds"])
        medians = {key: round(statistics.median(values), 1) for key, values in rates.items()}
        ours = medians.pop((pair.ours.name, 0))
        best = max(medians, key=lambda key: medians[key])
        row = at_least(f"{label} throughput {name}", "target subwords/s", (ours, medians[best]), THROUGHPUT_AT_LEAST)
        rows.append(row.with_details(peer_batch=best[1]))
    return rows


def check_lengths(engine: str, tokens: int, task: ServingTask) -> None:
    """Raise ProcessFailed if forced translations have not the length that they should have."""
    wanted = task.max_length * len(task.sentences)
    if tokens != wanted:
        raise ProcessFailed(f"{engine} found {tokens} subwords for {task.name}, not {wanted}: the tasks differ")


def memory_rows(pair: Pair, label: str) -> list[Row]:
    """Compare what the processes hold now, and held at most."""
    ours, peer = (process.ask("memory") for process in pair.each())
    return [
        at_most(f"{label} {name}", "MiB", (ours[field], peer[field]), MEMORY_AT_MOST)
        for field, name in (("pss_mib", "PSS"), ("peak_rss_mib", "peak RSS"))
    ]


def measure_task(task: ServingTask, effort: Effort) -> tuple[list[Row], Outputs]:
    """Measure both engines with each compute type; what a trained model translates is returned too."""
    rows, outputs = list[Row](), Outputs()
    for compute_type in COMPUTE_TYPES:
        label = f"{task.name} {compute_type}"
        with started(task, compute_type, threads=1) as pair:
            sentences = min(effort.latency_sentences[task.name], len(task.sentences))
            found = latency_rows(pair, task, label, sentences)
        with started(task, compute_type, threads=CORES) as pair:
            found += throughput_rows(pair, task, label, effort.rounds)
            if (task.name, compute_type) == ("base", "int8"):
                found += memory_rows(pair, f"{label} memory,")
            if task.references:
                outputs |= translated(pair, task, compute_type)
        print_rows(found)
        rows += found
    return rows, outputs


def translated(pair: Pair, task: ServingTask, compute_type: str) -> Outputs:
    """Return what both engines find."""
    return {
        (process.name, compute_type, name): process.ask(
            "translate", **search_of(task, beam_size), max_batch_size=PEER_BATCHES[0]
        )
        for name, beam_size in SEARCHES.items()
        for process in pair.each()
    }


def quality_rows(task: ServingTask, outputs: Outputs) -> list[Row]:
    """Compare what the engines found: the same subwords in FP32? how much BLEU does int8 cost?"""
    subwords = Subwords.load(task.bundle / SUBWORDS_FILE)
    bleu = {
        key: sacrebleu.corpus_bleu([subwords.decode(item["tokens"]) for item in found], [task.references]).score
        for key, found in outputs.items()
    }
    rows = []
    for name in SEARCHES:
        pairs = list(zip(*(outputs[engine, "fp32", name] for engine in ENGINES), strict=True))
        same = sum(mine["tokens"] == theirs["tokens"] for mine, theirs in pairs)
        rows.append(
            reported(f"{task.name} fp32 same translations {name}", "share", (round(same / len(pairs), 4), None))
        )
        for compute_type in COMPUTE_TYPES:
            ours, peer = (round(bleu[engine, compute_type, name], 2) for engine in ENGINES)
            rows.append(reported(f"{task.name} {compute_type} BLEU {name}", "BLEU", (ours, peer)))
        ours, peer = (round(bleu[engine, "fp32", name] - bleu[engine, "int8", name], 2) for engine in ENGINES)
        loss = f"{task.name} int8 BLEU loss {name}"
        rows.append(at_most(loss, "BLEU", (ours, peer), BLEU_LOSS_AT_MOST, relative=False))
    return rows


def cold_start_rows(task: ServingTask, text: str) -> list[Row]:
    """Measure fresh processes of both engines by turns, from their start to their first translation; raises
    ProcessFailed, PeerMissing."""
    rows = []
    for compute_type in COMPUTE_TYPES:
        own = [sys.executable, "-m", "bench.serving.cold_start", str(task.bundle), compute_type, text]
        peer = [str(ctranslate2_python()), "-m", "bench.peers.ctranslate2_cold_start", str(task.peers[compute_type])]
        peer += [str(task.bundle / SUBWORDS_FILE), PEER_TYPES[compute_type], text]
        turns = [(cold_start_s(own), cold_start_s(peer)) for _ in range(_COLD_STARTS)]
        ours, theirs = (round(statistics.median(taken_s), 3) for taken_s in zip(*turns, strict=True))
        rows.append(at_most(f"{task.name} {compute_type} cold start", "s", (ours, theirs), COLD_START_AT_MOST))
    return rows


def cold_start_s(command: Sequence[str]) -> float:
    """Return the seconds from the start of a process to its first line; raises ProcessFailed."""
    begin_s = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.getenv("PYTHONPATH"))))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        taken_s = time.perf_counter() - begin_s
        error = process.stderr.read()
    if not line or process.returncode:
        raise ProcessFailed(f"{' '.join(command)} ended with exit status {process.returncode}:\n{error}")
    return taken_s


def measure(arguments: argparse.Namespace) -> Result:
    """Run the benchmark; raises one of `FAILURES`."""
    corpus_task = task_of(arguments.data, arguments.source, arguments.target)
    trained = trained_bundle(arguments.model, corpus_task)
    news = find_news(arguments.data, arguments.source, arguments.target)
    text = read_text(corpus_task, news)
    effort = QUICK if arguments.quick else FULL
    tasks = {
        "tiny": lambda: tiny_task(trained, text),
        "base": lambda: base_task(text, effort.base_sentences),
    }
    rows: list[Row] = []
    for name in arguments.tasks:
        task = tasks[name]()
        found, outputs = measure_task(task, effort)
        rows += [*found, *(quality_rows(task, outputs) if outputs else ()), *cold_start_rows(task, text.test_source[0])]
    print_rows(rows)
    return Result(
        bench="serving-cpu-quick" if arguments.quick else "serving-cpu",
        value=sum(row.ok for row in rows) / len(rows),
        target=1.0,
        peer=Peer(name=CTRANSLATE2, value=1.0),
        details={
            "unit": "share of the rows that hold",
            "rows": [row.as_dict() for row in rows],
            "model": model_facts(trained),
            "news": news.described,
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-serving-cpu", description=__doc__)
    add_corpus(parser)
    add_model(parser)
    parser.add_argument("--tasks", nargs="+", choices=("tiny", "base"), default=["tiny", "base"])
    parser.add_argument(
        "--quick", action="store_true", help="measure fewer sentences and rounds, with the same targets"
    )
    return parser.parse_args(argv)


FAILURES: Final = (TextMissing, FileNotFoundError, ModelUnfit, PeerMissing, ProcessFailed, ServiceFailed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if every row holds."""
    arguments = parse(argv)
    return measured("bench-serving-cpu", lambda: measure(arguments), FAILURES)


if __name__ == "__main__":
    sys.exit(main())
