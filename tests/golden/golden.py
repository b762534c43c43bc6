"""Digests of what a change of the inside must not change, by calls of the SDK to the real service.

    python -m tests.golden.golden OUT.json

Run it before and after, on one machine with the same packages, and compare the two files: with `--before BEFORE.json`
it names what differs and exits with 1. Some ten minutes on two cores.

* runs of 200 updates of the preset `tiny`: FP32, R-Drop, emulated BF16, two processes, and one that was paused in the
  middle, which equals the unbroken one: weights, and records without what a clock has measured;
* translations of 1,000 sentences by the FP32 run's model: greedy, beam 5, sampling with a seed, prefixes, n-best, int8;
* names, types and label names of all metrics.

The refusals of the contract are told by the tests themselves: FERRYMAN_GOLDEN_REFUSALS=FILE pytest tests/contract.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.shared.made_up import made_up_text
from examples.local_service import local_service, reserved_port
from ferryman import Client, Sampling, StreamSentence
from ferryman.types import (
    DataRecipe,
    MetricRecord,
    OptimizationRecipe,
    Recipe,
    RunEvent,
    RunState,
    StateChange,
    StepMetrics,
    StopRecipe,
    ValidationRecipe,
)

STEPS: Final = 200
SENTENCES: Final = 1_000
_PAIRS: Final = 6_000
_VALIDATION_PAIRS: Final = 100
_PAUSE_AT: Final = STEPS // 2
_MEASURED: Final = re.compile(r"time|second|duration|per_s|memory|bytes|utilization|mfu")
"""Names of fields that a clock or the machine fills."""
_OF_THE_ATTEMPT: Final = (StateChange, RunEvent)

_RECIPES: Final[Mapping[str, tuple[OptimizationRecipe, int]]] = {
    "fp32": (OptimizationRecipe(batch_target_tokens=1_024), 1),
    "paused": (OptimizationRecipe(batch_target_tokens=1_024), 1),
    "r-drop": (OptimizationRecipe(batch_target_tokens=512, r_drop_alpha=1.0), 1),
    "bf16": (OptimizationRecipe(batch_target_tokens=512, precision="bf16"), 1),
    "two processes": (OptimizationRecipe(batch_target_tokens=512), 2),
}


def digest(parts: Iterable[object]) -> str:
    """Return a digest of the texts of some values."""
    summed = hashlib.sha256()
    for part in parts:
        summed.update(f"{part!r}\n".encode())
    return summed.hexdigest()[:16]


def recipe(optimization: OptimizationRecipe) -> Recipe:
    """Return the recipe of a run."""
    return Recipe(
        preset="tiny",
        data=DataRecipe(vocabulary_size=2_000),
        optimization=optimization,
        stop=StopRecipe(max_steps=STEPS),
        validation=ValidationRecipe(interval_steps=STEPS, checkpoint_interval_steps=50, max_translated_pairs=50),
        seed=7,
    )


def train(client: Client, corpus_id: str, name: str) -> tuple[str, str]:
    """Train a run of the table to its end; return its id and its model."""
    optimization, processes = _RECIPES[name]
    model = name.replace(" ", "-")
    run = client.start_training(corpus_id, model, recipe(optimization), processes=processes, keep_optimizer=False)
    if name == "paused":
        for record in client.stream_metrics(run.run_id):
            if isinstance(record.payload, StepMetrics) and record.payload.step >= _PAUSE_AT:
                client.pause_training(run.run_id)
                break
        for record in client.stream_metrics(run.run_id):
            if isinstance(record.payload, StateChange) and record.payload.state is RunState.PAUSED:
                break
        client.resume_training(run.run_id)
    ended = client.wait(run.run_id)
    assert ended.state is RunState.SUCCEEDED, ended.error
    return run.run_id, f"{model}/{ended.model_version}"


def timeless(record: MetricRecord) -> Iterator[object]:
    """Yield what a record says beside times; nothing for what belongs to the attempt."""
    if not isinstance(record.payload, _OF_THE_ATTEMPT):
        values = dataclasses.asdict(record.payload)
        yield type(record.payload).__name__, {key: it for key, it in values.items() if not _MEASURED.search(key)}


def run_digests(client: Client, run_id: str, model: str, folder: Path) -> dict[str, str]:
    """Return the digests of a run's records and of the files of its model, but for what names the run."""
    folder.parent.mkdir(exist_ok=True)
    client.download_model(model, folder)
    records = [item for record in client.stream_metrics(run_id, follow=False) for item in timeless(record)]
    found = {"records": digest(records)}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def translation_digests(client: Client, model: str, sentences: Sequence[str]) -> dict[str, str]:
    """Return the digests of the sentences' translations in every way."""
    prefixed = [StreamSentence(id=str(i), sentence=text, target_prefix="ba") for i, text in enumerate(sentences)]
    ways: dict[str, tuple[Sequence[Any], dict[str, Any]]] = {
        "greedy": (sentences, {"beam_size": 1}),
        "beam 5": (sentences, {"beam_size": 5}),
        "n-best": (sentences[:200], {"beam_size": 4, "n_best": 4, "return_token_scores": True}),
        "sampling": (sentences[:200], {"sampling": Sampling(temperature=1.5, seed=3), "n_best": 2}),
        "prefixes": (prefixed[:200], {"beam_size": 3}),
    }
    found = {}
    for name, (texts, options) in ways.items():
        results = client.translate_stream(model, texts, in_order=True, **options)
        found[name] = digest(
            (hypothesis.text, hypothesis.pieces, round(hypothesis.log_probability, 3))
            for result in results
            for hypothesis in (result.translation.hypotheses if result.translation else ())
        )
    return found


