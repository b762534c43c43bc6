"""Loading published bundles for translating."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

from ferryman_service.bundle import graph_io
from ferryman_service.bundle.graph_check import check_graphs
from ferryman_service.bundle.manifest import SUBWORDS_FILE, Architecture, Manifest, read_manifest, verify
from ferryman_service.config import open_files
from ferryman_service.domain.errors import ModelDamaged, TooManyOpenFiles
from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.domain.translation import ComputeType
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.search.decoder import Decoder, RunningBatch
from ferryman_service.text.subwords import Subwords
from ferryman_service.translation.cache_memory import CacheShape
from ferryman_service.translation.counts import EngineCounts
from ferryman_service.translation.device_batch import DeviceRunningBatch
from ferryman_service.translation.device_model import DeviceModel
from ferryman_service.translation.engine import BatchingEngine
from ferryman_service.translation.onnx_model import CPU, OnnxConfig, OnnxModel
from ferryman_service.translation.running_batch import OnnxRunningBatch
from ferryman_service.translation.scheduler import SchedulerConfig

_log = logging.getLogger(__name__)
_CANNOT_LOAD: Final = (
    onnxruntime_errors.Fail,
    onnxruntime_errors.InvalidArgument,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.InvalidProtobuf,
    onnxruntime_errors.NotImplemented,
    RuntimeError,  # raised by SentencePiece
    ValueError,  # raised for an array of another shape, and for a graph of other outputs
    EOFError,  # raised by NumPy for an empty file
    OSError,
)


ON_A_GPU: Final = SchedulerConfig(threads=1, max_rows=1024, max_encoded_tokens=8192)
"""A GPU does one step at a time, and many rows take it as long as few."""


_WIDE: Final = 256
_WIDE_ROWS: Final = 80
"""With matrices this wide the products are as fast with 80 rows as with more, and rows take much memory."""


class OnnxBundleLoader:
    """A BundleLoader."""

    def __init__(
        self,
        config: OnnxConfig,
        scheduler: SchedulerConfig,
        on_a_gpu: SchedulerConfig = ON_A_GPU,
        *,
        rows_by_size: bool = True,
        max_translation_tokens: int = 0,
        counts: EngineCounts | None = None,
    ) -> None:
        """Store the parts; `on_a_gpu` holds for models in fp16. With `rows_by_size` wide models run no more rows than
        they make the most of, whatever `scheduler` says. No translation has more than `max_translation_tokens`, 0: than
        the longest source of its model. `counts` is told what the engines do."""
        assert on_a_gpu.threads == 1, "a model on a GPU is used by one thread"
        self._config = config
        self._scheduler = scheduler
        self._on_a_gpu = on_a_gpu
        self._rows_by_size = rows_by_size
        self._max_translation_tokens = max_translation_tokens
        self._counts = counts

    def load(self, bundle: Path, compute_type: ComputeType | None = None) -> BatchingEngine:
        """Check every digest and graph, and load; raises ModelDamaged, TooManyOpenFiles. A bundle without int8 or fp16
        is loaded as float32, on the CPU."""
        config = self._fitting(read_manifest(bundle), compute_type or self._config.compute_type)
        manifest = verify(bundle, to_translate=config.compute_type)
        check_graphs(bundle, manifest, [config.compute_type])
        header = manifest.header
        try:
            subwords = Subwords.load(bundle / SUBWORDS_FILE)
            _check_size(subwords, header.architecture)
            decoder = _open_decoder(bundle, header.architecture, config)
        except _CANNOT_LOAD as error:
            if open_files.are_exhausted():
                raise TooManyOpenFiles("the server has no file left to load the model with: try again") from error
            name = type(error).__name__  # its text names paths of this machine
            raise ModelDamaged(f"the bundle is as it was published, but cannot be loaded: {name}") from error
        text = SentenceText(subwords, header.max_sentence_tokens, self._max_translation_tokens)
        scheduler = replace(
            self._scheduling(header.architecture, config.compute_type),
            cache_shape=_cache_shape(header.architecture, config.compute_type),
        )
        return BatchingEngine(
            decoder,
            text,
            manifest.size_bytes(config.compute_type),
            scheduler,
            compute_type=config.compute_type,
            counts=self._counts,
        )

    def _scheduling(self, architecture: Architecture, compute_type: ComputeType) -> SchedulerConfig:
        if compute_type is ComputeType.FP16:
            return self._on_a_gpu
        if self._rows_by_size and architecture.d_model > _WIDE:
            return replace(self._scheduler, max_rows=min(_WIDE_ROWS, self._scheduler.max_rows))
        return self._scheduler

    def _fitting(self, manifest: Manifest, compute_type: ComputeType) -> OnnxConfig:
        run_id = manifest.header.lineage.run_id
        if compute_type is ComputeType.INT8 and not manifest.has_int8:
            _log.warning("the model of run %s has no int8 graphs: loaded as fp32", run_id)
            compute_type = ComputeType.FP32
        if compute_type is ComputeType.FP16 and not manifest.has_fp16:
            _log.warning("the model of run %s has no fp16 graphs, so no GPU can run it: loaded as fp32", run_id)
            compute_type = ComputeType.FP32
        if compute_type is ComputeType.FP16:
            return replace(self._config, compute_type=compute_type)
        return replace(self._config, compute_type=compute_type, device=CPU, cuda_graphs=False)


def _cache_shape(architecture: Architecture, compute_type: ComputeType) -> CacheShape:
    """Return what caches take: keys and values of each layer; on a GPU there are two pieces of memory."""
    parts = 2 * architecture.decoder_layers * architecture.heads
    size_bytes = 2 * 2 if compute_type is ComputeType.FP16 else 4
    return CacheShape(
        row_position_bytes=parts * graph_io.cache_width(architecture.head_dim) * size_bytes,
        source_position_bytes=parts * architecture.head_dim * size_bytes,
        powers_of_two=compute_type is ComputeType.FP16,
    )


def open_device_model(config: OnnxConfig, load: Callable[[OnnxConfig], DeviceModel]) -> DeviceModel:
    """Return the model that `load` returns; without CUDA graphs if they are refused, at the latest when a first step is
    captured."""
    if config.cuda_graphs:
        try:
            model = load(config)
            _take_a_step(model)
            return model
        except Exception as error:  # noqa: BLE001 (a model that cannot be loaded at all is found out below)
            _log.warning("CUDA graphs are refused, so steps are run node by node: %s", error)
    return load(replace(config, cuda_graphs=False))


def _take_a_step(model: DeviceModel) -> None:
    batch = DeviceRunningBatch(model, 1)
    batch.admit([(EOS,)])
    batch.step(np.array([[BOS]]), np.array([[0]]), 1)


def _open_decoder(bundle: Path, architecture: Architecture, config: OnnxConfig) -> Decoder:
    if config.compute_type is not ComputeType.FP16:
        return OnnxDecoder(OnnxModel.load(bundle, architecture, config))
    return DeviceDecoder(open_device_model(config, lambda config: DeviceModel.load(bundle, architecture, config)))


def _check_size(subwords: Subwords, architecture: Architecture) -> None:
    """Raise ModelDamaged if there could be tokens without a row in the embedding."""
    if subwords.size != architecture.vocabulary_size:
        text = f"{SUBWORDS_FILE} cannot be loaded: it has {subwords.size} subwords"
        raise ModelDamaged(f"{text}, the architecture {architecture.vocabulary_size}", file=SUBWORDS_FILE)


class OnnxDecoder:
    """A search.Decoder. Safe to call from several threads at once; each batch belongs to one."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model

    def batch(self, width: int, *, attention: bool = False) -> RunningBatch:
        """Return an empty batch with `width` rows per sentence."""
        return OnnxRunningBatch(self._model, width, attention=attention)


class DeviceDecoder:
    """A search.Decoder over a model on a GPU. It and its batches are used by one thread."""

    def __init__(self, model: DeviceModel) -> None:
        self._model = model

    def batch(self, width: int, *, attention: bool = False) -> RunningBatch:
        """Return an empty batch with `width` rows per sentence."""
        return DeviceRunningBatch(self._model, width, attention=attention)
