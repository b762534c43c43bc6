"""The plain loop of the quality benchmark: `peers.plain_loop` with an end, a falling rate, validations and a test.

As one writes it by hand, with the benefit of every doubt: its clock stands still while it validates, denormal numbers
are flushed as in our engine, and the search is ours. It reads on each line of its input the seconds of training at
which its turn ends. At the end of its time it takes the weights of its best validation and translates the test set.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import sacrebleu
import torch

from bench.peers.plain_loop import PlainTransformer, batch_loss, cut_batches, endless, new_optimizer, update
from bench.peers.plain_search import PlainDecoder
from bench.peers.task import Pair, read_ids
from bench.quality.peer import SUBWORDS, TEXTS, PlainJob, PlainOutcome, PlainRecipe, Point, read_job, write_outcome
from bench.shared.process import take_stdout
from ferryman_service.domain.translation import CancelToken, SearchOptions
from ferryman_service.pipeline.translator import MicroBatchLimit, TextTranslator
from ferryman_service.text.subwords import Subwords

_LOSS_MAX_TOKENS: Final = 4096


def learning_rate(recipe: PlainRecipe, share: float) -> float:
    """Return the rate at a share (0 to 1) of the time: a straight line up to the peak, another one down to 0."""
    rising = share / recipe.warmup_share
    falling = (1.0 - share) / (1.0 - recipe.warmup_share)
    return recipe.peak_learning_rate * max(0.0, min(rising, falling))


class TimedTraining:
    """Calls `step` with the used share of the time, and `validate` every so often, outside of the time."""

    def __init__(
        self,
        step: Callable[[float], None],
        validate: Callable[[float, int], None],
        *,
        total_s: float,
        validations: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._step = step
        self._validate = validate
        self._clock = clock
        self._interval_s = total_s / validations
        self._steps = 0
        self._validated_step = 0
        self.total_s = total_s
        self.elapsed_s = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the whole time is used."""
        return self.elapsed_s >= self.total_s

    def work(self, until_s: float) -> None:
        """Train until so many seconds of training are over; more than the whole time lengthens it."""
        self.total_s = max(self.total_s, until_s)
        next_validation_s = self._next_validation_s()
        while self.elapsed_s < until_s:
            started_s = self._clock()
            self._step(self.elapsed_s / self.total_s)
            self.elapsed_s += self._clock() - started_s
            self._steps += 1
            if self.elapsed_s >= next_validation_s:
                self._report()
                next_validation_s = self._next_validation_s()
        if self.is_over and self._validated_step < self._steps:
            self._report()

    def _next_validation_s(self) -> float:
        return (self.elapsed_s // self._interval_s + 1) * self._interval_s

    def _report(self) -> None:
        self._validate(self.elapsed_s, self._steps)
        self._validated_step = self._steps


class PlainTraining:
    """The model, its optimizer and its batches; what was found by validating, and the best weights."""

    def __init__(self, folder: Path, job: PlainJob) -> None:
        torch.manual_seed(job.seed)
        torch.set_flush_denormal(True)
        self.model = PlainTransformer(job.task).train()
        self.curve: list[Point] = []
        self._job = job
        self._optimizer = new_optimizer(self.model)
        self._batches = endless(cut_batches(read_ids(folder), job.task.max_tokens), job.seed)
        self._held_out = cut_batches(read_ids(folder, "validation"), _LOSS_MAX_TOKENS)
        texts = json.loads((folder / TEXTS).read_text())
        self._sources, self._references, self._test = texts["sources"], texts["references"], texts["test"]
        self._translator = TextTranslator(
            Subwords.load(folder / SUBWORDS), PlainDecoder(self.model), job.max_sentence_tokens, MicroBatchLimit()
        )
        self._best: tuple[Point, dict[str, torch.Tensor]] | None = None

    def step(self, share: float) -> None:
        """Take one step at the rate of this share of the time."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._job.recipe, share)
        update(self.model, self._optimizer, next(self._batches), self._job.task)

    def validate(self, seconds: float, step: int) -> None:
        """Score the weights on the validation set, and keep them if they are the best so far."""
        self.model.eval()
        nll_per_token = held_out_loss(self.model, self._held_out)
        bleu = sacrebleu.corpus_bleu(self._translate(self._sources, 1), [self._references]).score
        self.model.train()
        point = Point(seconds=round(seconds, 2), step=step, bleu=bleu, nll_per_token=nll_per_token)
        self.curve.append(point)
        if self._best is None or _rank(point) > _rank(self._best[0]):
            self._best = point, copy.deepcopy(self.model.state_dict())

    def finish(self) -> PlainOutcome:
        """Take the weights that were best on the validation set and translate the test set with them."""
        assert self._best is not None, "the end of the time is validated"
        selected, weights = self._best
        self.model.load_state_dict(weights)
        self.model.eval()
        translations = self._translate(self._test, self._job.beam_size) if self._job.has_test else []
        return PlainOutcome(curve=self.curve, selected=selected, translations=translations)

    def _translate(self, sentences: Sequence[str], beam_size: int) -> list[str]:
        found, _ = self._translator.translate(sentences, SearchOptions(beam_size=beam_size), CancelToken())
        return [translation.hypotheses[0].text for translation in found]


@torch.inference_mode()
def held_out_loss(model: PlainTransformer, batches: Sequence[Sequence[Pair]]) -> float:
    """Return nats per target token, without smoothing."""
    sums = [batch_loss(model, batch, label_smoothing=0.0) for batch in batches]
    return sum(loss.item() for loss, _ in sums) / sum(tokens for _, tokens in sums)


def _rank(point: Point) -> tuple[float, float]:
    return point.bleu, -point.nll_per_token


def main() -> None:
    """Train in turns until the time is over; then leave the outcome in the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="what bench.quality.peer wrote")
    folder: Path = parser.parse_args().folder
    answers = take_stdout()
    job = read_job(folder)
    training = PlainTraining(folder, job)
    timed = TimedTraining(training.step, training.validate, total_s=job.total_s, validations=job.recipe.validations)
    answers.write(json.dumps({"parameters": sum(each.numel() for each in training.model.parameters())}) + "\n")
    for line in sys.stdin:
        timed.work(until_s=float(line))
        if timed.is_over:
            write_outcome(folder, training.finish())
        memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        last = training.curve[-1].bleu if training.curve else 0.0
        answer = {"elapsed_s": timed.elapsed_s, "bleu": last, "peak_memory_mb": round(memory_mb)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
