"""`make bench-training-cpu`: target tokens per second in training, beside other systems.

Ferryman (the engine, as a worker runs it), a plain loop around torch.nn.Transformer, and fairseq train the same model
on the same subwords, by turns in one run. Beside them runs the floor: the matrix products of an update, nothing else.

A peer's batch is bounded by sentences times the longest of them, padding included, as fairseq's --max-tokens counts.
Our limit counts real target tokens; it is set so that the mean update has as many of them as the plain loop's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.peers.environment import PeerMissing, fairseq_python
from bench.peers.plain_loop import cut_batches
from bench.peers.task import PeerTask, read_ids, recipe_of, task_of, write_ids
from bench.shared.command_line import add_corpus
from bench.shared.corpus import read_training_text
from bench.shared.local_training import ListReporter, LocalCorpus, new_job, write_corpus
from bench.shared.process import ProcessFailed
from bench.shared.result import Peer, Result, publish, watched_machine
from bench.shared.turns import Contestant, alternate, median_ratio, started
from examples.parallel_text import TextMissing
from ferryman_service.domain.recipe import Precision, Preset, Recipe
from ferryman_service.domain.tokens import EOS
from ferryman_service.launch.launcher import LaunchConfig, worker_environment
from ferryman_service.training.packing import plan_epoch
from ferryman_service.training.pairs import TokenPairs
from ferryman_service.training.prepared import prepare_corpus

FOLDER: Final = Path("bench-output/training-cpu")
# As in the reference measurement for tiny; a base update of as many would take ten seconds.
MAX_TOKENS: Final = {Preset.TINY: 4096, Preset.BASE: 2048}
TARGET_RATIO: Final = 1.5
CORES: Final = 2
ROUNDS: Final = 5
TURN_S: Final = {Preset.TINY: 20.0, Preset.BASE: 25.0}
QUICK_ROUNDS: Final = 2
QUICK_TURN_S: Final = 5.0
_FIRST_NORMAL_ID: Final = EOS + 1

OURS: Final = "ferryman"
OURS_BF16: Final = "ferryman bf16"
PEERS: Final = ("plain loop", "fairseq")
FLOOR: Final = "matrix products"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The same task for all: our recipe, the peers' form of it, the text as token ids in files, the mean update."""

    preset: Preset
    recipe: Recipe
    task: PeerTask
    folder: Path
    source_tokens: int
    target_tokens: int
    sentences: int


def prepare(preset: Preset, corpus: LocalCorpus) -> Prepared:
    """Segment the corpus, write it for the peers, and give our batches the mean size of theirs."""
    max_tokens = MAX_TOKENS[preset]
    job = new_job("prepare", recipe_of(preset, max_tokens), corpus, FOLDER)
    pairs = prepare_corpus(job, ListReporter(), threads=CORES).pairs()
    write_ids(pairs, FOLDER / "ids")
    batches = cut_batches(read_ids(FOLDER / "ids"), max_tokens)
    mean = int(pairs.target.lengths_P.sum()) / len(batches)
    recipe = recipe_of(preset, limit_for(mean, pairs, max_tokens, job.recipe.seed))
    return Prepared(
        preset=preset,
        recipe=recipe,
        task=task_of(recipe, max_tokens),
        folder=FOLDER,
        source_tokens=round(int(pairs.source.lengths_P.sum()) / len(batches)),
        target_tokens=round(mean),
        sentences=round(len(pairs) / len(batches)),
    )


def limit_for(mean_tokens: float, pairs: TokenPairs, first_guess: int, seed: int) -> int:
    """Return the batch_target_tokens whose updates have on average so many target tokens."""
    limit = first_guess
    for _ in range(4):
        lengths = (pairs.source.lengths_P, pairs.target.lengths_P)
        updates = plan_epoch(*lengths, batch_target_tokens=limit, seed=seed, epoch=1)
        limit = round(limit * mean_tokens / (int(np.sum(lengths[1])) / len(updates)))
    return limit


