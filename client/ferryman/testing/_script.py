"""The records of a fake training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ferryman import types
from ferryman.types import RunState

BLEU_SIGNATURE: Final = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"


def noam_learning_rate(step: int) -> float:
    """Return the learning rate of "Attention Is All You Need", section 5.3, for d_model 512 and 4,000 warmup steps."""
    return float(512**-0.5 * min(step**-0.5, step * 4000**-1.5))


def training_script(
    steps: int = 4, learning_rate: Callable[[int], float] = noam_learning_rate
) -> list[types.MetricPayload]:
    """Return the payloads of a run with `steps` updates and one validation that succeeds."""
    loss = [8.0 / (1 + step) for step in range(steps + 1)]
    updates = [
        types.StepMetrics(
            step=step,
            epoch=1,
            loss=loss[step],
            nll_per_token=loss[step] / 2,
            perplexity=2.0 ** loss[step],
            learning_rate=learning_rate(step),
            gradient_norm=1.0,
            target_tokens=1000,
            target_tokens_per_second=20_000.0,
            duration_s=0.05,
            padding_share=0.02,
            memory_bytes=10**8,
        )
        for step in range(1, steps + 1)
    ]
    return [
        types.StateChange(state=RunState.QUEUED),
        types.StateChange(state=RunState.STARTING, attempt=1),
        types.StateChange(state=RunState.RUNNING, attempt=1),
        *updates,
        _validation(steps, loss[steps]),
        types.StateChange(state=RunState.EXPORTING, attempt=1),
        types.StateChange(state=RunState.SUCCEEDED, attempt=1),
    ]


def _validation(step: int, loss: float) -> types.ValidationMetrics:
    return types.ValidationMetrics(
        step=step,
        epoch=1,
        loss=loss,
        nll_per_token=loss / 2,
        perplexity=2.0**loss,
        bleu=31.5,
        chrf=55.0,
        translated_pairs=2,
        duration_s=0.5,
        best=True,
        bleu_signature=BLEU_SIGNATURE,
    )
