"""Loading published bundles for translating."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Final

from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

from ferryman_service.bundle.manifest import SUBWORDS_FILE, Manifest, read_manifest, verify
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.translation import ComputeType
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.search.decoder import RunningBatch
from ferryman_service.text.subwords import Subwords
from ferryman_service.translation.engine import BatchingEngine
from ferryman_service.translation.onnx_model import OnnxConfig, OnnxModel
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
    ValueError,  # raised for an array of another shape
    OSError,
)


class OnnxBundleLoader:
    """A BundleLoader."""

    def __init__(self, config: OnnxConfig, scheduler: SchedulerConfig) -> None:
        self._config = config
        self._scheduler = scheduler

    def load(self, bundle: Path, compute_type: ComputeType | None = None) -> BatchingEngine:
        """Check every digest and load; raises ModelDamaged. A bundle without int8 is loaded as float32."""
        config = self._fitting(read_manifest(bundle), compute_type or self._config.compute_type)
        manifest = verify(bundle, to_translate=config.compute_type)
        header = manifest.header
        try:
            model = OnnxModel.load(bundle, header.architecture, config)
            subwords = Subwords.load(bundle / SUBWORDS_FILE)
        except _CANNOT_LOAD as error:
            name = type(error).__name__  # its text names paths of this machine
            raise ModelDamaged(f"the bundle is as it was published, but cannot be loaded: {name}") from error
        text = SentenceText(subwords, header.max_sentence_tokens)
        return BatchingEngine(OnnxDecoder(model), text, manifest.size_bytes(config.compute_type), self._scheduler)

    def _fitting(self, manifest: Manifest, compute_type: ComputeType) -> OnnxConfig:
        if compute_type is ComputeType.INT8 and not manifest.has_int8:
            _log.warning("the model of run %s has no int8 graphs: loaded as fp32", manifest.header.lineage.run_id)
            compute_type = ComputeType.FP32
        return replace(self._config, compute_type=compute_type)


class OnnxDecoder:
    """A search.Decoder. Safe to call from several threads at once; each batch belongs to one."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model

    def batch(self, width: int, *, attention: bool = False) -> RunningBatch:
        """Return an empty batch with `width` rows per sentence."""
        return OnnxRunningBatch(self._model, width, attention=attention)