def preprocess_for_fairseq(python: Path, task: PeerTask, folder: Path) -> Path:
    """Return fairseq's binary form of the token ids. Its dictionary is ours: four special symbols and the others."""
    binary = folder / "fairseq"
    shutil.rmtree(binary, ignore_errors=True)  # of the preset before: fairseq overwrites nothing
    dictionary = folder / "dict.txt"
    dictionary.write_text("".join(f"{token} 1\n" for token in range(_FIRST_NORMAL_ID, task.vocabulary)))
    command = [str(python), "-m", "fairseq_cli.preprocess", "-s", "source", "-t", "target", "--joined-dictionary"]
    command += ["--trainpref", str(folder / "ids" / "train"), "--destdir", str(binary), "--srcdict", str(dictionary)]
    if (ended := subprocess.run(command, capture_output=True, text=True)).returncode:
        raise PeerMissing(f"fairseq-preprocess failed:\n{ended.stderr[-2000:]}")
    return binary


def fairseq_arguments(task: PeerTask, binary: Path) -> list[str]:
    """Return the arguments of fairseq-train."""
    sizes: dict[str, Any] = {"arch": "transformer", "dropout": task.dropout}
    for part, layers in (("encoder", task.encoder_layers), ("decoder", task.decoder_layers)):
        sizes |= {f"{part}-layers": layers, f"{part}-embed-dim": task.d_model}
        sizes |= {f"{part}-ffn-embed-dim": task.ffn_dim, f"{part}-attention-heads": task.heads}
    training = {
        "task": "translation",
        "source-lang": "source",
        "target-lang": "target",
        "optimizer": "adam",
        "adam-betas": "(0.9, 0.98)",
        "adam-eps": 1e-9,
        "lr": 1e-4,
        "lr-scheduler": "fixed",
        "clip-norm": task.clip_norm,
        "criterion": "label_smoothed_cross_entropy",
        "label-smoothing": task.label_smoothing,
        "max-tokens": task.max_tokens,
        "max-epoch": 1000,
        "seed": 1,
    }
    options = [f"--{name}={value}" for name, value in (sizes | training).items()]
    return [str(binary), *options, "--share-all-embeddings", "--cpu", "--disable-validation", "--no-save"]


def contestants(prepared: Prepared, *, with_bf16: bool) -> dict[str, Contestant]:
    """Return the programs to measure, by name."""
    fairseq = fairseq_python()
    binary = preprocess_for_fairseq(fairseq, prepared.task, prepared.folder)
    task = json.dumps(dataclasses.asdict(prepared.task))
    here = [sys.executable, "-m"]

    def ours(precision: Precision) -> list[str]:
        limit = str(prepared.recipe.optimization.batch_target_tokens)
        options = ["--folder", str(FOLDER), "--preset", prepared.preset, "--precision", precision]
        return [*here, "bench.training.ferryman_turns", *options, "--batch-target-tokens", limit]

    sizes = ["--source-tokens", str(prepared.source_tokens), "--target-tokens", str(prepared.target_tokens)]
    sizes += ["--sentences", str(prepared.sentences)]
    commands = {
        OURS: ours(Precision.FP32),
        "plain loop": [*here, "bench.peers.plain_loop", "--folder", str(prepared.folder / "ids"), "--task", task],
        "fairseq": [str(fairseq), "-m", "bench.peers.fairseq", *fairseq_arguments(prepared.task, binary)],
        FLOOR: [*here, "bench.training.matmul_floor", "--task", task, *sizes],
    }
    if with_bf16:
        commands[OURS_BF16] = ours(Precision.BF16)
    worker = worker_environment(LaunchConfig(data_dir=FOLDER), processes=1)
    # Without the bound on spinning the peers would suffer more than we do from whatever else the machine does.
    everybody = {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "10000", "PYTHONPATH": os.getcwd()}

    def environment(name: str) -> Mapping[str, str]:
        return {**worker, **everybody} if name.startswith(OURS) else everybody

    log = FOLDER / "logs"
    log.mkdir(exist_ok=True)
    return {
        name: Contestant(name, command, environment(name), log / f"{prepared.preset}-{name.replace(' ', '-')}.log")
        for name, command in commands.items()
    }


