"""Usable CPUs and memory, in fake cgroup trees and on this machine."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryman_service.config.resources import Machine, Usable, find_machine, usable_cpus, usable_memory
from tests.fakes.cgroup_tree import V1_UNLIMITED, CgroupTree

REPOSITORY = Path(__file__).parents[3]
MIB = 2**20
V2 = "/sys/fs/cgroup"
CPU_V1 = "/sys/fs/cgroup/cpu,cpuacct"
MEMORY_V1 = "/sys/fs/cgroup/memory"


@pytest.fixture
def tree(tmp_path):
    return CgroupTree(tmp_path)


def cpus(tree, affinity=64):
    return usable_cpus(tree.root, affinity)


def test_without_cgroups_affinity_counts(tree):
    assert cpus(tree, 3) == Usable(value=3, source="affinity")


def test_nothing_else_counts_cpus():
    counting = re.compile(r"cpu_count|sched_getaffinity")
    files = (REPOSITORY / "service").rglob("*.py")
    found = [file.name for file in files if counting.search(file.read_text(encoding="utf-8"))]
    assert found == ["resources.py"], "use usable_cpus of config/resources.py"


def test_affinity_of_this_process_is_asked_for(tree):
    assert usable_cpus(tree.root).value == len(os.sched_getaffinity(0))


def test_affinity_of_a_restricted_process_counts_on_this_machine():
    only = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, [{only}])\n"
        "from ferryman_service.config.resources import usable_cpus\nprint(usable_cpus().value)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [
        (100_000, 100_000, 1),
        (200_000, 100_000, 2),
        (150_000, 100_000, 2),
        (100_001, 100_000, 2),
        (1_000, 100_000, 1),
        (30_000, 10_000, 3),
        ("max", 100_000, 64),
        (6_400_000_000, 100_000, 64),
    ],
)
def test_cpu_max_is_rounded_up(tree, quota, period, expected):
    tree.mount_v2("/pod")
    tree.cpu_max(f"{V2}/pod", quota, period)
    assert cpus(tree).value == expected


def test_source_names_file_and_folder(tree):
    tree.mount_v2("/pod/container")
    tree.cpu_max(f"{V2}/pod/container", 100_000)
    assert cpus(tree) == Usable(value=1, source="cgroup v2 cpu.max at /sys/fs/cgroup/pod/container")


def test_affinity_below_quota_counts(tree):
    tree.mount_v2("/pod")
    tree.cpu_max(f"{V2}/pod", 800_000)
    assert cpus(tree, 4) == Usable(value=4, source="affinity")


def test_limit_of_an_ancestor_counts(tree):
    tree.mount_v2("/kubepods/burstable/pod1/container")
    tree.cpu_max(f"{V2}/kubepods/burstable/pod1/container", 400_000)
    tree.cpu_max(f"{V2}/kubepods/burstable", 200_000)
    tree.cpu_max(f"{V2}/kubepods", 300_000)
    tree.cpu_max(f"{V2}/kubepods/neighbour", 100_000)
    assert cpus(tree) == Usable(value=2, source="cgroup v2 cpu.max at /sys/fs/cgroup/kubepods/burstable")


def test_cgroup_namespace_shows_its_own_limit_at_the_mount_point(tree):
    tree.mount_v2("/")
    tree.cpu_max(V2, 100_000)
    assert cpus(tree) == Usable(value=1, source="cgroup v2 cpu.max at /sys/fs/cgroup")


def test_container_without_cgroup_namespace_sees_a_part_of_the_hierarchy(tree):
    tree.mount_v2("/docker/abc/inner", top="/docker/abc")
    tree.cpu_max(V2, 300_000)
    tree.cpu_max(f"{V2}/inner", 200_000)
    assert cpus(tree) == Usable(value=2, source="cgroup v2 cpu.max at /sys/fs/cgroup/inner")


@pytest.mark.parametrize("cgroup", ["/docker/abc", "/../other", "/..", "/pod (deleted)", "/a/../../../etc"])
def test_cgroup_outside_of_the_mount_is_replaced_by_the_mount_point(tree, cgroup):
    tree.mount_v2(cgroup)
    tree.cpu_max(V2, 200_000)
    tree.write("/sys/fs/other/cpu.max", "100000 100000")
    tree.write("/etc/cpu.max", "100000 100000")
    assert cpus(tree) == Usable(value=2, source="cgroup v2 cpu.max at /sys/fs/cgroup")


def test_mount_that_shows_the_cgroup_is_preferred(tree):
    tree.mount_v2("/docker/abc", top="/docker/other", point="/mnt/other")
    tree.mount_v2("/docker/abc", top="/docker/abc")
    tree.cpu_max("/mnt/other", 100_000)
    tree.cpu_max(V2, 200_000)
    assert cpus(tree).value == 2


def test_mount_point_with_a_space_is_found(tree):
    tree.mount_v2("/pod", point="/sys/my\\040cgroup")
    tree.cpu_max("/sys/my cgroup/pod", 100_000)
    assert cpus(tree) == Usable(value=1, source="cgroup v2 cpu.max at /sys/my cgroup/pod")


def test_v1_quota_over_period_is_rounded_up(tree):
    tree.mount_v1("cpu,cpuacct", "/pod")
    tree.cfs(CPU_V1, -1)
    tree.cfs(f"{CPU_V1}/pod", 250_000)
    assert cpus(tree) == Usable(value=3, source="cgroup v1 cpu.cfs_quota_us at /sys/fs/cgroup/cpu,cpuacct/pod")


def test_v1_ancestors_count(tree):
    tree.mount_v1("cpu,cpuacct", "/kubepods/pod1/container")
    tree.cfs(f"{CPU_V1}/kubepods/pod1/container", -1)
    tree.cfs(f"{CPU_V1}/kubepods/pod1", 50_000)
    assert cpus(tree).value == 1


def test_v1_controllers_are_matched_by_whole_names(tree):
    for other in ("cpuacct", "cpuset"):
        tree.mount_v1(other, "/other")
        tree.cfs(f"/sys/fs/cgroup/{other}/other", 100_000)
        tree.cfs(f"/sys/fs/cgroup/{other}/pod", 100_000)
    assert cpus(tree) == Usable(value=64, source="affinity")
    tree.mount_v1("cpu", "/pod")
    tree.cfs("/sys/fs/cgroup/cpu/pod", 300_000)
    assert cpus(tree) == Usable(value=3, source="cgroup v1 cpu.cfs_quota_us at /sys/fs/cgroup/cpu/pod")


def test_hybrid_takes_the_smaller_of_both_versions(tree):
    tree.mount_v1("cpu,cpuacct", "/a")
    tree.mount_v2("/b", point="/sys/fs/cgroup/unified")
    tree.cfs(f"{CPU_V1}/a", 400_000)
    assert cpus(tree).value == 4
    tree.cpu_max("/sys/fs/cgroup/unified/b", 300_000)
    assert cpus(tree) == Usable(value=3, source="cgroup v2 cpu.max at /sys/fs/cgroup/unified/b")
    tree.cfs(f"{CPU_V1}/a", 200_000)
    assert cpus(tree).value == 2


MALFORMED = [
    "",
    "\n",
    "nonsense",
    "100000",
    "100000 0",
    "0 100000",
    "-5 100000",
    "1e5 100000",
    "²0000 1",
    b"\xff\xfe 1",
    "9" * 5000 + " 1",
]


@pytest.mark.parametrize("content", MALFORMED)
def test_malformed_cpu_max_sets_no_limit(tree, content):
    tree.mount_v2("/pod")
    tree.write(f"{V2}/pod/cpu.max", content)
    tree.cpu_max(V2, 500_000)
    assert cpus(tree).value == 5


def test_unreadable_files_set_no_limit(tree):
    tree.mount_v2("/pod")
    tree.mount_v1("cpu,cpuacct", "/pod")
    for folder in (f"{V2}/pod/cpu.max", f"{CPU_V1}/pod/cpu.cfs_quota_us"):  # a folder cannot be read, even by root
        (tree.root / folder.lstrip("/")).mkdir(parents=True)
    assert cpus(tree) == Usable(value=64, source="affinity")


def test_v1_quota_without_a_period_sets_no_limit(tree):
    tree.mount_v1("cpu,cpuacct", "/pod")
    tree.write(f"{CPU_V1}/pod/cpu.cfs_quota_us", "100000")
    assert cpus(tree).value == 64


def test_proc_that_is_missing_sets_no_limit(tmp_path):
    assert usable_cpus(tmp_path, 2) == Usable(value=2, source="affinity")
    assert usable_memory(tmp_path) is None


def test_memory_of_the_machine_counts_without_limits(tree):
    assert usable_memory(tree.root) == Usable(value=64 * 1024 * MIB, source="MemTotal")


def test_v2_memory_limit_of_any_level_counts(tree):
    tree.mount_v2("/pod/container")
    tree.write(f"{V2}/pod/container/memory.max", "max\n")
    tree.write(f"{V2}/pod/memory.max", f"{512 * MIB}\n")
    assert usable_memory(tree.root) == Usable(value=512 * MIB, source="cgroup v2 memory.max at /sys/fs/cgroup/pod")


def test_v1_memory_limit_of_any_level_counts(tree):
    tree.mount_v1("memory", "/pod/container")
    tree.write(f"{MEMORY_V1}/memory.limit_in_bytes", V1_UNLIMITED)
    tree.write(f"{MEMORY_V1}/pod/memory.limit_in_bytes", 256 * MIB)
    tree.write(f"{MEMORY_V1}/pod/container/memory.limit_in_bytes", V1_UNLIMITED)
    source = "cgroup v1 memory.limit_in_bytes at /sys/fs/cgroup/memory/pod"
    assert usable_memory(tree.root) == Usable(value=256 * MIB, source=source)


def test_greatest_number_of_v1_sets_no_limit(tmp_path):
    tree = CgroupTree(tmp_path, total_kib=None)
    tree.mount_v1("memory")
    tree.write(f"{MEMORY_V1}/memory.limit_in_bytes", V1_UNLIMITED)
    assert usable_memory(tree.root) is None


def test_limit_above_the_memory_of_the_machine_does_not_count(tree):
    tree.mount_v2("/pod")
    tree.write(f"{V2}/pod/memory.max", 128 * 1024 * MIB)
    assert usable_memory(tree.root).source == "MemTotal"


@pytest.mark.parametrize("content", ["MemTotal: many kB\n", "MemTotal:\n", "nonsense", "MemTotal: 0 kB\n"])
def test_malformed_meminfo_is_ignored(tree, content):
    tree.write("/proc/meminfo", content)
    assert usable_memory(tree.root) is None


def test_this_machine_has_memory_and_cpus():
    machine = find_machine()
    assert machine.memory.value > 0
    assert 1 <= machine.cpus.value <= len(os.sched_getaffinity(0))


def test_lines_and_fields_tell_values_and_sources():
    machine = Machine(cpus=Usable(value=2, source="affinity"), memory=Usable(value=3 * 2**29, source="MemTotal"))
    assert list(machine.lines()) == ["usable CPUs: 2 (affinity)", "usable memory: 1.5 GiB (MemTotal)"]
    assert machine.fields() == {
        "cpus": 2,
        "cpus_source": "affinity",
        "memory_bytes": 3 * 2**29,
        "memory_source": "MemTotal",
    }
    small = Machine(cpus=machine.cpus, memory=Usable(value=700 * MIB, source="x"))
    assert list(small.lines())[1] == "usable memory: 700 MiB (x)"
    unknown = Machine(cpus=machine.cpus, memory=None)
    assert list(unknown.lines())[1] == "usable memory: unknown"
    assert unknown.fields() == {"cpus": 2, "cpus_source": "affinity"}


QUOTAS = st.none() | st.integers(1_000, 2_000_000)
LEVELS = st.lists(st.tuples(QUOTAS, QUOTAS), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(levels=LEVELS, affinity=st.integers(1, 64), period=st.sampled_from([10_000, 100_000, 1_000_000]))
def test_smallest_limit_of_all_levels_counts(levels, affinity, period):
    """Each level holds a quota of v2 and one of v1, or none."""
    with tempfile.TemporaryDirectory() as folder:
        tree = CgroupTree(Path(folder))
        own = "/" + "/".join(f"level{index}" for index in range(1, len(levels)))
        tree.mount_v2(own, point="/sys/fs/cgroup/unified")
        tree.mount_v1("cpu,cpuacct", own)
        for index, (v2, v1) in enumerate(levels):
            path = "".join(f"/level{each}" for each in range(1, index + 1))
            tree.cpu_max(f"/sys/fs/cgroup/unified{path}", "max" if v2 is None else v2, period)
            tree.cfs(f"{CPU_V1}{path}", -1 if v1 is None else v1, period)
        quotas = [quota for level in levels for quota in level if quota is not None]
        found = usable_cpus(tree.root, affinity)
    assert found.value == min([affinity, *(-(-quota // period) for quota in quotas)])
    assert 1 <= found.value <= affinity


FILES = [
    *("proc/self/cgroup", "proc/self/mountinfo", "proc/meminfo"),
    *("sys/fs/cgroup/cpu.max", "sys/fs/cgroup/memory.max", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"),
]
WORDS = st.sampled_from(
    ["0::/", "4:cpu:/a\0", "/..", " - cgroup2 ", " - cgroup ", "rw,cpu", "max", "9" * 5000, "\n", " ", "-1"]
)
CONTENTS = st.binary(max_size=64) | st.lists(WORDS | st.text("0123456789 /:-,\n", max_size=8), max_size=12).map(
    lambda words: "".join(words).encode()
)


@settings(deadline=None, max_examples=50)
@given(contents=st.dictionaries(st.sampled_from(FILES), CONTENTS), affinity=st.integers(1, 64))
def test_no_content_of_any_file_makes_counting_fail(contents, affinity):
    with tempfile.TemporaryDirectory() as folder:
        tree = CgroupTree(Path(folder))
        tree.mount_v2("/")
        tree.mount_v1("cpu,cpuacct", "/")
        for file, content in contents.items():
            tree.write(file, content)
        assert 1 <= usable_cpus(tree.root, affinity).value <= affinity
        memory = usable_memory(tree.root)
    assert memory is None or memory.value > 0
