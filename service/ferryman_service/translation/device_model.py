"""A bundle's 16-bit graphs in ONNX Runtime, with what they work on in the memory of a device.

On a GPU ONNX Runtime leaves every node that CUDA has no kernel for to the CPU, with copies between; the graphs are made
so that there is none. On a CPU the same graphs run too, slowly: tests use that.

Shape suffixes: S sentences, L source positions, D model width, H heads, E head width, G groups, N items, M moved items,
X numbers of an item.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ferryman_service.bundle import graph_io
from ferryman_service.bundle.embedding import Embedding
from ferryman_service.bundle.manifest import REORDER_FILE, Architecture, graph_files
from ferryman_service.translation.onnx_model import CPU, CUDA, OnnxConfig, session_options

_CUDA_PROVIDER: Final = "CUDAExecutionProvider"
_MOST_GRAPHS: Final = 256
"""A captured graph is never freed, so there are only so many; other shapes are run node by node."""
MOST_NUMBERS: Final = 2**31 - 1
"""CUDA's Gather counts in 32 bits."""
ENCODED_AT_ONCE: Final = 16_384
_ZEROS_BYTES: Final = 1 << 16
_KEPT_MOVES: Final = 64

_log = logging.getLogger(__name__)


class DeviceModel:
    """The sessions of one model and its embedding. Used by one thread at a time."""

    def __init__(
        self,
        encoder: onnxruntime.InferenceSession,
        decoder: onnxruntime.InferenceSession,
        reorder: onnxruntime.InferenceSession,
        embedding: Embedding,
        architecture: Architecture,
        *,
        device: str,
        captures: bool = False,
    ) -> None:
        """Store the parts; `captures`: the decoder's session was opened for CUDA graphs."""
        self.decoder = decoder
        self.embedding = embedding
        self.architecture = architecture
        self.device = device
        self.logits_width = _logits_width(decoder)
        """V, and the padding that the graph has behind it."""
        self.element_type = _element_type(decoder)
        """What keys and values are."""
        self._encoder = encoder
        self._reorder = reorder
        self._cross_names = graph_io.keys_values_names("cross", architecture.decoder_layers)
        self._captures = captures
        self._graph_numbers = itertools.count()
        # To get memory of the device and give it back is slow: what every step needs is kept.
        self._indices: dict[int, onnxruntime.OrtValue] = {}
        self._moves: dict[tuple[int, ...], onnxruntime.IOBinding] = {}
        self._zeros: onnxruntime.OrtValue | None = None

    @classmethod
    def load(cls, bundle: Path, architecture: Architecture, config: OnnxConfig) -> DeviceModel:
        """Load the graphs. Raises ONNX Runtime's errors for bad graphs, OSError and ValueError for bad files, and
        CudaFailed if CUDA was asked for and does not start."""
        files = graph_files(config.compute_type)
        return cls(
            open_session(bundle / files.encoder, config),
            open_session(bundle / files.decoder, config, captures=config.cuda_graphs),
            open_session(bundle / REORDER_FILE, config),
            Embedding.open(bundle, config.compute_type, architecture),
            architecture,
            device=config.device,
            captures=config.cuda_graphs,
        )

    def to_device(self, array: NDArray[Any]) -> onnxruntime.OrtValue:
        """Return the array in the device's memory; on a CPU it is the same memory."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def room_for(self, shape: Sequence[int], dtype: np.dtype[Any]) -> onnxruntime.OrtValue:
        """Return memory of the device, whatever is in it."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self.device, 0)

    def zeros(self, size_bytes: int) -> onnxruntime.OrtValue:
        """Return memory of the device, at least so much, all zeros: copied there from a small piece of them."""
        if self._zeros is None:
            self._zeros = self.to_device(np.zeros(_ZEROS_BYTES // 8, np.int64))
        pieces = -(-size_bytes // _ZEROS_BYTES)
        memory = self.room_for([pieces * _ZEROS_BYTES // 8], np.dtype(np.int64))
        at_once = max(1, MOST_NUMBERS // (_ZEROS_BYTES // 8))
        for first in range(0, pieces, at_once):
            everywhere = np.zeros(min(at_once, pieces - first), np.int64)
            target = memory.data_ptr() + first * _ZEROS_BYTES
            self.move(self._zeros.data_ptr(), 1, everywhere, target, 1, _ZEROS_BYTES)
        return memory

    def bind_input(
        self, binding: onnxruntime.IOBinding, name: str, dtype: np.dtype[Any], shape: Sequence[int], address: int
    ) -> None:
        """Bind a piece of the device's memory."""
        binding.bind_input(name, self.device, 0, dtype, list(shape), address)

    def bind_output(
        self, binding: onnxruntime.IOBinding, name: str, dtype: np.dtype[Any], shape: Sequence[int], address: int
    ) -> None:
        """Bind a piece of the device's memory."""
        binding.bind_output(name, self.device, 0, dtype, list(shape), address)

    def encode(self, sources: Sequence[Sequence[int]], length: int, address_of: Callable[[int, int], int]) -> None:
        """Write the cross keys and values of sentences, padded to `length`; those of layer n's part (as in
        graph_io.keys_values_names) and sentence s, and of all sentences behind s, belong at address_of(n, s)."""
        at_once = max(1, ENCODED_AT_ONCE // length)
        for first in range(0, len(sources), at_once):
            addresses = [address_of(part, first) for part in range(len(self._cross_names))]
            self._encode(sources[first : first + at_once], length, addresses)

    def _encode(self, sources: Sequence[Sequence[int]], length: int, addresses: Sequence[int]) -> None:
        architecture, count = self.architecture, len(sources)
        lengths_S = np.fromiter(map(len, sources), np.int32, count)
        real_SL = np.arange(length) < lengths_S[:, None]
        x_SLD = np.zeros((count, length, architecture.d_model), np.float32)
        x_SLD[real_SL] = self._embedded(sources, np.nonzero(real_SL)[1].astype(np.int32))
        inputs: dict[str, NDArray[Any]] = {graph_io.EMBEDDED: x_SLD, graph_io.SOURCE_LENGTHS: lengths_S}
        if architecture.rotates:
            inputs[graph_io.POSITIONS] = np.ascontiguousarray(np.broadcast_to(np.arange(length), real_SL.shape))
        binding, shape_3 = self._encoder.io_binding(), np.array(x_SLD.shape)
        binding.bind_input(graph_io.SHAPE, CPU, 0, shape_3.dtype, [3], shape_3.ctypes.data)
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)  # ONNX Runtime copies it into memory that it keeps
        shape = count, architecture.heads, length, architecture.head_dim
        for name, address in zip(self._cross_names, addresses, strict=True):
            self.bind_output(binding, name, self.element_type, shape, address)
        self._encoder.run_with_iobinding(binding)

    def _embedded(self, sources: Sequence[Sequence[int]], position_N: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return x_ND of all tokens of all sentences; position_N are their places in the sentences."""
        token_N = np.fromiter(itertools.chain.from_iterable(sources), np.int64, len(position_N))
        x_ND = np.empty((len(token_N), self.architecture.d_model), np.float32)
        self.embedding.of_rows(token_N, position_N, int(position_N.max()), x_ND)
        return x_ND

    def move(self, source: int, items: int, index_M: NDArray[np.int64], target: int, groups: int, item: int) -> None:
        """Fill the memory at `target`, [groups, M, item bytes], with items of [groups, items, item bytes] at `source`.

        An item's bytes are a multiple of 8.
        """
        numbers, moved = item // 8, len(index_M)
        at_once = max(1, MOST_NUMBERS // (max(items, moved) * numbers))
        index = self._index(index_M)
        for first in range(0, groups, at_once):
            count = min(at_once, groups - first)
            place = source + first * items * item, target + first * moved * item
            self._reorder.run_with_iobinding(self._bound_move(index, *place, count, items, moved, numbers))

    def _index(self, index_M: NDArray[np.int64]) -> onnxruntime.OrtValue:
        """Return the numbers in the device's memory, where they stay until the next of the same length."""
        kept = self._indices.get(len(index_M))
        if kept is not None:
            kept.update_inplace(index_M)
            return kept
        if len(self._indices) >= _KEPT_MOVES:
            self._indices.clear()
            self._moves.clear()  # they are bound to what was kept
        self._indices[len(index_M)] = new = self.to_device(np.array(index_M))
        return new

    def _bound_move(
        self, index: onnxruntime.OrtValue, source: int, target: int, groups: int, items: int, moved: int, numbers: int
    ) -> onnxruntime.IOBinding:
        key = source, target, groups, items, moved, numbers
        found = self._moves.get(key)
        if found is None:
            if len(self._moves) >= _KEPT_MOVES:
                self._moves.clear()
            found, dtype = self._reorder.io_binding(), np.dtype(np.int64)
            self.bind_input(found, graph_io.DATA, dtype, (groups, items, numbers), source)
            found.bind_ortvalue_input(graph_io.INDEX, index)
            self.bind_output(found, graph_io.MOVED, dtype, (groups, moved, numbers), target)
            self._moves[key] = found
        return found

    def step_options(self) -> onnxruntime.RunOptions | None:
        """Return the options with which the decoder is run on memory and shapes that it was never run on before, and
        on the same again: they say which CUDA graph that is, if any."""
        if not self._captures:
            return None
        number = next(self._graph_numbers)
        if number == _MOST_GRAPHS:
            _log.warning("%d CUDA graphs were captured: other batch shapes are run without one", _MOST_GRAPHS)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number + 1 if number < _MOST_GRAPHS else -1))
        return options


def _logits_width(decoder: onnxruntime.InferenceSession) -> int:
    widths = [int(value.shape[1]) for value in decoder.get_outputs() if value.name == graph_io.LOGITS]
    if not widths:
        raise ValueError("the graph is no decoder: it gives no logits")
    return widths[0]


def _element_type(decoder: onnxruntime.InferenceSession) -> np.dtype[Any]:
    is_float16 = any(value.type == "tensor(float16)" for value in decoder.get_inputs())
    return np.dtype(np.float16 if is_float16 else np.float32)


class CudaFailed(Exception):
    """CUDA was asked for, and ONNX Runtime does without: a driver or a library is missing."""


def open_session(
    path: Path,
    config: OnnxConfig,
    *,
    captures: bool = False,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph on the configured device, with the common options if there are no others; raises CudaFailed if CUDA
    does not start."""
    session = onnxruntime.InferenceSession(
        str(path),
        options or session_options(config),
        providers=_providers(config, captures=captures),
    )
    if config.device == CUDA and _CUDA_PROVIDER not in session.get_providers():
        raise CudaFailed(f"ONNX Runtime {onnxruntime.__version__} could not start CUDA; its log says why")
    return session


def _providers(config: OnnxConfig, *, captures: bool) -> list[Any]:
    if config.device == CPU:
        return ["CPUExecutionProvider"]
    options = {"device_id": "0", "enable_cuda_graph": "1" if captures else "0"}
    return [(_CUDA_PROVIDER, options), "CPUExecutionProvider"]


def cuda_is_available() -> bool:
    """Tell whether ONNX Runtime can use a GPU here: it is built for CUDA, finds CUDA's libraries, and gets memory."""
    if _CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return False
    onnxruntime.preload_dlls()  # those that pip has installed, or that came with torch
    try:
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), CUDA, 0)
    except Exception as error:  # noqa: BLE001 (whatever it is, there is no GPU to be used)
        _log.warning("ONNX Runtime is built for CUDA, but there is no GPU that it can use: %s", error)
        return False
    return True
