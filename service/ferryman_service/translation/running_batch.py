"""The running batch on ONNX Runtime: buffers that the decoder graph works on in place.

Sentences and rows have numbers (the search's) and places (in the buffers). A sentence keeps its place until the
places are made dense again, and its rows change places within it: when the search reorders a beam, the first child of
a row stays where its parent is, and only further children are copied, over rows that died.

Shape suffixes: S sentences, P places of sentences, W rows per sentence, R rows by place (place p's are p * W to p * W
+ W - 1), N layers' keys and values in turn, H heads, T positions of a row's cache, L source positions, E head width,
D model width, K candidates per row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ferryman_service.bundle import graph_io
from ferryman_service.search.decoder import Candidates
from ferryman_service.translation.onnx_model import CPU, OnnxModel

_FIRST_PLACES: Final = 4
_FIRST_POSITIONS: Final = 32
_SOURCE_STEP: Final = 8
_ENCODED_TOKENS: Final = 512
"""More in one call are not faster, but take more memory."""
_EMPTY_PLACES: Final = 1 / 16
"""How large a share of the places that a step computes may be empty: to fill them takes time too, and new sentences
do."""
MOST_BINDINGS: Final = 256
"""A binding takes some kilobytes for each layer, and as sentences come and go there may be thousands of shapes."""
_FEW_ROWS: Final = 6
"""So many are copied faster one by one."""
_SIMILAR: Final = 0.75
"""Sentences are encoded together if the shortest has at least this share of the longest one's length."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


