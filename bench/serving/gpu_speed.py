"""The speed of translating on a GPU, and its upper bound.

Shape suffixes: S sentences, W rows of each.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from bench.serving.gpu_models import random_sources
from bench.serving.gpu_setting import FORCED_LENGTH, Setting
from bench.shared.commands import TokenSearch
from bench.shared.gpu_sections import Finding, python_module
from ferryman_service.bundle.manifest import DECODER_FP16_FILE, read_manifest
from ferryman_service.domain.tokens import BOS
from ferryman_service.domain.translation import CancelToken, PreparedSentence, SearchOptions, SentenceResult
from ferryman_service.translation.device_batch import DeviceRunningBatch
from ferryman_service.translation.device_model import DeviceModel
from ferryman_service.translation.loader import open_device_model
from ferryman_service.translation.onnx_model import CPU, CUDA

SEARCHES: Final = {"greedy": 1, "beam 4": 4}
_ROUNDS: Final = 3
_LATENCY_SENTENCES: Final = 30
_COPY_BYTES: Final = 2**31
_COPIES: Final = 8
_FLOAT16_BYTES: Final = 2
_SOURCE_POSITIONS: Final = 27
_TARGET_POSITIONS: Final = 15  # held by a cache on average, with translations of 30


def measure_floor(setting: Setting) -> Finding:
    """Return what a step of `base` must read and write, and how long the memory takes for that."""
    bundle = setting.speed_bundle()
    size = _COPY_BYTES // (2**10 if setting.small else 1)
    memory = torch.empty(size, dtype=torch.uint8, device=setting.device)
    copy_s = min(_seconds(memory.clone, setting.device) for _ in range(_COPIES))
    bytes_per_s = 2 * size / copy_s
    architecture = read_manifest(bundle).header.architecture
    weight_bytes = (bundle / DECODER_FP16_FILE).stat().st_size
    number_bytes = 2 * architecture.decoder_layers * architecture.d_model * _FLOAT16_BYTES
    found: Finding = {"copy_gb_per_s": bytes_per_s / 1e9, "weight_mb": weight_bytes / 1e6}
    for name, sentences, beam_size in (("batch 1", 1, 1), ("greedy", setting.batch, 1), ("beam 4", setting.batch, 4)):
        rows = sentences * beam_size
        kept = sentences * _SOURCE_POSITIONS * number_bytes + rows * _TARGET_POSITIONS * number_bytes
        logits = (
            rows * architecture.vocabulary_size * (2 * _FLOAT16_BYTES + 4 * 4)
        )  # written and read, in 16 and 32 bits
        step_s = (weight_bytes + kept + logits) / bytes_per_s
        found[name] = {
            "mb": (weight_bytes + kept + logits) / 1e6,
            "ms": step_s * 1e3,
            "tokens_per_s": sentences / step_s,
        }
    return found


def _seconds(work: Callable[[], Any], device: str) -> float:
    started_s = time.perf_counter()
    work()
    if device == CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def measure_latency(setting: Setting, *, graphs: bool) -> Finding:
    """Translate one sentence after the other: milliseconds per token, the encoder's part included."""
    engine = setting.engine(setting.speed_bundle(), 1, sentences=1, graphs=graphs)
    sentences = forced(setting, _LATENCY_SENTENCES)
    engine.run(sentences[:3], SearchOptions(beam_size=1), CancelToken())
    taken_ms = []
    for sentence in sentences:
        started_s = time.perf_counter()
        engine.run([sentence], SearchOptions(beam_size=1), CancelToken())
        taken_ms.append((time.perf_counter() - started_s) * 1e3)
    ms = statistics.median(taken_ms)
    return {"ms_per_token": ms / FORCED_LENGTH, "ms_per_sentence": ms, "tokens_per_s": FORCED_LENGTH / ms * 1e3}


def measure_throughput(setting: Setting, beam_size: int, *, graphs: bool) -> Finding:
    """Translate many sentences, `batch` at a time: target tokens per second, the median of rounds after a first one."""
    engine = setting.engine(setting.speed_bundle(), beam_size, graphs=graphs)
    sentences = forced(setting, setting.batch * (2 if setting.small else 8))
    rates = []
    for _ in range(_ROUNDS + 1):
        started_s = time.perf_counter()
        results = engine.run(sentences, SearchOptions(beam_size=beam_size), CancelToken())
        taken_s = time.perf_counter() - started_s
        rates.append(sum(map(_tokens_of, results)) / taken_s)
    return {"tokens_per_s": statistics.median(rates[1:]), "first_round": rates[0], "rounds": rates[1:]}


