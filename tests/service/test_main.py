"""The command `ferryman-service`: what it says of a wrong configuration, and an end that nothing holds up."""

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version

import pytest

from ferryman_service.__main__ import _STORE_COMMANDS, _StopSignals, main
from ferryman_service.config.automatic import decoding_threads
from ferryman_service.config.resources import find_machine
from ferryman_service.config.service_config import ServiceConfig
from ferryman_service.domain.log_context import log_fields, logging_with
from tests.fakes.bundles import write_bundle
from tests.fakes.crashes import tree_of

STUCK = """
import asyncio, sys, time
from ferryman_service import __main__, bootstrap

class StuckService:
    port, probe_port, metrics_port = 1, 0, 0

    async def start(self):
        if sys.argv[1] == "loop":
            asyncio.get_running_loop().call_later(0.2, time.sleep, 1000)

    async def folder_lost(self):
        await asyncio.Event().wait()

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
    assert b"some tasks did not end in time" in process.communicate()[1]


async def test_a_signal_during_a_call_is_logged_without_the_fields_of_that_call(monkeypatch, caplog):
    fields = []
    monkeypatch.setattr(_StopSignals, "_bound", lambda *_: None)
    monkeypatch.setattr(caplog.handler, "emit", lambda record: fields.append((record.getMessage(), log_fields())))
    caplog.set_level("INFO")
    signals = _StopSignals(asyncio.get_running_loop(), limit_s=1)
    with logging_with(request_id="of a call"):
        signals._heed()
        await signals.stop.wait()
    assert fields == [("stopping", {})]


def test_a_wrong_configuration_ends_every_command_with_2(monkeypatch, capsys):
    monkeypatch.setenv("FERRYMAN_PORT", "x")
    for command in (["serve"], ["health"], ["config", "--check"], ["config", "--show"]):
        assert main([*command, "--grace-s", "-1"]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "2 errors in the configuration" in told.err
        assert "FERRYMAN_PORT is 'x', must be a whole number" in told.err
        assert "--grace-s is -1, must be from 0 to 3600" in told.err


def command(*arguments):
    return [sys.executable, "-m", "ferryman_service", *map(str, arguments)]


def serve(data_dir, *flags):
    ports = {"--port": 0, "--probe-port": 0, "--metrics-port": 0}
    ports |= dict(zip(flags[::2], flags[1::2], strict=True))
    settings = [str(part) for each in ports.items() for part in each]
    return command("serve", "--data-dir", data_dir, "--roles", "translation", *settings)


def failure_of(*arguments):
    """Return the lines of a command that fails."""
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    return ended.stderr.splitlines()


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize("flag", ["--port", "--probe-port", "--metrics-port"])
def test_a_taken_port_is_told_in_one_line_and_nothing_after_it(tmp_path, taken, flag):
    lines = failure_of(*serve(tmp_path, flag, taken))
    assert lines[-1].startswith(f"ferryman-service: cannot listen on 127.0.0.1:{taken}")
    assert not [line for line in lines if "Traceback" in line or "Warning" in line]


@pytest.mark.parametrize("flag", ["--port", "--probe-port", "--metrics-port"])
def test_with_log_format_json_a_failed_start_is_json_too(tmp_path, taken, flag):
    *_, last = map(json.loads, failure_of(*serve(tmp_path, flag, taken, "--log-format", "json")))
    assert last["level"] == "ERROR"
    assert last["message"].startswith(f"cannot listen on 127.0.0.1:{taken}")


def test_with_log_format_json_mistakes_in_the_configuration_are_json_too():
    arguments = command("serve", "--log-format", "json", "--port", "x", "--grace-s", "-1")
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert ended.returncode == 2
    assert [(line["level"], line["message"]) for line in lines] == [
        ("ERROR", "--port is 'x', must be a whole number"),
        ("ERROR", "--grace-s is -1, must be from 0 to 3600"),
    ]


def test_a_data_folder_that_cannot_be_made_is_told_with_the_option(tmp_path):
    (tmp_path / "file").touch()
    text = failure_of(*serve(tmp_path / "file"))[-1]
    assert text.startswith(f"ferryman-service: the data folder {tmp_path / 'file'} cannot be used: ")
    assert "--data-dir" in text


def test_a_data_folder_whose_path_is_not_utf8_is_refused(tmp_path):
    text = failure_of(*serve(f"{tmp_path}/caf\udce9"))[-1]
    assert text.startswith("ferryman-service: the data folder ")
    assert r"caf\udce9' cannot be used: its path is not UTF-8; rename the folder" in text


def test_the_folder_of_a_bundle_that_is_not_there_is_named(tmp_path):
    bundle = tmp_path / "nope"
    [text] = failure_of(*command("import-model", bundle, "en-de", "--data-dir", tmp_path / "data"))
    assert text == f"ferryman-service: bundle folder {bundle} not found"


def test_the_log_tells_of_start_and_end_and_of_a_changed_database(tmp_path):
    told = []
    for _ in range(2):
        process = subprocess.Popen(serve(tmp_path, "--log-format", "json"), stderr=subprocess.PIPE, text=True)
        try:
            lines = []
            while not lines or not lines[-1]["message"].startswith("serving on"):
                lines.append(json.loads(process.stderr.readline()))
            process.send_signal(signal.SIGTERM)
            lines += map(json.loads, process.communicate(timeout=60)[1].splitlines())
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0
        told.append(lines)
    migrations = [[line["message"] for line in lines if "database" in line["logger"]] for lines in told]
    [[made], none] = migrations
    assert made.startswith("the database was brought from nothing to schema ")
    assert not none
    first, *_, last = told[1]
    machine = find_machine()
    assert (first["message"], last["message"]) == ("starting", "stopped")
    assert (first["version"], first["roles"], first["data_dir"]) == (version("ferryman"), "translation", str(tmp_path))
    assert (first["port"], first["device"], first["compute_type"]) == (0, "auto", "auto")
    assert (first["cpus"], first["cpus_source"]) == (machine.cpus.value, machine.cpus.source)
    assert first["memory_bytes"] == machine.memory.value
    assert "stopping" in [line["message"] for line in told[1]]


@pytest.mark.parametrize("arguments", [["serve"], ["health"], ["import-model", "bundle", "en-de"]])
def test_without_the_extra_server_its_name_is_told(monkeypatch, capsys, arguments):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)  # what an import finds where the package is not installed
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert told.err == "ferryman-service: not installed: sqlalchemy; run: pip install 'ferryman[server]'\n"


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ferryman-service {version('ferryman')}\n"


def test_a_right_configuration_is_shown(monkeypatch, capsys):
    monkeypatch.setenv("FERRYMAN_PORT", "7")
    monkeypatch.setenv("FERRYMAN_PROT", "7")
    assert main(["config", "--show", "--grace-s", "3"]) == 0
    told = capsys.readouterr()
    lines = [line.split() for line in told.out.splitlines()]
    assert ["port", "=", "7", "#", "FERRYMAN_PORT"] in lines
    assert ["grace_s", "=", "3", "#", "--grace-s"] in lines
    assert tomllib.loads(told.out)["port"] == 7
    *_, cpus, memory, threads, queue, caches, models = told.out.splitlines()
    machine = find_machine()
    assert [cpus, memory] == [f"# {line}" for line in machine.lines()]
    assert threads == f"# automatic translation_threads: {decoding_threads(machine)}"
    automatic = [line.split(":")[0] for line in (queue, caches, models)]
    assert automatic == [f"# automatic {name}" for name in ("queue_tokens", "cache_memory_mib", "model_memory_mib")]
    assert "warning: unknown variable FERRYMAN_PROT is ignored" in told.err
    assert main(["config", "--check"]) == 0


def test_health_of_a_probe_port_that_is_off(capsys):
    assert main(["health", "--probe", "--probe-port", "0"]) == 2
    assert "which turns the probe port off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("database", "words"),
    [(b"\xff" * 8192, "is damaged (file is not a database)"), (b"", "is empty, but the folders beside it are not")],
)
def test_database_that_does_not_belong_to_the_folder_is_told_in_one_line_and_nothing_is_changed(
    tmp_path, database, words
):
    bundle = write_bundle(tmp_path / "models" / "en-de" / "1")
    before = tree_of(bundle)
    (tmp_path / "ferryman.db").write_bytes(database)
    ports = ["--port", "0", "--probe-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "ferryman_service", "serve", "--data-dir", str(tmp_path), *ports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert line.startswith(f"ferryman-service: the database {tmp_path / 'ferryman.db'} {words}")
    assert "'ferryman-service repair'" in line
    assert tree_of(bundle) == before
    assert (tmp_path / "ferryman.db").read_bytes() == database


def test_folder_commands(tmp_path, capsys):
    write_bundle(tmp_path / "models" / "en-de" / "1")
    (tmp_path / "runs" / ("run_" + "0" * 22)).mkdir(parents=True)
    config = ServiceConfig(data_dir=tmp_path)

    def say(command, **options):
        status = _STORE_COMMANDS[command](config, argparse.Namespace(**options))
        return status, capsys.readouterr().out.splitlines()

    assert say("trash") == (0, ["the trash is empty"])
    status, lines = say("verify", deep=False)
    assert (status, len(lines)) == (1, 2)
    _, planned = say("repair", dry_run=True)
    _, done = say("repair", dry_run=False)
    assert planned == ["dry run, nothing was changed; planned repairs:", *done]
    assert say("repair", dry_run=False) == (0, ["nothing to repair"])
    assert say("verify", deep=True) == (0, ["checked database: 1, model versions: 1, runs: 1; damaged: 0"])
