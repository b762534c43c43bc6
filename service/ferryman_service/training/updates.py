"""Updates on their way: what was sent to the device, and the record that is made of it when its outcome is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ferryman_service.domain.recipe import OptimizationRecipe
from ferryman_service.domain.records import StepMetrics
from ferryman_service.model.config import TransformerConfig
from ferryman_service.training.batches import Batch
from ferryman_service.training.flops import peak_flops, training_flops
from ferryman_service.training.memory import used_memory_bytes
from ferryman_service.training.scores import perplexity
from ferryman_service.training.step import PendingOutcome, StepOutcome


@dataclass(frozen=True)
class SentUpdate:
    """An update that was sent to the device, and what its record says beside the outcome."""

    step: int
    epoch: int
    target_tokens: int
    padding_share: float
    flops: float
    started_s: float
    outcome: PendingOutcome


class StepMeter:
    """Makes the records of updates, in the order in which they were sent."""

    def __init__(self, device: torch.device, recipe: OptimizationRecipe, config: TransformerConfig) -> None:
        self._device = device
        self._config = config
        self._passes = 2 if recipe.r_drop_alpha else 1
        self._peak_flops = peak_flops(device, recipe.precision)
        self._known_s = -math.inf

    def flops(self, batches: Sequence[Batch]) -> float:
        """Return the arithmetic in this process's share of an update: R-Drop goes twice over it."""
        source, target = sum(b.source_tokens for b in batches), sum(b.target_tokens for b in batches)
        pairs = sum(len(b.source_BS) for b in batches)
        return self._passes * training_flops(self._config, source, target, pairs) if pairs else 0.0

    def metrics(self, sent: SentUpdate, outcome: StepOutcome, now_s: float) -> StepMetrics:
        """Return the record of an update whose outcome is known now.

        The device works on one update after the other: this one has taken the time since it was sent, or since the one
        before it was known if that was later.
        """
        seconds = now_s - max(sent.started_s, self._known_s)
        self._known_s = now_s
        return StepMetrics(
            step=sent.step,
            epoch=sent.epoch,
            loss=outcome.loss,
            nll_per_token=outcome.nll_per_token,
            perplexity=perplexity(outcome.nll_per_token),
            learning_rate=outcome.learning_rate,
            gradient_norm=outcome.gradient_norm,
            target_tokens=sent.target_tokens,
            target_tokens_per_second=sent.target_tokens / seconds,
            duration_s=seconds,
            padding_share=sent.padding_share,
            memory_bytes=used_memory_bytes(self._device),
            skipped=outcome.skipped,
            model_flops_utilization=sent.flops / seconds / self._peak_flops if self._peak_flops else 0.0,
        )


def padding_share(batches: Sequence[Batch]) -> float:
    """Return the share of padding among the positions of the batches."""
    positions = sum(batch.positions for batch in batches)
    tokens = sum(batch.source_tokens + batch.target_tokens for batch in batches)
    return 1.0 - tokens / positions if positions else 0.0