def _tokens_of(result: SentenceResult) -> int:
    if result.translation is None:
        raise RuntimeError("a sentence was not translated") from result.error
    return len(result.translation.hypotheses[0].tokens)


def measure_steps(setting: Setting, *, graphs: bool) -> Finding:
    """Take steps without a search: milliseconds by number of sentences and width, with and without a new order."""
    bundle = setting.speed_bundle()
    architecture = read_manifest(bundle).header.architecture
    config = replace(setting.onnx_config, cuda_graphs=graphs)
    model = open_device_model(config, lambda config: DeviceModel.load(bundle, architecture, config))
    found: Finding = {}
    for sentences, width in ((1, 1), (1, 4), (setting.batch, 1), (setting.batch, 4)):
        batch = DeviceRunningBatch(model, width)
        sources = random_sources(sentences, setting.speed_vocabulary)
        started_s = time.perf_counter()
        batch.admit(sources)
        encoded_s = time.perf_counter() - started_s
        times = {"in_order_ms": [0, 1, 2, 3][:width], "reordered_ms": [1, 0, 0, 2][:width]}
        found[f"{sentences} x {width}"] = {"encode_ms_first": encoded_s * 1e3} | {
            name: _step_ms(batch, parents) for name, parents in times.items() if width > 1 or name == "in_order_ms"
        }
    return found


def _step_ms(batch: DeviceRunningBatch, parents: Sequence[int]) -> float:
    shape = batch.sentences, batch.width
    tokens_SW, parents_SW = np.full(shape, BOS + 5), np.tile(parents, (batch.sentences, 1))
    taken_s = []
    for _ in range(14):  # twice that fits the first room
        started_s = time.perf_counter()
        batch.step(tokens_SW, parents_SW, 2 * batch.width)
        taken_s.append(time.perf_counter() - started_s)
    return statistics.median(taken_s[4:]) * 1e3


def forced(setting: Setting, count: int) -> list[PreparedSentence]:
    """Return sentences whose translations have FORCED_LENGTH subwords."""
    sources = random_sources(count, setting.speed_vocabulary)
    return [
        PreparedSentence(source=tuple(source), min_length=FORCED_LENGTH, max_length=FORCED_LENGTH) for source in sources
    ]


def measure_peer(setting: Setting) -> Finding:
    """Do the same with CTranslate2 in float16, if it can be imported here."""
    try:
        ctranslate2: Any = importlib.import_module("ctranslate2")
    except ImportError as error:
        return {"left_out": f"CTranslate2 cannot be imported: {error}"}
    from bench.peers.ctranslate2_worker import CTranslate2Engine

    bundle, folder = setting.speed_bundle(), setting.folder / "ctranslate2"
    subprocess.run([*python_module("bench.peers.ctranslate2_convert"), str(bundle), str(folder)], check=True)
    compute_type = "float16" if setting.device == CUDA else "float32"
    translator = ctranslate2.Translator(str(folder), device=setting.device, compute_type=compute_type)
    engine = CTranslate2Engine(folder, translator)
    sentences = [engine.prepare(sentence.source) for sentence in forced(setting, setting.batch * 8)]
    found: Finding = {"version": ctranslate2.__version__}
    alone = TokenSearch(beam_size=1, max_length=FORCED_LENGTH, forced=True, max_batch_size=1)
    engine.translate(sentences[:3], alone)
    taken_ms = [_seconds(functools.partial(engine.translate, [one], alone), CPU) * 1e3 for one in sentences[:20]]
    found["latency"] = {"ms_per_token": statistics.median(taken_ms) / FORCED_LENGTH}
    found["latency"]["tokens_per_s"] = 1e3 / found["latency"]["ms_per_token"]
    for name, beam_size in SEARCHES.items():
        search = replace(alone, beam_size=beam_size, max_batch_size=setting.batch)
        engine.translate(sentences[: setting.batch], search)
        taken_s = min(_seconds(functools.partial(engine.translate, sentences, search), CPU) for _ in range(2))
        tokens = sum(len(item.tokens) for item in engine.read(engine.translate(sentences, search)))
        found[name] = {"tokens_per_s": tokens / taken_s}
    return found
