"""Checks of training on a GPU. Each returns its finding and whether it passed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bench.shared.local_training import ListReporter, new_job, write_corpus
from bench.training.gpu_speed import Variant, alone, new_model, planned_batches, synthetic_pairs
from examples.parallel_text import ParallelLines
from ferryman_service.bundle.manifest import WEIGHTS_FILE
from ferryman_service.domain.models import ModelLineage
from ferryman_service.domain.recipe import Precision, Preset, Recipe, resolve_recipe
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.training import TrainedModel
from ferryman_service.domain.translation import CancelToken, SearchOptions
from ferryman_service.training.batches import Batch
from ferryman_service.training.checkpoint import Checkpoint, Position, load_checkpoint, save_checkpoint
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
from ferryman_service.training.export import OnnxExporter
from ferryman_service.training.files import Disk
from ferryman_service.training.step import StepOutcome, Trainee, new_trainee
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig

_VOCABULARY: Final = 500
# Small enough for a CPU, to which products in 16 bits are foreign.
_SMALL_MODEL: Final = {"d_model": 64, "ffn_dim": 128, "encoder_layers": 2, "decoder_layers": 2}
_STEPS: Final = 20
_BATCH_TARGET_TOKENS: Final = 512
_FP32_TOLERANCE: Final = 1e-3
_BF16_TOLERANCE: Final = 2e-2
_RESUME_TOLERANCE: Final = 1e-5
_OVERFLOWING_SCALE: Final = 2.0**60
_SEARCHES: Final = {"greedy": SearchOptions(beam_size=1), "beam 5": SearchOptions(beam_size=5)}

Finding = dict[str, Any]


def tiny_recipe(precision: Precision, **model: float) -> Recipe:
    """Return a small network with a small vocabulary and a warmup that is over soon."""
    return resolve_recipe(
        {
            "preset": Preset.TINY,
            "model": _SMALL_MODEL | model,
            "data": {"vocabulary_size": _VOCABULARY},
            "optimization": {"batch_target_tokens": _BATCH_TARGET_TOKENS, "precision": precision},
            "schedule": {"warmup_steps": 20},
            "seed": 3,
        }
    )


def tiny_trainee(recipe: Recipe, device: torch.device, variant: Variant = Variant.EAGER) -> Trainee:
    """Return a trainee that has done nothing."""
    return new_trainee(new_model(recipe, variant, device), recipe, alone(device))


def tiny_batches(count: int, device: torch.device, batch_target_tokens: int = _BATCH_TARGET_TOKENS) -> list[Batch]:
    """Return the same few batches each time."""
    pairs = synthetic_pairs(_VOCABULARY, count * batch_target_tokens // 20)
    return [batch.to(device) for batch in planned_batches(pairs, batch_target_tokens, count)]


def outcomes(trainee: Trainee, batches: list[Batch]) -> list[StepOutcome]:
    """Do an update with each batch."""
    return [trainee.step([batch], batch.target_tokens).read() for batch in batches]


def loss_curves(device: torch.device, folder: Path) -> Finding:
    """The losses of 20 updates on the CPU in FP32 and here, without dropout, whose masks no two devices share."""
    curves: dict[str, list[float]] = {}
    for name, place, precision in (
        ("cpu fp32", torch.device("cpu"), Precision.FP32),
        ("fp32", device, Precision.FP32),
        ("bf16", device, Precision.BF16),
        ("fp16", device, Precision.FP16),
    ):
        trainee = tiny_trainee(tiny_recipe(precision, dropout=0.0), place)
        curves[name] = [outcome.loss for outcome in outcomes(trainee, tiny_batches(_STEPS, place))]
    expected = curves["cpu fp32"]
    worst = {
        name: max(abs(loss / want - 1) for loss, want in zip(curve, expected, strict=True))
        for name, curve in curves.items()
    }
    # FP16 skips its first updates until its scale fits, so its curve lags; it must only be finite and fall.
    ok = worst["fp32"] < _FP32_TOLERANCE and worst["bf16"] < _BF16_TOLERANCE and curves["fp16"][-1] < expected[0]
    return {"ok": ok, "worst_relative_difference": worst, "curves": curves}


def compiling(device: torch.device, folder: Path) -> Finding:
    """The losses with compiled layers are those without, to rounding, and no update waits for the device."""
    worst = {}
    for precision in (Precision.FP32, Precision.BF16):
        recipe, batches = tiny_recipe(precision, dropout=0.0), tiny_batches(_STEPS, device)
        plain, compiled = (
            [outcome.loss for outcome in outcomes(tiny_trainee(recipe, device, variant), batches)]
            for variant in (Variant.EAGER, Variant.COMPILED_LAYERS)
        )
        worst[precision] = max(abs(loss / want - 1) for loss, want in zip(compiled, plain, strict=True))
    waits = waits_of(tiny_trainee(recipe, device, Variant.COMPILED_LAYERS), batches, device)
    ok = worst[Precision.FP32] < _FP32_TOLERANCE and worst[Precision.BF16] < _BF16_TOLERANCE and not waits
    return {"ok": ok, "worst_relative_difference": worst, "waits": waits}


def loss_scaling(device: torch.device, folder: Path) -> Finding:
    """FP16: an update that overflows changes no weight, halves the scale and is reported; training continues."""
    trainee = tiny_trainee(tiny_recipe(Precision.FP16), device)
    batches = tiny_batches(40, device)
    outcomes(trainee, batches[:1])
    trainee.load(trainee.tensors(), dataclasses.replace(trainee.counters(), loss_scale=_OVERFLOWING_SCALE))
    before = copies(trainee.tensors()["weights"])
    first = outcomes(trainee, batches[1:2])[0]
    unchanged = all(torch.equal(before[name], now) for name, now in trainee.tensors()["weights"].items())
    scale = trainee.counters().loss_scale
    later = outcomes(trainee, [*batches[2:], *batches[2:]])
    skipped = sum(outcome.skipped for outcome in later)
    counters = trainee.counters()
    ok = first.skipped and unchanged and scale == _OVERFLOWING_SCALE / 2 and not later[-1].skipped
    ok = ok and counters.updates_done - counters.updates_applied >= 1 + skipped
    return {"ok": ok, "skipped": 1 + skipped, "final_loss_scale": counters.loss_scale, "last_loss": later[-1].loss}


def out_of_memory(device: torch.device, folder: Path) -> Finding:
    """A batch that does not fit is split once and gives the same loss; one that never fits fails with a cure."""
    recipe = tiny_recipe(Precision.FP32, dropout=0.0)
    batch = tiny_batches(1, device, batch_target_tokens=8192)[0]
    whole = outcomes(tiny_trainee(recipe, device), [batch])[0]
    trainee = tiny_trainee(recipe, device)
    fits(trainee, batch.source_BS.shape[0] // 2 + 1)
    halved = outcomes(trainee, [batch])[0]
    fits(trainee, 1)
    try:
        outcomes(trainee, [batch])
        failure = None
    except TrainingFailed as error:
        failure = error
    difference = abs(halved.loss / whole.loss - 1)
    reported = failure is not None and failure.reason is FailureReason.OUT_OF_MEMORY
    finding: Finding = {
        "ok": halved.split and not whole.split and difference < _FP32_TOLERANCE and reported,
        "relative_difference": difference,
        "failure": str(failure),
    }
    if device.type == "cuda":
        finding["real"] = really_out_of_memory(recipe, device)
        finding["ok"] = finding["ok"] and finding["real"]["split"]
    return finding


def fits(trainee: Trainee, sentences: int) -> None:
    """Let the network fail, as a full device does, on more sentences than these."""
    hidden = type(trainee.model).hidden

    def limited(source_BS: Tensor, target_input_BT: Tensor) -> Tensor:
        if len(source_BS) > sentences:
            raise torch.OutOfMemoryError("no room, says the check")
        return hidden(trainee.model, source_BS, target_input_BT)

    object.__setattr__(trainee.model, "hidden", limited)


def really_out_of_memory(recipe: Recipe, device: torch.device) -> Finding:
    """Take so much of the device's memory away that only half of a batch fits."""
    trainee = tiny_trainee(recipe, device)
    batch = tiny_batches(1, device, batch_target_tokens=2**18)[0]
    peaks = []
    for part in (batch.halves()[:1], [batch]):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        trainee.step(part, batch.target_tokens).read()
        peaks.append(torch.cuda.max_memory_reserved(device))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((0.3 * peaks[0] + 0.7 * peaks[1]) / total, device)
    try:
        outcome = trainee.step([batch], batch.target_tokens).read()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return {"split": outcome.split, "half_gb": peaks[0] / 1e9, "whole_gb": peaks[1] / 1e9, "loss": outcome.loss}


