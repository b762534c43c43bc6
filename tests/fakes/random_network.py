"""Random networks of every kind as graphs, and what they must equal: the whole network run on every row's whole prefix.

Shape suffixes: S sentences, W rows of each, R = S * W rows, T target positions, L source positions, V vocabulary, K
candidates, H heads, E head width, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ferryman_service.bundle.embedding import write_embedding, write_int8_embedding
from ferryman_service.bundle.manifest import Architecture, graph_files
from ferryman_service.domain.recipe import NormPlacement, Positions
from ferryman_service.domain.tokens import EOS, PAD
from ferryman_service.domain.translation import ComputeType
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer, source_mask
from ferryman_service.search.decoder import Candidates
from ferryman_service.training.graphs import Float32Products, decoder_graph, encoder_graph, graph_weights
from ferryman_service.training.int8 import Int8Products, Ranges
from ferryman_service.translation.onnx_model import OnnxConfig, OnnxModel

LONGEST_SOURCE = 256


def random_network(vocabulary_size: int = 120, *, seed: int = 0, **changes: Any) -> Transformer:
    """Return a small network in evaluation mode whose biases and norms are random too."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "heads": 4,
        "ffn_dim": 40,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "norm": NormPlacement.POST,
    }
    transformer = Transformer(TransformerConfig(**{**values, **changes}, vocabulary_size=vocabulary_size)).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return transformer


def open_graphs(
    folder: Path, transformer: Transformer, ranges: Ranges | None = None, source_length: int = LONGEST_SOURCE
) -> OnnxModel:
    """Write the network's graphs and embedding into the folder and load them: in int8 if there are ranges."""
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = transformer.config, graph_weights(transformer)
    products = Float32Products(weights) if ranges is None else Int8Products(weights, ranges)
    compute_type = ComputeType.FP32 if ranges is None else ComputeType.INT8
    files = graph_files(compute_type)
    encoder = encoder_graph(config, weights, products, source_length)
    (folder / files.encoder).write_bytes(encoder.SerializeToString())
    (folder / files.decoder).write_bytes(decoder_graph(config, weights, products).SerializeToString())
    (write_embedding if ranges is None else write_int8_embedding)(folder, weights["embedding.weight"])
    architecture = Architecture(
        d_model=config.d_model,
        decoder_layers=config.decoder_layers,
        heads=config.heads,
        vocabulary_size=config.vocabulary_size,
        rotates=config.positions is Positions.ROPE,
    )
    return OnnxModel.load(folder, architecture, OnnxConfig(compute_type=compute_type))


def random_sources(count: int, longest: int, vocabulary_size: int, seed: int) -> list[tuple[int, ...]]:
    """Return sources of 1 to `longest` tokens, the end symbol included."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest, count).tolist()
    return [(*generator.integers(4, vocabulary_size, length).tolist(), EOS) for length in lengths]


class NaiveBatch:
    """A RunningBatch without caches: every step runs the network on every row's whole prefix, and ranks by sorting."""

    def __init__(self, transformer: Transformer, width: int) -> None:
        self._transformer = transformer
        self._sources: list[tuple[int, ...]] = []
        self._prefixes: list[list[tuple[int, ...]]] = []
        self.width = width

    @property
    def sentences(self) -> int:
        return len(self._sources)

    def lengths(self) -> list[int]:
        """Return how many tokens each sentence's rows were fed."""
        return [len(prefixes[0]) for prefixes in self._prefixes]

    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        self._sources += map(tuple, sources)
        self._prefixes += [[()] * self.width for _ in sources]

    def keep(self, kept_S: NDArray[np.int64]) -> None:
        self._sources = [self._sources[sentence] for sentence in kept_S]
        self._prefixes = [self._prefixes[sentence] for sentence in kept_S]

    def step(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64], k: int) -> Candidates:
        log_probs_SWV = log_softmax(self.step_logits(tokens_SW, parents_SW))
        tokens_SWK = np.argsort(-log_probs_SWV, axis=2, kind="stable")[:, :, :k]
        return Candidates(np.take_along_axis(log_probs_SWV, tokens_SWK, axis=2), tokens_SWK)

    @torch.inference_mode()
    def step_logits(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> NDArray[np.float32]:
        moves = zip(self._prefixes, tokens_SW.tolist(), parents_SW.tolist(), strict=True)
        self._prefixes = [
            [(*prefixes[parent], token) for token, parent in zip(tokens, parents, strict=True)]
            for prefixes, tokens, parents in moves
        ]
        source_RL = padded([source for source in self._sources for _ in range(self.width)])
        target_RT = padded([prefix for prefixes in self._prefixes for prefix in prefixes])
        last_R = torch.tensor([len(prefix) - 1 for prefixes in self._prefixes for prefix in prefixes])
        asked: list[torch.Tensor] = []
        hook = self._transformer.decoder_layers[-1].cross_attention.query.register_forward_hook(
            lambda module, inputs, query_RTD: asked.append(query_RTD)
        )
        try:
            mask_R11L = source_mask(source_RL)
            memory_RLD = self._transformer.encode_masked(source_RL, mask_R11L)
            hidden_RTD = self._transformer.decode_hidden(target_RT, memory_RLD, mask_R11L)
        finally:
            hook.remove()
        row_R = torch.arange(len(last_R))
        self._attention_SWL = self._attention(asked[0][row_R, last_R], memory_RLD, source_RL)
        logits_RV = self._transformer.project(hidden_RTD[row_R, last_R])
        return logits_RV.numpy().reshape(self.sentences, self.width, -1)

    def attention(self) -> NDArray[np.float32]:
        return self._attention_SWL

    def _attention(
        self, query_RD: torch.Tensor, memory_RLD: torch.Tensor, source_RL: torch.Tensor
    ) -> NDArray[np.float32]:
        keys_RHLE = self._transformer.cross_keys_values(memory_RLD)[-1].keys_BHSE
        rows, heads, _, width = keys_RHLE.shape
        scores_RHL = (keys_RHLE @ query_RD.view(rows, heads, width, 1))[..., 0] / math.sqrt(width)
        scores_RHL = scores_RHL.masked_fill((source_RL == PAD)[:, None], -torch.inf)
        mean_RL = scores_RHL.softmax(dim=-1).mean(dim=1)
        return mean_RL.numpy().reshape(self.sentences, self.width, -1)


def padded(sentences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the sentences side by side, filled with PAD at their ends."""
    token_NT = torch.full((len(sentences), max(map(len, sentences))), PAD)
    for row_T, sentence in zip(token_NT, sentences, strict=True):
        row_T[: len(sentence)] = torch.tensor(sentence)
    return token_NT


def log_softmax(logits_SWV: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log-probabilities."""
    log_probs_SWV: NDArray[np.float32] = torch.from_numpy(logits_SWV).log_softmax(dim=-1).numpy()
    return log_probs_SWV
