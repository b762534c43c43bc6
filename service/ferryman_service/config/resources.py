"""The CPUs and the memory that this process may use: what the machine has, less what a cgroup takes away.

A container's limits are files of cgroup v2 (`cpu.max`, `memory.max`) or of v1 (`cpu.cfs_quota_us` over
`cpu.cfs_period_us`, `memory.limit_in_bytes`). A limit also binds every cgroup below it, so all levels count, from the
process's own cgroup up to the mount point. See the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/.

Unreadable and malformed files set no limit: counting never fails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

_ROOT: Final = Path("/")
_BYTES_PER_KIB: Final = 1024
_BYTES_PER_MIB: Final = 2**20
_BYTES_PER_GIB: Final = 2**30
_MEMORY_V1: Final = "memory.limit_in_bytes"
_NO_LIMIT_BYTES: Final = 2**62
"""cgroup v1 writes the greatest multiple of the page size below 2**63 where no limit is set."""
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, kw_only=True)
class Usable:
    """How much of a resource the process may use (CPUs, or bytes of memory), and what sets the limit."""

    value: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the process may use of its machine. `memory` is in bytes, None if nothing tells it."""

    cpus: Usable
    memory: Usable | None

    def fields(self) -> dict[str, object]:
        """Return the values and their sources as fields of a log line."""
        memory = {} if self.memory is None else {"memory_bytes": self.memory.value, "memory_source": self.memory.source}
        return {"cpus": self.cpus.value, "cpus_source": self.cpus.source, **memory}

    def lines(self) -> Iterator[str]:
        """Yield a line for each resource, such as "usable CPUs: 2 (affinity)"."""
        yield f"usable CPUs: {self.cpus.value} ({self.cpus.source})"
        memory = "unknown" if self.memory is None else f"{_amount(self.memory.value)} ({self.memory.source})"
        yield f"usable memory: {memory}"


def find_machine(root: Path = _ROOT) -> Machine:
    """Return what this process may use now; `root` is the folder that holds /proc and the cgroup mounts."""
    return Machine(cpus=usable_cpus(root), memory=usable_memory(root))


def usable_cpus(root: Path = _ROOT, affinity: int | None = None) -> Usable:
    """Return the smallest of scheduler affinity and all cgroup quotas, rounded up, at least 1.

    `affinity` is the number of CPUs that the scheduler may choose from; None: ask the kernel.
    """
    cpus = len(os.sched_getaffinity(0)) if affinity is None else affinity
    limits = [*_limits(root, "cpu", 2, "cpu.max", _quota_v2), *_limits(root, "cpu", 1, "cpu.cfs_quota_us", _quota_v1)]
    return min([Usable(value=max(1, cpus), source="affinity"), *limits], key=lambda limit: limit.value)


def usable_memory(root: Path = _ROOT) -> Usable | None:
    """Return the smallest of the machine's memory and all cgroup limits, bytes; None if no file tells any of them."""
    limits = [
        *_total(root),
        *_limits(root, "memory", 2, "memory.max", lambda folder: _bytes(folder / "memory.max")),
        *_limits(root, "memory", 1, _MEMORY_V1, lambda folder: _bytes(folder / _MEMORY_V1)),
    ]
    return min(limits, key=lambda limit: limit.value, default=None)


def _total(root: Path) -> Iterator[Usable]:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, amount = line.partition(":")
        kib = _positive(amount.removesuffix("kB"))
        if name == "MemTotal" and kib is not None:
            yield Usable(value=kib * _BYTES_PER_KIB, source="MemTotal")


def _limits(
    root: Path, controller: str, version: int, file: str, read: Callable[[Path], int | None]
) -> Iterator[Usable]:
    """Yield the limits that `read` finds in the process's cgroup and in its ancestors."""
    for folder in _levels(root, controller, version):
        if (value := read(folder)) is not None:
            where = _ROOT / folder.relative_to(root)
            yield Usable(value=value, source=f"cgroup v{version} {file} at {where}")


def _quota_v2(folder: Path) -> int | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return _rounded_up(_positive(quota), _positive(period))


def _quota_v1(folder: Path) -> int | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return _rounded_up(_positive(quota), _positive(period))


def _bytes(file: Path) -> int | None:
    limit = _positive(_read(file))
    return None if limit is None or limit >= _NO_LIMIT_BYTES else limit


def _rounded_up(quota_us: int | None, period_us: int | None) -> int | None:
    return None if quota_us is None or period_us is None else -(-quota_us // period_us)


@dataclass(frozen=True, kw_only=True)
class _Mount:
    """A mounted cgroup hierarchy: `top` is the cgroup that is visible at `point`."""

    version: int
    options: frozenset[str]
    top: PurePosixPath
    point: Path


def _levels(root: Path, controller: str, version: int) -> Iterator[Path]:
    """Yield the folder of the process's own cgroup, then those of its ancestors, up to the mount point."""
    path = _own_cgroup(root, controller, version)
    mounts = [
        mount for mount in _mounts(root) if mount.version == version and (version == 2 or controller in mount.options)
    ]
    if path is None or not mounts:
        return
    mount, folder = _place(mounts, path)
    yield folder
    while folder != mount.point:
        folder = folder.parent
        yield folder


def _place(mounts: Sequence[_Mount], path: PurePosixPath) -> tuple[_Mount, Path]:
    """Return the mount that shows the cgroup, and the cgroup's folder.

    In a cgroup namespace, or with a part of the hierarchy mounted, the path may lie outside of the mount. The mount
    point then stands for it: container runtimes mount the container's own cgroup there.
    """
    for mount in mounts:
        below = path.relative_to(mount.top) if path.is_relative_to(mount.top) else None
        if below is not None and ".." not in below.parts and os.path.isdir(mount.point / below):
            return mount, mount.point / below
    return mounts[0], mounts[0].point


def _own_cgroup(root: Path, controller: str, version: int) -> PurePosixPath | None:
    """Return the process's cgroup; lines are like "0::/a" (v2) and "4:cpu,cpuacct:/a" (v1), see cgroups(7)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        is_own = (number, controllers) == ("0", "") if version == 2 else controller in controllers.split(",")
        if is_own and path.startswith("/"):
            return PurePosixPath(path)
    return None


def _mounts(root: Path) -> Iterator[_Mount]:
    """Yield the cgroup mounts; see /proc/pid/mountinfo in proc(5)."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        top, point = (_OCTAL.sub(lambda found: chr(int(found[1], 8)), field) for field in fields[3:5])
        yield _Mount(
            version=2 if kind[0] == "cgroup2" else 1,
            options=frozenset(kind[-1].split(",")),
            top=PurePosixPath(top),
            point=root / point.lstrip("/"),
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # ValueError: the path holds a NUL
        return ""


def _positive(text: str) -> int | None:
    """Return a whole number above 0; None for all else, such as "max" and -1."""
    stripped = text.strip()
    if not (stripped.isascii() and stripped.isdecimal() and len(stripped) < 20):
        return None
    return int(stripped) or None


def _amount(size_bytes: int) -> str:
    if size_bytes < _BYTES_PER_GIB:
        return f"{size_bytes / _BYTES_PER_MIB:.0f} MiB"
    return f"{size_bytes / _BYTES_PER_GIB:.1f} GiB"
