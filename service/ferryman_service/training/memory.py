"""How much memory training holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

_STATM: Final = Path("/proc/self/statm")


def used_memory_bytes(device: torch.device) -> int:
    """Return the device memory allocated to this process on a GPU, else its resident memory (proc(5), statm)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident_pages = int(_STATM.read_bytes().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")
