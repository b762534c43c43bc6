"""The launcher, with small programs in the worker's place."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ferryman_service.config.resources import usable_cpus
from ferryman_service.launch.environment import INHERITED, PRIVATE
from ferryman_service.launch.launcher import LaunchConfig, ProcessLauncher, read_log_tail, worker_environment
from ferryman_service.launch.process import is_alive, process_identity
from tests.fakes.cgroup_tree import CgroupTree

TELL = """
import json, os, sys
told = {"arguments": sys.argv[1:], "stdin": json.load(sys.stdin), "environment": dict(os.environ),
        "leads_group": os.getpgrp() == os.getpid(), "session": os.getsid(0), "umask": os.umask(0)}
print(json.dumps(told))
print("on stderr", file=sys.stderr)
sys.exit(3)
"""
WAIT = "import signal; print('up'); signal.pause()"
# The child begins after a while, as a worker does.
FORK = "import os, time; time.sleep(0.3); os.fork() or print(os.getpid(), flush=True); time.sleep(600)"
COMPILES = """
import subprocess, sys, time
compiler = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(compiler.pid, flush=True)
time.sleep(600)
"""
SERVICE = """
import sys
from pathlib import Path
from ferryman_service.launch.launcher import LaunchConfig, ProcessLauncher
folder = Path(sys.argv[1])
config = LaunchConfig(data_dir=folder, command=lambda processes: (sys.executable, "-c", sys.argv[2]))
launcher = ProcessLauncher(config, lambda run_id, attempt: folder / "log", lambda run_id, attempt: folder / "scratch")
launcher.start("run_x", 1, 1)
assert "torch" not in sys.modules
print(launcher._workers["run_x", 1].pid, flush=True)
sys.stdin.readline()
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
        launcher = ProcessLauncher(
            LaunchConfig(**values),
            lambda run_id, attempt: tmp_path / f"{run_id}-{attempt}.log",
            lambda run_id, attempt: tmp_path / f"{run_id}-{attempt}",
        )
        started.append(launcher)
        return launcher

    yield make
    for launcher in started:
        for run_id, attempt in launcher._workers:
            launcher.kill(run_id, attempt, None)
            launcher._workers[run_id, attempt].wait()


def ended(launcher, run_id="run_x", attempt=1):
    wait_until(lambda: not launcher.is_running(run_id, attempt, None))
    return launcher.exit_description(run_id, attempt)


def told_by(launcher, attempt=1):
    """What TELL says about itself."""
    return json.loads(launcher.log_tail("run_x", attempt).splitlines()[0])


def test_a_worker_is_a_program_of_its_own(launch, tmp_path):
    launcher = launch(TELL)
    launcher.start("run_x", 2, 2)
    assert ended(launcher, attempt=2) == "exit status 3"
    assert launcher.log_tail("run_x", 2).splitlines()[1:] == ["on stderr"]
    told = told_by(launcher, 2)
    assert told["arguments"] == ["--data-dir", str(tmp_path), "--run-id", "run_x", "--attempt", "2"]
    assert told["leads_group"], "a terminal's Ctrl-C goes to the service's group"
    assert told["session"] == os.getsid(0), "a nice value counts between processes of one session"


