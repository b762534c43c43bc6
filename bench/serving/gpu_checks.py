"""Checks of translating on a GPU. Each returns its finding and whether it passed.

Shape suffixes: S sentences, W rows of each, K candidates per row.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import sacrebleu
from numpy.typing import NDArray

from bench.serving.gpu_models import random_sources
from bench.serving.gpu_setting import KINDS, Setting
from bench.shared.gpu_sections import Finding
from ferryman_service.bundle.embedding import Embedding
from ferryman_service.bundle.manifest import REORDER_FILE, graph_files, read_manifest
from ferryman_service.domain.tokens import BOS
from ferryman_service.domain.translation import CancelToken, ComputeType, PreparedSentence, SearchOptions
from ferryman_service.search.decoder import Candidates, RunningBatch
from ferryman_service.translation.device_batch import DeviceRunningBatch
from ferryman_service.translation.device_model import DeviceModel, open_session
from ferryman_service.translation.loader import open_device_model
from ferryman_service.translation.onnx_model import CUDA, OnnxConfig, OnnxModel, session_options
from ferryman_service.translation.running_batch import OnnxRunningBatch

_SEARCHES: Final = {"greedy": SearchOptions(beam_size=1), "beam 4": SearchOptions(beam_size=4)}
_SAME_AT_LEAST: Final = 0.8
"""Random weights have many close choices, and after one that falls out differently all is different."""
_BLEU_LOSS_AT_MOST: Final = 0.1
_TOLERANCE: Final = 0.1
"""Of a log-probability: some steps of a logit in 16 bits."""
_STEPS: Final = 60
_LONGEST: Final = 24


def same_tokens(setting: Setting) -> Finding:
    """How many translations of random weights are the same in fp16 here and in fp32 on the CPU."""
    vocabulary_size = setting.check_vocabulary
    sources = random_sources(setting.check_sentences, vocabulary_size)
    prepared = [PreparedSentence(source=source, max_length=len(source) + 5) for source in sources]
    here, exact = setting.engine(setting.check_bundle(), 4), setting.cpu_engine(setting.check_bundle())
    shares = {}
    for name, options in _SEARCHES.items():
        # Random networks repeat themselves permanently, which makes equality trivial.
        options = replace(options, no_repeat_ngram_size=1)
        found, wanted = (
            [result.translation.hypotheses[0].tokens if result.translation else None for result in results]
            for results in (engine.run(prepared, options, CancelToken()) for engine in (here, exact))
        )
        shares[name] = sum(one == other for one, other in zip(found, wanted, strict=True)) / len(found)
    return {"ok": min(shares.values()) >= _SAME_AT_LEAST, "sentences": len(sources), "share": shares}


def bleu(setting: Setting) -> Finding:
    """What a trained model scores in fp16 here and in fp32 on the CPU."""
    if setting.model is None or setting.source is None or setting.reference is None:
        return {"ok": True, "left_out": "no model with text: pass --model, --source and --reference"}
    sources = setting.source.read_text(encoding="utf-8").splitlines()
    references = setting.reference.read_text(encoding="utf-8").splitlines()
    engines = {"fp16": setting.engine(setting.model, 4), "fp32 on the CPU": setting.cpu_engine(setting.model)}
    scores: dict[str, dict[str, float]] = {}
    same: dict[str, float] = {}
    for name, options in _SEARCHES.items():
        texts = {
            label: [each.hypotheses[0].text for each in engine.translate(sources, options, CancelToken())[0]]
            for label, engine in engines.items()
        }
        scores[name] = {label: sacrebleu.corpus_bleu(found, [references]).score for label, found in texts.items()}
        one, other = texts.values()
        same[name] = sum(mine == theirs for mine, theirs in zip(one, other, strict=True)) / len(sources)
    ok = all(score["fp16"] >= score["fp32 on the CPU"] - _BLEU_LOSS_AT_MOST for score in scores.values())
    return {"ok": ok, "bleu": scores, "same": same, "sentences": len(sources)}


def running_batch(setting: Setting) -> Finding:
    """Sentences join, branch and leave at random, here in fp16 and on the CPU in fp32: the same log-probabilities."""
    worst = {}
    for kind in KINDS:
        bundle = setting.check_bundle(kind)
        exact = OnnxModel.load(bundle, read_manifest(bundle).header.architecture, OnnxConfig())
        model = DeviceModel.load(bundle, exact.architecture, setting.onnx_config)
        for width in (1, 4):
            batches = DeviceRunningBatch(model, width), OnnxRunningBatch(exact, width)
            worst[f"{kind}, width {width}"] = _worst_difference(batches, setting.check_vocabulary)
    return {"ok": max(worst.values()) < _TOLERANCE, "largest_difference": worst, "steps": _STEPS}


def _worst_difference(batches: tuple[RunningBatch, RunningBatch], vocabulary_size: int) -> float:
    generator, width, worst = np.random.default_rng(1), batches[0].width, 0.0
    for step in range(_STEPS):
        if step % 3 == 0:
            sources = random_sources(int(generator.integers(1, 9)), vocabulary_size, seed=step)
            for batch in batches:
                batch.admit([source[-_LONGEST:] for source in sources])
        shape = batches[0].sentences, width
        tokens_SW = generator.integers(4, vocabulary_size, shape) if step else np.full(shape, BOS)
        parents_SW = generator.integers(0, width, shape) if step % 2 else np.tile(np.arange(width), (shape[0], 1))
        found, wanted = (batch.step(tokens_SW, parents_SW, 2 * width) for batch in batches)
        worst = max(worst, float(np.abs(found.log_probs_SWK - wanted.log_probs_SWK).max()))
        if step % 5 == 4:
            kept_S: NDArray[np.int64] = np.flatnonzero(generator.random(shape[0]) < 0.6)
            kept_S = kept_S if len(kept_S) else np.array([0])
            for batch in batches:
                batch.keep(kept_S)
    return worst


def placement(setting: Setting) -> Finding:
    """On which provider each kind of node runs: on a GPU none may be left to the CPU."""
    found = {
        f"{kind}, {graph}": nodes
        for kind in KINDS
        for graph, nodes in _nodes(setting, setting.check_bundle(kind)).items()
    }
    on_cpu = [name for name, nodes in found.items() if "CPUExecutionProvider" in nodes]
    return {"ok": setting.device != CUDA or not on_cpu, "on_cpu": on_cpu, "nodes": found}


def _nodes(setting: Setting, bundle: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Return the nodes of each graph by provider, from a run."""
    config, files = setting.onnx_config, graph_files(ComputeType.FP16)
    architecture = read_manifest(bundle).header.architecture

    def profiled(name: str) -> onnxruntime.InferenceSession:
        options = session_options(config)
        options.enable_profiling = True
        options.profile_file_prefix = str(setting.folder / name)
        return open_session(bundle / name, config, options=options)

    encoder, decoder, reorder = map(profiled, (files.encoder, files.decoder, REORDER_FILE))
    embedding = Embedding.open(bundle, ComputeType.FP16, architecture)
    model = DeviceModel(encoder, decoder, reorder, embedding, architecture, device=config.device)
    batch = DeviceRunningBatch(model, 2)
    batch.admit(random_sources(3, setting.check_vocabulary))
    for parents in ([0, 1], [0, 0]):
        batch.step(np.full((3, 2), BOS), np.tile(parents, (3, 1)), 4)
    sessions = {"encoder": encoder, "decoder": decoder, "reorder": reorder}
    return {name: nodes_by_provider(_profile_of(session)) for name, session in sessions.items()}


