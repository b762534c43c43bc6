"""The processes that train together. A process alone is rank 0 of 1."""

from __future__ import annotations

import datetime
import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

# torch's optimizers import this module at their first step. Its functions keep the process group of that moment as a
# default argument, so that the group's threads would outlive it and abort the program at its end. Before there is a
# group the import does no harm.
import torch.distributed.nn
from torch import Tensor

from ferryman_service.domain.heartbeat import Heartbeat
from ferryman_service.domain.training import RunCancelled

# The others wait while rank 0 prepares a corpus or validates. If a process dies, or ends with a failure, the first
# ends the group at once (launch/group.py).
_PATIENCE: Final = datetime.timedelta(days=1)


class Verdict(enum.IntEnum):
    """What rank 0 tells the others before each update."""

    GO_ON = 0
    FINISH = 1
    ABANDON = 2
    DECAY = 3


@dataclass(frozen=True, kw_only=True)
class Group:
    """Which of `size` processes of this machine this one is. They meet at the file `meeting`, which is not there before
    and lies in a folder that only they can use."""

    rank: int = 0
    size: int = 1
    meeting: Path | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, "ranks count from 0"
        assert self.size == 1 or self.meeting is not None, "several processes need a place to meet"


ALONE: Final = Group()


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together. Every method must be called by all of them, in the same order.

    Waiting for the others is no sign of life: `heartbeat` is told.
    """

    rank: int
    world_size: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

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

    def ask_first(self, question: Callable[[], float]) -> float:
        """Return rank 0's answer, which it alone works out while the others wait; raises what `agree` does."""
        answer = 0.0
        if self.is_first:
            with self.others_follow():
                answer = float(question())
        self.agree(Verdict.GO_ON)
        return self.share([answer])[0]

    def meet(self) -> None:
        """Wait until all ranks have come here."""
        if self.world_size > 1:
            with self.heartbeat.waiting():
                dist.all_reduce(torch.zeros(1))

    def share(self, numbers: list[float]) -> list[float]:
        """Return the numbers of rank 0; all ranks must give as many.

        They go from CPU to CPU: nobody waits for a GPU's queue, and no GPU spins while rank 0 does something alone.
        """
        if self.world_size == 1:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64)
        with self.heartbeat.waiting():
            dist.broadcast(shared, src=0)
        values: list[float] = shared.tolist()
        return values

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.world_size == 1:
            return
        with self.heartbeat.waiting():
            for exchange in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                exchange.wait()


@contextmanager
def join_ranks(device: torch.device, group: Group = ALONE, heartbeat: Heartbeat | None = None) -> Iterator[Ranks]:
    """Join the processes of the group, and leave them at the end.

    They find each other by a file, so no process serves a store to the others, and nothing is unpickled: gloo and NCCL
    exchange tensors over connections of their own, on loopback if GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME say so.

    On a GPU, who leaves by an error does not say goodbye: NCCL would wait for the others, who may know nothing of it.
    """
    heartbeat = heartbeat or Heartbeat()
    if group.meeting is None:
        yield Ranks(rank=0, world_size=1, device=device, heartbeat=heartbeat)
        return
    if device.type == "cuda":
        device = torch.device("cuda", group.rank)
        torch.cuda.set_device(device)
    with heartbeat.waiting():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            # Not by its URI: torch does not decode what that escapes, such as a space.
            store=dist.FileStore(str(group.meeting.absolute()), group.size),  # type: ignore[attr-defined]
            rank=group.rank,
            world_size=group.size,
            timeout=_PATIENCE,
        )
    failed = True
    try:
        yield Ranks(rank=group.rank, world_size=group.size, device=device, heartbeat=heartbeat)
        failed = False
    finally:
        if not (failed and device.type == "cuda"):
            dist.destroy_process_group()
