"""The cluster: three serving pods and a training pod on one data folder, and Envoy in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.rehearsal.chart import PodTemplate, pod_template
from bench.rehearsal.load import ALIAS, BEAM_SIZE, LENGTH, MODEL
from bench.rehearsal.pods import Pod, kill_all_that_name
from bench.rehearsal.proxy import Envoy
from bench.rehearsal.texts import sentences_of
from ferryman import AsyncClient

SENTENCES: Final = 48
_ENVOY_HOST: Final = 1
_TRAINING_HOST: Final = 10
_SERVING_HOST: Final = 11


class PreparationFailed(Exception):
    """A program that prepares the cluster has failed. The message holds what it said."""


@dataclass
class Cluster:
    """Everything that runs. `expected` is what each published version makes of each sentence."""

    folder: Path
    data: Path
    training: Pod
    serving: Sequence[Pod]
    envoy: Envoy
    sentences: Sequence[str]
    expected: dict[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def headless(self) -> str:
        """The target of a client that balances by itself: what a headless service's name leads to."""
        return "ipv4:" + ",".join(pod.target for pod in self.serving)

    async def publish(self, number: int) -> str:
        """Publish a bundle of `bench.rehearsal.models` beside the running pods, as a Job would; return its name."""
        bundle = self.folder / "bundles" / str(number)
        program = ("-m", "ferryman_service", "import-model", str(bundle), MODEL)
        said = await _run(*program, environment={"FERRYMAN_DATA_DIR": str(self.data)})
        return said.split()[-1]

    async def learn(self, reference: str) -> None:
        """Ask a replica what a version makes of every sentence."""
        async with AsyncClient(self.serving[0].target) as client:
            result = await client.translate(
                reference, self.sentences, beam_size=BEAM_SIZE, min_length=LENGTH, max_length=LENGTH + 1
            )
        assert result.model == reference, f"{reference} was asked for, {result.model} has answered"
        texts = [translation.text for translation in result.translations]
        self.expected[reference] = dict(zip(self.sentences, texts, strict=True))

    async def promote(self, number: int) -> None:
        """Let the alias point at a version: a call to the training process, through Envoy."""
        async with AsyncClient(self.envoy.target) as client:
            await client.set_model_alias(MODEL, ALIAS, number)


@contextlib.asynccontextmanager
async def running_cluster(folder: Path, objects: Sequence[dict[str, Any]]) -> AsyncIterator[Cluster]:
    """Start everything that the rendered chart says, with one published version; end it all with the block."""
    _clear(folder)
    data, network = folder / "data" / "own", _network()  # a folder of the service's own in the volume, as in the chart
    serving, training = (pod_template(objects, role) for role in ("translation", "training"))
    replicas = [_pod(serving, f"serving-{n + 1}", network, _SERVING_HOST + n, folder) for n in range(serving.replicas)]
    trainer = _pod(training, "training", network, _TRAINING_HOST, folder)
    envoy = Envoy(f"{network}.{_ENVOY_HOST}", {"translation": replicas, "training": [trainer]}, folder / "envoy")
    cluster = Cluster(folder, data, trainer, replicas, envoy, sentences_of(random.Random(2), SENTENCES))
    try:
        await _run("-m", "bench.rehearsal.models", str(folder / "bundles"))
        reference = await cluster.publish(1)
        await asyncio.gather(*(pod.start() for pod in (trainer, *replicas)))
        await envoy.start()
        await cluster.promote(1)
        await cluster.learn(reference)
        yield cluster
    finally:
        await envoy.stop()
        for pod in (*replicas, trainer):
            if pod.is_running():
                await pod.kill()
        kill_all_that_name(str(data.resolve()))  # workers outlive the service


def _pod(template: PodTemplate, name: str, network: str, host: int, folder: Path) -> Pod:
    return Pod(template, name, f"{network}.{host}", folder / "data", folder / name)


def _network() -> str:
    """Return a part of the loopback network that is unlikely to be another rehearsal's."""
    generator = random.Random(os.getpid())
    return f"127.{generator.randint(1, 254)}.{generator.randint(0, 254)}"


async def _run(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run Python with these arguments; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    output, errors = await process.communicate()
    if process.returncode:
        raise PreparationFailed(f"python {' '.join(arguments)}: {errors.decode(errors='replace')[-2000:]}")
    return output.decode()


def _clear(folder: Path) -> None:
    """Remove what an earlier rehearsal left; published bundles are read-only folders."""
    if folder.exists():
        for path in (folder, *folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
