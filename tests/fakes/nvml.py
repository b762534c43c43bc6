"""The part of the module pynvml (nvidia-ml-py) that is used, over GPUs that a test makes up."""

from __future__ import annotations

from types import SimpleNamespace


class FakeNvml:
    """`gpus` are (used bytes, total bytes, utilization in percent, or None if it is not told); once `is_lost`, nothing
    is answered any more."""

    class NVMLError(Exception):
        """Raised by every function."""

    def __init__(self, gpus, *, starts=True):
        self._gpus = gpus
        self._starts = starts
        self.is_lost = False

    def nvmlInit(self):
        if not self._starts:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        if self.is_lost:
            raise self.NVMLError("GPU is lost")
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self._gpus[index]

    def nvmlDeviceGetMemoryInfo(self, handle):
        used, total, _ = handle
        return SimpleNamespace(used=used, total=total, free=total - used)

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle[2] is None:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=handle[2], memory=0)
