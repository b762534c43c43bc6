"""The order of the waiting sentences: callers advance by weight, and nobody waits for ever."""

import random

import pytest

from ferryman_service.domain.translation import CancelToken, FairShare, SearchOptions
from ferryman_service.translation.waiting import PeerLines, WaitingLine
from tests.fakes.scripted_decoder import work


class Line:
    """A line of named sentences."""

    def __init__(self, line=None):
        self.line = WaitingLine() if line is None else line
        self._names = {}

    def add(self, name, share, tokens=10, **options):
        one = work(1, lambda result: None, source_tokens=tokens, share=share, **options)
        self._names[id(one)] = (name, one)
        self.line.add(one, 0)

    def take(self):
        return self._names[id(self.line.take().work)][0]

    def take_all(self):
        return [self.take() for _ in range(len(self.line))]


def test_one_callers_sentences_come_in_order():
    line, share = Line(), FairShare()
    for name in range(50):
        line.add(name, share, tokens=2 + name % 7)
    assert line.take_all() == list(range(50))


def test_use_of_other_queues_does_not_change_a_callers_place():
    """Small and large calls wait in lines of their own, whose virtual times know nothing of each other."""
    small, large, ours, other = Line(PeerLines()), Line(PeerLines()), FairShare(), FairShare()
    for name in range(1_000):
        small.add(name, ours)
    small.take_all()
    for name in range(10):
        large.add(f"other {name}", other)
        large.add(f"ours {name}", ours)
    assert "ours 0" in [large.take() for _ in range(2)]


@pytest.mark.parametrize("seed", range(5))
def test_callers_that_wait_get_tokens_by_weight(seed):
    """However much each has queued, in which order they came, and how long their sentences are."""
    generator = random.Random(seed)
    weights = {"light": 1.0, "heavy": 4.0, "middle": 2.0}
    shares = {name: FairShare(weight) for name, weight in weights.items()}
    queue = [(name, generator.randint(2, 40)) for name in weights for _ in range(1500)]
    generator.shuffle(queue)
    line = Line()
    for name, tokens in queue:
        line.add((name, tokens), shares[name], tokens=tokens)
    taken = dict.fromkeys(weights, 0)
    for _ in range(1800):
        name, tokens = line.take()
        taken[name] += tokens
    total = sum(taken.values())
    for name, weight in weights.items():
        assert taken[name] / total == pytest.approx(weight / 7, rel=0.1)


def test_a_newcomer_overtakes_what_others_have_queued():
    line, bulk = Line(), FairShare(1.0)
    for name in range(2000):
        line.add(name, bulk)
    for expected in range(100):
        assert line.take() == expected
    line.add("newcomer", FairShare(4.0), tokens=40)
    assert line.take() == "newcomer"
    assert line.take() == 100


def test_a_translation_that_must_be_long_counts_as_such():
    """Else a caller could take more than its share with short sentences and long minimum lengths or prefixes."""
    line, long, short = Line(), FairShare(), FairShare()
    for number in range(40):
        line.add(("long", number), long, tokens=10, min_length=30)
        line.add(("short", number), short, tokens=10)
    taken = [line.take()[0] for _ in range(40)]
    assert taken.count("short") == pytest.approx(30, abs=2)


def test_beams_count_as_rows():
    line, greedy, beam = Line(), FairShare(), FairShare()
    for name in range(40):
        line.add(("greedy", name), greedy)
        line.add(("beam", name), beam, options=SearchOptions(beam_size=5))
    first = [line.take()[0] for _ in range(24)]
    assert first.count("greedy") == 20


@pytest.mark.parametrize("callers", [1, 3, 20])
def test_callers_that_come_one_after_the_other_do_not_keep_a_bulk_waiting(callers):
    """Each comes with one sentence and a share of its own, and when it is taken the next one comes."""
    line, bulk = Line(), FairShare(1.0)
    for name in range(60):
        line.add(("bulk", name), bulk)
    for name in range(callers):
        line.add(("unary", name), FairShare(4.0))
    taken = []
    while taken.count("bulk") < 60 and len(taken) < 10_000:
        taken.append(line.take()[0])
        if taken[-1] == "unary":
            line.add(("unary", len(taken)), FairShare(4.0))
    assert taken.count("bulk") == 60
    assert taken.count("bulk") / len(taken) == pytest.approx(1 / (4 * callers + 1), rel=0.15)
    gaps = [len(gap) for gap in "".join(name[0] for name in taken).split("b")]
    assert max(gaps) <= 2 * 4 * callers + 1


