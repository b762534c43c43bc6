"""The running batch on a GPU: caches stay in its memory, tokens go there and candidates come back.

A GPU is fast with few shapes, and a CUDA graph has but one: so places, positions and source positions come in powers of
two, and what is beyond the sentences is computed and not looked at. A sentence's rows stand in the order of its beam:
when that changes, the whole cache is copied in the new order to a second piece of memory, and the two change parts. The
same copy brings sentences together when others have left, and makes room.

Shape suffixes: S sentences, P places of sentences, W rows per sentence, R = P * W rows, H heads, T positions of a row's
cache, L source positions, K candidates per row, V vocabulary, M moved items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ferryman_service.bundle import graph_io
from ferryman_service.search.decoder import Candidates
from ferryman_service.translation.device_model import DeviceModel
from ferryman_service.translation.onnx_model import CPU

_FIRST_POSITIONS: Final = 32
_FIRST_SOURCE_POSITIONS: Final = 16
_CHUNK: Final = 8
"""Positions that are copied together when the room for them changes; every room is a multiple."""
_ALIGNMENT: Final = 64
"""Where inputs begin in their common memory, as multiples of 4 bytes."""
KEPT_BYTES: Final = 1 << 30
KEPT_BINDINGS: Final = 256

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """What the caches have room for: sentences, target positions, source positions; each a power of two."""

    places: int
    positions: int
    source_positions: int


_FIRST_LAYOUT: Final = Layout(1, _FIRST_POSITIONS, _FIRST_SOURCE_POSITIONS)


class DeviceRunningBatch:
    """A search.RunningBatch."""

    def __init__(self, model: DeviceModel, width: int, *, attention: bool = False) -> None:
        """Make an empty batch."""
        architecture = model.architecture
        self._model = model
        self._width = width
        self._attends = attention
        self._parts = 2 * architecture.decoder_layers
        itemsize = model.element_type.itemsize
        self._cache = _Cache(model, architecture.heads, graph_io.cache_width(architecture.head_dim) * itemsize)
        self._cross = _Cache(model, architecture.heads, architecture.head_dim * itemsize)
        self._ranks_W = np.arange(width)
        self._place_S: Integers = np.empty(0, np.int64)
        self._end = 0  # no sentence is at this place or behind it
        self._layout = _FIRST_LAYOUT
        # Places without a sentence have 0 and 1 here: what is computed there stays in bounds.
        self._past_length_P: NDArray[np.int32] = np.zeros(1, np.int32)
        self._source_length_P: NDArray[np.int32] = np.ones(1, np.int32)
        self._inputs: dict[int, _StepInputs] = {}
        self._bindings: dict[tuple[Layout, int, int, int], _BoundStep] = {}
        self._step: _BoundStep | None = None
        self._rearrange(_FIRST_LAYOUT)

    @property
    def width(self) -> int:
        """W."""
        return self._width

    @property
    def sentences(self) -> int:
        """S."""
        return len(self._place_S)

    @property
    def layout(self) -> Layout:
        """What the caches have room for."""
        return self._layout

    @property
    def size_bytes(self) -> int:
        """How much memory the caches take."""
        return self._cache.size_bytes + self._cross.size_bytes

    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        """Encode sentences and put them behind those in the batch."""
        if not sources:
            return
        self._make_room_for(sources)
        layout, places = self._layout, np.arange(self._end, self._end + len(sources))
        self._model.encode(
            sources,
            layout.source_positions,
            lambda part, sentence: self._cross.address(part * layout.places + self._end + sentence),
        )
        self._source_length_P[places] = [len(source) for source in sources]
        self._place_S = np.concatenate((self._place_S, places))
        self._end += len(sources)

    def keep(self, kept_S: Integers) -> None:
        """Let all sentences leave but these."""
        leaves_S = np.ones(self.sentences, bool)
        leaves_S[kept_S] = False
        gone = self._place_S[leaves_S]
        self._past_length_P[gone], self._source_length_P[gone] = 0, 1
        self._place_S = self._place_S[kept_S]
        if not len(kept_S):
            for cache in (self._cache, self._cross):
                cache.give_back()
            self._rearrange(replace(_FIRST_LAYOUT, source_positions=self._layout.source_positions))

    def step(self, tokens_SW: Integers, parents_SW: Integers, k: int) -> Candidates:
        """Feed one token to each row and return its `k` best continuations."""
        k = min(k, self._model.architecture.vocabulary_size)
        best_RQ = self._run(tokens_SW, parents_SW, k)
        best_SWQ = best_RQ.reshape(-1, self._width, 2 * k)[self._place_S]
        return Candidates(best_SWQ[:, :, :k], best_SWQ[:, :, k:].astype(np.int64))

    def step_logits(self, tokens_SW: Integers, parents_SW: Integers) -> Floats:
        """Feed one token to each row and return logits_SWV."""
        logits_RV = self._run(tokens_SW, parents_SW, 0)
        logits_SWV: Floats = logits_RV.reshape(self._layout.places, self._width, -1)[self._place_S]
        return logits_SWV[:, :, : self._model.architecture.vocabulary_size]

    def attention(self) -> Floats:
        """Return what each row paid attention to."""
        assert self._attends, "the batch was made without attention=True"
        assert self._step is not None and self._step.attention is not None, "no step was taken yet"
        weight_SHWL = self._step.attention.numpy()[self._place_S]
        mean_SWL: Floats = weight_SHWL.astype(np.float32).mean(axis=1)
        return mean_SWL

    def _run(self, tokens_SW: Integers, parents_SW: Integers, k: int) -> Floats:
        """Take a step and return the rows' candidates, or with `k` 0 their logits."""
        self._settle(parents_SW)
        places = self._layout.places
        inputs = self._inputs.get(places)
        if inputs is None:
            inputs = self._inputs[places] = _StepInputs(self._model, places, self._width)
        token_PW = np.zeros((places, self._width), np.int64)
        token_PW[self._place_S] = tokens_SW
        past_R = inputs.past_length_R
        past_R.reshape(places, self._width)[...] = self._past_length_P[:, None]
        self._model.embedding.of_rows(token_PW.reshape(-1), past_R, int(past_R.max()), inputs.x_RD)
        inputs.source_length_P[...] = self._source_length_P
        if self._model.architecture.rotates:
            inputs.position_R[...] = past_R
        inputs.send()
        self._step = self._bound(inputs, k)
        self._step.run()
        self._past_length_P[self._place_S] += 1
        return self._step.answer()

    def _settle(self, parents_SW: Integers) -> None:
        """Bring rows into the order of the beams, and give the caches the room that the step needs."""
        layout, sentences = self._layout, self.sentences
        positions = layout.positions
        if int(self._past_length_P.max()) >= positions:
            positions *= 2
        # Not as soon as half of the places would do: a sentence more would bring them back.
        places = _power_of_two(sentences) if 8 * sentences <= 3 * layout.places else layout.places
        wanted = Layout(places, positions, layout.source_positions)
        if wanted != layout or (self._width > 1 and not (parents_SW == self._ranks_W).all()):
            self._rearrange(wanted, parents_SW)

    def _make_room_for(self, sources: Sequence[Sequence[int]]) -> None:
        """Make as many places free behind all sentences as sources come, with room for the longest."""
        layout, needed = self._layout, self.sentences + len(sources)
        present = self._source_length_P[self._place_S].max(initial=0)
        length = max(int(present), max(map(len, sources)))
        room = _power_of_two(length, _FIRST_SOURCE_POSITIONS)
        if room < layout.source_positions and 4 * length > layout.source_positions and self.sentences:
            room = layout.source_positions
        wanted = Layout(max(layout.places, _power_of_two(needed)), layout.positions, room)
        if wanted != layout or self._end + len(sources) > layout.places:
            self._rearrange(wanted)

    def _rearrange(self, layout: Layout, parents_SW: Integers | None = None) -> None:
        """Let the sentences stand side by side from the first place on, in this layout, and each row hold what its
        parent has held. What lies behind them is finite, whatever it is."""
        old, sentences, width = self._layout, self.sentences, self._width
        if not sentences:
            self._cache.clear(self._parts, layout.places * width, layout.positions)
            self._cross.clear(self._parts, layout.places, layout.source_positions)
        else:
            place_P = np.zeros(layout.places, np.int64)
            place_P[:sentences] = self._place_S
            rank_PW = np.zeros((layout.places, width), np.int64)
            rank_PW[:sentences] = self._ranks_W if parents_SW is None else parents_SW
            self._cache.move((place_P[:, None] * width + rank_PW).reshape(-1), layout.positions)
            is_dense = int(self._place_S[-1]) == sentences - 1
            if not is_dense or replace(old, positions=layout.positions) != layout:
                self._cross.move(place_P, layout.source_positions)
        past_length_P, source_length_P = np.zeros(layout.places, np.int32), np.ones(layout.places, np.int32)
        past_length_P[:sentences] = self._past_length_P[self._place_S]
        source_length_P[:sentences] = self._source_length_P[self._place_S]
        self._past_length_P, self._source_length_P = past_length_P, source_length_P
        self._place_S, self._end, self._layout = np.arange(sentences), sentences, layout

    def _bound(self, inputs: _StepInputs, k: int) -> _BoundStep:
        """Return the decoder on the memory that the caches have now."""
        key = self._layout, k, self._cache.address(0), self._cross.address(0)
        found = self._bindings.get(key)
        if found is None:
            if len(self._bindings) >= KEPT_BINDINGS:
                self._bindings.clear()
            found = self._bindings[key] = self._bind(inputs, k)
        return found

    def _bind(self, inputs: _StepInputs, k: int) -> _BoundStep:
        model, layout, width = self._model, self._layout, self._width
        rows, architecture = layout.places * width, model.architecture
        step = _BoundStep(model)
        step.bind_host(graph_io.SHAPE, np.array([layout.places, width, architecture.d_model]))
        # Lengths say what is looked at; this bounds them, and must be the same in every step of a CUDA graph.
        step.bind_host(graph_io.TOTAL_LENGTH, np.array(layout.positions, np.int32))
        step.bind_host(graph_io.K, np.array([max(k, 1)]))
        step.bind_value(graph_io.SOURCE_POSITIONS, model.to_device(np.arange(layout.source_positions, dtype=np.int32)))
        inputs.bind(step.binding)
        shape = layout.places, architecture.heads, layout.source_positions, architecture.head_dim
        for part, name in enumerate(graph_io.keys_values_names("cross", architecture.decoder_layers)):
            address = self._cross.address(part * layout.places)
            model.bind_input(step.binding, name, model.element_type, shape, address)
        shape = rows, architecture.heads, layout.positions, graph_io.cache_width(architecture.head_dim)
        names = (graph_io.keys_values_names(kind, architecture.decoder_layers) for kind in ("past", "present"))
        for part, (past, present) in enumerate(zip(*names, strict=True)):
            address = self._cache.address(part * rows)
            model.bind_input(step.binding, past, model.element_type, shape, address)
            model.bind_output(step.binding, present, model.element_type, shape, address)
        if k:
            step.bind_answer(graph_io.BEST, (rows, 2 * k))
        else:
            step.bind_answer(graph_io.LOGITS, (rows, model.logits_width))
        if self._attends:
            step.bind_attention((layout.places, architecture.heads, width, layout.source_positions))
        return step


