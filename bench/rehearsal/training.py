"""The scenario of the training process: it is restarted while a run trains and a reader follows the run."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from bench.rehearsal.cluster import Cluster
from bench.rehearsal.effort import Effort
from bench.rehearsal.pods import kill_all_that_name
from bench.rehearsal.report import Report
from bench.rehearsal.texts import pairs_of
from ferryman import AsyncClient
from ferryman.errors import FerrymanError
from ferryman.types import (
    DataRecipe,
    MetricRecord,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunState,
    StepMetrics,
    StopRecipe,
    ValidationRecipe,
)

_MODEL: Final = "trained"
_SETTLE_STEPS: Final = 20
_RECIPE: Final = Recipe(
    model=ModelRecipe(d_model=64, encoder_layers=1, decoder_layers=1, heads=4, ffn_dim=128, dropout=0.0),
    data=DataRecipe(vocabulary_size=100, max_sentence_tokens=64),
    optimization=OptimizationRecipe(batch_target_tokens=2048),
    stop=StopRecipe(max_duration_s=40.0),
    validation=ValidationRecipe(interval_steps=200, max_translated_pairs=20, checkpoint_interval_steps=20),
)


class Follower:
    """Somebody who reads every record of a run through Envoy, with the SDK."""

    def __init__(self, client: AsyncClient, run_id: str) -> None:
        """Store."""
        self._client = client
        self._run_id = run_id
        self.records: list[MetricRecord] = []
        self.failure: FerrymanError | None = None
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for record in self._client.stream_metrics(self._run_id):
                self.records.append(record)
        except FerrymanError as error:
            self.failure = error

    async def until_more(self, steps: int) -> None:
        """Wait until so many more steps have come, or no more will."""
        before = len(self.steps())
        while len(self.steps()) < before + steps and not self._reading.done():
            await asyncio.sleep(0.05)

    async def until_end(self) -> None:
        """Wait until no more will come."""
        await self._reading

    def steps(self) -> list[int]:
        """Return the steps that have come, in the order in which they came."""
        return [record.payload.step for record in self.records if isinstance(record.payload, StepMetrics)]

    def sequences(self) -> list[int]:
        """Return the numbers of the records, in the order in which they came."""
        return [record.sequence for record in self.records]


async def restarted_training(cluster: Cluster, _: Effort) -> Report:
    """Restart the training pod twice: first the service alone, then, as a node that dies would, with its worker."""
    report = Report("e", "the training process restarted while a run trains and is followed; through Envoy")
    async with AsyncClient(cluster.envoy.target) as client:
        train, validation = (pairs_of(random.Random(seed), count) for seed, count in ((1, 2000), (2, 40)))
        corpus = await client.upload_corpus("rehearsal", "xx", "yy", train=train, validation=validation)
        run = await client.start_training(corpus.corpus_id, _MODEL, _RECIPE)
        follower = Follower(client, run.run_id)
        await follower.until_more(_SETTLE_STEPS)
        ending = await cluster.training.delete()
        await cluster.training.start()
        await follower.until_more(_SETTLE_STEPS)
        first = await client.get_training_run(run.run_id)
        await cluster.training.kill()
        kill_all_that_name(run.run_id)  # in a container its workers die with the service
        await cluster.training.start()
        last = await client.wait(run.run_id)
        await follower.until_end()
        answer = await client.translate(_MODEL, train[0][0])
    stopped = f"exit status {ending.status} after {ending.seconds:.1f} s"
    report.must("the restarted service ends by itself", stopped, ending.in_time and not ending.status)
    text = "the run continues in its worker when the service alone is restarted"
    report.must(text, f"attempt {first.attempt}, {first.state}", first.attempt == 1)
    report.must("the run continues in another worker when both die", f"attempt {last.attempt}", last.attempt == 2)
    report.must("it succeeds", last.state, last.state is RunState.SUCCEEDED)
    _check_follower(report, follower, last.last_sequence)
    report.must("its model is served by the replicas", answer.model, answer.model == f"{_MODEL}/1")
    return report


def _check_follower(report: Report, follower: Follower, last_sequence: int) -> None:
    """Note whether the reader has every record and every step once."""
    sequences, steps = follower.sequences(), follower.steps()
    seen = f"{len(sequences)} of {last_sequence} records{f', {follower.failure}' if follower.failure else ''}"
    report.must("the reader has every record once, in order", seen, sequences == list(range(1, last_sequence + 1)))
    report.must("and every step once, in order", f"{len(steps)} steps", steps == list(range(1, len(steps) + 1)))
