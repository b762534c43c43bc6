"""Beam search against a slow and obvious one, and against looking at every sentence there is."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.search.beam import BeamOptions, RawHypothesis, search
from tests.fakes.decoder import FakeDecoder, random_model


def run(model, sources, options, max_lengths, check=lambda: None):
    session = FakeDecoder(model).encode(sources)
    return search(session, options, np.array(max_lengths, dtype=np.int64), check)


def score(log_probability, length, options):
    return log_probability / float(length) ** options.length_penalty


def slow_search(model, source, options, max_length):
    """One sentence, lists and loops, written from the module's description; it never stops early."""
    live, finished = [((BOS,), 0.0)], []
    for length in range(1, max_length + 1):
        candidates = []
        for row, (prefix, log_probability) in enumerate(live):
            for token, step in enumerate(model(source, prefix)):
                if token not in (PAD, BOS):
                    candidates.append((-(log_probability + float(step)), row, token))
        candidates.sort()
        live_next = []
        for rank, (negative, row, token) in enumerate(candidates[: 2 * options.beam_size]):
            prefix = live[row][0]
            if token != EOS:
                live_next.append(((*prefix, token), -negative))
            elif rank < options.beam_size:
                finished.append(
                    RawHypothesis(
                        tokens=prefix[1:],
                        log_probability=-negative,
                        score=score(-negative, length, options),
                        finished=True,
                    )
                )
        live = live_next[: options.beam_size]
        if options.beam_size == 1 and finished:
            break
    cut = [
        RawHypothesis(tokens=prefix[1:], log_probability=total, score=score(total, max_length, options), finished=False)
        for prefix, total in live
    ]
    finished.sort(key=lambda hypothesis: -hypothesis.score)
    return (finished + cut)[: options.n_best]


@st.composite
def cases(draw):
    beam_size = draw(st.integers(1, 5))
    options = BeamOptions(
        beam_size=beam_size,
        n_best=draw(st.integers(1, beam_size)),
        length_penalty=draw(st.sampled_from([0.0, 0.6, 1.0, 2.5, -1.0])),
    )
    model = random_model(
        draw(st.integers(0, 2**31)),
        draw(st.integers(4, 9)),
        sharpness=draw(st.sampled_from([0.3, 1.0, 3.0])),
        levels=draw(st.sampled_from([0, 1])),
    )
    sentences = draw(st.integers(1, 4))
    sources = [(*range(4, 4 + sentence), EOS) for sentence in range(sentences)]
    max_lengths = draw(st.lists(st.integers(1, 7), min_size=sentences, max_size=sentences))
    return model, sources, options, max_lengths


@settings(max_examples=1500, deadline=None)
@given(cases())
def test_equals_the_slow_search(case):
    model, sources, options, max_lengths = case
    for found, source, limit in zip(run(*case), sources, max_lengths, strict=True):
        assert found == slow_search(model, source, options, limit)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_result_keeps_the_rules(case):
    model, sources, options, max_lengths = case
    for found, source, limit in zip(run(*case), sources, max_lengths, strict=True):
        assert 1 <= len(found) <= options.n_best
        assert len({(hypothesis.tokens, hypothesis.finished) for hypothesis in found}) == len(found)
        keys = [(not hypothesis.finished, -hypothesis.score) for hypothesis in found]
        assert keys == sorted(keys)
        for hypothesis in found:
            assert hypothesis.length <= limit
            assert hypothesis.finished or hypothesis.length == limit
            assert not {PAD, BOS, EOS} & set(hypothesis.tokens)
            ending = (EOS,) if hypothesis.finished else ()
            path = (BOS, *hypothesis.tokens, *ending)
            log_probability = sum(float(model(source, path[:i])[path[i]]) for i in range(1, len(path)))
            assert hypothesis.log_probability == pytest.approx(log_probability, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_neighbours_change_nothing(case):
    model, sources, options, max_lengths = case
    together = run(*case)
    for index, source in enumerate(sources):
        assert run(model, [source], options, max_lengths[index : index + 1]) == [together[index]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 2.0]))
