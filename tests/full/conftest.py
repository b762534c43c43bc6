"""The images, built once for all tests here, and a training run of ten steps."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest

from ferryman import (
    Client,
    DataRecipe,
    LearningRateSchedule,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunState,
    StopRecipe,
    TrainingRun,
    ValidationRecipe,
)
from tests.full.containers import BASE, ContainerEngine
from tests.ops.conftest import helm_and_kubectl  # noqa: F401
from tests.system.conftest import reversal_corpus

MODEL = "reversal"
SENTENCES = ("ba ce di fo", "gu ka", "le mi no pu ba")
TARGETS = ("serving-cpu", "cpu")
STEPS = 10
_RECIPE = Recipe(
    model=ModelRecipe(d_model=32, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=64, dropout=0.0),
    data=DataRecipe(vocabulary_size=50, max_sentence_tokens=64),
    schedule=LearningRateSchedule(warmup_steps=5),
    optimization=OptimizationRecipe(batch_target_tokens=512),
    stop=StopRecipe(max_steps=STEPS),
    validation=ValidationRecipe(interval_steps=5, max_translated_pairs=10),
)
_MB = 10**6
_built: list[str] = []


@pytest.fixture(scope="session")
def engine() -> Iterator[ContainerEngine]:
    """An engine whose storage is removed at the end, unless KEEP_IMAGES names a folder that keeps the images."""
    kept = os.environ.get("KEEP_IMAGES", "")
    # Not in /tmp, which is memory on many machines.
    folder = Path(kept).absolute() if kept else Path(tempfile.mkdtemp(prefix="ferryman-images-", dir="/var/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    engine = ContainerEngine(folder)
    yield engine
    engine.remove_containers()
    if not kept:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def images(engine: ContainerEngine) -> Mapping[str, str]:
    """The name of the image of each target."""
    _build(engine, BASE, engine.build_base)
    names = {target: engine.image(target) for target in TARGETS}
    for target, image in names.items():
        _build(engine, image, partial(engine.build, target))
    return names


def _build(engine: ContainerEngine, image: str, build: Callable[[], None]) -> None:
    if engine.has_image(image):
        _built.append(f"{image}: kept from before, {engine.size_bytes(image) / _MB:,.0f} MB")
        return
    begin_s = time.monotonic()
    build()
    took_s = time.monotonic() - begin_s
    _built.append(f"{image}: built in {took_s:.0f} s, {engine.size_bytes(image) / _MB:,.0f} MB")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long the builds took, and how large the images are."""
    if _built:
        terminalreporter.section("images")
        for line in _built:
            terminalreporter.write_line(line)


@pytest.fixture
def volume(engine: ContainerEngine) -> str:
    """A new volume."""
    return engine.podman("volume", "create").strip()


def start_ten_steps(client: Client) -> TrainingRun:
    """Start a run that publishes the next version of MODEL."""
    corpus = client.upload_corpus(
        "reversal", "xx", "yy", train=reversal_corpus(500, seed=1), validation=reversal_corpus(20, seed=2)
    )
    return client.start_training(corpus.corpus_id, MODEL, _RECIPE)


def wait_for_success(client: Client, run: TrainingRun) -> TrainingRun:
    """Return the run, which must succeed, at its end."""
    ended = client.wait(run.run_id)
    assert ended.state is RunState.SUCCEEDED, ended
    return ended