class OnnxRunningBatch:
    """A search.RunningBatch."""

    def __init__(self, model: OnnxModel, width: int, *, attention: bool = False) -> None:
        architecture = model.architecture
        self._model = model
        self._width = width
        self._attention = attention
        self._heads, self._head_dim = architecture.heads, architecture.head_dim
        self._cache_width = graph_io.cache_width(architecture.head_dim)
        self._layers = 2 * architecture.decoder_layers
        self._cross_names = graph_io.keys_values_names("cross", architecture.decoder_layers)
        self._past_names = graph_io.keys_values_names("past", architecture.decoder_layers)
        self._present_names = graph_io.keys_values_names("present", architecture.decoder_layers)
        self._place_S: Integers = np.empty(0, np.int64)
        self._row_SW: Integers = np.empty((0, width), np.int64)
        self._places = 0  # what a step computes: up to the highest place that is taken
        self._in_place = True  # sentence s is at place s, and its row w at row s * W + w
        self._attention_PHWL: Floats = np.empty(0, np.float32)
        self._ranks_W = np.arange(width)
        self._cache, self._cross = _Storage(), _Storage()
        self._past_length_R: NDArray[np.int32] = np.zeros(0, np.int32)
        self._lives_R: NDArray[np.int32] = np.zeros(0, np.int32)
        self._source_length_P: NDArray[np.int32] = np.zeros(0, np.int32)
        self._entry_RT: Integers = np.zeros((0, 0), np.int64)
        self._entries = 1
        self._row_R: Integers = np.arange(0)
        self._total_length: NDArray[np.int32] = np.zeros((), np.int32)
        self._k_1: Integers = np.ones(1, np.int64)
        self._bindings: dict[tuple[int, ...], onnxruntime.IOBinding] = {}
        self._lay_out(_FIRST_PLACES, _FIRST_POSITIONS, _SOURCE_STEP)

    @property
    def width(self) -> int:
        """W."""
        return self._width

    @property
    def sentences(self) -> int:
        """S."""
        return len(self._place_S)

    @property
    def size_bytes(self) -> int:
        """How much memory the caches take."""
        return self._cache.size_bytes + self._cross.size_bytes

    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        """Encode sentences and put them behind those in the batch."""
        if not sources:
            return
        places = self._free_places(len(sources), max(map(len, sources)))
        by_length = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
        for group in _similar(by_length, sources):
            encoded_N = self._model.encode([sources[index] for index in group])
            length = encoded_N[0].shape[2]
            place_G = places[group]
            for cross_PHLE, encoded_GHLE in zip(self._cross.array, encoded_N, strict=True):
                cross_PHLE[place_G, :, :length] = encoded_GHLE
        self._source_length_P[places] = [len(source) for source in sources]
        row_SW = places[:, None] * self._width + self._ranks_W
        self._past_length_R[row_SW], self._lives_R[row_SW] = 0, 1
        self._place_S = np.concatenate((self._place_S, places))
        self._row_SW = np.concatenate((self._row_SW, row_SW))
        self._note_order()

    def keep(self, kept_S: Integers) -> None:
        """Let all sentences leave but these."""
        leaves_S = np.ones(self.sentences, bool)
        leaves_S[kept_S] = False
        leaving_RW = self._row_SW[leaves_S]
        self._past_length_R[leaving_RW], self._lives_R[leaving_RW] = 0, 0
        self._place_S, self._row_SW = self._place_S[kept_S], self._row_SW[kept_S]
        self._note_order()
        if not len(kept_S):
            self._cache.give_back()
            self._cross.give_back()
            self._lay_out(_FIRST_PLACES, _FIRST_POSITIONS, self._source_room)

    def step(self, tokens_SW: Integers, parents_SW: Integers, k: int) -> Candidates:
        """Feed one token to each row and return its `k` best continuations."""
        k = min(k, self._model.architecture.vocabulary_size)
        self._run(tokens_SW, parents_SW, k)
        log_prob_RK, token_RK = self._best
        if self._in_place:
            rows, shape = tokens_SW.size, (*tokens_SW.shape, k)
            return Candidates(log_prob_RK[:rows].reshape(shape), token_RK[:rows].reshape(shape))
        return Candidates(log_prob_RK.take(self._row_SW, 0), token_RK.take(self._row_SW, 0))

    def step_logits(self, tokens_SW: Integers, parents_SW: Integers) -> Floats:
        """Feed one token to each row and return logits_SWV."""
        self._run(tokens_SW, parents_SW, 0)
        logits_RV = self._logits_RV[:, : self._model.architecture.vocabulary_size]
        return logits_RV[self._row_SW]

    def attention(self) -> Floats:
        """Return what each row paid attention to."""
        assert self._attention, "the batch was made without attention=True"
        mean_PWL = self._attention_PHWL.mean(axis=1)
        mean_RL = mean_PWL.reshape(-1, mean_PWL.shape[-1])
        found: Floats = mean_RL.take(self._row_SW, 0)
        return found

    def _run(self, tokens_SW: Integers, parents_SW: Integers, k: int) -> None:
        """Take a step; the outputs then lie in the buffers that the binding names."""
        if self._width > 1:
            self._reorder(parents_SW)
        if self._places - self.sentences > self._places * _EMPTY_PLACES:
            self._make_dense()
        rows = self._places * self._width
        past_length_R = self._past_length_R[:rows]
        longest = int(past_length_R.max())
        if longest >= self._room:
            self._lay_out(self._cross.array.shape[1], 2 * self._room, self._source_room)
            past_length_R = self._past_length_R[:rows]
        if self._in_place:
            token_R = tokens_SW.reshape(-1)
        else:
            token_R = np.zeros(rows, np.int64)
            token_R[self._row_SW] = tokens_SW
        self._model.embedding.of_rows(token_R, past_length_R, longest, self._x_RD[:rows])
        self._total_length[...] = longest + 1
        if self._model.architecture.rotates:
            self._position_R1[:rows, 0] = past_length_R
        shapes = self._places, k, self._room, self._source_room, self._cross.array.shape[1]
        binding = self._bindings.get(shapes)
        if binding is None:
            if len(self._bindings) >= MOST_BINDINGS:
                del self._bindings[next(iter(self._bindings))]  # the oldest
            binding = self._bindings[shapes] = self._bind(self._places, k)
        if self._attention:
            # Memory of one's own is refused: ONNX infers the shape of this output as if there were no source.
            binding.bind_output(graph_io.ATTENTION, CPU)
        self._model.decoder.run_with_iobinding(binding)
        if self._attention:
            self._attention_PHWL = binding.get_outputs()[-1].numpy()
        if self._width > 1:
            self._number_entries(past_length_R)
        past_length_R += self._lives_R[:rows]

    def _reorder(self, parents_SW: Integers) -> None:
        """Give every row a place that holds its parent's cache."""
        if (parents_SW == self._ranks_W).all():
            return
        sentences, width = parents_SW.shape
        number_SW = parents_SW + np.arange(0, sentences * width, width)[:, None]
        row_SW = self._row_SW.take(number_SW)
        dies_R = np.ones(sentences * width, bool)
        dies_R[number_SW] = False
        if dies_R.any():
            # Not the first child of its parent.
            further_SW = (parents_SW[:, :, None] == parents_SW[:, None, :]).argmax(axis=2) != self._ranks_W
            source_N = row_SW[further_SW]
            target_N = self._row_SW.reshape(-1)[dies_R]  # as many in each sentence as it has further children
            row_SW[further_SW] = target_N
            self._copy_rows(source_N, target_N)
        self._row_SW = row_SW
        self._in_place = False

    def _copy_rows(self, source_N: Integers, target_N: Integers) -> None:
        """Copy rows' caches to other rows of the same sentences, but for the beginning that both have in common.

        Rows of a beam part late, so that is most of it. `entry` says for each position of a row which key and value lie
        there: equal numbers, equal contents.
        """
        entry_RT, length_N = self._entry_RT, self._past_length_R[source_N]
        longest = int(length_N.max())
        first_N = (entry_RT[source_N, :longest] != entry_RT[target_N, :longest]).argmax(axis=1)
        if len(source_N) <= _FEW_ROWS:
            for pair in zip(source_N.tolist(), target_N.tolist(), first_N.tolist(), length_N.tolist(), strict=True):
                self._copy_window(*pair)
            return
        order_N = length_N.argsort(kind="stable")
        cuts = np.flatnonzero(np.diff(length_N[order_N])) + 1
        for even_N in np.split(order_N, cuts):
            self._copy_window(source_N[even_N], target_N[even_N], int(first_N[even_N].min()), int(length_N[even_N[0]]))

    def _copy_window(self, source: Integers | int, target: Integers | int, first: int, length: int) -> None:
        """Copy the positions from `first` on of a row, or of rows of the same length."""
        cache_NRHTE, window = self._cache.array, slice(first, length)
        cache_NRHTE[:, target, :, window] = cache_NRHTE[:, source, :, window]
        self._entry_RT[target, window] = self._entry_RT[source, window]

    def _number_entries(self, past_length_R: NDArray[np.int32]) -> None:
        """Give the key and value that a step has written into each row a number of their own."""
        rows = len(past_length_R)
        self._entry_RT[self._row_R[:rows], past_length_R] = self._row_R[:rows] + self._entries
        self._entries += rows

    def _note_order(self) -> None:
        self._places = int(self._place_S.max(initial=-1)) + 1
        order_R = self._row_SW.reshape(-1)
        self._in_place = self._places == self.sentences and bool((order_R == self._row_R[: len(order_R)]).all())

    def _free_places(self, wanted: int, length: int) -> Integers:
        """Return places for new sentences of at most `length` source positions, making room as needed."""
        places, needed = self._cross.array.shape[1], self.sentences + wanted
        room = _rounded(length)
        if self.sentences:
            present = int(self._source_length_P[self._place_S].max())
            room = max(room, self._source_room if 2 * present > self._source_room else _rounded(present))
        if needed > places or room != self._source_room:
            self._lay_out(max(places, _rounded(needed, _FIRST_PLACES)), self._room, room)
        free_P = np.ones(self._cross.array.shape[1], bool)
        free_P[self._place_S] = False
        return np.flatnonzero(free_P)[:wanted]

    def _make_dense(self) -> None:
        """Move the sentences at the highest places to free ones below, so that places 0 to S - 1 are taken."""
        sentences, width = self.sentences, self._width
        free_P = np.ones(sentences, bool)
        free_P[self._place_S[self._place_S < sentences]] = False
        mover_M = np.flatnonzero(self._place_S >= sentences)
        target_M, source_M = np.flatnonzero(free_P), self._place_S[mover_M]
        self._cross.array[:, target_M] = self._cross.array[:, source_M]
        self._source_length_P[target_M] = self._source_length_P[source_M]
        source_R = (source_M[:, None] * width + self._ranks_W).reshape(-1)
        target_R = (target_M[:, None] * width + self._ranks_W).reshape(-1)
        length = int(self._past_length_R[source_R].max())
        if length:
            self._cache.array[:, target_R, :, :length] = self._cache.array[:, source_R, :, :length]
            self._entry_RT[target_R, :length] = self._entry_RT[source_R, :length]
        self._past_length_R[target_R] = self._past_length_R[source_R]
        self._past_length_R[source_R], self._lives_R[source_R], self._lives_R[target_R] = 0, 0, 1
        self._row_SW[mover_M] += ((target_M - source_M) * width)[:, None]
        self._place_S[mover_M] = target_M
        self._note_order()

    def _lay_out(self, places: int, room: int, source_room: int) -> None:
        """Give the caches room for so many sentences, positions and source positions; what is in them stays."""
        keep = self.sentences > 0
        rows = places * self._width
        is_new = self._cache.lay_out((self._layers, rows, self._heads, room, self._cache_width), keep=keep)
        is_new |= self._cross.lay_out((self._layers, places, self._heads, source_room, self._head_dim), keep=keep)
        self._room, self._source_room = room, source_room
        if is_new:
            self._bindings.clear()
        if self._entry_RT.shape != (rows, room):
            entry_RT = np.zeros((rows, room), np.int64)
            kept = tuple(slice(min(sizes)) for sizes in zip(entry_RT.shape, self._entry_RT.shape, strict=True))
            entry_RT[kept] = self._entry_RT[kept]
            self._entry_RT = entry_RT
        if places > len(self._source_length_P):
            self._grow(places)

    def _grow(self, places: int) -> None:
        """Make the small buffers long enough for so many sentences."""
        rows = places * self._width
        self._past_length_R = _longer(self._past_length_R, rows, 0)
        self._lives_R = _longer(self._lives_R, rows, 0)
        self._source_length_P = _longer(self._source_length_P, places, 1)
        self._x_RD = np.zeros((rows, self._model.architecture.d_model), np.float32)
        self._position_R1 = np.zeros((rows, 1), np.int64)
        self._row_R = np.arange(rows)
        self._best = np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)
        self._logits_RV = np.empty((0, 0), np.float32)
        self._bindings.clear()

    def _bind(self, sentences: int, k: int) -> onnxruntime.IOBinding:
        """Bind the first places of all buffers. With `k` 0 the logits are asked for, else the k best."""
        rows, architecture = sentences * self._width, self._model.architecture
        binding = self._model.decoder.io_binding()
        _bind_input(binding, graph_io.EMBEDDED, self._x_RD, (sentences, self._width, architecture.d_model))
        _bind_input(binding, graph_io.PAST_LENGTHS, self._past_length_R, (rows,))
        _bind_input(binding, graph_io.TOTAL_LENGTH, self._total_length, ())
        _bind_input(binding, graph_io.SOURCE_LENGTHS, self._source_length_P, (sentences,))
        _bind_input(binding, graph_io.K, self._k_1, (1,))
        if architecture.rotates:
            _bind_input(binding, graph_io.POSITIONS, self._position_R1, (rows, 1))
        cross_shape = sentences, *self._cross.array.shape[2:]
        for name, cross in zip(self._cross_names, self._cross.array, strict=True):
            _bind_input(binding, name, cross, cross_shape)
        cache_shape = rows, *self._cache.array.shape[2:]
        for past, present, cache in zip(self._past_names, self._present_names, self._cache.array, strict=True):
            _bind_input(binding, past, cache, cache_shape)
            _bind_output(binding, present, cache, cache_shape)
        self._bind_answers(binding, rows, k)
        return binding

    def _bind_answers(self, binding: onnxruntime.IOBinding, rows: int, k: int) -> None:
        all_rows, width = len(self._x_RD), self._model.logits_width
        if not k:
            if not self._logits_RV.size:
                self._logits_RV = np.empty((all_rows, width), np.float32)
            _bind_output(binding, graph_io.LOGITS, self._logits_RV, (rows, width))
            return
        if self._best[0].shape != (all_rows, k):
            self._best = np.empty((all_rows, k), np.float32), np.empty((all_rows, k), np.int64)
            self._bindings.clear()
            self._k_1[0] = k
        log_prob_RK, token_RK = self._best
        _bind_output(binding, graph_io.LOG_PROBS, log_prob_RK, (rows, k))
        _bind_output(binding, graph_io.TOKENS, token_RK, (rows, k))


