"""Loading published bundles for translating."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

from ferryman_service.bundle.manifest import SUBWORDS_FILE, verify
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.pipeline.translator import MicroBatchLimit, TextTranslator
from ferryman_service.text.subwords import Subwords
from ferryman_service.translation.onnx_decoder import OnnxConfig, OnnxDecoder

_CANNOT_LOAD: Final = (
    onnxruntime_errors.Fail,
    onnxruntime_errors.InvalidArgument,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.InvalidProtobuf,
    onnxruntime_errors.NotImplemented,
    RuntimeError,  # raised by SentencePiece
    OSError,
)


class OnnxBundleLoader:
    """A BundleLoader."""

    def __init__(self, config: OnnxConfig, limit: MicroBatchLimit) -> None:
        self._config = config
        self._limit = limit

    def load(self, bundle: Path) -> TextTranslator:
        """Check every digest and load; raises ModelDamaged."""
        header = verify(bundle, to_translate=True).header
        try:
            decoder = OnnxDecoder.load(bundle, header.architecture, self._config)
            subwords = Subwords.load(bundle / SUBWORDS_FILE)
        except _CANNOT_LOAD as error:
            name = type(error).__name__  # its text names paths of this machine
            raise ModelDamaged(f"the bundle is as it was published, but cannot be loaded: {name}") from error
        return TextTranslator(subwords, decoder, header.max_sentence_tokens, self._limit)