def test_returning_caller_gains_nothing_from_its_absence():
    line, regular, absent = Line(), FairShare(), FairShare()
    for name in range(20):
        line.add(("regular", name), regular)
    for _ in range(10):
        line.take()
    for name in range(20):
        line.add(("absent", name), absent)
    names = [line.take()[0] for _ in range(20)]
    assert names.count("absent") in (10, 11)


def test_cancelled_sentences_are_taken_out_and_the_rest_keep_their_order():
    line, tokens = Line(), [CancelToken() for _ in range(30)]
    share = FairShare()
    for name, token in enumerate(tokens):
        line.add(name, share, token=token)
    assert line.line.take_abandoned() == []
    for token in tokens[::3]:
        token.cancel()
    gone = {waiting.work.token for waiting in line.line.take_abandoned()}
    assert gone == set(tokens[::3])
    assert line.take_all() == [name for name in range(30) if name % 3]
    assert line.line._weight == 0.0
    line.add("later", share)
    assert line.take_all() == ["later"]


def test_a_caller_is_asked_once_however_many_sentences_wait():
    """A full line holds tens of thousands, and is looked through many times a second."""

    class CountingToken(CancelToken):
        asked = 0

        def is_wanted(self):
            self.asked += 1
            return super().is_wanted()

    line, share = Line(), FairShare()
    stays, goes = CountingToken(), CountingToken()
    for number in range(100):
        line.add(number, share, token=goes if number % 3 == 0 else stays)
    goes.cancel()
    assert len(line.line.take_abandoned()) == 34
    assert (stays.asked, goes.asked) == (1, 1)
    assert line.line.take_abandoned() == []
    assert goes.asked == 1, "it has left the line"
    assert line.take_all() == [number for number in range(100) if number % 3]
    line.line.take_abandoned()
    assert stays.asked == 2


def test_peers_advance_alike_however_many_callers_each_has():
    line, calm = Line(PeerLines()), FairShare(1.0, "calm")
    for number in range(1000):
        line.add(("crowd", number), FairShare(4.0, "crowd"))
    for number in range(20):
        line.add(("calm", number), calm)
    first = [line.take()[0] for _ in range(40)]
    assert first.count("calm") == 20
    for _ in range(100):
        line.take()
    line.add("newcomer", FairShare(4.0, "new"), tokens=40)
    assert "newcomer" in (line.take(), line.take())
    token = CancelToken()
    line.add("gone", FairShare(4.0, "gone"), token=token)
    token.cancel()
    assert len(line.line.take_abandoned()) == 1
    assert len(line.take_all()) == len(line.line._lines) + 1000 + 20 + 1 - 40 - 100 - 2


@pytest.mark.parametrize("peers", [1, 5])
def test_peers_that_come_one_after_the_other_do_not_keep_a_bulk_waiting(peers):
    line, bulk = Line(PeerLines()), FairShare(1.0, "bulk")
    for name in range(60):
        line.add(("bulk", name), bulk)
    for name in range(peers):
        line.add(("unary", name), FairShare(4.0, f"peer {name}"))
    taken = []
    while taken.count("bulk") < 60 and len(taken) < 10_000:
        kind, name = line.take()
        taken.append(kind)
        if kind == "unary":
            line.add(("unary", name), FairShare(4.0, f"peer {name}"))
    assert taken.count("bulk") / len(taken) == pytest.approx(1 / (peers + 1), rel=0.15)


def test_caller_whose_peer_had_nothing_in_line_is_not_held_up_by_what_it_took_before():
    line, stream = Line(PeerLines()), FairShare(1.0, "peer")
    for name in range(50):
        line.add(name, stream)
        assert line.take() == name
    for name in range(3):
        line.add(("stream", name), stream)
        line.add(("call", name), FairShare(1.0, "peer"))
    assert [line.take()[0] for _ in range(4)].count("stream") >= 1
