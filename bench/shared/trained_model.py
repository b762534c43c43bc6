"""The trained model of the serving benchmarks: found if a good one is there, else trained once.

A bundle is used if it was trained on the benchmark's corpus, has the sizes of the preset `tiny` and is well trained.
`make bench-quality` may have left such a bundle. Otherwise the service trains one, for a fixed number of updates, so
that the weights are equally good on every machine; it is kept in bench-output/serving.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.shared.corpus import Corpus, find_corpus
from examples.local_service import local_service
from ferryman import Client
from ferryman.cli.progress import follow
from ferryman.types import (
    LearningRateSchedule,
    ModelRecipe,
    Recipe,
    RunState,
    StopRecipe,
    TrainingRun,
    ValidationRecipe,
)
from ferryman_service.bundle.manifest import FORMAT_VERSION, MANIFEST_FILE, manifest_digest
from ferryman_service.domain.corpora import Side, Split
from ferryman_service.domain.recipe import recipe_to_dict, resolve_recipe
from ferryman_service.stores.corpus_text import CorpusLimits, check_split
from ferryman_service.stores.corpus_upload import corpus_digest

QUALITY_OUTPUT: Final = Path("bench-output/quality")
QUALITY_MODEL_NAME: Final = "bench"
"""Where `bench-quality` leaves its model."""
OUTPUT: Final = Path("bench-output/serving/trained")
MODEL_NAME: Final = "serving"
UPDATES: Final = 1600
MULTI30K: Final = ("test_2016_flickr", "en", "de")
LEAST_BLEU: Final = 28.0
"""Of the validation set of Multi30k from English to German, translated greedily."""
_DECAYING_SCHEDULES: Final = ("linear", "cosine")
_LEAST_DECAYED_SHARE: Final = 0.8


class ModelUnfit(Exception):
    """A model is not what the benchmark needs. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The corpus and languages that the model must have been trained on."""

    corpus: Corpus
    source: str
    target: str

    @property
    def least_bleu(self) -> float | None:
        """The least validation BLEU of a well trained model; None where no bound is known."""
        return LEAST_BLEU if (self.corpus.test_name, self.source, self.target) == MULTI30K else None


def task_of(data: Path, source: str, target: str) -> Task:
    """Return the task of a folder with train, val and test files; raises TextMissing."""
    return Task(corpus=find_corpus(data, source, target), source=source, target=target)


def training_recipe() -> Recipe:
    """Return the preset `tiny` with a rate that decays until the last update."""
    return Recipe(
        preset="tiny",
        model=ModelRecipe(norm="pre", dropout=0.0),
        schedule=LearningRateSchedule(
            kind="linear", peak_learning_rate=0.004, warmup_steps=max(1, UPDATES // 6), total_steps=UPDATES
        ),
        stop=StopRecipe(max_steps=UPDATES),
        validation=ValidationRecipe(interval_steps=UPDATES, max_translated_pairs=500, averaging="none"),
    )


def trained_bundle(folder: Path | None, task: Task) -> Path:
    """Return a well trained model's bundle: the one in the folder; or one of bench-quality or of an earlier benchmark;
    or one that is trained now.

    Raises FileNotFoundError, ModelUnfit (`folder` holds no such bundle), ServiceFailed.
    """
    digest = digest_of(task)
    if folder is not None:
        if not (folder / MANIFEST_FILE).exists():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST_FILE}: pass MODEL=folder of a bundle")
        if fault := fault_of(folder, task, digest):
            raise ModelUnfit(f"{folder} {fault}; leave MODEL out to let the benchmark find or train a model")
        return folder
    for bundle in left_bundles():
        fault = fault_of(bundle, task, digest) or recipe_fault(bundle, task)
        if fault is None:
            print(f"translating with {bundle}", flush=True)
            return bundle
        print(f"not used: {bundle} {fault}", flush=True)
    bundle = train(task)
    if fault := fault_of(bundle, task, digest):
        raise ModelUnfit(f"{bundle}, which was trained for this benchmark, {fault}; look at {OUTPUT / 'service.log'}")
    return bundle


def left_bundles() -> Iterator[Path]:
    """Yield the bundles that bench-quality and the serving benchmarks left, the newest of each first."""
    for models in (QUALITY_OUTPUT / "data/models" / QUALITY_MODEL_NAME, OUTPUT / "data/models" / MODEL_NAME):
        versions = [path for path in models.glob("*") if path.name.isdigit() and (path / MANIFEST_FILE).exists()]
        yield from sorted(versions, key=lambda path: int(path.name), reverse=True)


def fault_of(bundle: Path, task: Task, digest: str) -> str | None:
    """Return why the bundle cannot be used for the task, as what follows its name in a sentence; None if it can."""
    manifest = _manifest(bundle)
    if manifest["format_version"] != FORMAT_VERSION:
        return f"has bundle format {manifest['format_version']}, not {FORMAT_VERSION}"
    header = manifest["header"]
    lineage, scores = header["lineage"], header["scores"]
    if lineage["corpus_digest"] != digest:
        return f"was trained on another corpus ({lineage['source_language']}-{lineage['target_language']}) than DATA"
    least = task.least_bleu
    if least is not None and scores["bleu"] < least:
        return f"has validation BLEU {scores['bleu']:.1f}, less than {least:g}"
    return None


def recipe_fault(bundle: Path, task: Task) -> str | None:
    """Return how the bundle's model differs in size from the preset `tiny`, or, where no bound of BLEU is known, that
    its learning rate had not decayed; as `fault_of` does. A bundle that the user names may differ."""
    step = _header(bundle)["scores"]["step"]
    if task.least_bleu is None and not _has_decayed(_header(bundle)["lineage"]["recipe"], step):
        return f"has weights of step {step}, whose learning rate had not decayed"
    wanted = recipe_to_dict(resolve_recipe({"preset": "tiny"}))
    recipe = _header(bundle)["lineage"]["recipe"]
    sizes = ("d_model", "encoder_layers", "decoder_layers", "heads", "ffn_dim")
    pairs = [(f"model.{name}", recipe["model"].get(name), wanted["model"][name]) for name in sizes]
    pairs.append(("data.vocabulary_size", recipe["data"].get("vocabulary_size"), wanted["data"]["vocabulary_size"]))
    differ = [f"{name} {found}, not {size}" for name, found, size in pairs if found != size]
    return f"has {', '.join(differ)}" if differ else None


def digest_of(task: Task) -> str:
    """Return the digest that the service gives the task's corpus."""
    files = {Split.TRAIN: task.corpus.train, Split.VALIDATION: task.corpus.validation}
    with tempfile.TemporaryDirectory() as name:
        raw, checked = Path(name, "raw"), Path(name, "checked")
        raw.mkdir()
        checked.mkdir()
        for split, pair in files.items():
            for side, path in ((Side.SOURCE, pair.source), (Side.TARGET, pair.target)):
                _unpack(path, raw / f"{split}.{side}")
        splits = {split: check_split(split, raw, checked, CorpusLimits()) for split in Split}
    return corpus_digest([task.source, task.target], splits)


