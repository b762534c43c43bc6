"""The floor under a training step, measured by turns: its matrix products alone, in the shapes that they have.

An "update" here multiplies what an update without padding multiplies, forward once and backward twice, and does
nothing else. No implementation that computes the same products with the same library can be faster.

Shape suffixes: none; a product of M x K by K x N counts 2 M N K operations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bench.peers.task import PeerTask
from bench.shared.turns import Turns, TurnsOver

_LOGIT_ROWS: Final = 512


@dataclass(frozen=True)
class Shape:
    """`count` products of M x K by K x N; with `batch` above 1, so many small ones in one call."""

    m: int
    n: int
    k: int
    count: int
    batch: int = 1

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.m * self.n * self.k * self.count * self.batch


def update_shapes(
    task: PeerTask, source_tokens: int, target_tokens: int, sentences: int, logit_rows: int = _LOGIT_ROWS
) -> list[Shape]:
    """Return the products of a forward pass over so many real tokens; logits are made `logit_rows` at a time."""
    d, f, encoder, decoder = task.d_model, task.ffn_dim, task.encoder_layers, task.decoder_layers
    rows, head, batch = (source_tokens, target_tokens), d // task.heads, sentences * task.heads
    s, t = round(source_tokens / sentences), round(target_tokens / sentences)
    shapes = []
    for tokens, layers in zip(rows, (encoder, decoder), strict=True):
        shapes += [Shape(tokens, 3 * d, d, layers), Shape(tokens, d, d, layers)]
        shapes += [Shape(tokens, f, d, layers), Shape(tokens, d, f, layers)]
    shapes += [Shape(target_tokens, d, d, 2 * decoder), Shape(source_tokens, 2 * d, d, decoder)]
    for queries, keys, layers in ((s, s, encoder), (t, t, decoder), (t, s, decoder)):
        shapes += [Shape(queries, keys, head, layers, batch), Shape(queries, head, keys, layers, batch)]
    whole, rest = divmod(target_tokens, logit_rows)
    shapes += [Shape(logit_rows, task.vocabulary, d, whole)] if whole else []
    shapes += [Shape(rest, task.vocabulary, d, 1)] if rest else []
    return shapes


def with_gradients(shape: Shape) -> Iterator[Shape]:
    """Yield the product, and the two that give the gradients of its factors."""
    m, n, k = shape.m, shape.n, shape.k
    for size in ((m, n, k), (m, k, n), (k, n, m)):
        yield Shape(*size, shape.count, shape.batch)


def operands(
    shape: Shape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return two factors, and room for their product."""
    lead = () if shape.batch == 1 else (shape.batch,)
    sizes = ((shape.m, shape.k), (shape.k, shape.n), (shape.m, shape.n))
    left, right, room = (torch.randn(*lead, *size, device=device, dtype=dtype) for size in sizes)
    return left, right, room


def main() -> None:
    """Multiply until no turn follows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, help="a PeerTask as JSON")
    parser.add_argument("--source-tokens", type=int, required=True)
    parser.add_argument("--target-tokens", type=int, required=True)
    parser.add_argument("--sentences", type=int, required=True)
    arguments = parser.parse_args()
    task = PeerTask(**json.loads(arguments.task))
    sizes = (arguments.source_tokens, arguments.target_tokens, arguments.sentences)
    products = [product for shape in update_shapes(task, *sizes) for product in with_gradients(shape)]
    made = [(product.count, operands(product)) for product in products]
    operations = sum(product.operations for product in products)
    turns = Turns(flops_per_target_token=operations / arguments.target_tokens)
    try:
        turns.boundary(0)
        while True:
            for count, (left, right, room) in made:
                for _ in range(count):
                    torch.matmul(left, right, out=room)
            turns.boundary(arguments.target_tokens)
    except TurnsOver:
        return


if __name__ == "__main__":
    main()
