"""The processes that train together, as torchrun starts them. A process alone is rank 0 of 1."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# torch's optimizers import this module at their first step. Its functions keep the process group of that moment as a
# default argument, so that the group's threads would outlive it and abort the program at its end. Before there is a
# group the import does no harm.
import torch.distributed.nn
from torch import Tensor

from ferryman_service.domain.training import RunCancelled


class Verdict(enum.IntEnum):
    """What rank 0 tells the others before each update."""

    GO_ON = 0
    FINISH = 1
    ABANDON = 2


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together. Every method must be called by all of them, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process reports, validates and writes."""
        return self.rank == 0

    def agree(self, verdict: Verdict) -> Verdict:
        """Return rank 0's verdict; raises RunCancelled in the others if rank 0 left `others_follow` by an error."""
        agreed = Verdict(int(self.share([float(verdict)])[0]))
        if agreed is Verdict.ABANDON and not self.is_first:
            raise RunCancelled("the first process gave up")
        return agreed

    @contextmanager
    def others_follow(self) -> Iterator[None]:
        """For what rank 0 does alone while the others wait in `agree`: if it fails, they stop too."""
        try:
            yield
        except BaseException:
            if self.is_first:
                self.agree(Verdict.ABANDON)
            raise

    def share(self, numbers: list[float]) -> list[float]:
        """Return the numbers of rank 0; all ranks must give as many."""
        if self.world_size == 1:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        values: list[float] = shared.tolist()
        return values

    def sum_gradients(self, parameters: Iterable[Tensor], *also: Tensor) -> None:
        """Replace every gradient, and each further tensor, by its sum over the ranks, in one exchange."""
        if self.world_size == 1:
            return
        tensors = [_gradient(parameter) for parameter in parameters] + list(also)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, as its environment tells, and leave them at the end."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=rank, world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:  # this rank had no batch
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
