"""Ferryman's training engine, measured by turns: the whole of it, as a worker runs it, reports and all."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from bench.peers.task import recipe_of
from bench.shared.local_training import ListReporter, new_job, open_corpus
from bench.shared.turns import Turns, TurnsOver
from ferryman_service.domain.recipe import Precision, Preset
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine


class TurnReporter(ListReporter):
    """Waits for its turn when the engine asks, between two updates, whether to continue."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def check(self) -> None:
        """Go on when it is our turn. Before training has started the engine asks too: then it may."""
        if "TRAINING_STARTED" in self.codes():
            self._turns.boundary(self.steps[-1].target_tokens if self.steps else 0)


def main() -> None:
    """Train until no turn follows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="with a corpus in it")
    parser.add_argument("--preset", type=Preset, required=True)
    parser.add_argument("--precision", type=Precision, required=True)
    parser.add_argument("--batch-target-tokens", type=int, required=True)
    arguments = parser.parse_args()
    recipe = recipe_of(arguments.preset, arguments.batch_target_tokens, arguments.precision)
    job = new_job(f"{arguments.preset}-{arguments.precision}", recipe, open_corpus(arguments.folder), arguments.folder)
    try:
        TorchTrainingEngine(EngineConfig(device="cpu")).train(job, TurnReporter(Turns()))
    except TurnsOver:
        shutil.rmtree(job.run_dir)


if __name__ == "__main__":
    main()