class _Storage:
    """The memory of a cache whose shape changes: [layers, places or rows, heads, positions, head width]."""

    def __init__(self) -> None:
        self._flat: Floats = np.zeros(0, np.float32)
        self.array: Floats = self._flat.reshape(0, 0, 0, 0, 0)

    @property
    def size_bytes(self) -> int:
        """How much memory is held, used or not."""
        return self._flat.nbytes

    def lay_out(self, shape: tuple[int, int, int, int, int], *, keep: bool) -> bool:
        """Give the array this shape, with what it holds if that is to be kept; tell whether it lies in new memory.

        What is not kept is zeros, or was left behind: never NaN, for attention multiplies by zero what it does not
        look at.
        """
        if shape == self.array.shape:
            return False
        old, size = self.array, math.prod(shape)
        is_new = keep or size > self._flat.size
        if is_new:
            self._flat = np.zeros(size, np.float32)
        self.array = self._flat[:size].reshape(shape)
        if keep:
            places, length = min(shape[1], old.shape[1]), min(shape[3], old.shape[3])
            self.array[:, :places, :, :length] = old[:, :places, :, :length]
        return is_new

    def give_back(self) -> None:
        """Free the memory if it is much; the array must be laid out anew."""
        if self._flat.nbytes > KEPT_BYTES:
            self._flat = np.zeros(0, np.float32)
            self.array = self._flat.reshape(0, 0, 0, 0, 0)