class _Cache:
    """Keys or values of all layers, [parts, items, heads, positions, bytes], in one of two pieces of memory: to move
    them is to copy them into the other. An item is a row's, or a sentence's."""

    def __init__(self, model: DeviceModel, heads: int, width_bytes: int) -> None:
        self._model = model
        self._heads = heads
        self._width_bytes = width_bytes
        self._memory: list[onnxruntime.OrtValue | None] = [None, None]
        self._parts = self._items = self._positions = 0

    @property
    def size_bytes(self) -> int:
        """How much memory both pieces take."""
        return sum(_bytes_of(memory) for memory in self._memory)

    def address(self, item: int) -> int:
        """Return where an item lies, counted through all parts."""
        memory = self._memory[0]
        assert memory is not None, "the cache has no memory before it is cleared"
        return int(memory.data_ptr()) + item * self._item_bytes(self._positions)

    def clear(self, parts: int, items: int, positions: int) -> None:
        """Have room for so much, whatever is in it."""
        self._parts, self._items, self._positions = parts, items, positions
        self._make_room(0, parts * items * self._item_bytes(positions))

    def move(self, source_M: Integers, positions: int) -> None:
        """Let each item hold what item source_M[m] has held, with room for other positions: what is beyond the former
        ones is finite, whatever it is."""
        parts, source = self._parts, self.address(0)
        self._make_room(1, parts * len(source_M) * self._item_bytes(positions))
        self._memory.reverse()
        target, items = self._memory[0], self._items
        assert target is not None
        old, new = self._positions // _CHUNK, positions // _CHUNK
        index_M, item_bytes = source_M, self._item_bytes(positions)
        if old != new:
            chunk_T = np.arange(new)
            chunk_T[old:] = 0
            head_MH = source_M[:, None] * self._heads + np.arange(self._heads)
            index_M = (head_MH[:, :, None] * old + chunk_T).reshape(-1)
            items, item_bytes = items * self._heads * old, _CHUNK * self._width_bytes
        self._model.move(source, items, index_M, target.data_ptr(), parts, item_bytes)
        self._items, self._positions = len(source_M), positions

    def give_back(self) -> None:
        """Free the memory if it is much; the cache must be cleared then."""
        if self.size_bytes > KEPT_BYTES:
            self._memory = [None, None]

    def _item_bytes(self, positions: int) -> int:
        return self._heads * positions * self._width_bytes

    def _make_room(self, side: int, wanted_bytes: int) -> None:
        """Have so many bytes on one side. New memory is zeros: attention multiplies by zero what it does not look at,
        so it must hold no NaN."""
        if wanted_bytes > _bytes_of(self._memory[side]):
            self._memory[side] = None
            self._memory[side] = self._model.zeros(wanted_bytes)


