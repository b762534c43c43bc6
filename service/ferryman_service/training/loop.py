"""The training loop: updates, validations and checkpoints, until a limit is reached."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ferryman_service.domain.recipe import Recipe
from ferryman_service.domain.records import EventLevel, ValidationMetrics
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.schedule import DecayPlan, DecayReason, ScheduleKind
from ferryman_service.domain.training import PauseRequested, StopRequested
from ferryman_service.training.batches import SOURCE_MULTIPLE, make_batch
from ferryman_service.training.budget import TimeBudget
from ferryman_service.training.checkpoint import (
    Checkpoint,
    Position,
    checkpoint_path,
    checkpoint_step,
    load_checkpoint,
)
from ferryman_service.training.decay import DecayPlanner, high_rate, reaches_target
from ferryman_service.training.files import Disk
from ferryman_service.training.packing import EpochPlan, Update, plan_epoch
from ferryman_service.training.pairs import TokenPairs
from ferryman_service.training.ranks import Verdict
from ferryman_service.training.reporting import Series
from ferryman_service.training.resume import newest_usable
from ferryman_service.training.retention import remove_newer, with_candidate
from ferryman_service.training.scores import ValidationScores, perplexity
from ferryman_service.training.step import StepOutcome, Trainee
from ferryman_service.training.updates import SentUpdate, StepMeter, padding_share
from ferryman_service.training.validate import Validator
from ferryman_service.training.writer import CheckpointWriter


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """What the loop works with. Only rank 0 validates, reports and writes.

    `pairs(epoch)` returns the training pairs of a pass; if that takes long, it may raise what a request to rest raises.
    No time limit ends training before `reported_step`: an earlier attempt has reported so far. `decays` are the decays
    that earlier attempts planned.
    """

    trainee: Trainee
    pairs: Callable[[int], TokenPairs]
    recipe: Recipe
    validator: Validator
    series: Series
    checkpoints: Path
    budget: TimeBudget
    reported_step: int = 0
    decays: Sequence[DecayPlan] = ()
    disk: Disk = field(default_factory=Disk)


class TrainingLoop:
    """Trains from a position on.

    Every method is called by all ranks, at the same places; `_go_on` says where rank 0 decides for all.
    """

    def __init__(self, parts: LoopParts, position: Position | None = None) -> None:
        self._parts = parts
        self._ranks = parts.trainee.ranks
        self._pairs: TokenPairs | None = None
        self._plan: EpochPlan | None = None
        self._planned_epoch = 0
        self._sent: deque[SentUpdate] = deque()
        self._meter = StepMeter(self._ranks.device, parts.recipe.optimization, parts.trainee.model.config)
        self._writer = CheckpointWriter(parts.checkpoints, parts.disk)
        self._rest: PauseRequested | StopRequested | None = None
        self._planner = DecayPlanner(parts.recipe, parts.budget, parts.decays, parts.reported_step)
        self._next_decay: DecayPlan | None = None
        self._boundary_s: float | None = None
        """When the last update ended: the time of an update includes what is done between two. A validation, whose time
        is measured by itself, forgets it."""
        self.position = position or Position()
        parts.trainee.decays = self.position.decays

    def run(self) -> None:
        """Train until a limit is reached; then the weights of the last step are validated and in a checkpoint.

        Before PauseRequested and StopRequested are passed on, a checkpoint of the last step is left.
        """
        with self._writer:
            if self.position.is_beginning:
                self._save()  # a run that diverges or rests before its first validation has something to go back to
            self._validate_if_due()
            while self._go_on():
                step = self.position.step
                self._update()
                if self.position.step > step:
                    self._validate_if_due()
                    self._save_if_due()
            self._end()

    def _go_on(self) -> bool:
        while (verdict := self._verdict()) is not Verdict.GO_ON:
            # Outcomes that were still on their way may lead back to a checkpoint: then this is not the end, nor the
            # time to decay.
            if not self._settle():
                continue
            if verdict is Verdict.FINISH:
                return False
            self._begin_decay()
        return True

    def _verdict(self) -> Verdict:
        verdict = Verdict.GO_ON
        if self._ranks.is_first:
            with self._ranks.others_follow():
                self._writer.check()
                if self._is_to_rest():
                    verdict = Verdict.FINISH
                elif self._decay_is_due():
                    verdict = Verdict.DECAY
                elif self._reason_to_stop() is not None:
                    verdict = Verdict.FINISH
        return self._ranks.agree(verdict)

    def _decay_is_due(self) -> bool:
        self._next_decay = self._planner.next_plan(self.position)
        return self._next_decay is not None

    def _begin_decay(self) -> None:
        """Let the learning rate decay from the next update on; before that the plan is durable."""
        numbers = [0.0] * 3
        if self._next_decay is not None:
            plan = self._next_decay
            numbers = [float(plan.first_step), float(plan.last_step), float(_REASONS.index(plan.reason))]
        first, last, reason = (int(number) for number in self._ranks.share(numbers))
        plan = DecayPlan(first_step=first, last_step=last, reason=_REASONS[reason])
        self.position = replace(self.position, decays=(*self.position.decays, plan))
        self._parts.trainee.decays = self.position.decays
        if self._ranks.is_first:
            with self._ranks.others_follow():
                self._parts.series.decay_plan(plan)
                self._parts.series.flush()

    def _is_to_rest(self) -> bool:
        self._rest = None
        try:
            self._parts.series.check()
        except (PauseRequested, StopRequested) as request:
            self._rest = request
        return self._rest is not None

    def _reason_to_stop(self) -> tuple[str, str] | None:
        stop, position = self._parts.recipe.stop, self.position
        if position.ending is not None:
            return position.ending
        last_step = self._planner.last_step(position)
        if last_step is not None and position.step >= last_step:
            return "DECAY_ENDED", f"the learning rate's decay has ended at step {position.step}"
        if self._parts.recipe.schedule.kind is not ScheduleKind.WSD:
            if stop.patience and position.validations_since_best >= stop.patience:
                text = f"{stop.patience} validations without a better score: stopping at step {position.step}"
                return "EARLY_STOP", text
            if position.validated is not None and reaches_target(self._parts.recipe, position.validated):
                return "TARGET_REACHED", f"stop.target_score: {stop.target_score:g} is reached at step {position.step}"
        if stop.max_steps and position.step >= stop.max_steps:
            return "LIMIT_REACHED", f"stop.max_steps: {position.step} updates are done"
        if stop.max_epochs and position.epoch >= stop.max_epochs and self._epoch_is_over():
            return "LIMIT_REACHED", f"stop.max_epochs: {position.epoch} passes over the pairs are done"
        validations_to_come = 1 + (position.validated is None)
        decays = last_step is not None or self._planner.is_waiting(position)
        in_time = decays or position.step < max(1, self._parts.reported_step)
        if not in_time and self._parts.budget.is_spent(validations_to_come):
            return "LIMIT_REACHED", f"stop.max_duration: the time is over at step {position.step}"
        return None

    def _end(self) -> None:
        """Leave the last state validated and in a checkpoint, and say why it is the last; or rest."""
        reason = None
        if self._ranks.is_first:
            with self._ranks.others_follow():
                if self._rest is not None:
                    self._lay_down()
                    raise self._rest
                reason = self._reason_to_stop()
                if self.position.ending is None:
                    self.position = replace(self.position, ending=reason)
                    if self._parts.recipe.stop.max_duration_s:
                        # The clock is no function of the recipe: what it said must be known to whoever does this again.
                        self._lay_down()
        if self.position.validated is None:
            self._validate()
        self._see_written()
        if reason is not None:
            if (event := high_rate(self._parts.recipe, self.position)) is not None:
                self._parts.series.event(*event, repeats=True)
            self._parts.series.event(EventLevel.INFO, *reason, repeats=True)

    def _lay_down(self) -> None:
        """Leave a checkpoint that the run's plan does not have, and see it on the disk."""
        self._write()
        self._writer.wait()

    def _see_written(self) -> None:
        """Wait until the last checkpoint is on the disk; a failure is known to all ranks."""
        if self._ranks.is_first:
            with self._ranks.others_follow():
                self._writer.wait()

    def _update(self) -> None:
        started_s = self._parts.budget.clock()
        update = self._next_update()
        assert self._pairs is not None
        target_tokens = sum(int(self._pairs.target.lengths_P[index_B].sum()) for index_B in itertools.chain(*update))
        multiple = SOURCE_MULTIPLE[self._ranks.device.type]
        batches = [make_batch(self._pairs, index_B, multiple) for index_B in update[self._ranks.rank]]
        on_device = [batch.to(self._ranks.device) for batch in batches]
        outcome = self._parts.trainee.step(on_device, target_tokens)
        position = self.position
        self.position = replace(
            position, step=position.step + 1, updates_in_epoch=position.updates_in_epoch + 1, validated=None
        )
        self._sent.append(
            SentUpdate(
                step=self.position.step,
                epoch=self.position.epoch,
                target_tokens=target_tokens,
                padding_share=padding_share(batches),
                flops=self._meter.flops(batches),
                started_s=started_s,
                outcome=outcome,
            )
        )
        # On a GPU the newest update is still on its way, and nobody waits for it.
        self._read_outcomes(but=1 if self._ranks.device.type == "cuda" else 0)
        now_s = self._parts.budget.clock()
        self._parts.budget.note_update(now_s - (self._boundary_s or started_s))
        self._boundary_s = now_s

    def _settle(self) -> bool:
        """Wait for all updates; return False if they led back to a checkpoint."""
        step = self.position.step
        self._read_outcomes()
        return self.position.step == step

    def _read_outcomes(self, but: int = 0) -> None:
        """Report the updates that were sent, all but the newest `but`, and see to those that were skipped."""
        while len(self._sent) > but:
            sent = self._sent.popleft()
            with self._ranks.heartbeat.waiting():  # for a GPU, which may never answer
                outcome = sent.outcome.read()
            self._report_step(sent, outcome)
            in_a_row = self.position.skipped_in_a_row + 1 if outcome.skipped else 0
            self.position = replace(self.position, skipped_in_a_row=in_a_row)
            if in_a_row > self._parts.recipe.optimization.max_skipped_updates:
                self._roll_back(sent.step, outcome)

    def _roll_back(self, step: int, outcome: StepOutcome) -> None:
        """Go back to the last checkpoint with a lower learning rate. Raises TrainingFailed (NON_FINITE_LOSS)."""
        self._sent.clear()
        diverged = f"{self.position.skipped_in_a_row} updates in a row up to step {step} had no finite gradient"
        target = self._ranks.ask_first(lambda: self._step_to_go_back_to(diverged, outcome))
        checkpoint = load_checkpoint(checkpoint_path(self._parts.checkpoints, int(target)))
        trainee = self._parts.trainee
        trainee.load(checkpoint.tensors, checkpoint.counters)
        trainee.scale_rate(self._parts.recipe.optimization.rollback_rate_scale)
        text = (
            f"{diverged}: back to step {checkpoint.position.step}, the learning rate times "
            f"{trainee.counters().rate_scale:g} from here on"
        )
        if self._ranks.is_first:
            self._parts.series.event(EventLevel.WARNING, "ROLLED_BACK", text, repeats=True)
        self.position = replace(checkpoint.position, rollbacks=self.position.rollbacks + 1, skipped_in_a_row=0)
        trainee.decays = self.position.decays
        self._ranks.meet()  # all have read the checkpoint before the first one replaces it
        if self._ranks.is_first:
            with self._ranks.others_follow():
                # What a pause has left beyond knows nothing of the divergence: whoever is next must not begin there.
                remove_newer(self._parts.checkpoints, int(target), self._parts.disk)
        self._save()
        self._see_written()

    def _step_to_go_back_to(self, diverged: str, outcome: StepOutcome) -> int:
        self._writer.wait()
        position, path = self.position, None
        if position.rollbacks < self._parts.recipe.optimization.max_rollbacks:
            path, damages = newest_usable(self._parts.checkpoints, up_to_step=position.scheduled_step)
            for damage in damages:
                self._parts.series.event(EventLevel.WARNING, "CHECKPOINT_DAMAGED", damage)
        if path is None:
            text = (
                f"{diverged} (loss {outcome.loss}, learning rate {outcome.learning_rate:g}), after "
                f"{position.rollbacks} returns to a checkpoint: lower the learning rate, warm up longer, or clip "
                "the gradient"
            )
            raise TrainingFailed(FailureReason.NON_FINITE_LOSS, text)
        return checkpoint_step(path)

    def _next_update(self) -> Update:
        if self._epoch_is_over():
            self.position = replace(self.position, epoch=self.position.epoch + 1, updates_in_epoch=0)
        return self._plan_epoch()[self.position.updates_in_epoch]

    def _epoch_is_over(self) -> bool:
        return not self._plan_epoch().exists(self.position.updates_in_epoch)

    def _plan_epoch(self) -> EpochPlan:
        if self._plan is not None and self._planned_epoch == self.position.epoch:
            return self._plan
        recipe = self._parts.recipe
        try:
            self._pairs = self._parts.pairs(self.position.epoch)
        except (PauseRequested, StopRequested):
            if self._settle():  # else a divergence has left a checkpoint already
                self._lay_down()
            raise
        self._planned_epoch = self.position.epoch
        self._plan = plan_epoch(
            self._pairs.source.lengths_P,
            self._pairs.target.lengths_P,
            batch_target_tokens=recipe.optimization.batch_target_tokens,
            seed=recipe.seed,
            epoch=self.position.epoch,
            ranks=self._ranks.world_size,
            micro_batches=recipe.optimization.accumulation_steps,
        )
        return self._plan

    def _report_step(self, sent: SentUpdate, outcome: StepOutcome) -> None:
        if not self._ranks.is_first:
            return
        series = self._parts.series
        series.step(self._meter.metrics(sent, outcome, self._parts.budget.clock()))
        if outcome.skipped:
            text = f"step {sent.step}: the gradient's norm is {outcome.gradient_norm}; the weights were left alone"
            series.event(EventLevel.WARNING, "UPDATE_SKIPPED", text, repeats=True)
        if outcome.split:
            text = f"step {sent.step}: the batch did not fit into the device's memory and was computed in halves"
            series.event(EventLevel.WARNING, "OUT_OF_MEMORY_SPLIT", text)
        if outcome.uncompiled:
            text = f"step {sent.step}: compiled code failed, and the run goes on without: {outcome.uncompiled}"
            series.event(EventLevel.WARNING, "COMPILATION_FAILED", text)

    def _validate_if_due(self) -> None:
        interval, position = self._parts.recipe.validation.interval_steps, self.position
        is_due = position.step > 0 and position.step % interval == 0 and position.validated is None
        if is_due and self._settle():
            self._validate()

    def _save_if_due(self) -> None:
        interval, position = self._parts.recipe.validation.checkpoint_interval_steps, self.position
        if interval and position.step % interval == 0 and position.scheduled_step != position.step and self._settle():
            self._save()

    def _validate(self) -> None:
        """Validate, report, and leave a checkpoint. Rank 0 does; the others go on and wait for its next verdict."""
        if not self._ranks.is_first:
            self.position = replace(self.position, validated=_NOT_MINE)
        else:
            clock = self._parts.budget.clock
            started_s = clock()
            with self._ranks.others_follow():
                scores = self._scores()
                self._report_validation(scores, clock() - started_s)
            self._parts.budget.validation_s = clock() - started_s
        self._save()
        self._boundary_s = None

    def _scores(self) -> ValidationScores:
        trainee, validator = self._parts.trainee, self._parts.validator
        try:
            with trainee.published():
                scores = validator.score(trainee.model)
        except (PauseRequested, StopRequested):
            self._lay_down()
            raise
        if validator.was_split:
            text = (
                f"validation at step {self.position.step}: a batch did not fit into the device's memory and was halved"
            )
            self._parts.series.event(EventLevel.WARNING, "OUT_OF_MEMORY_SPLIT", text)
        return scores

    def _report_validation(self, scores: ValidationScores, seconds: float) -> None:
        recipe, best, position = self._parts.recipe.validation, self.position.best, self.position
        metric = self._parts.validator.metric
        rank = scores.rank(metric)
        is_best = best is None or rank > best.rank(metric)
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
            duration_s=seconds,
            best=is_best,
            bleu_signature=self._parts.validator.bleu_signature,
        )
        self._parts.series.validation(metrics)

    def _save(self) -> None:
        """Leave a checkpoint that the run's plan has at this step."""
        self.position = replace(self.position, scheduled_step=self.position.step)
        if self._ranks.is_first:
            with self._ranks.others_follow():
                self._write()

    def _write(self) -> None:
        """Begin to write a checkpoint; everything before it is durable by now."""
        parts = self._parts
        parts.series.flush()
        self.position = replace(
            self.position,
            reports=parts.series.reports,
            elapsed_s=parts.budget.elapsed_s(),
            validation_s=parts.budget.validation_s,
            update_s=parts.budget.update_s(),
        )
        self._writer.write(Checkpoint(parts.trainee.tensors(), parts.trainee.counters(), self.position))


_REASONS: Final = tuple(DecayReason)

_NOT_MINE: Final = ValidationScores(loss=0.0, nll_per_token=0.0, bleu=0.0, chrf=0.0, translated_pairs=0)
"""What the other ranks hold in place of rank 0's scores: that there are some."""