def test_a_worker_gets_a_chosen_environment_and_what_is_private_by_a_pipe(launch, tmp_path, monkeypatch):
    for name in os.environ:
        monkeypatch.delenv(name)
    chosen = {
        "PATH": "/bin",
        "HOME": "/nowhere",
        "LC_ALL": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "3",
    }
    secret = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20geheim", "https_proxy": "http://user:geheim@proxy"}
    left_out = {"FERRYMAN_TOKEN": "geheim", "AWS_SECRET_ACCESS_KEY": "geheim", "MY_PATH": "x", "PATHS": "x"}
    for name, value in (chosen | secret | left_out).items():
        monkeypatch.setenv(name, value)
    launcher = launch(TELL, environment={"EXTRA": "more"})
    launcher.start("run_x", 1, 1)
    ended(launcher)
    told = told_by(launcher)
    assert told["stdin"] == secret
    assert told["environment"] == chosen | {
        "EXTRA": "more",
        "TMPDIR": str(tmp_path / "run_x-1"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "=lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_RAS_ENABLE": "0",
        "GOMP_SPINCOUNT": "100",
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "MALLOC_TOP_PAD_": str(2**26),
    }


def test_environment_of_a_worker_is_the_list_in_the_documentation():
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    _, section = page.split("## Environment of a training process\n")
    listed = [cell for row in re.findall(r"^\| (`.+?) \|", section.split("\n## ")[0], re.M) for cell in row.split(", ")]
    assert listed == [f"`{name}`" for name in (*INHERITED, *PRIVATE)]


@pytest.mark.parametrize(("threads", "expected"), [(None, "5"), (7, "7")])
def test_threads_are_those_of_the_config_else_of_the_environment(launch, monkeypatch, threads, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launcher = launch(TELL, threads_per_worker=threads)
    launcher.start("run_x", 1, 1)
    ended(launcher)
    assert told_by(launcher)["environment"]["OMP_NUM_THREADS"] == expected


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
    assert told_by(launcher)["environment"]["MALLOC_TRIM_THRESHOLD_"] == "1"


@pytest.mark.parametrize(
    ("environment", "expected"), [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]
)
def test_spinning_is_bounded_unless_the_environment_says_how_to_wait(launch, monkeypatch, environment, expected):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    launcher = launch(TELL, environment=environment)
    launcher.start("run_x", 1, 1)
    ended(launcher)
    assert told_by(launcher)["environment"].get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize("nice", [0, 5, 19])
def test_nice_lowers_the_worker_and_its_children(launch, nice):
    launcher = launch(FORK, nice=nice)
    launcher.start("run_x", 1, 1)
    wait_until(lambda: launcher.log_tail("run_x", 1).endswith("\n"))
    pids = [launcher._workers["run_x", 1].pid, int(launcher.log_tail("run_x", 1))]
    expected = min(19, nice_of(os.getpid()) + nice)
    assert [nice_of(pid) for pid in pids] == [expected, expected]
    assert [Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in pids] == ["900\n", "900\n"]


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


@pytest.mark.parametrize("program", [FORK, COMPILES])
def test_all_that_the_worker_has_started_is_killed_and_its_files_are_removed(launch, tmp_path, program):
    launcher = launch(program)
    launcher.start("run_x", 1, 1)
    wait_until(lambda: launcher.log_tail("run_x", 1).endswith("\n"))
    child = process_identity(int(launcher.log_tail("run_x", 1)))
    scratch = tmp_path / "run_x-1"
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert launcher.last_beat("run_x", 1)
    assert launcher.kill("run_x", 1, None)
    wait_until(lambda: not is_alive(child))
    assert not scratch.exists()
    assert launcher.last_beat("run_x", 1) is None


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


def test_live_workers_are_found_whoever_started_them(launch, tmp_path):
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
    worker = process_identity(elsewhere._workers["run_x", 1].pid)
    launcher = launch()
    assert launcher.kill("run_x", 1, None)
    assert is_alive(worker)
    assert launcher.kill("run_x", 1, worker)
    assert not is_alive(worker)


def test_workers_that_ended_are_collected_when_the_next_one_starts(launch):
    launcher = launch("pass")
    launcher.start("run_x", 1, 1)
    worker = launcher._workers["run_x", 1]
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    launcher.start("run_x", 2, 1)
    assert worker.returncode == 0


def test_a_program_that_cannot_be_started(launch):
    launcher = launch(command=lambda processes: ("/nowhere/at/all",))
    with pytest.raises(OSError, match="/nowhere/at/all"):
        launcher.start("run_x", 1, 1)
    assert not launcher.is_running("run_x", 1, None)
    assert launcher.log_tail("run_x", 1) == ""
    assert launcher.last_beat("run_x", 1) is None, "no temporary files are left"


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
