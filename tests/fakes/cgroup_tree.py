"""A folder with /proc and cgroup mounts as a kernel shows them, for a process in cgroups of the test's choice."""

import os
from pathlib import Path

V1_UNLIMITED = 9_223_372_036_854_771_712


class CgroupTree:
    """Mounts are added with `mount_v2` and `mount_v1`; limits with the methods named after the files."""

    def __init__(self, root: Path, total_kib: int | None = 65_536 * 1024):
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        self._memberships: list[str] = []
        self._mounts = ["22 27 0:20 / /proc rw,nosuid shared:12 - proc proc rw"]
        if total_kib is not None:
            (root / "proc/meminfo").write_text(f"MemTotal:       {total_kib} kB\nMemFree:        1024 kB\n")

    def mount_v2(self, cgroup="/", *, top="/", point="/sys/fs/cgroup"):
        """Mount cgroup v2, the process in `cgroup`; `top` is the cgroup that the mount point shows."""
        self._memberships.append(f"0::{cgroup}")
        self._mount(f"31 23 0:28 {top} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate", point)

    def mount_v1(self, controllers, cgroup="/", *, top="/"):
        """Mount a hierarchy of cgroup v1, such as "cpu,cpuacct"."""
        self._memberships.append(f"{len(self._memberships) + 1}:{controllers}:{cgroup}")
        point = f"/sys/fs/cgroup/{controllers}"
        self._mount(f"32 31 0:29 {top} {point} rw,relatime - cgroup cgroup rw,{controllers}", point)

    def _mount(self, line, point):
        (self.root / point.lstrip("/")).mkdir(parents=True, exist_ok=True)
        self._mounts.append(line)
        (self.root / "proc/self/cgroup").write_text("\n".join(self._memberships) + "\n")
        (self.root / "proc/self/mountinfo").write_text("\n".join(self._mounts) + "\n")

    def write(self, path, content):
        """Write a file of a cgroup, given by its path below the root."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else str(content).encode())

    def cpu_max(self, folder, quota, period=100_000):
        self.write(os.path.join(folder, "cpu.max"), f"{quota} {period}\n")

    def cfs(self, folder, quota, period=100_000):
        self.write(os.path.join(folder, "cpu.cfs_quota_us"), f"{quota}\n")
        self.write(os.path.join(folder, "cpu.cfs_period_us"), f"{period}\n")
