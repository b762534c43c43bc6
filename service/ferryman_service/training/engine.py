"""The training engine: PyTorch, on this machine's CPU or GPU, alone or as one of several processes."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ferryman_service.config.resources import usable_cpus
from ferryman_service.domain.heartbeat import Heartbeat
from ferryman_service.domain.models import ModelScores, PublishedWeights
from ferryman_service.domain.os_errors import refuse_if_exhausted
from ferryman_service.domain.recipe import Recipe
from ferryman_service.domain.records import EventLevel
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.tracing import NULL_TRACER, Tracer
from ferryman_service.domain.training import TrainedModel, TrainingJob
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.budget import TimeBudget
from ferryman_service.training.checkpoint import (
    CheckpointDamaged,
    Position,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    tidy_up,
)
from ferryman_service.training.compile import SETTINGS, choose_attention, compilation_remark, set_up_compilation
from ferryman_service.training.data import ValidationPairs, tokenise_validation_pairs
from ferryman_service.training.files import Disk, RunFiles, disk_full_is_told
from ferryman_service.training.finish import choose_weights
from ferryman_service.training.loop import LoopParts, TrainingLoop
from ferryman_service.training.pairs import TokenPairs
from ferryman_service.training.prepared import open_prepared, prepare_corpus, prepared_folder
from ferryman_service.training.ranks import ALONE, Group, Ranks, Verdict, join_ranks
from ferryman_service.training.reporting import Reporter, Series
from ferryman_service.training.resume import newest_usable
from ferryman_service.training.sampling import epoch_source
from ferryman_service.training.scoring import scoring_of
from ferryman_service.training.step import Trainee, new_trainee
from ferryman_service.training.validate import Validator
from ferryman_service.trash import move_to_trash

_CHECK_SENTENCES: Final = 64
_HELD_OUT_PAIRS: Final = 1000
_BEGINNING: Final = -1


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and how to train: `device` is "auto" (a GPU if there is one), "cpu" or "cuda"; `threads` None is torch's
    choice; `compilation` of the layers is "auto" (on a GPU, where Triton and a C compiler are at hand), "on" or "off";
    `group` says with which processes.
    """

    device: str = "auto"
    threads: int | None = None
    compilation: str = "auto"
    group: Group = ALONE

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f'device is {self.device!r}, must be "auto", "cpu" or "cuda"')
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, must be at least 1")
        if self.compilation not in SETTINGS:
            raise ValueError(f'compilation is {self.compilation!r}, must be "auto", "on" or "off"')