@contextmanager
def nobody_waits(device: torch.device) -> Iterator[None]:
    """Make torch refuse whatever would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_waiting(device: torch.device, folder: Path) -> Finding:
    """An update, its batch's way to the device included, never waits for the device; in each precision."""
    waits = {}
    for precision in Precision:
        trainee = tiny_trainee(tiny_recipe(precision), device)
        batches = tiny_batches(4, torch.device("cpu"))
        outcomes(trainee, [batch.to(device) for batch in batches])
        waits[f"{precision}: step"] = waits_of(trainee, [batch.to(device) for batch in batches], device)
        waits[f"{precision}: step and batch"] = waits_of(trainee, batches, device)
    return {"ok": not any(waits.values()), "waits": waits}


def waits_of(trainee: Trainee, batches: list[Batch], device: torch.device) -> str:
    """Return why one of these updates waits for the device, "" if none does. They have been done before."""
    try:
        with nobody_waits(device):
            pending = [trainee.step([batch.to(device)], batch.target_tokens) for batch in batches]
        for outcome in pending:
            outcome.read()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def resuming(device: torch.device, folder: Path) -> Finding:
    """Ten updates, and five with a checkpoint and five after it, end with the same weights, to rounding."""
    recipe = tiny_recipe(Precision.BF16)
    batches = tiny_batches(10, device)
    straight = tiny_trainee(recipe, device)
    outcomes(straight, batches)
    before = tiny_trainee(recipe, device)
    outcomes(before, batches[:5])
    checkpoints = folder / "resuming"
    checkpoints.mkdir(parents=True)
    checkpoint = Checkpoint(before.tensors(), before.counters(), Position(step=5))
    kept = load_checkpoint(save_checkpoint(checkpoints, checkpoint, Disk()))
    after = tiny_trainee(recipe, device)
    after.load(kept.tensors, kept.counters)
    outcomes(after, batches[5:])
    worst = max(
        float((ours - theirs).abs().max())
        for ours, theirs in zip(
            after.tensors()["weights"].values(), straight.tensors()["weights"].values(), strict=True
        )
    )
    limit = 0.0 if device.type == "cpu" else _RESUME_TOLERANCE
    return {"ok": worst <= limit, "bit_identical": worst == 0.0, "largest_difference": worst}


