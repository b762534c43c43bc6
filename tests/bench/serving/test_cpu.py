"""What the serving benchmark makes of what its processes answer."""

import sys
import time
import types

import pytest

from bench.serving import cpu as serving_cpu
from bench.serving.cpu import Pair, cold_start_s, latency_rows, memory_rows, quality_rows, throughput_rows
from bench.serving.engine import FerrymanEngine
from bench.shared.commands import TokenSearch
from bench.shared.models import ServingTask
from bench.shared.process import ProcessFailed
from ferryman_service.domain.errors import Cancelled
from ferryman_service.domain.translation import Hypothesis, SentenceResult, Timings, Translation
from tests.fakes.random_model import random_sentences

SENTENCES = [[4, 5, 3]] * 25


class FakeProcess:
    """A serving process that takes so many milliseconds a sentence, and as many subwords as it is told."""

    def __init__(self, name, ms, tokens=15, faster_batch=32, memory=None):
        self.name = name
        self.asked = []
        self._ms, self._tokens, self._faster_batch, self._memory = ms, tokens, faster_batch, memory

    def ask(self, command, **arguments):
        self.asked.append((command, arguments))
        if command == "latency":
            return [self._ms * arguments["beam_size"]] * arguments["count"]
        if command == "memory":
            return self._memory
        seconds = self._ms * len(SENTENCES) / 1000
        if arguments["max_batch_size"] not in (0, self._faster_batch):
            seconds *= 2
        return {"seconds": seconds, "tokens": self._tokens * len(SENTENCES)}


def task(*, forced):
    return ServingTask(
        name="base", bundle=None, peers={}, sentences=SENTENCES, max_length=15, forced=forced, references=()
    )


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(serving_cpu, "_SETTLE_S", 0.0)


def test_latency_is_measured_by_turns_over_the_same_sentences():
    pair = Pair(FakeProcess("ferryman", 0.7), FakeProcess("ctranslate2", 1.0))
    greedy, beam = latency_rows(pair, task(forced=False), "base fp32", 25)
    assert (greedy.ours, greedy.peer, greedy.ok) == (0.7, 1.0, True)
    assert (beam.ours, beam.peer, beam.name) == (3.5, 5.0, "base fp32 latency beam 5")
    assert pair.ours.asked == pair.peer.asked
    blocks = [(a["first"], a["count"]) for _, a in pair.ours.asked if a["beam_size"] == 5]
    assert blocks[1:] == [(0, 10), (10, 10), (20, 5)]


def test_throughput_is_compared_with_faster_peer_batch():
    pair = Pair(FakeProcess("ferryman", 0.5), FakeProcess("ctranslate2", 1.0, faster_batch=64))
    greedy, _ = throughput_rows(pair, task(forced=True), "base fp32", 2)
    assert (greedy.ours, greedy.peer, greedy.ok) == (30_000.0, 15_000.0, True)
    assert greedy.as_dict()["peer_batch"] == 64


@pytest.mark.parametrize("which", [0, 1])
def test_forced_translations_of_another_length_are_refused(which):
    lengths = [15, 15]
    lengths[which] = 14
    pair = Pair(FakeProcess("ferryman", 1.0, lengths[0]), FakeProcess("ctranslate2", 1.0, lengths[1]))
    with pytest.raises(ProcessFailed, match=r"found 350 subwords for base, not 375"):
        throughput_rows(pair, task(forced=True), "base fp32", 1)


def test_memory_is_compared_now_and_at_its_peak():
    mine, theirs = ({"pss_mib": pss, "peak_rss_mib": peak} for pss, peak in ((100.0, 300.0), (200.0, 200.0)))
    pair = Pair(FakeProcess("ferryman", 1.0, memory=mine), FakeProcess("ctranslate2", 1.0, memory=theirs))
    now, peak = memory_rows(pair, "base int8 memory,")
    assert (now.name, now.ok) == ("base int8 memory, PSS", True)
    assert (peak.name, peak.ok) == ("base int8 memory, peak RSS", False)


