"""Programs that answer commands, and what is measured inside them."""

import sys

import pytest

from bench.shared.commands import Commands, Found, TokenSearch
from bench.shared.process import ProcessFailed, ServingProcess, memory_mib

_PROGRAM = """
import sys
from bench.shared.process import answer_commands
def add(a, b):
    print("what a program prints itself is no answer")
    return a + b
answer_commands({"add": add, "end": lambda: sys.exit("ended in the middle")}, kind="adder")
"""


def program(tmp_path):
    return ServingProcess("adder", [sys.executable, "-c", _PROGRAM], {"PYTHONPATH": "."}, tmp_path / "logs" / "log")


class ReversingEngine:
    """A TokenEngine that translates a sentence into its subwords in reverse order."""

    def __init__(self):
        self.searches = []

    def prepare(self, sentence):
        return tuple(sentence)

    def translate(self, prepared, search):
        self.searches.append((len(prepared), search))
        return [sentence[::-1] for sentence in prepared]

    def read(self, result):
        return [Found(tokens=tokens, score=-1.0) for tokens in result]


def test_program_answers_commands_in_order(tmp_path):
    with program(tmp_path) as adder:
        assert adder.facts == {"kind": "adder"}
        assert adder.ask("add", a=1, b=2) == 3
        assert adder.ask("add", a="x", b="y") == "xy"


def test_ended_program_raises_with_its_log(tmp_path):
    with program(tmp_path) as adder:
        with pytest.raises(ProcessFailed, match="ended in the middle"):
            adder.ask("end")
        with pytest.raises(ProcessFailed, match="exit status 1"):
            adder.ask("add", a=1, b=2)


def test_failed_start_raises_with_its_log(tmp_path):
    broken = ServingProcess("broken", [sys.executable, "-c", "import nothing_of_this_name"], {}, tmp_path / "log")
    with pytest.raises(ProcessFailed, match="nothing_of_this_name"), broken:
        pass


def test_memory_of_process_is_measured():
    before = memory_mib()
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    after = memory_mib()
    assert set(after) == {"rss_mib", "peak_rss_mib", "pss_mib"}
    assert after["rss_mib"] - before["rss_mib"] > 50
    assert after["peak_rss_mib"] >= after["rss_mib"] - 1


def test_latency_translates_one_sentence_at_a_time():
    engine = ReversingEngine()
    commands = Commands(engine).handlers()
    assert commands["sentences"](ids=[[4, 3], [5, 3], [6, 3], [7, 3]]) == 4
    taken_ms = commands["latency"](first=1, count=2, beam_size=5, max_length=9)
    assert len(taken_ms) == 2 and all(ms > 0 for ms in taken_ms)
    assert engine.searches == [(1, TokenSearch(beam_size=5, max_length=9))] * 2


def test_throughput_translates_all_sentences_at_once():
    engine = ReversingEngine()
    commands = Commands(engine).handlers()
    commands["sentences"](ids=[[4, 5, 3], [6, 3]])
    measured = commands["throughput"](beam_size=1, max_length=9, max_batch_size=32)
    assert measured["tokens"] == 5 and measured["seconds"] > 0
    assert engine.searches == [(2, TokenSearch(beam_size=1, max_length=9, max_batch_size=32))]


def test_translations_come_back_in_order():
    commands = Commands(ReversingEngine()).handlers()
    commands["sentences"](ids=[[4, 5, 3], [6, 3]])
    found = commands["translate"](beam_size=1, max_length=9)
    assert found == [{"tokens": [3, 5, 4], "score": -1.0}, {"tokens": [3, 6], "score": -1.0}]
