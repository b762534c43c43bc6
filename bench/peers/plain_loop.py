"""A training loop as one writes it by hand around torch.nn.Transformer, measured by turns.

Straight, and as quick as its parts allow without taking them apart: batches of similar lengths, a causal hint instead
of a mask where nn.Transformer takes one, fused Adam, the sum of the losses over the batch's real tokens.

Shape suffixes: B sentences, S source positions, T target positions, D model width, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.task import Pair, PeerTask, read_ids
from bench.shared.turns import Turns, TurnsOver
from ferryman_service.domain.tokens import BOS, PAD

LONGEST = 512


class PlainTransformer(nn.Module):
    """nn.Transformer between a shared embedding and its transpose. Dropout where the paper has it, as the others here:
    on embeddings and sublayers, not inside attention or feed-forward."""

    def __init__(self, task: PeerTask) -> None:
        super().__init__()
        self.width = task.d_model
        self.embedding = nn.Embedding(task.vocabulary, task.d_model, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=task.d_model**-0.5)
        self.dropout = nn.Dropout(task.dropout)
        self.register_buffer("positions_TD", sinusoids(LONGEST, task.d_model), persistent=False)
        self.transformer = nn.Transformer(
            d_model=task.d_model,
            nhead=task.heads,
            num_encoder_layers=task.encoder_layers,
            num_decoder_layers=task.decoder_layers,
            dim_feedforward=task.ffn_dim,
            dropout=task.dropout,
            batch_first=True,
            norm_first=task.norm_first,
        )
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = 0.0

    def forward(self, source_BS: Tensor, target_input_BT: Tensor) -> Tensor:
        """Return logits_BTV."""
        padding_BS = source_BS == PAD
        causal_TT = nn.Transformer.generate_square_subsequent_mask(target_input_BT.shape[1])
        hidden_BTD = self.transformer(
            self.embed(source_BS),
            self.embed(target_input_BT),
            tgt_mask=causal_TT,
            src_key_padding_mask=padding_BS,
            memory_key_padding_mask=padding_BS,
            tgt_is_causal=True,
        )
        return F.linear(hidden_BTD, self.embedding.weight)

    def encode(self, source_BS: Tensor) -> Tensor:
        """Return memory_BSD."""
        memory_BSD: Tensor = self.transformer.encoder(self.embed(source_BS), src_key_padding_mask=source_BS == PAD)
        return memory_BSD

    def next_logits(self, target_input_BT: Tensor, memory_BSD: Tensor, padding_BS: Tensor) -> Tensor:
        """Return logits_BV of the token that follows; the mask is True at the source's padding."""
        hidden_BTD = self.transformer.decoder(
            self.embed(target_input_BT),
            memory_BSD,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(target_input_BT.shape[1]),
            memory_key_padding_mask=padding_BS,
            tgt_is_causal=True,
        )
        return F.linear(hidden_BTD[:, -1], self.embedding.weight)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return x_BTD."""
        assert isinstance(self.positions_TD, Tensor)
        x_BTD = self.embedding(tokens_BT) * math.sqrt(self.width) + self.positions_TD[: tokens_BT.shape[1]]
        embedded_BTD: Tensor = self.dropout(x_BTD)
        return embedded_BTD


def sinusoids(length: int, width: int) -> Tensor:
    """Return positions_TD (Vaswani et al., 2017, section 3.5)."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


def cut_batches(pairs: Sequence[Pair], max_tokens: int) -> list[list[Pair]]:
    """Return batches of similar lengths: sentences times the longest of them, either side, is at most `max_tokens`."""
    batches: list[list[Pair]] = [[]]
    longest = 0
    for pair in sorted(pairs, key=lambda pair: (len(pair[0]), len(pair[1]))):
        longest = max(longest, len(pair[0]), len(pair[1]))
        if batches[-1] and (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = max(len(pair[0]), len(pair[1]))
        batches[-1].append(pair)
    return batches


def padded(sentences: Sequence[Sequence[int]]) -> Tensor:
    """Return tokens_BT, padded at the end."""
    longest = max(map(len, sentences))
    return torch.tensor([[*sentence, *[PAD] * (longest - len(sentence))] for sentence in sentences])


def endless(batches: list[list[Pair]], seed: int) -> Iterator[list[Pair]]:
    """Yield the batches in a new order each time round."""
    generator = random.Random(seed)
    while True:
        generator.shuffle(batches)
        yield from batches


def new_optimizer(model: PlainTransformer) -> torch.optim.Adam:
    """Return Adam as in the paper."""
    return torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9, fused=True)


def batch_loss(model: PlainTransformer, batch: Sequence[Pair], label_smoothing: float) -> tuple[Tensor, int]:
    """Return the sum of the losses over the batch's real target tokens, and the number of these."""
    source_BS = padded([source for source, _ in batch])
    labels_BT = padded([target for _, target in batch])
    target_input_BT = F.pad(labels_BT[:, :-1], (1, 0), value=BOS)
    tokens = int((labels_BT != PAD).sum())
    logits_BTV = model(source_BS, target_input_BT)
    loss = F.cross_entropy(
        logits_BTV.flatten(0, 1),
        labels_BT.flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return loss, tokens


def update(model: PlainTransformer, optimizer: torch.optim.Adam, batch: Sequence[Pair], task: PeerTask) -> int:
    """Take one step on a batch; return its real target tokens."""
    loss, tokens = batch_loss(model, batch, task.label_smoothing)
    optimizer.zero_grad()
    (loss / tokens).backward()  # type: ignore[no-untyped-call]
    if task.clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
    optimizer.step()
    return tokens


def train(task: PeerTask, folder: Path, turns: Turns) -> None:
    """Train until no turn follows."""
    torch.manual_seed(1)
    model = PlainTransformer(task).train()
    optimizer = new_optimizer(model)
    tokens = 0
    for batch in endless(cut_batches(read_ids(folder), task.max_tokens), seed=1):
        turns.boundary(tokens)
        tokens = update(model, optimizer, batch, task)


def main() -> None:
    """Read the task and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--task", required=True, help="a PeerTask as JSON")
    arguments = parser.parse_args()
    try:
        train(PeerTask(**json.loads(arguments.task)), arguments.folder, Turns())
    except TurnsOver:
        return


if __name__ == "__main__":
    main()
