"""Decoding with a bundle's graphs in ONNX Runtime.

Shape suffixes: S sentences, L source positions, W rows per sentence, R = S * W rows, K candidates per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ferryman_service.bundle import graph_io
from ferryman_service.bundle.manifest import DECODER_FILE, ENCODER_FILE, Architecture
from ferryman_service.domain.tokens import PAD
from ferryman_service.search.decoder import Candidates
from ferryman_service.search.rows import SentenceRows

_CPU = "cpu"
_CUDA = "cuda"
_DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]  # on a CPU the fused node takes several times the time of its parts


@dataclass(frozen=True, kw_only=True)
class OnnxConfig:
    """How the graphs are run. One thread per call is the fastest for models this small: run calls in parallel instead.

    `cuda` runs them on the first GPU, and needs the package onnxruntime-gpu.
    """

    intra_op_threads: int = 1
    cuda: bool = False

    def __post_init__(self) -> None:
        assert self.intra_op_threads > 0, "intra_op_threads must be positive"


class OnnxDecoder:
    """A search.Decoder over a bundle. Safe to call from several threads at once."""

    def __init__(
        self,
        encoder: onnxruntime.InferenceSession,
        decoder: onnxruntime.InferenceSession,
        architecture: Architecture,
        device: str,
    ) -> None:
        self._encoder = encoder
        self._decoder = decoder
        self._architecture = architecture
        self._device = device
        self._cross_names = graph_io.keys_values_names("cross", architecture.decoder_layers)

    @classmethod
    def load(cls, bundle: Path, architecture: Architecture, config: OnnxConfig) -> OnnxDecoder:
        """Load the graphs. Raises ValueError if CUDA is asked for and missing, ONNX Runtime's errors for bad graphs."""
        providers = _providers(config)
        options = _session_options(config)
        encoder, decoder = (
            onnxruntime.InferenceSession(
                str(bundle / name), options, providers=providers, disabled_optimizers=_DISABLED_OPTIMIZERS
            )
            for name in (ENCODER_FILE, DECODER_FILE)
        )
        return cls(encoder, decoder, architecture, _CUDA if config.cuda else _CPU)

    def encode(self, sources: Sequence[Sequence[int]]) -> OnnxSession:
        """Encode sentences (subword ids, end symbol included, none empty)."""
        source_SL = np.full((len(sources), max(map(len, sources))), PAD, dtype=np.int64)
        for row_L, source in zip(source_SL, sources, strict=True):
            row_L[: len(source)] = source
        binding = self._encoder.io_binding()
        binding.bind_cpu_input(graph_io.SOURCE, source_SL)
        encoded_names = (graph_io.BIAS, *self._cross_names)
        for name in encoded_names:
            binding.bind_output(name, self._device)
        self._encoder.run_with_iobinding(binding)
        encoded = dict(zip(encoded_names, binding.get_outputs(), strict=True))
        return OnnxSession(self._decoder, encoded, self._architecture, len(sources), self._device)


class OnnxSession:
    """A search.DecodingSession. The caches stay where the graphs run; tokens and candidates come and go."""

    def __init__(
        self,
        decoder: onnxruntime.InferenceSession,
        encoded: dict[str, onnxruntime.OrtValue],
        architecture: Architecture,
        sentences: int,
        device: str,
    ) -> None:
        self._decoder = decoder
        self._encoded = encoded
        self._vocabulary_size = architecture.vocabulary_size
        self._device = device
        self._past_names = graph_io.keys_values_names("past", architecture.decoder_layers)
        self._present_names = graph_io.keys_values_names("present", architecture.decoder_layers)
        heads = architecture.heads
        empty = np.empty((sentences, heads, 0, architecture.d_model // heads), dtype=np.float32)
        self._cache = [onnxruntime.OrtValue.ortvalue_from_numpy(empty, device)] * len(self._past_names)
        self._rows = SentenceRows(sentences)
        self._sentences = sentences
        self._position = 0

    def step(self, tokens_R: NDArray[np.int64], parents_R: NDArray[np.int64], k: int) -> Candidates:
        """Feed one token to each row; see search.DecodingSession."""
        stays_S = self._rows.follow(parents_R)
        if stays_S is not None:
            self._encoded = {name: self._select(value, stays_S) for name, value in self._encoded.items()}
            self._sentences = len(stays_S)
        binding = self._decoder.io_binding()
        binding.bind_cpu_input(graph_io.STEP_INPUT, tokens_R.reshape(self._sentences, -1))
        binding.bind_cpu_input(graph_io.PARENT, parents_R.reshape(self._sentences, -1))
        binding.bind_cpu_input(graph_io.POSITION, np.array([self._position]))
        binding.bind_cpu_input(graph_io.K, np.array([min(k, self._vocabulary_size)]))
        for name, value in (*self._encoded.items(), *zip(self._past_names, self._cache, strict=True)):
            binding.bind_ortvalue_input(name, value)
        for name in (graph_io.LOG_PROBS, graph_io.TOKENS):
            binding.bind_output(name, _CPU)
        for name in self._present_names:
            binding.bind_output(name, self._device)
        self._decoder.run_with_iobinding(binding)
        log_probs, tokens, *self._cache = binding.get_outputs()
        self._position += 1
        return Candidates(log_probs.numpy(), tokens.numpy())

    def _select(self, value: onnxruntime.OrtValue, index_S: NDArray[np.int64]) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()[index_S], self._device)


def cuda_is_available() -> bool:
    """Tell whether the installed ONNX Runtime can run on a GPU."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _providers(config: OnnxConfig) -> list[str]:
    if not config.cuda:
        return ["CPUExecutionProvider"]
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise ValueError(f"CUDA is asked for, ONNX Runtime offers {', '.join(available)}: install onnxruntime-gpu")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _session_options(config: OnnxConfig) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.intra_op_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A memory plan is kept for every shape that was ever seen, and the caches have a new shape at every step.
    options.enable_mem_pattern = False
    return options
