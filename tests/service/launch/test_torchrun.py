"""The launcher, with small programs in the worker's place, and once with the real torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ferryman_service.config.resources import usable_cpus
from ferryman_service.launch.process import is_alive, process_identity
from ferryman_service.launch.torchrun import (
    LaunchConfig,
    TorchrunLauncher,
    read_log_tail,
    torchrun_command,
    worker_environment,
)
from tests.fakes.cgroup_tree import CgroupTree
from tests.fakes.namespaces import UNKNOWN_HOST, namespace

TELL = """
import json, os, sys
told = {"arguments": sys.argv[1:], "stdin": sys.stdin.read(), "session": os.getsid(0) == os.getpid(),
        "threads": os.environ["OMP_NUM_THREADS"], "extra": os.environ.get("EXTRA"),
        "allocator": os.environ["MALLOC_TRIM_THRESHOLD_"], "spin": os.environ.get("GOMP_SPINCOUNT"),
        "stop_timeout": os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]}
print(json.dumps(told))
print("on stderr", file=sys.stderr)
sys.exit(3)
"""
WAIT = "import signal; print('up'); signal.pause()"
# The child begins after a while, as a worker does.
FORK = "import os, time; time.sleep(0.3); os.fork() or print(os.getpid(), flush=True); time.sleep(600)"
SERVICE = """
import sys
from pathlib import Path
from ferryman_service.launch.torchrun import LaunchConfig, TorchrunLauncher
folder = Path(sys.argv[1])
config = LaunchConfig(data_dir=folder, command=lambda processes: (sys.executable, "-c", sys.argv[2]))
launcher = TorchrunLauncher(config, lambda run_id, attempt: folder / f"{run_id}-{attempt}.log")
launcher.start("run_x", 1, 1)
assert "torch" not in sys.modules
print(launcher._agents["run_x", 1].pid, flush=True)
sys.stdin.readline()
"""
TORCH_WORKER = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from ferryman_service.launch.process import current_process_identity, die_with_parent
die_with_parent()
dist.init_process_group("gloo")
me = current_process_identity()
Path(sys.argv[2], "worker").write_text(f"{me.pid} {dist.get_world_size()} {os.environ['MASTER_ADDR']}")
if sys.argv[-1] == "2":
    raise SystemExit("this attempt is meant to fail")
import signal
signal.pause()
"""
BARE_MACHINE = """
import os, sys
from pathlib import Path
from ferryman_service.launch.torchrun import LaunchConfig, TorchrunLauncher, torchrun_command
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
os.chdir("/proc")
config = LaunchConfig(
    data_dir=folder,
    command=lambda processes: (*torchrun_command(processes)[:-1], "stand_in_worker"),
    environment={"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
)
launcher = TorchrunLauncher(config, lambda run_id, attempt: folder / "log")
launcher.start("run_x", 1, processes)
launcher._agents["run_x", 1].wait()
sys.exit(launcher.exit_description("run_x", 1))
"""
ADDING_WORKER = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
ones = torch.ones(1)
dist.all_reduce(ones)
print(f"together {int(ones)}, in {os.environ['TMPDIR']}", flush=True)
dist.destroy_process_group()
"""


def wait_until(condition, timeout_s=60):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def nice_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])


@pytest.fixture
def launch(tmp_path):
    """Return a launcher whose workers run the given program; they end with the test."""
    started = []

    def make(program=WAIT, **config):
        command = (sys.executable, "-c", program)
        values = {"data_dir": tmp_path, "command": lambda processes: command} | config
        launcher = TorchrunLauncher(
            LaunchConfig(**values), lambda run_id, attempt: tmp_path / f"{run_id}-{attempt}.log"
        )
        started.append(launcher)
        return launcher

    yield make
    for launcher in started:
        for run_id, attempt in launcher._agents:
            launcher.kill(run_id, attempt, None)
            launcher._agents[run_id, attempt].wait()


def ended(launcher, run_id="run_x", attempt=1):
    wait_until(lambda: not launcher.is_running(run_id, attempt, None))
    return launcher.exit_description(run_id, attempt)


def test_a_worker_is_a_program_of_its_own(launch, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    launcher = launch(TELL, environment={"EXTRA": "more"})
    launcher.start("run_x", 2, 2)
    assert ended(launcher, attempt=2) == "exit status 3"
    told, on_stderr = launcher.log_tail("run_x", 2).splitlines()
    assert json.loads(told) == {
        "arguments": ["--data-dir", str(tmp_path), "--run-id", "run_x", "--attempt", "2"],
        "stdin": "",
        "session": True,
        "threads": str(max(1, usable_cpus().value // 2)),
        "stop_timeout": "45",
        "extra": "more",
        "allocator": str(2**32),
        "spin": "100",
    }
    assert on_stderr == "on stderr"


@pytest.mark.parametrize(("threads", "expected"), [(None, "5"), (7, "7")])
def test_threads_are_those_of_the_config_else_of_the_environment(launch, monkeypatch, threads, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launcher = launch(TELL, threads_per_worker=threads)
    launcher.start("run_x", 1, 1)
    ended(launcher)
    assert json.loads(launcher.log_tail("run_x", 1).splitlines()[0])["threads"] == expected


@pytest.mark.parametrize(("quota", "processes", "threads"), [(100_000, 1, 1), (100_000, 2, 1), (1_000_000, 1, None)])
def test_worker_threads_follow_the_limit_of_its_container(tmp_path, monkeypatch, quota, processes, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tree = CgroupTree(tmp_path)
    tree.mount_v2("/")
    tree.cpu_max("/sys/fs/cgroup", quota)
    environment = worker_environment(LaunchConfig(data_dir=tmp_path), processes, tree.root)
    assert environment["OMP_NUM_THREADS"] == str(threads or usable_cpus(tree.root).value)


def test_operator_threads_win_over_the_limit_of_the_container(tmp_path, monkeypatch):
    tree = CgroupTree(tmp_path)
    tree.mount_v2("/")
    tree.cpu_max("/sys/fs/cgroup", 100_000)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert worker_environment(LaunchConfig(data_dir=tmp_path), 1, tree.root)["OMP_NUM_THREADS"] == "7"


def test_the_allocator_is_set_up_unless_the_environment_says_how(launch):
    launcher = launch(TELL, environment={"MALLOC_TRIM_THRESHOLD_": "1"})
    launcher.start("run_x", 1, 1)
    ended(launcher)
    assert json.loads(launcher.log_tail("run_x", 1).splitlines()[0])["allocator"] == "1"


@pytest.mark.parametrize(
    ("environment", "expected"), [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]
)
def test_spinning_is_bounded_unless_the_environment_says_how_to_wait(launch, monkeypatch, environment, expected):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    launcher = launch(TELL, environment=environment)
    launcher.start("run_x", 1, 1)
    ended(launcher)
    assert json.loads(launcher.log_tail("run_x", 1).splitlines()[0])["spin"] == expected


@pytest.mark.parametrize("nice", [0, 5, 19])
def test_nice_lowers_the_worker_and_its_children(launch, nice):
    launcher = launch(FORK, nice=nice)
    launcher.start("run_x", 1, 1)
    wait_until(lambda: launcher.log_tail("run_x", 1).endswith("\n"))
    pids = [launcher._agents["run_x", 1].pid, int(launcher.log_tail("run_x", 1))]
    expected = min(19, nice_of(os.getpid()) + nice)
    assert [nice_of(pid) for pid in pids] == [expected, expected]


def test_a_living_worker_runs_until_it_is_killed(launch):
    launcher = launch()
    launcher.start("run_x", 1, 1)
    assert launcher.is_running("run_x", 1, None)
    assert launcher.exit_description("run_x", 1) == ""
    assert launcher.kill("run_x", 1, None)
    assert ended(launcher) == "killed by signal 9"
    assert launcher.kill("run_x", 1, None)


def test_attempts_are_told_apart(launch):
    launcher = launch()
    launcher.start("run_x", 1, 1)
    assert not launcher.is_running("run_x", 2, None)
    assert not launcher.is_running("run_y", 1, None)
    assert launcher.kill("run_x", 2, None)
    assert launcher.is_running("run_x", 1, None)


def test_the_whole_group_is_killed(launch):
    launcher = launch(FORK)
    launcher.start("run_x", 1, 1)
    wait_until(lambda: launcher.log_tail("run_x", 1).endswith("\n"))
    child = process_identity(int(launcher.log_tail("run_x", 1)))
    assert launcher.kill("run_x", 1, None)
    assert not is_alive(child)


def test_a_worker_outlives_the_service_and_is_found_again(launch, tmp_path):
    command = [sys.executable, "-c", SERVICE, str(tmp_path), WAIT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
        worker = process_identity(int(service.stdout.readline()))
        service.kill()
    launcher = launch()
    assert launcher.is_running("run_x", 1, worker)
    assert not launcher.is_running("run_x", 1, None)
    assert launcher.kill("run_x", 1, None)
    assert not launcher.is_running("run_x", 1, worker)
    assert launcher.exit_description("run_x", 1) == ""


def test_what_lives_is_found_whoever_has_started_it(launch, tmp_path):
    launcher = launch()
    launcher.start("run_x", 1, 1)
    launcher.start("run_x", 12, 1)
    launch(data_dir=tmp_path / "other").start("run_y", 1, 1)
    wait_until(lambda: all(launcher.log_tail("run_x", attempt) for attempt in (1, 12)))
    another_service = launch()
    assert another_service.living() == {("run_x", 1), ("run_x", 12)}
    assert another_service.kill("run_x", 12, None)
    assert another_service.living() == {("run_x", 1)}


def test_a_worker_with_other_arguments_is_killed_by_its_identity(launch, tmp_path):
    elsewhere = launch(data_dir=tmp_path / "before it was moved")
    elsewhere.start("run_x", 1, 1)
    wait_until(lambda: elsewhere.log_tail("run_x", 1))
    worker = process_identity(elsewhere._agents["run_x", 1].pid)
    launcher = launch()
    assert launcher.kill("run_x", 1, None)
    assert is_alive(worker)
    assert launcher.kill("run_x", 1, worker)
    assert not is_alive(worker)


def test_workers_that_ended_are_collected_when_the_next_one_starts(launch):
    launcher = launch("pass")
    launcher.start("run_x", 1, 1)
    agent = launcher._agents["run_x", 1]
    os.waitid(os.P_PID, agent.pid, os.WEXITED | os.WNOWAIT)
    launcher.start("run_x", 2, 1)
    assert agent.returncode == 0


def test_a_program_that_cannot_be_started(launch):
    launcher = launch(command=lambda processes: ("/nowhere/at/all",))
    with pytest.raises(OSError, match="/nowhere/at/all"):
        launcher.start("run_x", 1, 1)
    assert not launcher.is_running("run_x", 1, None)
    assert launcher.log_tail("run_x", 1) == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ""),
        (b"one\ntwo", "one\ntwo"),
        (b"x" * 8191 + b"\n", "x" * 8191 + "\n"),
        (b"cut\n" + b"y" * 8000 + b"\nlast\n" * 40, "last\n" + "\nlast\n" * 39),
        (b"z" * 9000, "z" * 8192),
        (b"bad \xff byte\n", "bad \ufffd byte\n"),
        (b"\xff" * 7000 + b"\nend\n", "end\n"),
    ],
)
def test_the_tail_of_a_log(tmp_path, content, expected):
    (tmp_path / "log").write_bytes(content)
    tail = read_log_tail(tmp_path / "log")
    assert tail == expected
    assert len(tail.encode()) <= 8192


def test_no_log_has_no_tail(tmp_path):
    assert read_log_tail(tmp_path / "missing") == ""


@pytest.mark.system
@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_needs_neither_name_of_machine_nor_temporary_folder(tmp_path, processes):
    """The data folder is the only one that can be written, and the machine's name does not resolve."""
    (tmp_path / "stand_in_worker.py").write_text(ADDING_WORKER)
    read_only = [f"mount -t tmpfs -o ro none {folder}" for folder in ("/tmp", "/var/tmp") if os.path.isdir(folder)]
    prefix = namespace(UNKNOWN_HOST, f"mount --bind '{tmp_path}' /mnt", *read_only)
    if prefix is None:
        pytest.skip("the kernel allows no namespaces here")
    environment = {key: value for key, value in os.environ.items() if key not in ("TMPDIR", "TEMP", "TMP")}
    command = [*prefix, sys.executable, "-P", "-c", BARE_MACHINE, "/mnt", str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    log = (tmp_path / "log").read_text()
    assert done.stderr == "exit status 0\n", log
    assert log.count(f"together {processes}, in /mnt/tmp") == processes
    assert "Unable to resolve" not in log, "gloo has looked the name up"


@pytest.mark.system
def test_torchrun_itself(launch, tmp_path, monkeypatch):
    (tmp_path / "stand_in_worker.py").write_text(TORCH_WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = (*torchrun_command()[:-1], "stand_in_worker")
    launcher = launch(command=lambda processes: command)
    launcher.start("run_x", 1, 1)
    wait_until(lambda: (tmp_path / "worker").exists() and (tmp_path / "worker").read_text())
    pid, world_size, address = (tmp_path / "worker").read_text().split()
    worker = process_identity(int(pid))
    assert world_size == "1"
    assert address == "localhost", "the host's own name need not resolve"
    assert launcher.is_running("run_x", 1, worker)
    os.kill(launcher._agents["run_x", 1].pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(worker))
    assert ended(launcher) == "killed by signal 9"
    launcher.start("run_x", 2, 1)
    assert ended(launcher, attempt=2) == "exit status 1"
    assert "this attempt is meant to fail" in (tmp_path / "run_x-2.log").read_text()