def train(task: Task) -> Path:
    """Train through the service; return the published bundle. Raises ServiceFailed, ModelUnfit."""
    print(
        f"training a model for the serving benchmarks, once: {UPDATES:,} updates of the preset tiny, "
        f"some minutes on two cores; it is kept in {OUTPUT}",
        flush=True,
    )
    corpus = task.corpus
    with local_service(OUTPUT / "data", OUTPUT / "service.log") as address, Client(address) as client:
        uploaded = client.upload_corpus(
            corpus.test_name,
            task.source,
            task.target,
            train=(corpus.train.source, corpus.train.target),
            validation=(corpus.validation.source, corpus.validation.target),
        )
        run: TrainingRun = client.start_training(uploaded.corpus_id, MODEL_NAME, training_recipe())
        run = follow(client, run.run_id, Console())
    if run.state is not RunState.SUCCEEDED:
        raise ModelUnfit(
            f"training the benchmark's model ended {run.state}: {run.error}; pass MODEL=folder of a bundle"
        )
    return OUTPUT / "data/models" / MODEL_NAME / str(run.model_version)


def model_facts(bundle: Path) -> Mapping[str, Any]:
    """Return the facts about a trained model for a line of JSON."""
    header = _header(bundle)
    return {
        "bundle": str(bundle),
        "digest": manifest_digest(bundle)[:12],
        "validation_bleu": round(header["scores"]["bleu"], 2),
        "step": header["scores"]["step"],
    }


def _has_decayed(recipe: Mapping[str, Any], step: int) -> bool:
    schedule = recipe["schedule"]
    total = schedule.get("total_steps")
    return schedule["kind"] in _DECAYING_SCHEDULES and bool(total) and step >= _LEAST_DECAYED_SHARE * total


def _manifest(bundle: Path) -> Mapping[str, Any]:
    """Read without the checks of `read_manifest`: the bundle may have another format."""
    manifest: Mapping[str, Any] = json.loads((bundle / MANIFEST_FILE).read_text())
    return manifest


def _header(bundle: Path) -> Mapping[str, Any]:
    header: Mapping[str, Any] = _manifest(bundle)["header"]
    return header


def _unpack(path: Path, to: Path) -> None:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source, to.open("wb") as unpacked:
        shutil.copyfileobj(source, unpacked)