def describe(prepared: Prepared, measured: Mapping[str, Contestant]) -> dict[str, Any]:
    """Return what is reported beside the value, and print it as a table."""
    floor = measured[FLOOR]
    flops = floor.facts.pop("flops_per_target_token")
    systems = {name: contestant.summary() for name, contestant in measured.items()}
    for name, summary in systems.items():
        summary["share_of_floor"] = round(median_ratio(measured[name], floor), 3)
    gflops = flops * systems[FLOOR]["tokens_per_s"] / 1e9
    print(f"\n{prepared.preset}: {flops / 1e6:.1f} MFLOP of matrix products a target token; alone they run at")
    print(f"{gflops:.0f} GFLOP/s, so no more than {systems[FLOOR]['tokens_per_s']:,.0f} target tokens/s\n")
    print(
        f"{'':16} {'tokens/s':>9} {'p10':>8} {'p90':>8} {'updates':>8} {'tokens/update':>14} {'MB':>6} {'of floor':>9}"
    )
    for name, row in systems.items():
        print(
            f"{name:16} {row['tokens_per_s']:9,.0f} {row['p10']:8,.0f} {row['p90']:8,.0f} {row['updates']:8.0f} "
            f"{row['tokens_per_update']:14,.0f} {row['peak_memory_mb']:6,.0f} {row['share_of_floor']:9.0%}"
        )
    return {
        "unit": "times the target tokens/s of the faster peer, FP32, median over rounds",
        "systems": systems,
        "mflop_per_target_token": round(flops / 1e6, 2),
        "matmul_gflop_per_s": round(gflops, 1),
        "peer_max_tokens": prepared.task.max_tokens,
        "our_batch_target_tokens": prepared.recipe.optimization.batch_target_tokens,
        "batch": "peers: sentences x longest, either side, <= peer_max_tokens; ours: real target tokens <= "
        "our_batch_target_tokens, for the plain loop's mean",
        "dropout": prepared.task.dropout,
        "task": dataclasses.asdict(prepared.task),
    }


def has_bf16_arithmetic() -> bool:
    """Whether the CPU multiplies BF16 numbers itself. Where it does not, BF16 takes 25 times as long as FP32."""
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def measure(prepared: Prepared, arguments: argparse.Namespace) -> Result:
    """Run the systems by turns."""
    with_bf16 = not arguments.no_bf16 and has_bf16_arithmetic()
    programs = contestants(prepared, with_bf16=with_bf16)
    with started(list(programs.values())):
        alternate(list(programs.values()), rounds=arguments.rounds, turn_s=arguments.turn_s[prepared.preset])
    details = describe(prepared, programs)
    ratios = {name: median_ratio(programs[OURS], programs[name]) for name in PEERS}
    faster = min(ratios, key=lambda name: ratios[name])
    print(f"ferryman: {', '.join(f'{ratio:.2f} x {name}' for name, ratio in ratios.items())}\n")
    is_full = not arguments.quick
    return Result(
        bench=f"training-cpu-{prepared.preset}{'-quick' if arguments.quick else ''}",
        value=ratios[faster],
        target=TARGET_RATIO if is_full else None,
        peer=Peer(name=f"{faster}, {details['systems'][faster]['tokens_per_s']:,.0f} target tokens/s", value=1.0),
        details={
            "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
            "bf16": "measured" if with_bf16 else "left out: not wanted, or this CPU has no BF16 arithmetic",
            **details,
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-training-cpu", description=__doc__)
    add_corpus(parser, "train and val files")
    parser.add_argument(
        "--preset", type=Preset, choices=list(MAX_TOKENS), help="measure this preset only (default: both)"
    )
    parser.add_argument("--no-bf16", action="store_true", help="do not measure BF16")
    parser.add_argument(
        "--quick", action="store_true", help=f"run {QUICK_ROUNDS} rounds of short turns, without a target"
    )
    arguments = parser.parse_args(argv)
    arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    arguments.turn_s = dict.fromkeys(TURN_S, QUICK_TURN_S) if arguments.quick else TURN_S
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached for each preset."""
    arguments = parse(argv)
    presets = [arguments.preset] if arguments.preset else list(MAX_TOKENS)
    try:
        train, validation = read_training_text(arguments.data, arguments.source, arguments.target)
        corpus = write_corpus(FOLDER, train, validation)
        with watched_machine():
            return max(publish(measure(prepare(preset, corpus), arguments)) for preset in presets)
    except (TextMissing, PeerMissing, ProcessFailed) as error:
        sys.exit(f"bench-training-cpu: {error}")


if __name__ == "__main__":
    sys.exit(main())
