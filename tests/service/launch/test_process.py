"""Telling processes apart."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from ferryman_service.launch.process import current_process_identity, is_alive, kill_all_with, process_identity

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