class _StepInputs:
    """What a step takes from the host, in one piece of memory so that it is one copy. `x_RD`, `past_length_R` and the
    others are to be filled; `send` copies them to the device."""

    def __init__(self, model: DeviceModel, places: int, width: int) -> None:
        rows, d_model = places * width, model.architecture.d_model
        self._model = model
        self._wanted: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = [
            (graph_io.EMBEDDED, np.dtype(np.float32), (places, width, d_model)),
            (graph_io.PAST_LENGTHS, np.dtype(np.int32), (rows,)),
            (graph_io.SOURCE_LENGTHS, np.dtype(np.int32), (places,)),
        ]
        if model.architecture.rotates:
            self._wanted.append((graph_io.POSITIONS, np.dtype(np.int64), (rows, 1)))
        sizes = [int(np.prod(shape)) * dtype.itemsize // 4 for _, dtype, shape in self._wanted]
        ends = np.cumsum([_rounded(size, _ALIGNMENT) for size in sizes]).tolist()
        self._begins = [0, *ends[:-1]]
        self._host = np.zeros(ends[-1], np.float32)
        views: dict[str, NDArray[Any]] = {
            name: self._host[begin : begin + size].view(dtype)
            for (name, dtype, _), begin, size in zip(self._wanted, self._begins, sizes, strict=True)
        }
        self.x_RD: Floats = views[graph_io.EMBEDDED].reshape(rows, d_model)
        self.past_length_R: NDArray[np.int32] = views[graph_io.PAST_LENGTHS]
        self.source_length_P: NDArray[np.int32] = views[graph_io.SOURCE_LENGTHS]
        self.position_R: Integers = views.get(graph_io.POSITIONS, np.empty(0, np.int64))
        self._there = model.to_device(self._host.copy())

    def send(self) -> None:
        """Copy what was filled in."""
        self._there.update_inplace(self._host)

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind the copies as inputs."""
        for (name, dtype, shape), begin in zip(self._wanted, self._begins, strict=True):
            self._model.bind_input(binding, name, dtype, shape, self._there.data_ptr() + 4 * begin)


class _BoundStep:
    """The decoder on certain memory and shapes; it keeps what it is bound to alive, except for caches and inputs."""

    def __init__(self, model: DeviceModel) -> None:
        self.binding = model.decoder.io_binding()
        self.attention: onnxruntime.OrtValue | None = None
        self._model = model
        self._answer: onnxruntime.OrtValue | None = None
        self._bound: list[object] = []
        self._options = model.step_options()

    def bind_host(self, name: str, array: NDArray[Any]) -> None:
        """Bind an input that is read on the CPU; it must not change."""
        self._bound.append(array)
        self.binding.bind_input(name, CPU, 0, array.dtype, list(array.shape), array.ctypes.data)

    def bind_value(self, name: str, value: onnxruntime.OrtValue) -> None:
        """Bind an input on the device; it must not change."""
        self._bound.append(value)
        self.binding.bind_ortvalue_input(name, value)

    def bind_answer(self, name: str, shape: tuple[int, ...]) -> None:
        """Bind the output, float32, that `answer` returns."""
        self._answer = self._model.room_for(shape, np.dtype(np.float32))
        self.binding.bind_ortvalue_output(name, self._answer)

    def bind_attention(self, shape: tuple[int, ...]) -> None:
        """Bind the weights of the attention."""
        self.attention = self._model.room_for(shape, self._model.element_type)
        self.binding.bind_ortvalue_output(graph_io.ATTENTION, self.attention)

    def run(self) -> None:
        """Take the step, and wait until it is done."""
        self._model.decoder.run_with_iobinding(self.binding, self._options)

    def answer(self) -> Floats:
        """Return a copy of the answer."""
        assert self._answer is not None
        answer: Floats = self._answer.numpy()
        return answer


def _bytes_of(memory: onnxruntime.OrtValue | None) -> int:
    return 0 if memory is None else int(memory.tensor_size_in_bytes())


def _power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is neither below the number nor below the least."""
    return max(least, 1 << (number - 1).bit_length())


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