KEPT_BYTES: Final = 8 << 20


def _longer(array: NDArray[np.int32], length: int, fill: int) -> NDArray[np.int32]:
    longer = np.full(length, fill, np.int32)
    longer[: len(array)] = array
    return longer


def _bind_input(binding: onnxruntime.IOBinding, name: str, buffer: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Bind the beginning of a buffer; the buffer must outlive the binding."""
    binding.bind_input(name, CPU, 0, buffer.dtype, shape, buffer.__array_interface__["data"][0])


def _bind_output(binding: onnxruntime.IOBinding, name: str, buffer: NDArray[Any], shape: tuple[int, ...]) -> None:
    binding.bind_output(name, CPU, 0, buffer.dtype, shape, buffer.__array_interface__["data"][0])


def _rounded(length: int, step: int = _SOURCE_STEP) -> int:
    """Return the next multiple of the step, of eighths of a power of two where that is coarser: few shapes, little
    waste."""
    step = max(step, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _similar(by_length: Sequence[int], sources: Sequence[Sequence[int]]) -> list[list[int]]:
    """Cut indices of sources, longest first, into groups of similar length and not too many tokens."""
    groups: list[list[int]] = []
    longest = 0
    for index in by_length:
        full = not groups or (len(groups[-1]) + 1) * longest > _ENCODED_TOKENS
        if full or len(sources[index]) < _SIMILAR * longest:
            groups.append([])
            longest = len(sources[index])
        groups[-1].append(index)
    return groups