def test_int8_loss_is_reported_in_bleu(tmp_path, random_subwords):
    texts = random_sentences(40, seed=5)
    ids = random_subwords.encode(texts)
    worse = [[*sentence[:-1]] for sentence in ids]
    outputs = {
        (engine, compute_type, name): [
            {"tokens": tokens} for tokens in (worse if (engine, compute_type) == ("ferryman", "int8") else ids)
        ]
        for engine in serving_cpu.ENGINES
        for compute_type in ("fp32", "int8")
        for name in serving_cpu.SEARCHES
    }
    references = [random_subwords.decode(sentence) for sentence in ids]
    bundle_task = types.SimpleNamespace(name="tiny", bundle=tmp_path, references=references)
    rows = {row.name: row for row in quality_rows(bundle_task, outputs)}
    assert rows["tiny fp32 same translations greedy"].ours == 1.0
    assert rows["tiny fp32 BLEU beam 5"].ours == rows["tiny int8 BLEU beam 5"].peer == 100.0
    loss = rows["tiny int8 BLEU loss beam 5"]
    assert loss.ours > 0.3 and loss.peer == 0.0 and not loss.ok


@pytest.fixture
def random_subwords(tmp_path):
    from ferryman_service.domain.recipe import SubwordAlgorithm
    from ferryman_service.text.subwords import train_subwords

    return train_subwords(
        random_sentences(400, seed=1),
        tmp_path / "subwords.model",
        vocabulary_size=120,
        algorithm=SubwordAlgorithm.UNIGRAM,
        character_coverage=1.0,
        seed=1,
    )


class EchoEngine:
    """Translates a sentence into itself, or into an error."""

    def __init__(self, error=None):
        self.prepared = ()
        self._error = error

    def run(self, prepared, options, token):
        self.prepared, self.options = prepared, options
        return [
            SentenceResult(translation=self._echo(each.source), error=self._error, timings=Timings())
            for each in prepared
        ]

    def _echo(self, source):
        if self._error is not None:
            return None
        best = Hypothesis(
            text="", score=-2.0, log_probability=-4.0, target_tokens=len(source), finished=True, tokens=source
        )
        return Translation(hypotheses=[best], source_tokens=len(source))


def test_our_engine_gets_search_of_peer():
    engine = EchoEngine()
    ours = FerrymanEngine(engine)
    found = ours.read(
        ours.translate(
            [ours.prepare([4, 3]), ours.prepare([5, 6, 3])], TokenSearch(beam_size=5, max_length=15, forced=True)
        )
    )
    assert [(item.tokens, item.score) for item in found] == [((4, 3), -2.0), ((5, 6, 3), -2.0)]
    assert [(each.min_length, each.max_length) for each in engine.prepared] == [(15, 15)] * 2
    assert (engine.options.beam_size, engine.options.length_penalty) == (5, 1.0)
    ours.translate([ours.prepare([4, 3])], TokenSearch(beam_size=1, max_length=40))
    assert [(each.min_length, each.max_length) for each in engine.prepared] == [(0, 40)]


def test_error_of_our_engine_is_raised():
    ours = FerrymanEngine(EchoEngine(Cancelled("nobody waits")))
    with pytest.raises(Cancelled):
        ours.translate([(4, 3)], TokenSearch(beam_size=1, max_length=9))


def test_cold_start_ends_with_first_line():
    slow_end = "import time; print('a translation', flush=True); time.sleep(0.3)"
    begin_s = time.perf_counter()
    taken_s = cold_start_s([sys.executable, "-c", slow_end])
    assert 0 < taken_s < time.perf_counter() - begin_s - 0.25


def test_failed_cold_start_raises_with_its_output():
    with pytest.raises(ProcessFailed, match="it hurts"):
        cold_start_s([sys.executable, "-c", "import sys; sys.exit('it hurts')"])