def exporting(device: torch.device, folder: Path) -> Finding:
    """A model that the whole engine trained here is exported, and translates on the CPU to the same tokens."""
    sources = [" ".join(str((7 * i + 3 * j) % 50) for j in range(2 + i % 9)) for i in range(600)]
    targets = [" ".join(f"w{token}" for token in source.split()[::-1]) for source in sources]
    train, held_out = (ParallelLines(sources[part], targets[part]) for part in (slice(0, 500), slice(500, 564)))
    corpus = write_corpus(folder / "corpus", train, held_out)
    recipe = resolve_recipe(
        {
            "model": _SMALL_MODEL | {"dropout": 0.0},
            "data": {"vocabulary_size": 120, "max_sentence_tokens": 64},
            "optimization": {"batch_target_tokens": 512, "precision": Precision.BF16},
            "stop": {"max_steps": 60},
            "validation": {"interval_steps": 30},
            "schedule": {"warmup_steps": 50},
        }
    )
    reporter = ListReporter()
    trained = TorchTrainingEngine(EngineConfig(device=device.type)).train(
        new_job("exporting", recipe, corpus, folder), reporter
    )
    return compare_export(trained, recipe, corpus.digest, folder, [step.loss for step in reporter.steps])


def compare_export(trained: TrainedModel, recipe: Recipe, digest: str, folder: Path, losses: list[float]) -> Finding:
    """Return how many held-out sentences ONNX Runtime translates to the same tokens as PyTorch."""
    bundle = folder / "bundle"
    bundle.mkdir()
    lineage = ModelLineage(
        run_id="run", corpus_id="corpus", corpus_digest=digest, source_language="a", target_language="b", recipe=recipe
    )
    OnnxExporter().export(trained, lineage, bundle)
    reference = OnnxExporter().reference(trained)
    with contextlib.closing(OnnxBundleLoader(OnnxConfig(), SchedulerConfig()).load(bundle)) as exported:
        equal: Mapping[str, int] = {
            name: sum(
                one.hypotheses[0].tokens == other.hypotheses[0].tokens
                for one, other in zip(
                    exported.translate(trained.check_sentences, options, CancelToken())[0],
                    reference.translate(trained.check_sentences, options, CancelToken())[0],
                    strict=True,
                )
            )
            for name, options in _SEARCHES.items()
        }
    sentences = len(trained.check_sentences)
    ok = all(count == sentences for count in equal.values()) and losses[-1] < losses[0]
    size = (bundle / WEIGHTS_FILE).stat().st_size
    return {"ok": ok, "sentences": sentences, **equal, "losses": [losses[0], losses[-1]], "weights_bytes": size}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


CHECKS: Final[Mapping[str, Callable[[torch.device, Path], Finding]]] = {
    "loss curves": loss_curves,
    "loss scaling": loss_scaling,
    "no waiting": no_waiting,
    "resuming": resuming,
    "exporting": exporting,
    "out of memory": out_of_memory,
    "compiling": compiling,
}
