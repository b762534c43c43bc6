"""Target tokens per second of training on a GPU, and what share of the device's arithmetic that is.

Shape suffixes: S source positions, T target positions, P pairs.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from bench.shared.local_training import ListReporter
from ferryman_service.domain.recipe import Precision, Preset, Recipe, resolve_recipe
from ferryman_service.domain.records import StepMetrics
from ferryman_service.domain.tokens import EOS, PAD
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.batches import SOURCE_MULTIPLE, Batch, make_batch
from ferryman_service.training.budget import TimeBudget
from ferryman_service.training.compile import (
    choose_attention,
    compilation_remark,
    compile_layers,
    set_up_compilation,
)
from ferryman_service.training.flops import peak_flops, training_flops
from ferryman_service.training.loop import LoopParts, TrainingLoop
from ferryman_service.training.packing import plan_epoch
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.reporting import Series
from ferryman_service.training.step import PendingOutcome, Trainee, new_trainee
from ferryman_service.training.validate import Validator

# Log-normal lengths, about those of WMT's news in 32,000 subwords.
_MEAN_LENGTH: Final = 27.0
_SIGMA: Final = 0.55
_LONGEST: Final = 128
_BUCKETS: Final = (16, 24, 32, 48, 64, 96, 128)


class Variant(StrEnum):
    """How the network is run; on a GPU, training itself uses COMPILED_LAYERS if it can, and nothing but it or EAGER."""

    EAGER = "eager"
    COMPILED_LAYERS = "compiled layers"
    BARE_LENGTHS = "compiled layers, source lengths as they come"
    COMPILED = "compiled"
    GRAPHS = "compiled, buckets, CUDA graphs"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is: the real sizes, or small ones with which every line runs anywhere in seconds."""

    vocabulary: int = 32_000
    pairs: int = 120_000
    warmup: int = 8
    updates: int = 24
    repeats: int = 3
    small: bool = False

    def recipe(self, preset: Preset, batch_target_tokens: int, precision: Precision, **model: Any) -> Recipe:  # noqa: ANN401
        """Return the preset at this scale."""
        if self.small:
            model = {"d_model": 32, "ffn_dim": 64, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, **model}
        return resolve_recipe(
            {
                "preset": preset,
                "model": model,
                "data": {"vocabulary_size": self.vocabulary, "max_sentence_tokens": 64 if self.small else 256},
                "optimization": {"batch_target_tokens": batch_target_tokens, "precision": precision},
                "stop": {"max_steps": 10**9},
                "validation": {"interval_steps": 10**9},
            }
        )


SMALL: Final = Scale(vocabulary=300, pairs=600, warmup=2, updates=3, repeats=2, small=True)


def synthetic_pairs(vocabulary: int, pairs: int, seed: int = 1) -> TokenPairs:
    """Return pairs of random tokens, target about as long as source."""
    generator = np.random.default_rng(seed)
    mu = np.log(_MEAN_LENGTH) - _SIGMA**2 / 2
    source_P = generator.lognormal(mu, _SIGMA, pairs)
    target_P = source_P * generator.uniform(0.8, 1.2, pairs)
    return TokenPairs(*(_random_side(lengths_P, vocabulary, generator) for lengths_P in (source_P, target_P)))


def _random_side(lengths_P: NDArray[np.float64], vocabulary: int, generator: np.random.Generator) -> TokenSide:
    whole_P = np.clip(np.rint(lengths_P), 2, _LONGEST).astype(np.int64)
    tokens_N = generator.integers(EOS + 1, vocabulary, int(whole_P.sum()), dtype=np.int32)
    tokens_N[np.cumsum(whole_P) - 1] = EOS
    return TokenSide.from_lengths(tokens_N, whole_P)


