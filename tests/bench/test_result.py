"""The line that ends a benchmark."""

import json

import pytest

from bench import result
from bench.result import Peer, Result, publish


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    monkeypatch.chdir(tmp_path)


def measured(value, target=35.0):
    peer = Peer(name="another system", value=34.0)
    return Result(bench="quality", value=value, target=target, peer=peer, details={"minutes": 15})


def test_the_last_line_is_the_result_and_is_kept(capsys):
    assert publish(measured(35.7)) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    values = json.loads(line)
    assert (values["bench"], values["value"], values["target"], values["ok"]) == ("quality", 35.7, 35.0, True)
    assert (values["peer"], values["peer_name"], values["ratio"]) == (34.0, "another system", 1.05)
    assert values["minutes"] == 15
    assert {"device", "versions", "date"} <= set(values)
    assert (result.RESULTS / "quality.json").read_text() == line + "\n"


def test_a_missed_target_is_not_ok(capsys):
    assert publish(measured(34.99)) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_without_peer_and_target_there_is_nothing_to_miss(capsys):
    assert publish(Result(bench="quality", value=1.0, target=None, peer=None, details={})) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["ok"], values["peer"], values["ratio"], values["target"]) == (True, None, None, None)
