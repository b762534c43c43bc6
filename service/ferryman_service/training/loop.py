"""The training loop: updates, validations and checkpoints, until a limit is reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from ferryman_service.domain.recipe import Recipe
from ferryman_service.domain.records import EventLevel, StepMetrics, ValidationMetrics
from ferryman_service.training.batches import Batch, Index, make_batch, plan_epoch
from ferryman_service.training.checkpoint import Position, prune_checkpoints, save_checkpoint
from ferryman_service.training.memory import used_memory_bytes
from ferryman_service.training.pairs import TokenPairs
from ferryman_service.training.ranks import Verdict
from ferryman_service.training.reporting import Reporter
from ferryman_service.training.scores import ValidationScores, perplexity
from ferryman_service.training.step import StepOutcome, Trainee, training_step
from ferryman_service.training.validate import Validator

_FIRST_RESERVE: Final = 0.05


class TimeBudget:
    """The seconds that a run may take, and what its last work is expected to need of them."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the time; a limit of 0 is none."""
        self.clock = clock
        self._limit_s = limit_s
        self._started_s = clock()
        self._validation_s: float | None = None

    def validation_took(self, seconds: float) -> None:
        """Learn from a validation how long the last ones will take."""
        self._validation_s = seconds

    def is_spent(self, validations_to_come: int) -> bool:
        """Whether it is time to stop, so that this many validations still fit."""
        if self._limit_s == 0:
            return False
        reserve_s = self._limit_s * _FIRST_RESERVE
        if self._validation_s is not None:
            reserve_s = validations_to_come * self._validation_s
        return self.clock() - self._started_s + reserve_s >= self._limit_s


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """What the loop works with. Only rank 0 validates, reports and writes."""

    trainee: Trainee
    pairs: TokenPairs
    recipe: Recipe
    validator: Validator
    reporter: Reporter
    checkpoints: Path
    budget: TimeBudget