def test_a_wide_beam_finds_the_best_of_all_sentences(seed, length_penalty):
    vocabulary_size, limit = 5, 4
    model = random_model(seed, vocabulary_size)
    options = BeamOptions(beam_size=128, n_best=1, length_penalty=length_penalty)
    best = -math.inf
    for length in range(limit):
        for tokens in itertools.product((1, 4), repeat=length):
            path = (BOS, *tokens, EOS)
            total = sum(float(model((EOS,), path[:i])[path[i]]) for i in range(1, len(path)))
            best = max(best, score(total, length + 1, options))
    [[found]] = run(model, [(EOS,)], options, [limit])
    assert found.finished
    assert found.score == pytest.approx(best, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_a_beam_of_one_takes_the_best_token_each_time(seed, limit):
    model = random_model(seed, 9)
    [[found]] = run(model, [(5, EOS)], BeamOptions(beam_size=1, n_best=1, length_penalty=1.0), [limit])
    prefix = [BOS]
    while len(prefix) <= limit and prefix[-1] != EOS:
        log_probs = model((5, EOS), prefix).copy()
        log_probs[[PAD, BOS]] = -np.inf
        prefix.append(int(log_probs.argmax()))
    assert list(found.tokens) == [token for token in prefix[1:] if token != EOS]
    assert found.finished == (prefix[-1] == EOS)


def ends_after(lengths):
    """A model that is sure of token 4, and of the end after `lengths[first source token]` tokens."""

    def next_log_probs(source, prefix):
        wanted = EOS if len(prefix) > lengths[source[0]] else 4
        log_probs = np.full(6, math.log(1e-6), dtype=np.float32)
        log_probs[wanted] = math.log1p(-5e-6)
        return log_probs

    return next_log_probs


def test_done_sentences_leave_at_once():
    decoder = FakeDecoder(ends_after({4: 1, 5: 3, 6: 5}))
    session = decoder.encode([(4, EOS), (5, EOS), (6, EOS)])
    options = BeamOptions(beam_size=1, n_best=1, length_penalty=1.0)
    found = search(session, options, np.array([20, 20, 20]), lambda: None)
    assert [len(hypotheses[0].tokens) for hypotheses in found] == [1, 3, 5]
    assert session.row_counts == [3, 3, 2, 2, 1, 1]


def test_a_sure_model_stops_the_beam_long_before_the_limit():
    session = FakeDecoder(ends_after({4: 3})).encode([(4, EOS)])
    options = BeamOptions(beam_size=2, n_best=1, length_penalty=1.0)
    search(session, options, np.array([100]), lambda: None)
    assert len(session.row_counts) < 10


def test_zero_probabilities_are_never_chosen():
    def only_token_four(source, prefix):
        log_probs = np.full(8, -np.inf, dtype=np.float32)
        log_probs[4] = 0.0
        return log_probs

    options = BeamOptions(beam_size=3, n_best=3, length_penalty=1.0)
    [found] = run(only_token_four, [(EOS,)], options, [5])
    assert found == [RawHypothesis(tokens=(4,) * 5, log_probability=0.0, score=0.0, finished=False)]


def test_check_is_called_before_every_step_and_may_stop_the_search():
    class StoppedError(Exception):
        pass

    steps_left = iter(range(3, -1, -1))

    def check():
        if next(steps_left) == 0:
            raise StoppedError

    session = FakeDecoder(random_model(1, 8)).encode([(EOS,)])
    with pytest.raises(StoppedError):
        search(session, BeamOptions(beam_size=4, n_best=1, length_penalty=1.0), np.array([50]), check)
    assert len(session.row_counts) == 3


def test_no_sentences_need_no_step():
    options = BeamOptions(beam_size=1, n_best=1, length_penalty=1.0)
    session = FakeDecoder(random_model(1, 8)).encode([])
    assert search(session, options, np.array([], dtype=np.int64), lambda: None) == []
    assert session.row_counts == []


def test_with_a_negative_penalty_a_short_good_row_is_not_given_up():
    def next_log_probs(source, prefix):
        probabilities = np.full(6, 0.002)
        probabilities[[4, EOS]] = (0.01, 0.98) if len(prefix) == 3 else (0.9, 0.08)
        return np.log(probabilities).astype(np.float32)

    options = BeamOptions(beam_size=2, n_best=1, length_penalty=-1.0)
    [[found]] = run(next_log_probs, [(EOS,)], options, [50])
    assert found.tokens == (4, 4)
