"""Where the time of a GPU's steps goes: the device's kernels, the host's functions, and forms of the step's end.

Shape suffixes: R rows, D model width, V vocabulary, C blocks of B tokens, K candidates.
"""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import onnxruntime
import torch

from bench.serving.gpu_models import random_sources
from bench.serving.gpu_setting import Setting
from bench.serving.gpu_speed import forced
from bench.shared.gpu_sections import Finding
from ferryman_service.bundle.manifest import read_manifest
from ferryman_service.domain.tokens import BOS
from ferryman_service.domain.translation import CancelToken, SearchOptions
from ferryman_service.training.graph_builder import GraphBuilder
from ferryman_service.translation.device_batch import DeviceRunningBatch
from ferryman_service.translation.device_model import DeviceModel
from ferryman_service.translation.loader import open_device_model
from ferryman_service.translation.onnx_model import CPU, CUDA, OnnxConfig, session_options
from ferryman_service.translation.scheduler import Scheduler

_STEPS: Final = 10
_SHOWN: Final = 25
_WIDTH: Final = 512
_BLOCK: Final = 64


def measure_kernels(setting: Setting) -> Finding:
    """Return, for steps of one row and of a full batch with beams, the kernels that took the most time: us a step, and
    how many of them there are in it."""
    bundle = setting.speed_bundle()
    architecture = read_manifest(bundle).header.architecture
    model = open_device_model(setting.onnx_config, lambda config: DeviceModel.load(bundle, architecture, config))
    found: Finding = {}
    for sentences, width in ((1, 1), (setting.batch, 1), (setting.batch, 4)):
        batch = DeviceRunningBatch(model, width)
        batch.admit(random_sources(sentences, setting.speed_vocabulary))
        parents_SW = np.tile([1, 0, 0, 2][:width] if width > 1 else [0], (sentences, 1))
        tokens_SW = np.full((sentences, width), BOS + 5)
        for _ in range(4):
            batch.step(tokens_SW, parents_SW, 2 * width)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if setting.device == CUDA:
            activities = [torch.profiler.ProfilerActivity.CUDA]
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            started_s = time.perf_counter()
            for _ in range(_STEPS):
                batch.step(tokens_SW, parents_SW, 2 * width)
            wall_s = time.perf_counter() - started_s
        kernels = [(event.key, event.device_time_total, event.count) for event in profile.key_averages()]
        kernels.sort(key=lambda kernel: -kernel[1])
        found[f"{sentences} x {width}"] = {
            "wall_us_profiled": round(1e6 * wall_s / _STEPS, 1),
            "device_us": round(sum(us for _, us, _ in kernels) / _STEPS, 1),
            "kernels_a_step": sum(count for _, _, count in kernels) / _STEPS,
            "kernels": {name[:160]: [round(us / _STEPS, 1), count / _STEPS] for name, us, count in kernels[:_SHOWN]},
        }
    return found


