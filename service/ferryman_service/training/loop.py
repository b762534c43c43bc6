"""The training loop: updates, validations and checkpoints, until a limit is reached."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ferryman_service.domain.recipe import Recipe
from ferryman_service.domain.records import EventLevel, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.training import PauseRequested, StopRequested
from ferryman_service.training.batches import Batch, Index, make_batch, plan_epoch, share
from ferryman_service.training.checkpoint import Checkpoint, Position, load_checkpoint, save_checkpoint
from ferryman_service.training.files import Disk
from ferryman_service.training.flops import peak_flops, training_flops
from ferryman_service.training.memory import used_memory_bytes
from ferryman_service.training.pairs import TokenPairs
from ferryman_service.training.ranks import Verdict
from ferryman_service.training.reporting import Series
from ferryman_service.training.resume import newest_usable
from ferryman_service.training.retention import prune_checkpoints, with_candidate
from ferryman_service.training.scores import ValidationScores, perplexity
from ferryman_service.training.step import PendingOutcome, StepOutcome, Trainee
from ferryman_service.training.validate import Validator

_FIRST_RESERVE: Final = 0.05


class TimeBudget:
    """The seconds that a run may take, and what its last work is expected to need of them."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the time; a limit of 0 is none."""
        self.clock = clock
        self._limit_s = limit_s
        self._started_s = clock()
        self.validation_s: float | None = None

    def resume(self, elapsed_s: float, validation_s: float | None) -> None:
        """Count what earlier attempts spent, and what they learnt about validations."""
        self._started_s -= elapsed_s
        self.validation_s = validation_s

    def elapsed_s(self) -> float:
        """Return the seconds spent, by earlier attempts too."""
        return self.clock() - self._started_s

    def is_spent(self, validations_to_come: int) -> bool:
        """Whether it is time to stop, so that this many validations still fit."""
        if self._limit_s == 0:
            return False
        reserve_s = self._limit_s * _FIRST_RESERVE
        if self.validation_s is not None:
            reserve_s = validations_to_come * self.validation_s
        return self.elapsed_s() + reserve_s >= self._limit_s


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """What the loop works with. Only rank 0 validates, reports and writes.

    `pairs(epoch)` returns the training pairs of a pass. No time limit ends training before `reported_step`: an earlier
    attempt has reported so far.
    """

    trainee: Trainee
    pairs: Callable[[int], TokenPairs]
    recipe: Recipe
    validator: Validator
    series: Series
    checkpoints: Path
    budget: TimeBudget
    reported_step: int = 0
    disk: Disk = field(default_factory=Disk)


@dataclass(frozen=True)
class _Sent:
    """An update that was sent to the device, and what its record says beside the outcome."""

    step: int
    epoch: int
    target_tokens: int
    padding_share: float
    flops: float
    started_s: float
    outcome: PendingOutcome