class TrainingLoop:
    """Trains from a position on."""

    def __init__(self, parts: LoopParts, position: Position | None = None) -> None:
        self._parts = parts
        self._ranks = parts.trainee.ranks
        self._plan: list[list[Index]] = []
        self._planned_epoch = 0
        self._validated_step = -1
        self.position = position or Position()

    def run(self) -> None:
        """Train until a limit is reached; then the weights of the last step are validated and in a checkpoint."""
        interval = self._parts.recipe.validation.interval_steps
        while self._go_on():
            self._update()
            if self.position.step % interval == 0:
                self._validate()
        if self._validated_step != self.position.step:
            self._validate()

    def _go_on(self) -> bool:
        verdict = Verdict.GO_ON
        if self._ranks.is_first:
            with self._ranks.others_follow():
                self._parts.reporter.check()
            if reason := self._reason_to_stop():
                self._parts.reporter.event(EventLevel.INFO, *reason)
                verdict = Verdict.FINISH
        return self._ranks.agree(verdict) is Verdict.GO_ON

    def _reason_to_stop(self) -> tuple[str, str] | None:
        stop, position = self._parts.recipe.stop, self.position
        if stop.patience and position.validations_since_best >= stop.patience:
            return "EARLY_STOP", f"{stop.patience} validations without a better score: stopping at step {position.step}"
        if stop.max_steps and position.step >= stop.max_steps:
            return "LIMIT_REACHED", f"stop.max_steps: {position.step} updates are done"
        if stop.max_epochs and position.epoch >= stop.max_epochs and self._epoch_is_over():
            return "LIMIT_REACHED", f"stop.max_epochs: {position.epoch} passes over the pairs are done"
        validations_to_come = 1 + (self._validated_step != position.step)
        if position.step and self._parts.budget.is_spent(validations_to_come):
            return "LIMIT_REACHED", f"stop.max_time_seconds: the time is over at step {position.step}"
        return None

    def _update(self) -> None:
        clock = self._parts.budget.clock
        started_s = clock()
        update = self._next_update()
        lengths_P = self._parts.pairs.target.lengths_P
        target_tokens = sum(int(lengths_P[index_B].sum()) for index_B in update)
        batch = self._own_batch(update)
        seed_dropout(self._parts.recipe.seed, self.position.step + 1, self._ranks.rank)
        outcome = training_step(self._parts.trainee, batch, target_tokens)
        self.position = replace(
            self.position, step=self.position.step + 1, updates_in_epoch=self.position.updates_in_epoch + 1
        )
        if self._ranks.is_first and batch is not None:
            self._report_step(outcome, batch, target_tokens, clock() - started_s)

    def _next_update(self) -> list[Index]:
        if self._epoch_is_over():
            self.position = replace(self.position, epoch=self.position.epoch + 1, updates_in_epoch=0)
        self._plan_epoch()
        return self._plan[self.position.updates_in_epoch]

    def _epoch_is_over(self) -> bool:
        self._plan_epoch()
        return self.position.updates_in_epoch >= len(self._plan)

    def _plan_epoch(self) -> None:
        if self._planned_epoch == self.position.epoch:
            return
        pairs, recipe = self._parts.pairs, self._parts.recipe
        self._planned_epoch = self.position.epoch
        self._plan = plan_epoch(
            pairs.source.lengths_P,
            pairs.target.lengths_P,
            batch_target_tokens=recipe.optimization.batch_target_tokens,
            seed=recipe.seed,
            epoch=self.position.epoch,
            ranks=self._ranks.world_size,
        )

    def _own_batch(self, update: list[Index]) -> Batch | None:
        if self._ranks.rank >= len(update):
            return None
        return make_batch(self._parts.pairs, update[self._ranks.rank]).to(self._ranks.device)

    def _report_step(self, outcome: StepOutcome, batch: Batch, target_tokens: int, seconds: float) -> None:
        metrics = StepMetrics(
            step=self.position.step,
            epoch=self.position.epoch,
            loss=outcome.loss,
            nll_per_token=outcome.nll_per_token,
            perplexity=perplexity(outcome.nll_per_token),
            learning_rate=outcome.learning_rate,
            gradient_norm=outcome.gradient_norm,
            target_tokens=target_tokens,
            target_tokens_per_second=target_tokens / seconds,
            step_seconds=seconds,
            padding_share=batch.padding_share,
            memory_bytes=used_memory_bytes(self._ranks.device),
        )
        self._parts.reporter.step(metrics)

    def _validate(self) -> None:
        """Validate, report, and leave a checkpoint. Rank 0 does; the others go on and wait for its next verdict."""
        self._validated_step = self.position.step
        if not self._ranks.is_first:
            return
        clock, trainee = self._parts.budget.clock, self._parts.trainee
        started_s = clock()
        with self._ranks.others_follow():
            scores = self._parts.validator.score(trainee.model)
            self._report_validation(scores, clock() - started_s)
            save_checkpoint(self._parts.checkpoints, trainee.model, trainee.optimizer, self.position)
            keep_last = self._parts.recipe.validation.keep_last
            prune_checkpoints(self._parts.checkpoints, keep_last, self.position.best_step)
        self._parts.budget.validation_took(clock() - started_s)

    def _report_validation(self, scores: ValidationScores, seconds: float) -> None:
        metric, best = self._parts.recipe.validation.metric, self.position.best
        is_best = best is None or scores.rank(metric) > best.rank(metric)
        if is_best:
            self.position = replace(self.position, best=scores, best_step=self.position.step, validations_since_best=0)
        else:
            self.position = replace(self.position, validations_since_best=self.position.validations_since_best + 1)
        metrics = ValidationMetrics(
            step=self.position.step,
            epoch=self.position.epoch,
            loss=scores.loss,
            nll_per_token=scores.nll_per_token,
            perplexity=perplexity(scores.nll_per_token),
            bleu=scores.bleu,
            chrf=scores.chrf,
            translated_pairs=scores.translated_pairs,
            seconds=seconds,
            best=is_best,
        )
        self._parts.reporter.validation(metrics)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of an update a function of these: a resumed run draws what an unbroken one does."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))
