"""Writing checkpoints beside training: an update waits for a copy of the tensors, not for the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ferryman_service.training.checkpoint import Checkpoint, TensorGroups, save_checkpoint
from ferryman_service.training.files import Disk
from ferryman_service.training.retention import prune_checkpoints


class CheckpointWriter:
    """Writes checkpoints, one after the other, and removes those that nobody needs any more.

    It is a context: at its end all is written, or has failed. What a write raises is raised by the next call.
    """

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder = folder
        self._disk = disk
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Copy the tensors, and begin to write once the checkpoint before this one is on the disk."""
        self.wait()
        copy = Checkpoint(_on_cpu(checkpoint.tensors), checkpoint.counters, checkpoint.position)
        self._pending = self._thread.submit(self._write, copy)

    def wait(self) -> None:
        """Wait until everything is on the disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def check(self) -> None:
        """Raise what has gone wrong so far."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def __enter__(self) -> CheckpointWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the end of the last write; what it raises is not hidden, unless something else went wrong before."""
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def _write(self, checkpoint: Checkpoint) -> None:
        save_checkpoint(self._folder, checkpoint, self._disk)
        prune_checkpoints(self._folder, checkpoint.position, self._disk)


def _on_cpu(groups: TensorGroups) -> TensorGroups:
    return {name: {key: _copy(tensor) for key, tensor in tensors.items()} for name, tensors in groups.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.cpu() if tensor.is_cuda else tensor.clone()
