"""The models of the serving benchmark, each as a bundle of ours and as CTranslate2's folders of the same weights.

tiny: the trained one of `trained_model`; translations end where the model ends them. base: the preset with 32,001
subwords and random weights; every translation is made to have 15 subwords.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers.environment import PeerMissing, ctranslate2_python
from bench.shared.corpus import News
from bench.shared.made_up import NO_SCORES, untrained_lineage, write_untrained_weights
from bench.shared.trained_model import Task
from examples.parallel_text import TextMissing, read_lines
from ferryman_service.bundle.manifest import (
    FORMAT_VERSION,
    SUBWORDS_FILE,
    WEIGHTS_FILE,
    manifest_digest,
    read_manifest,
)
from ferryman_service.domain.models import ModelLineage
from ferryman_service.domain.recipe import Recipe, SubwordAlgorithm, resolve_recipe
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.training import TrainedModel
from ferryman_service.text.normalise import normalise
from ferryman_service.text.subwords import Subwords, train_subwords

FOLDER: Final = Path("bench-output/serving")
COMPUTE_TYPES: Final = ("fp32", "int8")
PEER_TYPES: Final = {"fp32": "float32", "int8": "int8"}
"""CTranslate2's name of each compute type."""
CORES: Final = 2
BASE_VOCABULARY: Final = 32_001
FORCED_LENGTH: Final = 15
_CHECK_SENTENCES: Final = 64
_SEED: Final = 1


@dataclass(frozen=True, kw_only=True)
class ServingTask:
    """A model in both forms (`peers`: by compute type) and what it is to translate: subword ids with the end symbol;
    the translations' length in subwords, at most or, if `forced`, exactly; `references` of a trained model."""

    name: str
    bundle: Path
    peers: Mapping[str, Path]
    sentences: Sequence[Sequence[int]]
    max_length: int
    forced: bool
    references: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus: what subwords are learnt from, held-out sentences to check an export with, and the test set."""

    training: Sequence[str]
    held_out: Sequence[str]
    test_source: Sequence[str]
    test_target: Sequence[str]


def read_text(task: Task, news: News) -> Text:
    """Read the task's corpus, and news for more words; raises TextMissing."""
    train, corpus = read_lines(task.corpus.train), task.corpus
    training = [*train.source, *train.target, *news.training.source, *news.training.target]
    return Text(
        training=[normalise(line) for line in training],
        held_out=[normalise(line) for line in read_lines(corpus.validation).source],
        test_source=[normalise(line) for line in corpus.test.source],
        test_target=corpus.test.target,
    )


def tiny_task(trained: Path, text: Text) -> ServingTask:
    """Return the task of the trained model; raises TextMissing, PeerMissing."""
    limit = read_manifest(trained).header.max_sentence_tokens
    sentences = [[*ids, EOS] for ids in Subwords.load(trained / SUBWORDS_FILE).encode(text.test_source)]
    longest = max(map(len, sentences))
    if longest > limit:
        raise TextMissing(f"the test set has a sentence of {longest} subwords, the model takes {limit}")
    return ServingTask(
        name="tiny",
        bundle=trained,
        peers=converted(trained),
        sentences=sentences,
        max_length=min(limit, 2 * longest + 10),
        forced=False,
        references=text.test_target,
    )


def base_task(text: Text, sentences: int) -> ServingTask:
    """Return the task of the random model: random subwords, as many as the first test sentences have."""
    bundle = base_bundle(text)
    lengths = map(len, Subwords.load(bundle / SUBWORDS_FILE).encode(text.test_source[:sentences]))
    generator = random.Random(_SEED)
    ids = [[*(generator.randrange(EOS + 1, BASE_VOCABULARY) for _ in range(length)), EOS] for length in lengths]
    return ServingTask(
        name="base",
        bundle=bundle,
        peers=converted(bundle),
        sentences=ids,
        max_length=FORCED_LENGTH,
        forced=True,
    )


def base_bundle(text: Text) -> Path:
    """Return the bundle of the base preset with random weights, making it if it is not there."""
    recipe = resolve_recipe({"preset": "base", "data": {"vocabulary_size": BASE_VOCABULARY}})
    return random_bundle(recipe, text.training, text.held_out, FOLDER / "base")


def random_bundle(recipe: Recipe, training: Sequence[str], held_out: Sequence[str], folder: Path) -> Path:
    """Return the bundle of a recipe with random weights and BPE subwords, making it in `folder` if it is not there."""
    parts = folder.with_name(f"{folder.name}-parts")
    subwords, weights = parts / SUBWORDS_FILE, parts / WEIGHTS_FILE
    parts.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        train_subwords(
            training,
            subwords,
            vocabulary_size=recipe.data.vocabulary_size,
            algorithm=SubwordAlgorithm.BPE,
            character_coverage=1.0,
            seed=_SEED,
        )
        write_untrained_weights(recipe, weights)
    trained = TrainedModel(
        weights=weights,
        subwords=subwords,
        recipe=recipe,
        scores=NO_SCORES,
        parameters=count_numbers(weights),
        check_sentences=held_out[:_CHECK_SENTENCES],
    )
    return _exported(trained, untrained_lineage(recipe), folder)


def count_numbers(weights: Path) -> int:
    """Return how many numbers a safetensors file holds, by its header."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(part["shape"]) for name, part in header.items() if name != "__metadata__")


def _exported(trained: TrainedModel, lineage: ModelLineage, folder: Path) -> Path:
    """Return the bundle that this version's exporter writes, if need be, into `folder`."""
    ready = folder.with_suffix(".ready")
    if ready.exists() and ready.read_text() == str(FORMAT_VERSION):
        return folder
    from ferryman_service.training.export import OnnxExporter  # needs torch

    print(f"exporting {trained.weights} into {folder}, once", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    OnnxExporter().export(trained, lineage, folder)
    ready.write_text(str(FORMAT_VERSION))
    return folder


def converted(bundle: Path) -> dict[str, Path]:
    """Return CTranslate2's forms of a bundle's weights, FP32 and with weights in int8; raises PeerMissing."""
    python = ctranslate2_python()
    folders = {}
    for compute_type, options in (("fp32", []), ("int8", ["--quantization", "int8"])):
        folder = FOLDER / "ctranslate2" / f"{manifest_digest(bundle)[:12]}-{compute_type}"
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            command = [str(python), "-m", "bench.peers.ctranslate2_convert", str(bundle), str(partial), *options]
            if (ended := subprocess.run(command, capture_output=True, text=True)).returncode:
                raise PeerMissing(f"the conversion to CTranslate2 failed:\n{ended.stderr[-2000:]}")
            partial.rename(folder)
        folders[compute_type] = folder
    return folders
