"""The command `ferryman-service`: what it says of a wrong configuration, and an end that nothing holds up."""

import signal
import subprocess
import sys
import time

import pytest

from ferryman_service.__main__ import main

STUCK = """
import asyncio, sys, time
from ferryman_service import __main__, bootstrap

class StuckService:
    port, probe_port, metrics_port = 1, 0, 0

    async def start(self):
        if sys.argv[1] == "loop":
            asyncio.get_running_loop().call_later(0.2, time.sleep, 1000)

    async def stop(self, hurry):
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 1000)

bootstrap.build_service = lambda config: StuckService()
sys.exit(__main__.main(["serve", "--grace-s", "600"]))
"""


@pytest.mark.parametrize("what", ["loop", "thread"])
def test_a_second_signal_ends_a_process_that_is_stuck(what):
    process = subprocess.Popen([sys.executable, "-c", STUCK, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"serving on 127.0.0.1:1\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert b"something has not ended in time" in process.communicate()[1]


def test_a_wrong_configuration_ends_every_command_with_2(monkeypatch, capsys):
    monkeypatch.setenv("FERRYMAN_PORT", "x")
    for command in (["serve"], ["health"], ["config", "--check"], ["config", "--show"]):
        assert main([*command, "--grace-s", "-1"]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "2 mistakes in the configuration" in told.err
        assert "FERRYMAN_PORT is 'x', must be a whole number" in told.err
        assert "--grace-s is -1, must be from 0 to 3600" in told.err


def test_a_right_configuration_is_shown(monkeypatch, capsys):
    monkeypatch.setenv("FERRYMAN_PORT", "7")
    monkeypatch.setenv("FERRYMAN_PROT", "7")
    assert main(["config", "--show", "--grace-s", "3"]) == 0
    told = capsys.readouterr()
    lines = [line.split() for line in told.out.splitlines()]
    assert ["port", "=", "7", "#", "FERRYMAN_PORT"] in lines
    assert ["grace_s", "=", "3", "#", "--grace-s"] in lines
    assert "warning: FERRYMAN_PROT is no option" in told.err
    assert main(["config", "--check"]) == 0


def test_health_of_a_probe_port_that_is_off(capsys):
    assert main(["health", "--probe", "--probe-port", "0"]) == 2
    assert "there is no probe port" in capsys.readouterr().err
