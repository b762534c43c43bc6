"""The line that ends a benchmark."""

import json
import re
from pathlib import Path

import pytest

from bench.shared import result
from bench.shared.machine import MachineWatch, Window
from bench.shared.result import Peer, Result, publish

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    monkeypatch.chdir(tmp_path)


def measured(value, target=35.0):
    peer = Peer(name="another system", value=34.0)
    return Result(bench="quality", value=value, target=target, peer=peer, details={"minutes": 15})


def test_result_is_last_line_and_is_stored(capsys):
    assert publish(measured(35.7)) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    values = json.loads(line)
    assert (values["bench"], values["value"], values["target"], values["ok"]) == ("quality", 35.7, 35.0, True)
    assert (values["peer"], values["peer_name"], values["ratio"]) == (34.0, "another system", 1.05)
    assert values["minutes"] == 15
    assert {"device", "versions", "date"} <= set(values)
    assert (result.RESULTS / "quality.json").read_text() == line + "\n"


def test_missed_target_is_not_ok(capsys):
    assert publish(measured(34.99)) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_result_without_peer_and_target_is_ok(capsys):
    assert publish(Result(bench="quality", value=1.0, target=None, peer=None, details={})) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["ok"], values["peer"], values["ratio"], values["target"]) == (True, None, None, None)


def test_unmeasured_benchmark_is_invalid(capsys):
    found = Result(bench="load", value=None, target=1.5, peer=None, details={}, invalid_because="the peer is down")
    assert publish(found) == result.INVALID_STATUS == 3
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert (values["value"], values["ok"], values["valid"], values["ratio"]) == (None, False, False, None)
    assert values["invalid_because"] == "the peer is down"
    assert "INVALID: the peer is down" in err


def test_line_holds_load_of_machine(capsys):
    publish(measured(35.7))
    values = json.loads(capsys.readouterr().out)
    assert values["valid"] is True
    machine = values["machine"]
    assert {"cpus", "cpu_model", "busy", "busy_share", "busiest_process", "foreign_cpus"} <= set(machine)
    assert set(machine["load_averages_at_start"]) == set(machine["load_averages_at_end"]) == {"1_min", "5_min"}


def test_busy_machine_prints_warning(monkeypatch, capsys):
    watch = MachineWatch()
    busy = Window(seconds=5.0, foreign_cpus=1.0, busiest="intruder", busiest_cpus=0.9)
    monkeypatch.setattr(result, "_WATCH", watch)
    watch.read().windows.append(busy)
    publish(measured(35.7))
    out, err = capsys.readouterr()
    assert "most of all 'intruder'; stop them" in err
    assert json.loads(out)["machine"]["busy"] is True


def test_watched_block_warns_at_start(monkeypatch, capsys):
    watch = MachineWatch()
    monkeypatch.setattr(result, "_WATCH", watch)
    watch.read().windows.append(Window(seconds=5.0, foreign_cpus=1.0))
    with result.watched_machine():
        assert "warning: the machine was busy" in capsys.readouterr().err
        assert len(watch.windows) >= 2


PUBLISHING = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "bench").rglob("*.py")
    if re.search(r"^\s+return .*publish\(|\(publish\(", path.read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("program", PUBLISHING)
def test_every_benchmark_watches_machine(program):
    assert "watched_machine()" in (ROOT / program).read_text()