def metric_names(port: int) -> list[str]:
    """Return name, type and label names of the metrics of a service."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    types = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    labels = {
        (name, tuple(sorted(set(re.findall(r'(\w+)="', found)) - {"le", "quantile"})))
        for name, found in re.findall(r"^(ferryman\w+)\{(.*)\} ", text, re.MULTILINE)
    }
    return sorted({f"{name} {kind}" for name, kind in types} | {f"{name}{list(names)}" for name, names in labels})


def everything(folder: Path) -> dict[str, Any]:
    """Train, translate and ask; return all digests."""
    text = made_up_text(_PAIRS + SENTENCES)
    pairs = list(zip(text.source[:_PAIRS], text.target[:_PAIRS], strict=True))
    sentences = text.source[_PAIRS:]
    found: dict[str, Any] = {"runs": {}}
    models = {}
    with (
        reserved_port() as port,
        local_service(folder / "data", folder / "log", ["--device", "cpu"], metrics_port=port) as address,
        Client(address) as client,
    ):
        corpus = client.upload_corpus(
            "golden", "en", "de", train=pairs[_VALIDATION_PAIRS:], validation=pairs[:_VALIDATION_PAIRS]
        )
        for name in _RECIPES:
            run_id, models[name] = train(client, corpus.corpus_id, name)
            found["runs"][name] = run_digests(client, run_id, models[name], folder / "bundles" / name)
            print(name, found["runs"][name], flush=True)  # noqa: T201
        found["translations"] = translation_digests(client, models["fp32"], sentences)
        found["metrics"] = metric_names(port)
    int8 = ["--device", "cpu", "--compute-type", "int8"]
    with local_service(folder / "data", folder / "log-int8", int8) as address, Client(address) as client:
        found["translations int8"] = translation_digests(client, models["fp32"], sentences)
    assert found["runs"]["paused"] == found["runs"]["fp32"], "a pause has left a trace"
    return found


def differences(before: object, after: object, place: str = "") -> Iterator[str]:
    """Yield what differs, one line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list):
        yield from (f"{place}: no longer {item}" for item in before if item not in after)
        yield from (f"{place}: new {item}" for item in after if item not in before)
    elif before != after:
        yield f"{place}: {before} has become {after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the digests; the exit status is 1 if they differ from those before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--before", type=Path, help="a file to compare with")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="ferryman-golden-"))
    found = everything(folder)
    shutil.rmtree(folder, ignore_errors=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.before is None:
        return 0
    lines = list(differences(json.loads(arguments.before.read_text()), found))
    print("\n".join(lines) or "nothing differs")  # noqa: T201
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
