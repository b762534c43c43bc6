"""The training engine: PyTorch, on this machine's CPU or GPU, alone or as one of several processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from ferryman_service.domain.models import ModelScores
from ferryman_service.domain.records import EventLevel
from ferryman_service.domain.training import TrainedModel, TrainingJob
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.checkpoint import Position
from ferryman_service.training.data import (
    ValidationPairs,
    learn_subwords,
    tokenise_training_pairs,
    tokenise_validation_pairs,
)
from ferryman_service.training.files import RunFiles, disk_full_is_a_failure
from ferryman_service.training.finish import choose_weights
from ferryman_service.training.loop import LoopParts, TimeBudget, TrainingLoop
from ferryman_service.training.pairs import TokenPairs, open_pairs
from ferryman_service.training.ranks import Ranks, Verdict, join_ranks
from ferryman_service.training.reporting import Reporter
from ferryman_service.training.step import new_trainee
from ferryman_service.training.validate import Validator

_CHECK_SENTENCES: Final = 64


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where to train: `device` is "auto" (a GPU if there is one), "cpu" or "cuda"; `threads` None is torch's choice."""

    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f'device is {self.device!r}, must be "auto", "cpu" or "cuda"')
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, must be at least 1")


class TorchTrainingEngine:
    """A TrainingEngine. Changes torch's settings for the whole process: use it in a program of its own."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock

    def train(self, job: TrainingJob, reporter: Reporter) -> TrainedModel:
        """Train until the recipe's limit. Raises TrainingFailed, and what Reporter.check raises.

        What an earlier attempt left in the run's folder is removed. In a group of processes each calls this; only the
        first reports and writes, all return the same.
        """
        budget = TimeBudget(job.recipe.stop.max_time_seconds, self._clock)
        with disk_full_is_a_failure(job.run_dir), join_ranks(self._device()) as ranks:
            self._set_up_torch()
            return _Run(job, reporter, ranks, budget).train()

    def _device(self) -> torch.device:
        if self._config.device != "auto":
            return torch.device(self._config.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _set_up_torch(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        # Adam's moments of rarely seen subwords decay into denormal numbers, on which a CPU is many times slower.
        torch.set_flush_denormal(True)


class _Run:
    """One call of train."""

    def __init__(self, job: TrainingJob, reporter: Reporter, ranks: Ranks, budget: TimeBudget) -> None:
        self._job = job
        self._recipe = job.recipe
        self._files = RunFiles(job.run_dir)
        self._reporter = reporter
        self._ranks = ranks
        self._budget = budget

    def train(self) -> TrainedModel:
        if self._ranks.is_first:
            with self._ranks.others_follow():
                self._prepare()
        self._ranks.agree(Verdict.GO_ON)  # the others wait here for the files
        subwords, pairs = Subwords.load(self._files.subwords), open_pairs(self._files.pairs)
        data, cores = self._recipe.data, os.cpu_count() or 1
        validation = tokenise_validation_pairs(self._job.corpus, subwords, data, threads=cores)
        model = self._new_model(subwords.size)
        validator = Validator(validation, subwords, self._recipe, self._ranks.device, self._reporter.check)
        if self._ranks.is_first:
            self._report_start(model, pairs, validation)
        position = self._loop(model, pairs, validator)
        scores = self._choose_weights(model, validator, position)
        return TrainedModel(
            weights=self._files.weights,
            subwords=self._files.subwords,
            recipe=self._recipe,
            scores=scores,
            parameters=count_parameters(model),
            check_sentences=validation.sources[:_CHECK_SENTENCES],
        )

    def _prepare(self) -> None:
        """Learn subwords and tokenise the training pairs, once for all ranks."""
        started_s = time.perf_counter()
        self._files.start_afresh()
        data, check = self._recipe.data, self._reporter.check
        subwords = learn_subwords(self._job.corpus, data, self._files, seed=self._recipe.seed, check=check)
        message = f"learnt {subwords.size} {data.subword_algorithm} subwords in {time.perf_counter() - started_s:.1f} s"
        self._reporter.event(EventLevel.INFO, "SUBWORDS_TRAINED", message)
        cores = os.cpu_count() or 1
        tokenise_training_pairs(self._job.corpus, subwords, data, self._files, self._reporter, threads=cores)

    def _new_model(self, vocabulary_size: int) -> Transformer:
        torch.manual_seed(self._recipe.seed)  # the same initial weights on all ranks
        return Transformer(TransformerConfig.from_recipe(self._recipe, vocabulary_size)).to(self._ranks.device)

    def _report_start(self, model: Transformer, pairs: TokenPairs, validation: ValidationPairs) -> None:
        if validation.dropped:
            message = f"dropped validation pairs: {validation.dropped}"
            self._reporter.event(EventLevel.WARNING, "VALIDATION_PAIRS_DROPPED", message)
        processes = f" in {self._ranks.world_size} processes" if self._ranks.world_size > 1 else ""
        message = (
            f"{count_parameters(model):,} parameters, {len(pairs):,} training pairs, "
            f"{len(validation.sources):,} validation pairs; on {self._ranks.device}{processes}"
        )
        self._reporter.event(EventLevel.INFO, "TRAINING_STARTED", message)

    def _loop(self, model: Transformer, pairs: TokenPairs, validator: Validator) -> Position:
        parts = LoopParts(
            trainee=new_trainee(model.train(), self._recipe, self._ranks),
            pairs=pairs,
            recipe=self._recipe,
            validator=validator,
            reporter=self._reporter,
            checkpoints=self._files.checkpoints,
            budget=self._budget,
        )
        loop = TrainingLoop(parts)
        loop.run()
        return loop.position

    def _choose_weights(self, model: Transformer, validator: Validator, position: Position) -> ModelScores:
        chosen = None
        if self._ranks.is_first:
            with self._ranks.others_follow():
                recipe, reporter = self._recipe.validation, self._reporter
                chosen = choose_weights(model, validator, position, recipe, self._files, reporter)
        self._ranks.agree(Verdict.FINISH)
        return self._share_scores(chosen)

    def _share_scores(self, chosen: ModelScores | None) -> ModelScores:
        """Return rank 0's scores on every rank."""
        numbers = [0.0] * 5
        if chosen is not None:
            numbers = [chosen.bleu, chosen.chrf, chosen.nll_per_token, float(chosen.weights == "best"), chosen.step]
        bleu, chrf, nll_per_token, is_best, step = self._ranks.share(numbers)
        weights = "best" if is_best else "average"
        return ModelScores(bleu=bleu, chrf=chrf, nll_per_token=nll_per_token, weights=weights, step=int(step))


def count_parameters(model: Transformer) -> int:
    """Return how many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