class TrainingLoop:
    """Trains from a position on."""

    def __init__(self, parts: LoopParts, position: Position | None = None) -> None:
        self._parts = parts
        self._ranks = parts.trainee.ranks
        self._pairs: TokenPairs | None = None
        self._plan: list[list[Index]] = []
        self._planned_epoch = 0
        self._sent: deque[_Sent] = deque()
        self._peak_flops = peak_flops(self._ranks.device, parts.recipe.optimization.precision)
        self.position = position or Position()

    def run(self) -> None:
        """Train until a limit is reached; then the weights of the last step are validated and in a checkpoint.

        Before PauseRequested and StopRequested are passed on, a checkpoint of the last step is left.
        """
        recipe = self._parts.recipe.validation
        if self.position == Position():
            self._save()  # a run that diverges or rests before its first validation has something to go back to
        while not self.position.ended and self._go_on():
            self._update()
            step = self.position.step
            if step % recipe.interval_steps == 0:
                self._validate()
            elif recipe.checkpoint_interval_steps and step % recipe.checkpoint_interval_steps == 0:
                self._save()
        if self.position.validated is None:
            self._validate()

    def _go_on(self) -> bool:
        verdict = Verdict.GO_ON
        if self._ranks.is_first:
            with self._ranks.others_follow():
                try:
                    self._parts.series.check()
                except (PauseRequested, StopRequested):
                    self._read_outcomes()
                    self._save()
                    raise
            if reason := self._reason_to_stop():
                self._read_outcomes()
                self._parts.series.event(EventLevel.INFO, *reason, repeats=True)
                verdict = Verdict.FINISH
        self.position = replace(self.position, ended=self._ranks.agree(verdict) is not Verdict.GO_ON)
        return not self.position.ended

    def _reason_to_stop(self) -> tuple[str, str] | None:
        stop, position = self._parts.recipe.stop, self.position
        if stop.patience and position.validations_since_best >= stop.patience:
            return "EARLY_STOP", f"{stop.patience} validations without a better score: stopping at step {position.step}"
        if stop.max_steps and position.step >= stop.max_steps:
            return "LIMIT_REACHED", f"stop.max_steps: {position.step} updates are done"
        if stop.max_epochs and position.epoch >= stop.max_epochs and self._epoch_is_over():
            return "LIMIT_REACHED", f"stop.max_epochs: {position.epoch} passes over the pairs are done"
        validations_to_come = 1 + (position.validated is None)
        in_time = position.step < max(1, self._parts.reported_step)
        if not in_time and self._parts.budget.is_spent(validations_to_come):
            return "LIMIT_REACHED", f"stop.max_time_seconds: the time is over at step {position.step}"
        return None

    def _update(self) -> None:
        started_s = self._parts.budget.clock()
        update = self._next_update()
        assert self._pairs is not None
        target_tokens = sum(int(self._pairs.target.lengths_P[index_B].sum()) for index_B in update)
        own = share(update, self._ranks.rank, self._ranks.world_size)
        batches = [make_batch(self._pairs, index_B) for index_B in own]
        on_device = [batch.to(self._ranks.device) for batch in batches]
        outcome = self._parts.trainee.step(on_device, target_tokens)
        position = self.position
        self.position = replace(
            position, step=position.step + 1, updates_in_epoch=position.updates_in_epoch + 1, validated=None
        )
        flops = self._flops(batches) if self._peak_flops else 0.0
        padding = _padding_share(batches)
        step, epoch = self.position.step, self.position.epoch
        self._sent.append(_Sent(step, epoch, target_tokens, padding, flops, started_s, outcome))
        # On a GPU the newest update is still on its way, and nobody waits for it.
        self._read_outcomes(but=1 if self._ranks.device.type == "cuda" else 0)

    def _read_outcomes(self, but: int = 0) -> None:
        """Report the updates that were sent, all but the newest `but`, and see to those that were skipped."""
        while len(self._sent) > but:
            sent = self._sent.popleft()
            outcome = sent.outcome.read()
            self._report_step(sent, outcome)
            in_a_row = self.position.skipped_in_a_row + 1 if outcome.skipped else 0
            self.position = replace(self.position, skipped_in_a_row=in_a_row)
            if in_a_row > self._parts.recipe.optimization.max_skipped_updates:
                self._roll_back(sent.step, outcome)

    def _roll_back(self, step: int, outcome: StepOutcome) -> None:
        """Go back to the last checkpoint with a lower learning rate. Raises TrainingFailed (NON_FINITE_LOSS)."""
        recipe, trainee = self._parts.recipe.optimization, self._parts.trainee
        diverged = f"{self.position.skipped_in_a_row} updates in a row up to step {step} had no finite gradient"
        path = None
        if self.position.rollbacks < recipe.max_rollbacks:
            path, _ = newest_usable(self._parts.checkpoints)
        if path is None:
            text = (
                f"{diverged} (loss {outcome.loss}, learning rate {outcome.learning_rate:g}), after "
                f"{self.position.rollbacks} returns to a checkpoint: lower the learning rate, warm up longer, or clip "
                "the gradient"
            )
            raise TrainingFailed(FailureReason.NON_FINITE_LOSS, text)
        self._sent.clear()
        checkpoint = load_checkpoint(path)
        trainee.load(checkpoint.tensors, checkpoint.counters)
        trainee.scale_rate(recipe.rollback_rate_scale)
        text = (
            f"{diverged}: back to step {checkpoint.position.step}, the learning rate times "
            f"{trainee.counters().rate_scale:g} from here on"
        )
        if self._ranks.is_first:
            self._parts.series.event(EventLevel.WARNING, "ROLLED_BACK", text, repeats=True)
        self.position = replace(checkpoint.position, rollbacks=self.position.rollbacks + 1, skipped_in_a_row=0)
        self._ranks.agree(Verdict.GO_ON)  # all have read the checkpoint before the first one replaces it
        self._save()

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
        recipe = self._parts.recipe
        self._pairs = self._parts.pairs(self.position.epoch)
        self._planned_epoch = self.position.epoch
        self._plan = plan_epoch(
            self._pairs.source.lengths_P,
            self._pairs.target.lengths_P,
            batch_target_tokens=recipe.optimization.batch_target_tokens,
            seed=recipe.seed,
            epoch=self.position.epoch,
            parts=self._ranks.world_size * recipe.optimization.accumulation_steps,
        )

    def _flops(self, batches: list[Batch]) -> float:
        source, target = sum(b.source_tokens for b in batches), sum(b.target_tokens for b in batches)
        pairs = sum(len(b.source_BS) for b in batches)
        return training_flops(self._parts.trainee.model.config, source, target, pairs) if pairs else 0.0

    def _report_step(self, sent: _Sent, outcome: StepOutcome) -> None:
        if not self._ranks.is_first:
            return
        seconds = self._parts.budget.clock() - sent.started_s
        metrics = StepMetrics(
            step=sent.step,
            epoch=sent.epoch,
            loss=outcome.loss,
            nll_per_token=outcome.nll_per_token,
            perplexity=perplexity(outcome.nll_per_token),
            learning_rate=outcome.learning_rate,
            gradient_norm=outcome.gradient_norm,
            target_tokens=sent.target_tokens,
            target_tokens_per_second=sent.target_tokens / seconds,
            step_seconds=seconds,
            padding_share=sent.padding_share,
            memory_bytes=used_memory_bytes(self._ranks.device),
            skipped=outcome.skipped,
            model_flops_utilization=sent.flops / seconds / self._peak_flops if self._peak_flops else 0.0,
        )
        self._parts.series.step(metrics)
        if outcome.skipped:
            text = f"step {sent.step}: the gradient's norm is {outcome.gradient_norm}; the weights were left alone"
            self._parts.series.event(EventLevel.WARNING, "UPDATE_SKIPPED", text, repeats=True)
        if outcome.split:
            text = f"step {sent.step}: the batch did not fit into the device's memory and was computed in halves"
            self._parts.series.event(EventLevel.WARNING, "OUT_OF_MEMORY_SPLIT", text)

    def _validate(self) -> None:
        """Validate, report, and leave a checkpoint. Rank 0 does; the others go on and wait for its next verdict."""
        step = self.position.step
        self._read_outcomes()
        if self.position.step != step:
            return  # an outcome that was still on its way led back to a checkpoint
        if not self._ranks.is_first:
            self.position = replace(self.position, validated=_NOT_MINE)
            return
        clock, trainee = self._parts.budget.clock, self._parts.trainee
        started_s = clock()
        with self._ranks.others_follow(), trainee.published():
            scores = self._parts.validator.score(trainee.model)
            self._report_validation(scores, clock() - started_s)
        self._parts.budget.validation_s = clock() - started_s
        self._save()

    def _save(self) -> None:
        """Leave a checkpoint once everything before it is durable; rank 0 does."""
        if not self._ranks.is_first:
            return
        parts = self._parts
        with self._ranks.others_follow():
            parts.series.flush()
            self.position = replace(
                self.position,
                reports=parts.series.reports,
                elapsed_s=parts.budget.elapsed_s(),
                validation_s=parts.budget.validation_s,
            )
            checkpoint = Checkpoint(parts.trainee.tensors(), parts.trainee.counters(), self.position)
            save_checkpoint(parts.checkpoints, checkpoint, parts.disk)
            prune_checkpoints(parts.checkpoints, self.position, parts.disk)

    def _report_validation(self, scores: ValidationScores, seconds: float) -> None:
        recipe, best, position = self._parts.recipe.validation, self.position.best, self.position
        rank = scores.rank(recipe.metric)
        is_best = best is None or rank > best.rank(recipe.metric)
        candidates = with_candidate(position.candidates, position.step, rank, recipe)
        position = replace(position, validated=scores, candidates=candidates)
        if is_best:
            position = replace(position, best=scores, best_step=position.step, validations_since_best=0)
        else:
            position = replace(position, validations_since_best=position.validations_since_best + 1)
        self.position = position
        metrics = ValidationMetrics(
            step=position.step,
            epoch=position.epoch,
            loss=scores.loss,
            nll_per_token=scores.nll_per_token,
            perplexity=perplexity(scores.nll_per_token),
            bleu=scores.bleu,
            chrf=scores.chrf,
            translated_pairs=scores.translated_pairs,
            seconds=seconds,
            best=is_best,
        )
        self._parts.series.validation(metrics)


_NOT_MINE: Final = ValidationScores(loss=0.0, nll_per_token=0.0, bleu=0.0, chrf=0.0, translated_pairs=0)
"""What the other ranks hold in place of rank 0's scores: that there are some."""


def _padding_share(batches: list[Batch]) -> float:
    positions = sum(batch.positions for batch in batches)
    tokens = sum(batch.source_tokens + batch.target_tokens for batch in batches)
    return 1.0 - tokens / positions if positions else 0.0
