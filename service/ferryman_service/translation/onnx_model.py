"""A bundle's graphs in ONNX Runtime.

Shape suffixes: S sentences, L source positions, H heads, E head width, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ferryman_service.bundle import graph_io
from ferryman_service.bundle.embedding import Embedding
from ferryman_service.bundle.manifest import Architecture, graph_files
from ferryman_service.domain.translation import ComputeType

CPU: Final = "cpu"
CUDA: Final = "cuda"
_DISABLED_OPTIMIZERS: Final = ["SkipLayerNormFusion"]  # on a CPU the fused node takes longer than its parts


@dataclass(frozen=True, kw_only=True)
class OnnxConfig:
    """How graphs are run. One thread per call is the fastest for models this small: run calls in parallel instead.

    `device` is CPU or CUDA (the first GPU; FP16 alone runs there). `cuda_graphs`: steps are captured and replayed.
    """

    compute_type: ComputeType = ComputeType.FP32
    intra_op_threads: int = 1
    device: str = CPU
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        assert self.device in (CPU, CUDA), f"device is {self.device!r}, must be {CPU} or {CUDA}"
        assert self.device == CPU or self.compute_type is ComputeType.FP16, "on a GPU only fp16 runs"
        assert self.device == CUDA or not self.cuda_graphs, "CUDA graphs are for CUDA"
        assert self.intra_op_threads > 0, "intra_op_threads must be positive"


class OnnxModel:
    """The sessions of one model and its embedding. Safe to use from several threads at once."""

    def __init__(
        self,
        encoder: onnxruntime.InferenceSession,
        decoder: onnxruntime.InferenceSession,
        embedding: Embedding,
        architecture: Architecture,
    ) -> None:
        self.decoder = decoder
        self.embedding = embedding
        self.architecture = architecture
        self.logits_width = _logits_width(decoder)
        """V, and the padding that the graph has behind it."""
        self._encoder = encoder
        self._cross_names = graph_io.keys_values_names("cross", architecture.decoder_layers)

    @classmethod
    def load(cls, bundle: Path, architecture: Architecture, config: OnnxConfig) -> OnnxModel:
        """Load the graphs. Raises ONNX Runtime's errors for bad graphs, OSError and ValueError for bad files."""
        options = session_options(config)
        files = graph_files(config.compute_type)
        encoder, decoder = (
            onnxruntime.InferenceSession(
                str(bundle / name),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_DISABLED_OPTIMIZERS,
            )
            for name in (files.encoder, files.decoder)
        )
        embedding = Embedding.open(bundle, config.compute_type, architecture)
        return cls(encoder, decoder, embedding, architecture)

    def encode(self, sources: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Return cross_keys_SHLE and cross_values_SHLE of each decoder layer; L is the longest source's length.

        Each source is subword ids with the end symbol, none empty. What stands at padding is finite and of no use.
        """
        lengths_S = np.fromiter(map(len, sources), np.int32, len(sources))
        source_SL = np.zeros((len(sources), int(lengths_S.max())), np.int64)
        for row_L, source in zip(source_SL, sources, strict=True):
            row_L[: len(source)] = source
        inputs: dict[str, Any] = {
            graph_io.EMBEDDED: self.embedding.of_sources(source_SL),
            graph_io.SOURCE_LENGTHS: lengths_S,
        }
        if self.architecture.rotates:
            positions_L = np.arange(source_SL.shape[1])
            inputs[graph_io.POSITIONS] = np.ascontiguousarray(np.broadcast_to(positions_L, source_SL.shape))
        found: list[NDArray[np.float32]] = self._encoder.run(self._cross_names, inputs)
        return found


def _logits_width(decoder: onnxruntime.InferenceSession) -> int:
    """Return the number of columns; raises ValueError if the graph gives no logits."""
    for output in decoder.get_outputs():
        if output.name == graph_io.LOGITS:
            return int(output.shape[1])
    raise ValueError("the decoder gives no logits")


def session_options(config: OnnxConfig) -> onnxruntime.SessionOptions:
    """Return what all sessions have in common."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A memory plan is kept for every shape that was ever seen, and batches have many shapes.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options