class TorchTrainingEngine:
    """A TrainingEngine. Changes torch's settings for the whole process: use it in a program of its own."""

    def __init__(
        self,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        disk: Disk | None = None,
        tracer: Tracer = NULL_TRACER,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self._config = config
        self._tracer = tracer
        self._heartbeat = heartbeat
        self._clock = clock
        self._disk = disk or Disk()

    def train(self, job: TrainingJob, reporter: Reporter) -> TrainedModel:
        """Train until the recipe's limit, from the newest checkpoint in the run's folder if there is one.

        In a group of processes each calls this; only the first reports and writes, all return the same.
        Raises TrainingFailed, DiskIsFull, and what Reporter.check raises.
        """
        budget = TimeBudget(job.recipe.stop.max_duration_s, self._clock)
        joined = join_ranks(self._device(), self._config.group, self._heartbeat)
        with disk_full_is_told(job.run_dir), joined as ranks:
            self._set_up_torch()
            series = Series(reporter)
            return _Run(job, series, ranks, budget, self._disk, self._config.compilation, self._tracer).train()

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

    def __init__(
        self,
        job: TrainingJob,
        series: Series,
        ranks: Ranks,
        budget: TimeBudget,
        disk: Disk,
        compilation: str,
        tracer: Tracer,
    ) -> None:
        self._job = job
        self._recipe = job.recipe
        self._files = RunFiles(job.run_dir)
        self._series = series
        self._ranks = ranks
        self._budget = budget
        self._disk = disk
        self._compilation = compilation
        self._tracer = tracer
        self._compiled = False

    def train(self) -> TrainedModel:
        cpus = usable_cpus().value
        step = int(self._ranks.ask_first(lambda: self._begin(threads=cpus)))  # the others wait here for the files
        prepared = open_prepared(prepared_folder(self._job))
        assert prepared is not None, "the first process has made it"
        subwords = Subwords.load(prepared.subwords)
        # With several ranks nobody may leave alone while the others go on to the next update.
        check = self._series.check if self._ranks.world_size == 1 else (lambda: None)
        epochs = self._files.epochs / str(self._ranks.rank)
        pairs = epoch_source(self._job, prepared, subwords, epochs, check)
        validation = tokenise_validation_pairs(self._job.corpus, subwords, self._recipe.data, threads=cpus)
        model = self._new_model(subwords.size)
        validator = Validator(
            validation,
            subwords,
            self._recipe,
            self._ranks.device,
            self._series.check,
            self._tracer,
            scoring_of(self._job.target_language),
        )
        trainee, position = self._start(model) if step == _BEGINNING else self._go_back_to(step, model)
        if self._ranks.is_first:
            self._report_start(model, prepared.pairs(), validation, position)
        position = self._loop(trainee, pairs, validator, position)
        shutil.rmtree(epochs, ignore_errors=True)
        scores = self._choose_weights(model, validator, position)
        return TrainedModel(
            weights=self._files.weights,
            subwords=prepared.subwords,
            recipe=_with_vocabulary_of(subwords.size, self._recipe),
            scores=scores,
            parameters=count_parameters(model),
            check_sentences=validation.sources[:_CHECK_SENTENCES],
            held_out=list(zip(validation.sources, validation.references, strict=True))[:_HELD_OUT_PAIRS],
        )

    def _begin(self, threads: int) -> int:
        """Find out where to go on, and make what all ranks need; return the step of the checkpoint, or _BEGINNING."""
        checkpoint = self._find_checkpoint()
        # Subwords are learnt and the training pairs tokenised once for all ranks and all runs that want them so.
        with self._tracer.span("prepare corpus"):
            prepared = prepare_corpus(self._job, self._series, threads=threads)
        if checkpoint is not None:
            return checkpoint_step(checkpoint)
        self._series.resume(0)
        for remark in prepared.remarks:
            self._series.event(*remark, repeats=True)
        return _BEGINNING

    def _find_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint; remove what a crash has left, and set aside what is damaged."""
        folder = self._files.checkpoints
        folder.mkdir(exist_ok=True)
        tidy_up(folder, self._disk)
        path, damages = newest_usable(folder)
        for damage in damages:
            where = "the one before it" if path is not None else "the beginning"
            self._series.event(EventLevel.WARNING, "CHECKPOINT_DAMAGED", f"{damage}; going back to {where}")
        for newer in list_checkpoints(folder):
            if path is None or newer > path:
                self._set_aside(newer)
        return path

    def _set_aside(self, checkpoint: Path) -> None:
        """Take a damaged checkpoint out of the way. It may be whole again, as when a file could not be read for now."""
        if self._job.trash_dir is None:
            self._disk.remove(checkpoint)
        else:
            move_to_trash(self._job.trash_dir, checkpoint, "the checkpoint is damaged")

    def _start(self, model: Transformer) -> tuple[Trainee, Position]:
        """Begin at step 0: with random weights, or with those of a published model."""
        initial = self._job.initial
        if initial is None:
            return self._new_trainee(model), self._beginning()
        try:
            model.load_state_dict(load_file(initial.weights))
            trainee = self._new_trainee(model)
            if initial.keep_optimizer:
                if initial.checkpoint is None:
                    raise CheckpointDamaged("the run's own checkpoints are, and those with the optimizer are gone")
                checkpoint = load_checkpoint(initial.checkpoint)
                trainee.load_moments(checkpoint.tensors, checkpoint.counters.updates_applied)
        except (CheckpointDamaged, OSError, SafetensorError, RuntimeError, KeyError) as error:
            refuse_if_exhausted(error)
            text = f"the model to start from does not fit the recipe, or its files are damaged: {error}"
            raise TrainingFailed(FailureReason.INITIAL_MODEL_UNUSABLE, text) from error
        return trainee, self._beginning()

    def _beginning(self) -> Position:
        return Position(prepared=prepared_folder(self._job).name)

    def _go_back_to(self, step: int, model: Transformer) -> tuple[Trainee, Position]:
        checkpoint = load_checkpoint(checkpoint_path(self._files.checkpoints, step))
        position = checkpoint.position
        if position.prepared != self._beginning().prepared:
            text = (
                "this release makes other subwords or other pairs of the corpus than the one that began the run, which "
                "therefore cannot go on exactly: start it anew, or resume it with that release"
            )
            raise TrainingFailed(FailureReason.CHECKPOINT_UNUSABLE, text)
        trainee = self._new_trainee(model)
        trainee.load(checkpoint.tensors, checkpoint.counters)
        self._budget.resume(position.elapsed_s, position.validation_s, position.update_s)
        self._series.resume(position.reports)
        again = max(0, self._job.reported_step - step)
        text = f"going on from the checkpoint of step {step}; {again} steps that were reported are done again"
        self._series.event(EventLevel.INFO, "RESUMED", text)
        return trainee, position

    def _new_model(self, vocabulary_size: int) -> Transformer:
        torch.manual_seed(self._recipe.seed)  # the same initial weights on all ranks
        model = Transformer(TransformerConfig.from_recipe(self._recipe, vocabulary_size))
        choose_attention(self._ranks.device)
        model = model.to(self._ranks.device).train()
        self._compiled = set_up_compilation(model, self._compilation, self._ranks.device)
        return model

    def _new_trainee(self, model: Transformer) -> Trainee:
        return new_trainee(model, self._recipe, self._ranks, compiled=self._compiled)

    def _report_start(
        self, model: Transformer, pairs: TokenPairs, validation: ValidationPairs, position: Position
    ) -> None:
        if validation.dropped and position.is_beginning:
            message = f"dropped validation pairs: {validation.dropped}"
            self._series.event(EventLevel.WARNING, "VALIDATION_PAIRS_DROPPED", message, repeats=True)
        scoring = scoring_of(self._job.target_language).describe(self._recipe.validation.metric)
        processes = f" in {self._ranks.world_size} processes" if self._ranks.world_size > 1 else ""
        message = (
            f"{count_parameters(model):,} parameters, {len(pairs):,} training pairs, "
            f"{len(validation.sources):,} validation pairs; on {self._ranks.device}{processes}; {scoring}"
        )
        self._series.event(EventLevel.INFO, "TRAINING_STARTED", message)
        remark = compilation_remark(self._compiled, self._compilation, self._ranks.device)
        if remark is not None:
            self._series.event(*remark)

    def _loop(
        self, trainee: Trainee, pairs: Callable[[int], TokenPairs], validator: Validator, position: Position
    ) -> Position:
        parts = LoopParts(
            trainee=trainee,
            pairs=pairs,
            recipe=self._recipe,
            validator=validator,
            series=self._series,
            checkpoints=self._files.checkpoints,
            budget=self._budget,
            reported_step=self._job.reported_step,
            decays=self._job.decays,
            disk=self._disk,
        )
        loop = TrainingLoop(parts, position)
        with self._tracer.span("train", {"ferryman.first_step": position.step + 1}) as span:
            try:
                loop.run()
            finally:
                span.set({"ferryman.last_step": loop.position.step, "ferryman.epoch": loop.position.epoch})
        return loop.position

    def _choose_weights(self, model: Transformer, validator: Validator, position: Position) -> ModelScores:
        chosen = None
        if self._ranks.is_first:
            with self._ranks.others_follow():
                chosen = choose_weights(model, validator, position, self._recipe, self._files, self._series, self._disk)
        self._ranks.agree(Verdict.FINISH)
        return self._share_scores(chosen, validator)

    def _share_scores(self, chosen: ModelScores | None, validator: Validator) -> ModelScores:
        """Return rank 0's scores on every rank."""
        numbers = [0.0] * 6
        if chosen is not None:
            scores = (chosen.bleu, chosen.chrf, chosen.nll_per_token)
            numbers = [*scores, float(chosen.weights is PublishedWeights.AVERAGE), chosen.step, chosen.translated_pairs]
        bleu, chrf, nll_per_token, is_average, step, pairs = self._ranks.share(numbers)
        return ModelScores(
            bleu=bleu,
            chrf=chrf,
            nll_per_token=nll_per_token,
            weights=PublishedWeights.AVERAGE if is_average else PublishedWeights.CHECKPOINT,
            step=int(step),
            translated_pairs=int(pairs),
            loss_pairs=validator.loss_pairs,
            bleu_signature=validator.bleu_signature,
        )


def _with_vocabulary_of(size: int, recipe: Recipe) -> Recipe:
    """Return the recipe that leads to the same model and names the vocabulary's size."""
    if not recipe.data.reduce_vocabulary or size == recipe.data.vocabulary_size:
        return recipe
    data = dataclasses.replace(recipe.data, vocabulary_size=size, reduce_vocabulary=False)
    return dataclasses.replace(recipe, data=data)


def count_parameters(model: Transformer) -> int:
    """Return how many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