def _profile_of(session: onnxruntime.InferenceSession) -> list[dict[str, Any]]:
    path = Path(session.end_profiling())
    events: list[dict[str, Any]] = json.loads(path.read_text())
    path.unlink()
    return events


def nodes_by_provider(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return how many nodes of each kind ran on each provider, of the events of a profile."""
    nodes = {
        (event["args"].get("provider", ""), event["args"]["op_name"], event["name"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    providers = {provider for provider, _, _ in nodes}
    return {each: dict(Counter(kind for provider, kind, _ in nodes if provider == each)) for each in sorted(providers)}


def cuda_graphs(setting: Setting) -> Finding:
    """Steps are captured and replayed, and give what they give without."""
    if setting.onnx_config.device != CUDA:
        return {"ok": True, "left_out": "CUDA graphs need CUDA"}
    bundle = setting.check_bundle()
    architecture = read_manifest(bundle).header.architecture
    said = _Listener()
    logging.getLogger("ferryman_service").addHandler(said)
    models = [
        open_device_model(config, lambda config: DeviceModel.load(bundle, architecture, config))
        for config in (setting.onnx_config, replace(setting.onnx_config, cuda_graphs=True))
    ]
    batches = [DeviceRunningBatch(model, 4) for model in models]
    same = True
    for step in range(12):
        if step in (0, 4, 8):
            for batch in batches:
                batch.admit(random_sources(3, setting.check_vocabulary, seed=step))
        parents_SW = np.random.default_rng(step).integers(0, 4, (batches[0].sentences, 4))
        found: list[Candidates] = [batch.step(np.full(parents_SW.shape, BOS + 3), parents_SW, 8) for batch in batches]
        same &= bool((found[0].tokens_SWK == found[1].tokens_SWK).all())
    return {"ok": same and not said.lines, "same": same, "said": said.lines}


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage()[:1500])


CHECKS: Final[Mapping[str, Callable[[Setting], Finding]]] = {
    "nodes on the GPU": placement,
    "same tokens": same_tokens,
    "running batch": running_batch,
    "CUDA graphs": cuda_graphs,
    "BLEU": bleu,
}