def planned_batches(
    pairs: TokenPairs, batch_target_tokens: int, count: int, source_multiple: int = SOURCE_MULTIPLE["cuda"]
) -> list[Batch]:
    """Return the first batches of an epoch, as training on a GPU makes them if `source_multiple` says nothing else."""
    lengths = pairs.source.lengths_P, pairs.target.lengths_P
    updates = plan_epoch(*lengths, batch_target_tokens=batch_target_tokens, seed=1, epoch=1)
    return [make_batch(pairs, update[0][0], source_multiple) for update in updates[:count]]


def bucketed_batches(pairs: TokenPairs, batch_target_tokens: int, count: int) -> list[Batch]:
    """Return batches of a few fixed shapes, such as CUDA graphs want, in the proportions of the corpus."""
    longer_P = np.maximum(pairs.source.lengths_P, pairs.target.lengths_P)
    batches = []
    for low, high in zip((0, *_BUCKETS[:-1]), _BUCKETS, strict=True):
        index_P = np.flatnonzero((longer_P > low) & (longer_P <= high))
        rows = max(1, batch_target_tokens // high)
        cuts = [index_P[i : i + rows] for i in range(0, len(index_P) - rows + 1, rows)]
        batches += [widened(make_batch(pairs, cut), high) for cut in cuts]
    order = np.random.default_rng(1).permutation(len(batches))
    return [batches[i] for i in order[:count]]


def chosen_batches(variant: Variant, pairs: TokenPairs, batch_target_tokens: int, count: int) -> list[Batch]:
    """Return batches of the shapes that the variant wants."""
    if variant is Variant.GRAPHS:
        return bucketed_batches(pairs, batch_target_tokens, count)
    multiple = 1 if variant is Variant.BARE_LENGTHS else SOURCE_MULTIPLE["cuda"]
    return planned_batches(pairs, batch_target_tokens, count, multiple)


def widened(batch: Batch, length: int) -> Batch:
    """Return the batch with both sides padded to so many positions."""
    target_length = batch.decoder_input_BT.shape[1]
    row_N = torch.div(batch.label_positions_N, target_length, rounding_mode="floor")
    return Batch(
        source_BS=F.pad(batch.source_BS, (0, length - batch.source_BS.shape[1]), value=PAD),
        decoder_input_BT=F.pad(batch.decoder_input_BT, (0, length - target_length), value=PAD),
        label_positions_N=batch.label_positions_N + row_N * (length - target_length),
        labels_N=batch.labels_N,
        source_tokens=batch.source_tokens,
    )


def new_model(recipe: Recipe, variant: Variant, device: torch.device) -> Transformer:
    """Return the recipe's network, run as the variant says."""
    choose_attention(device)
    torch.manual_seed(1)
    model = Transformer(TransformerConfig.from_recipe(recipe, recipe.data.vocabulary_size)).to(device).train()
    if variant in (Variant.COMPILED_LAYERS, Variant.BARE_LENGTHS):
        compile_layers(model)
    elif variant is Variant.COMPILED:
        object.__setattr__(model, "hidden", torch.compile(model.hidden, dynamic=True))
    elif variant is Variant.GRAPHS:
        compiled = torch.compile(model.hidden, dynamic=False, mode="reduce-overhead")
        object.__setattr__(model, "hidden", compiled)
    return model


def alone(device: torch.device) -> Ranks:
    """Return the ranks of a single process."""
    return Ranks(rank=0, world_size=1, device=device)


def run_updates(trainee: Trainee, batches: Sequence[Batch]) -> list[bool]:
    """Do an update with each batch, reading outcomes as late as training does; return which were split or skipped."""
    pending: deque[PendingOutcome] = deque()
    odd = []
    for batch in batches:
        pending.append(trainee.step([batch], batch.target_tokens))
        if len(pending) > 1:
            odd.append(pending.popleft().read())
    odd += [outcome.read() for outcome in pending]
    return [outcome.split or outcome.skipped for outcome in odd]


def measure_speed(
    preset: Preset, variant: Variant, batch_target_tokens: int, scale: Scale, device: torch.device
) -> dict[str, Any]:
    """Return the rate of updates whose batches are on the device already."""
    recipe = scale.recipe(preset, batch_target_tokens, Precision.BF16)
    pairs = synthetic_pairs(scale.vocabulary, scale.pairs)
    chosen = chosen_batches(variant, pairs, batch_target_tokens, scale.updates)
    batches = [batch.to(device) for batch in chosen]
    trainee = new_trainee(new_model(recipe, variant, device), recipe, alone(device))
    started_s = time.perf_counter()
    for _ in range(2):  # every shape is seen before the clock runs, and captured where there are graphs
        run_updates(trainee, batches[: scale.warmup] if variant is not Variant.GRAPHS else batches)
    warmup_s = time.perf_counter() - started_s
    tokens = sum(batch.target_tokens for batch in batches)
    seconds, odd = [], 0
    for _ in range(scale.repeats):
        _wait(device)
        started_s = time.perf_counter()
        odd += sum(run_updates(trainee, batches))
        _wait(device)
        seconds.append(time.perf_counter() - started_s)
    config = trainee.model.config
    flops = sum(training_flops(config, b.source_tokens, b.target_tokens, len(b.source_BS)) for b in batches)
    peak = peak_flops(device, Precision.BF16)
    best = median(seconds)
    return {
        "target_tokens_per_s": tokens / best,
        "spread": [tokens / max(seconds), tokens / min(seconds)],
        "mfu": flops / best / peak if peak else None,
        "ms_per_update": 1000 * best / len(batches),
        "target_tokens_per_update": tokens / len(batches),
        "padding_share": float(np.mean([batch.padding_share for batch in batches])),
        "mflop_per_target_token": flops / tokens / 1e6,
        "warmup_s": warmup_s,
        "peak_memory_gb": peak_memory_gb(device),
        "split_or_skipped": odd,
    }


class _Enough(Exception):
    """Ends a loop that has no other end."""


def measure_loop(
    preset: Preset, batch_target_tokens: int, scale: Scale, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Return the rate of the whole training loop: batches are made, moved and reported as in a run.

    Whether the layers are compiled is what the engine chooses here by itself.
    """
    recipe = scale.recipe(preset, batch_target_tokens, Precision.BF16)
    pairs = synthetic_pairs(scale.vocabulary, scale.pairs)
    times_s: list[float] = []

    def check() -> None:
        times_s.append(time.perf_counter())
        if len(times_s) > scale.warmup + scale.updates:
            raise _Enough

    reporter = ListReporter(check=check)
    folder.mkdir(parents=True)
    model = new_model(recipe, Variant.EAGER, device)
    compiled = set_up_compilation(model, "auto", device)
    remark = compilation_remark(compiled, "auto", device)
    parts = LoopParts(
        trainee=new_trainee(model, recipe, alone(device), compiled=compiled),
        pairs=lambda epoch: pairs,
        recipe=recipe,
        validator=cast(Validator, None),  # no update of this measurement is followed by a validation
        series=Series(reporter),
        checkpoints=folder,
        budget=TimeBudget(0),
    )
    with contextlib.suppress(_Enough):
        TrainingLoop(parts).run()
    return {
        **_loop_rates(reporter.steps, times_s, scale),
        "layers_compiled": compiled,
        "remarks": [*([remark[1:]] if remark else []), *((code, text) for _, code, text in reporter.events)],
    }


def _loop_rates(steps: Sequence[StepMetrics], times_s: Sequence[float], scale: Scale) -> dict[str, float]:
    """Return the rates after the first updates; `times_s` are those of the checks before each update."""
    measured = steps[scale.warmup :]
    tokens = sum(step.target_tokens for step in measured)
    # The outcome of an update is read one update later, so both ends of the clock are equally late.
    seconds = times_s[-1] - times_s[scale.warmup]
    return {
        "target_tokens_per_s": tokens * (scale.updates / len(measured)) / seconds,
        "reported_target_tokens_per_s": median(step.target_tokens_per_second for step in measured),
        "mfu": median(step.model_flops_utilization for step in measured),
    }


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the most memory that was in use on the device so far."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
