"""Programs that are measured by turns."""

import sys

import pytest

from bench.shared.process import ProcessFailed
from bench.shared.turns import LEAST_UPDATES, Contestant, started

_PROGRAM = """
from bench.shared.turns import Turns, TurnsOver
turns = Turns(flops=3.0)
try:
    turns.boundary(0)
    while True:
        print("printed text is no answer")
        turns.boundary(7)
except TurnsOver:
    pass
"""


def contestant(tmp_path, program):
    return Contestant("program", [sys.executable, "-c", program], {"PYTHONPATH": "."}, tmp_path / "log")


def test_turn_reports_updates_and_tokens(tmp_path):
    program = contestant(tmp_path, _PROGRAM)
    with started([program]):
        program.turn(0.0, counts=False)
        program.turn(0.0)
    assert program.facts == {"flops": 3.0}
    assert [turn["tokens"] for turn in program.turns] == [[7] * LEAST_UPDATES]
    assert program.peak_memory_mb > 0


def test_failed_start_raises_with_its_log(tmp_path):
    with pytest.raises(ProcessFailed, match="no such thing"), started([contestant(tmp_path, "exit('no such thing')")]):
        pass