def measure_host(setting: Setting, beam_size: int) -> Finding:
    """Return the functions in which the decoding thread spends its time, ms a step as Python's profiler has it."""
    profiler, run = cProfile.Profile(), Scheduler._run

    def profiled(scheduler: Scheduler, worker: Any) -> None:  # noqa: ANN401
        profiler.runcall(run, scheduler, worker)

    Scheduler._run = profiled  # type: ignore[method-assign, assignment]
    with contextlib.closing(setting.engine(setting.speed_bundle(), beam_size)) as engine:
        results = engine.run(forced(setting, 2 * setting.batch), SearchOptions(beam_size=beam_size), CancelToken())
    steps = 2 * max(result.timings.steps for result in results)
    rows: list[tuple[float, str]] = []
    for (path, line, name), (_, _, own_s, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        rows.append((1e3 * own_s / steps, f"{path.rsplit('/', 1)[-1]}:{line} {name}"))
    rows.sort(reverse=True)
    return {"steps": steps, "own_ms_a_step": {name: round(ms, 4) for ms, name in rows[:_SHOWN]}}


def measure_heads(setting: Setting) -> Finding:
    """Return how long forms of the step's end take, ms: the product with the vocabulary and the best of each row."""
    vocabulary = setting.speed_vocabulary // _BLOCK * _BLOCK
    matrix_DV = (0.04 * np.random.default_rng(1).standard_normal((_WIDTH, vocabulary))).astype(np.float16)
    forms: Mapping[str, Callable[[GraphBuilder, str], str]] = {
        "log-softmax and TopK": _whole,
        "log-softmax and TopK in blocks": _blocks,
        "TopK of logits, less their logarithm of sum": _logits,
        "log-softmax alone": lambda builder, logits: builder.node("LogSoftmax", [logits], axis=-1, name="best"),
        "product alone": lambda builder, logits: builder.node("Identity", [logits], name="best"),
    }
    found: Finding = {}
    for name, form in forms.items():
        builder = GraphBuilder("head")
        hidden_RD = builder.input("hidden", "float16", ["rows", _WIDTH])
        builder.input("k", "int64", [1])
        logits_RV = builder.node("MatMul", [hidden_RD, builder.constant(matrix_DV)])
        best = form(builder, builder.cast(logits_RV, "float32"))
        builder.output(best, "float32", ["rows", "best"])
        try:
            found[name] = _head_times(builder.build().SerializeToString(), setting)
        except Exception as error:  # noqa: BLE001 (a form that the device has no kernel for)
            found[name] = {"error": str(error)[:300]}
    return found


def _whole(builder: GraphBuilder, logits_RV: str) -> str:
    log_probs_RV = builder.node("LogSoftmax", [logits_RV], axis=-1)
    return builder.nodes("TopK", [log_probs_RV, "k"], ["best", ""], axis=-1)[0]


def _blocks(builder: GraphBuilder, logits_RV: str) -> str:
    log_probs_RV = builder.node("LogSoftmax", [logits_RV], axis=-1)
    log_probs_RCB = builder.node("Reshape", [log_probs_RV, builder.constant([0, -1, _BLOCK])])
    largest_RC = builder.node("ReduceMax", [log_probs_RCB, builder.constant([2])], keepdims=0)
    _, chosen_RK = builder.nodes("TopK", [largest_RC, "k"], ["", ""], axis=-1)
    index_RK1 = builder.node("Unsqueeze", [chosen_RK, builder.constant([2])])
    found_RKB = builder.node("GatherND", [log_probs_RCB, index_RK1], batch_dims=1)
    found = builder.node("Reshape", [found_RKB, builder.constant([0, -1])])
    return builder.nodes("TopK", [found, "k"], ["best", ""], axis=-1)[0]


def _logits(builder: GraphBuilder, logits_RV: str) -> str:
    best_RK, _ = builder.nodes("TopK", [logits_RV, "k"], ["", ""], axis=-1)
    sum_R1 = builder.node("ReduceLogSumExp", [logits_RV, builder.constant([1])], keepdims=1)
    return builder.node("Sub", [best_RK, sum_R1], name="best")


def _head_times(graph: bytes, setting: Setting) -> dict[str, float]:
    config: OnnxConfig = setting.onnx_config
    providers = ["CPUExecutionProvider"] if config.device == CPU else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(graph, session_options(config), providers=providers)
    times = {}
    for rows, k in ((1, 2), (setting.batch, 2), (4 * setting.batch, 8)):
        hidden_RD = np.random.default_rng(2).standard_normal((rows, _WIDTH)).astype(np.float16)
        binding = session.io_binding()
        binding.bind_ortvalue_input("hidden", onnxruntime.OrtValue.ortvalue_from_numpy(hidden_RD, setting.device, 0))
        binding.bind_cpu_input("k", np.array([k], np.int64))
        binding.bind_output("best", setting.device, 0)
        taken_s = []
        for _ in range(8):
            started_s = time.perf_counter()
            session.run_with_iobinding(binding)
            taken_s.append(time.perf_counter() - started_s)
        times[f"{rows} rows"] = round(1e3 * statistics.median(taken_s[2:]), 4)
    return times
