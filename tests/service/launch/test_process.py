"""Telling processes apart."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from ferryman_service.launch.process import (
    current_process_identity,
    is_alive,
    kill_all_with,
    kill_process,
    lower_priority,
    process_identity,
    sees_same,
    what_follows,
)

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
sys.stdin.readline()
"""
CHILD = """
import os, signal
from ferryman_service.launch.process import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
signal.pause()
"""
ORPHAN = """
import os, signal, sys
from ferryman_service.launch import process
real = os.getppid
answers = [real(), 1]
os.getppid = lambda: answers.pop(0)
process.die_with_parent()
print("still alive", flush=True)
"""


STUCK = """
import hashlib, sys, threading, time
from ferryman_service.launch.process import end_on_sigterm
stop = threading.Event()
leave = {"leaves": lambda: print("left", stop.is_set(), flush=True), "hangs": lambda: time.sleep(600)}[sys.argv[1]]
end_on_sigterm(stop, leave, status=3, patience_s=0.2, leave_s=0.5 if sys.argv[1] == "hangs" else 30)
print("up", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # in C, for many minutes
"""
LISTENS = """
import threading
from ferryman_service.launch.process import end_on_sigterm
stop = threading.Event()
end_on_sigterm(stop, lambda: print("left", flush=True), status=3, patience_s=60, leave_s=60)
print("up", flush=True)
stop.wait()
print("ended by itself", flush=True)
"""
LIGHT = """
import sys
import ferryman_service.worker
print(sorted({"torch", "onnx", "onnxruntime", "sqlalchemy", "numpy"} & set(sys.modules)))
"""


@pytest.fixture
def sleeper():
    """A process with a name that looks like fields of /proc/<pid>/stat."""
    program = "import signal; open('/proc/self/comm', 'w').write(') Z 1 2 (x'); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_this_process():
    identity = current_process_identity()
    assert identity.pid == os.getpid()
    assert is_alive(identity)
    assert process_identity(os.getppid()) != identity


def test_another_process_with_the_same_pid_is_not_this_one():
    identity = current_process_identity()
    for other in ({"start_ticks": identity.start_ticks - 1}, {"boot_id": "another boot"}, {"pid": 1}):
        assert not is_alive(dataclasses.replace(identity, **other))


def test_processes_are_killed_by_their_arguments_and_no_others(tmp_path):
    wait = [sys.executable, "-c", "import time; time.sleep(600)"]
    wanted = ["--run", str(tmp_path), "--attempt", "1"]
    command_lines = [wanted, ["x", *wanted, "y"], [*wanted[:-1], "2"], [*wanted[:-1], "11"]]
    processes = [subprocess.Popen([*wait, *arguments]) for arguments in command_lines]
    try:
        assert kill_all_with(wanted, timeout_s=10)
        assert [process.poll() for process in processes] == [-signal.SIGKILL, -signal.SIGKILL, None, None]
        assert kill_all_with(wanted, timeout_s=0)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_process_is_killed_by_its_identity_and_no_other(sleeper):
    identity = process_identity(sleeper.pid)
    assert kill_process(dataclasses.replace(identity, start_ticks=1), timeout_s=10), "that one is gone"
    assert is_alive(identity)
    assert kill_process(identity, timeout_s=10)
    assert not is_alive(identity)
    assert kill_process(identity, timeout_s=0)
    sleeper.wait()
    assert kill_process(identity, timeout_s=0)


def test_arguments_of_running_programs_are_found(tmp_path):
    program = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]
    wanted = ["--run", str(tmp_path)]
    with subprocess.Popen([*program, *wanted, "7", "x y"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert what_follows(wanted) == what_follows(wanted[1:]) == {process.pid: ["7", "x y"]}
        assert what_follows([str(tmp_path), "--run"]) == {}
        process.kill()
    assert what_follows(wanted) == {}


def test_a_path_may_lead_another_process_elsewhere(tmp_path):
    assert sees_same(os.getpid(), tmp_path)
    assert not sees_same(os.getpid(), tmp_path / "missing")
    hidden = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    program = 'mount -t tmpfs tmpfs "$0" && echo up && read line'
    with subprocess.Popen([*hidden, program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if process.stdout.readline():  # else this kernel does not allow mount namespaces to this user
            assert not sees_same(process.pid, tmp_path)
            assert sees_same(process.pid, tmp_path.parent)


@pytest.mark.parametrize("leaving", ["leaves", "hangs"])
def test_a_process_that_is_stuck_in_a_long_phase_is_gone_soon_after_sigterm(leaving):
    command = [sys.executable, "-c", STUCK, leaving]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.terminate()
        try:
            assert process.wait(timeout=20) == 3
        finally:
            process.kill()
        assert process.stdout.read() == ("left True\n" if leaving == "leaves" else "")


def test_a_process_that_listens_to_sigterm_ends_by_itself():
    with subprocess.Popen([sys.executable, "-c", LISTENS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.wait(timeout=20) == 0
        assert process.stdout.read() == "ended by itself\n"


def test_a_worker_can_ask_to_die_with_its_parent_before_it_loads_anything_large():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, timeout=60, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_zombie_is_dead(sleeper):
    identity = process_identity(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has collected it
    assert not is_alive(identity)
    assert process_identity(sleeper.pid) is None


def test_a_child_dies_with_its_parent():
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        child = process_identity(int(parent.stdout.readline()))
        assert is_alive(child)
        parent.kill()
    deadline_s = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not is_alive(child)


def test_a_parent_that_died_just_before_counts():
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


def test_lower_priority_of_a_process_that_has_ended_is_no_error(sleeper):
    sleeper.kill()
    sleeper.wait()
    lower_priority(sleeper.pid, 5)
