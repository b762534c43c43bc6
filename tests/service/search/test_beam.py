"""The search against a slow and obvious one, against looking at every sentence there is, and its rules one by one."""

import dataclasses
import itertools
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryman_service.domain.tokens import BOS, EOS, PAD, UNK
from ferryman_service.domain.translation import EarlyStopping, Sampling, SearchOptions
from ferryman_service.search.beam import Searches, search
from ferryman_service.search.sentence import RawHypothesis, SentenceSearch, needs_logits
from tests.fakes.decoder import FakeDecoder, random_model
from tests.service.search.reference import Reference, TooClose

EXAMPLES = 70 if os.environ.get("FERRYMAN_SOAK") else 15


def run(model, sources, searches, check=lambda: None):
    return search(FakeDecoder(model), sources, searches, check)


def one(options, max_length, **others):
    return SentenceSearch(options=options, max_length=max_length, **others)


@dataclasses.dataclass
class Job:
    """A sentence that comes before step number `arrives` (or later, when it is its turn) and is given up after
    `patience` steps."""

    source: tuple[int, ...]
    search: SentenceSearch
    arrives: int = 0
    patience: int = 10_000


class Traffic:
    """Sentences that join and leave a running batch in their own time. Finds None for those that were given up."""

    def __init__(self, model, width, jobs, *, logits, attention=True):
        self.batch = FakeDecoder(model).batch(width, attention=attention)
        self.searches = Searches(width, logits=logits, attention=attention)
        self.jobs = jobs
        self.waiting = sorted(range(len(jobs)), key=lambda number: jobs[number].arrives)
        self.present, self.steps_left = [], []
        self.found = [None] * len(jobs)

    def run(self):
        step = 0
        while self.present or self.waiting:
            self.let_in(step)
            if self.present:
                self.step()
            step += 1
        return self.found

    def let_in(self, step):
        arrived = [number for number in self.waiting if self.jobs[number].arrives <= step]
        if arrived:
            self.batch.admit([self.jobs[number].source for number in arrived])
            self.searches.admit([self.jobs[number].search for number in arrived])
            self.present += arrived
            self.steps_left += [self.jobs[number].patience for number in arrived]
            self.waiting = self.waiting[len(arrived) :]

    def step(self):
        self.searches.step(self.batch)
        done = self.searches.done().tolist()
        for sentence in done:
            self.found[self.present[sentence]] = self.searches.results(sentence)
        self.steps_left = [steps - 1 for steps in self.steps_left]
        kept = [i for i in range(len(self.present)) if i not in done and self.steps_left[i] > 0]
        if len(kept) < len(self.present):
            self.searches.keep(np.array(kept, dtype=np.int64))
            self.batch.keep(np.array(kept, dtype=np.int64))
            self.present = [self.present[i] for i in kept]
            self.steps_left = [self.steps_left[i] for i in kept]
        assert self.searches.sentences == self.batch.sentences == len(self.present)


def models(least_vocabulary):
    return st.builds(
        random_model,
        st.integers(0, 2**31),
        st.integers(least_vocabulary, 9),
        sharpness=st.sampled_from([0.3, 1.0, 3.0]),
        levels=st.sampled_from([0, 0, 1]),
    )


MODELS, SMALLEST_MODELS = models(5), models(4)


# Strategies are made once: making them takes longer than the search.
PLAIN = st.fixed_dictionaries(
    {
        "length_penalty": st.sampled_from([1.0, 0.0, 0.6, 2.5, -1.0]),
        "beam_patience": st.sampled_from([1.0, 1.2, 2.0, 5.0]),
        "early_stopping": st.sampled_from(EarlyStopping),
        "return_token_scores": st.booleans(),
        "return_alignment": st.booleans(),
    }
)
N_BEST = [st.integers(1, max(1, width)) for width in range(6)]
SAMPLING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3]),
    top_p=st.sampled_from([1.0, 1.0, 0.4, 0.9]),
)
CHANGES = st.fixed_dictionaries(
    {
        "sampling": st.none() | SAMPLING,
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7, 5.0]),
        "no_repeat_ngram_size": st.sampled_from([0, 0, 1, 2, 3]),
    }
)
SEARCHES = st.fixed_dictionaries(
    {
        "max_length": st.integers(1, 8),
        "min_length": st.sampled_from([0, 0, 1, 2, 9]),
        "seed": st.sampled_from([0, 7, 2**64 - 1]),
    }
)
PREFIXES = st.just(()) | st.lists(st.sampled_from([UNK, 4]), max_size=8).map(tuple)
SOURCES = st.lists(st.integers(4, 6), max_size=3)
ARRIVALS = st.integers(0, 12)
PATIENCES = st.sampled_from([10_000, 10_000, 10_000, 1, 3])
BOOLEANS = st.booleans()


@st.composite
def jobs(draw, width, *, logits):
    """A job of any options of this width; `logits`: of those too that need them."""
    options = {"beam_size": width, "n_best": draw(N_BEST[width]), **draw(PLAIN)}
    search, prefix = draw(SEARCHES), ()
    if logits and draw(BOOLEANS):
        options |= draw(CHANGES)
        prefix = draw(PREFIXES)[: search["max_length"]]
    if options.get("sampling"):
        options["n_best"] = width
    return Job(
        source=(*draw(SOURCES), EOS),
        search=SentenceSearch(options=SearchOptions(**options), prefix=prefix, **search),
        arrives=draw(ARRIVALS),
        patience=draw(PATIENCES),
    )


TRAFFIC = {
    (width, logits): st.lists(jobs(width, logits=logits), min_size=1, max_size=6)
    for width in range(1, 6)
    for logits in (False, True)
}


def alike(found, expected, tolerance):
    assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in expected]
    for one_of_ours, one_of_theirs in zip(found, expected, strict=True):
        assert one_of_ours.finished == one_of_theirs.finished
        assert one_of_ours.alignment == one_of_theirs.alignment
        for name in ("score", "log_probability", "token_log_probs"):
            theirs = getattr(one_of_theirs, name)
            assert getattr(one_of_ours, name) == pytest.approx(theirs, abs=tolerance, rel=tolerance)


@settings(max_examples=10 * EXAMPLES, deadline=None)
@given(st.data())
def test_beams_that_join_and_leave_equal_the_slow_search(data):
    model, width = data.draw(SMALLEST_MODELS), data.draw(N_BEST[5])
    traffic = data.draw(TRAFFIC[width, False])
    for job, found in zip(traffic, Traffic(model, width, traffic, logits=False).run(), strict=True):
        if found is not None:
            alike(found, Reference(model, job.source, job.search, exact=True).run(), 1e-9)


@settings(max_examples=10 * EXAMPLES, deadline=None)
@given(st.data())
def test_changed_distributions_that_join_and_leave_equal_the_slow_search(data):
    model, width = data.draw(MODELS), data.draw(N_BEST[4])
    traffic = data.draw(TRAFFIC[width, True])
    for job, found in zip(traffic, Traffic(model, width, traffic, logits=True).run(), strict=True):
        if found is not None:
            try:
                expected = Reference(model, job.source, job.search, exact=False).run()
            except TooClose:
                continue
            alike(found, expected, 1e-5)


@settings(max_examples=3 * EXAMPLES, deadline=None)
@given(st.data())
def test_neighbours_change_nothing(data):
    model, width, logits = data.draw(MODELS), data.draw(N_BEST[4]), data.draw(BOOLEANS)
    traffic = data.draw(TRAFFIC[width, logits])
    together = Traffic(model, width, traffic, logits=logits).run()
    for job, found in zip(traffic, together, strict=True):
        if found is not None:
            assert Traffic(model, width, [job], logits=logits).run() == [found]


@settings(max_examples=3 * EXAMPLES, deadline=None)
@given(st.data())
def test_every_result_keeps_the_rules(data):
    model, width = data.draw(MODELS), data.draw(N_BEST[4])
    traffic = data.draw(TRAFFIC[width, True])
    for job, found in zip(traffic, run(model, *searches_of(traffic)), strict=True):
        options, limit = job.search.options, job.search.max_length
        assert len(found) <= options.n_best
        keys = [(not hypothesis.finished, -hypothesis.score) for hypothesis in found]
        assert keys == sorted(keys)
        for hypothesis in found:
            tokens, prefix = hypothesis.tokens, job.search.prefix
            assert hypothesis.finished or hypothesis.length == limit
            assert hypothesis.length <= limit
            assert not hypothesis.finished or len(tokens) >= job.search.min_length
            assert not {PAD, BOS, EOS} & set(tokens)
            assert tokens[: len(prefix)] == prefix
            if options.no_repeat_ngram_size and not prefix:
                size = options.no_repeat_ngram_size
                ngrams = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
                assert len(set(ngrams)) == len(ngrams)
            path = (BOS, *tokens, *([EOS] if hypothesis.finished else []))
            steps = [float(model(job.source, path[:i])[path[i]]) for i in range(1, len(path))]
            assert hypothesis.log_probability == pytest.approx(sum(steps), abs=1e-4)
            if options.return_token_scores:
                assert hypothesis.token_log_probs == pytest.approx(steps, abs=1e-4)
                assert math.fsum(hypothesis.token_log_probs) == pytest.approx(hypothesis.log_probability)
            assert len(hypothesis.alignment) == hypothesis.length * options.return_alignment


def searches_of(traffic):
    return [job.source for job in traffic], [job.search for job in traffic]


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from(EarlyStopping))
def test_a_beam_as_wide_as_everything_finds_the_best_of_all_sentences(seed, length_penalty, early_stopping):
    limit, model = 4, random_model(seed, 5)
    options = SearchOptions(
        beam_size=16, length_penalty=length_penalty, beam_patience=10, early_stopping=early_stopping
    )
    best = -math.inf
    for length in range(limit):
        for tokens in itertools.product((UNK, 4), repeat=length):
            path = (BOS, *tokens, EOS)
            total = sum(float(model((EOS,), path[:i])[path[i]]) for i in range(1, len(path)))
            best = max(best, total / float(length + 1) ** length_penalty)
    [[found]] = run(model, [(EOS,)], [one(options, limit)])
    assert found.finished
    assert found.score == pytest.approx(best, abs=1e-9)


def ends_after(lengths):
    """A model that is sure of token 4, and of the end after `lengths[first source token]` tokens."""

    def next_log_probs(source, prefix):
        wanted = EOS if len(prefix) > lengths[source[0]] else 4
        log_probs = np.full(6, math.log(1e-6), dtype=np.float32)
        log_probs[wanted] = math.log1p(-5e-6)
        return log_probs

    return next_log_probs


GREEDY = SearchOptions(beam_size=1)


def test_done_sentences_leave_at_once():
    decoder = FakeDecoder(ends_after({4: 1, 5: 3, 6: 5}))
    found = search(decoder, [(4, EOS), (5, EOS), (6, EOS)], [one(GREEDY, 20)] * 3, lambda: None)
    assert [len(hypotheses[0].tokens) for hypotheses in found] == [1, 3, 5]
    [batch] = decoder.batches
    assert batch.row_counts == [3, 3, 2, 2, 1, 1]


def test_searches_that_can_share_a_batch_do():
    decoder = FakeDecoder(ends_after({4: 2}))
    options = [
        GREEDY,
        SearchOptions(beam_size=3),
        SearchOptions(beam_size=3, length_penalty=0.2, early_stopping=EarlyStopping.OPTIMAL, min_length=1),
        SearchOptions(beam_size=3, repetition_penalty=1.2),
        SearchOptions(n_best=3, sampling=Sampling()),
        SearchOptions(beam_size=3, return_alignment=True),
    ]
    search(decoder, [(4, EOS)] * len(options), [one(each, 10) for each in options], lambda: None)
    assert [(batch.width, batch.row_counts[0] // batch.width) for batch in decoder.batches] == [
        (1, 1),
        (3, 2),
        (3, 2),
        (3, 1),
    ]


def test_which_searches_need_logits():
    assert not needs_logits(
        one(SearchOptions(min_length=2, beam_patience=2, return_token_scores=True), 9, min_length=2)
    )
    for options in (
        SearchOptions(repetition_penalty=1.1),
        SearchOptions(no_repeat_ngram_size=2),
        SearchOptions(sampling=Sampling()),
    ):
        assert needs_logits(one(options, 9))
    assert needs_logits(one(GREEDY, 9, prefix=(4,)))


@pytest.mark.parametrize(("patience", "steps"), [(1.0, 3), (1.2, 4), (2.0, 6)])
def test_the_first_rule_stops_at_beam_size_times_patience(patience, steps):
    def one_ends_in_each_step(source, prefix):
        return np.log(np.array([0.001, 0.001, 0.001, 0.3, 0.3, 0.297, 0.1], dtype=np.float32))

    decoder = FakeDecoder(one_ends_in_each_step)
    options = SearchOptions(beam_size=3, beam_patience=patience)
    search(decoder, [(EOS,)], [one(options, 50)], lambda: None)
    assert len(decoder.batches[0].row_counts) == steps


def test_the_optimal_rule_waits_for_a_row_that_may_become_better():
    def later_is_better(source, prefix):
        probabilities = np.full(6, 0.001)
        probabilities[[4, EOS]] = (0.5, 0.496) if len(prefix) < 4 else (0.001, 0.995)
        return np.log(probabilities).astype(np.float32)

    found = {
        early_stopping: run(
            later_is_better, [(EOS,)], [one(SearchOptions(beam_size=2, early_stopping=early_stopping), 50)]
        )[0][0]
        for early_stopping in EarlyStopping
    }
    assert len(found[EarlyStopping.OPTIMAL].tokens) == 3
    assert len(found[EarlyStopping.FIRST].tokens) < 3
    assert found[EarlyStopping.OPTIMAL].score > found[EarlyStopping.FIRST].score


def test_the_optimal_rule_gives_a_row_all_its_length():
    def improbable_then_sure(source, prefix):
        probabilities = np.full(6, 1e-4)
        match len(prefix):
            case 1:
                probabilities[[EOS, 4, 5]] = (0.4, 0.3, 0.29)
            case 2:
                probabilities[[EOS, 4]] = (0.35, 0.2)
            case length:
                probabilities[4 if length < 10 else EOS] = 0.999
        return np.log(probabilities).astype(np.float32)

    options = SearchOptions(beam_size=2, early_stopping=EarlyStopping.OPTIMAL)
    [[found]] = run(improbable_then_sure, [(EOS,)], [one(options, 50)])
    # When two have finished, the best row would score -2.8 / 3 if it ended, which is worse than -0.92.
    assert found.tokens == (4,) * 9


@pytest.mark.parametrize("early_stopping", EarlyStopping)
def test_a_sure_model_stops_the_beam_long_before_the_limit(early_stopping):
    decoder = FakeDecoder(ends_after({4: 3}))
    options = SearchOptions(beam_size=2, early_stopping=early_stopping)
    search(decoder, [(4, EOS)], [one(options, 100)], lambda: None)
    assert len(decoder.batches[0].row_counts) < 10


def test_with_a_negative_penalty_a_short_good_row_is_not_given_up():
    def next_log_probs(source, prefix):
        probabilities = np.full(6, 0.002)
        probabilities[[4, EOS]] = (0.01, 0.98) if len(prefix) == 3 else (0.9, 0.08)
        return np.log(probabilities).astype(np.float32)

    options = SearchOptions(beam_size=2, length_penalty=-1.0, early_stopping=EarlyStopping.OPTIMAL)
    [[found]] = run(next_log_probs, [(EOS,)], [one(options, 50)])
    assert found.tokens == (4, 4)


def only_token_four(source, prefix):
    log_probs = np.full(8, -np.inf, dtype=np.float32)
    log_probs[4] = 0.0
    return log_probs


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.5], ids=["top k", "logits"])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_zero_probabilities_are_never_chosen(beam_size, repetition_penalty):
    options = SearchOptions(beam_size=beam_size, n_best=beam_size, repetition_penalty=repetition_penalty)
    [found] = run(only_token_four, [(EOS,)], [one(options, 5)])
    assert found == [RawHypothesis(tokens=(4,) * 5, log_probability=0.0, score=0.0, finished=False)]


@pytest.mark.parametrize("options", [SearchOptions(beam_size=2), SearchOptions(n_best=2, sampling=Sampling())])
def test_a_sentence_without_a_way_on_is_done(options):
    options = dataclasses.replace(options, no_repeat_ngram_size=1)
    decoder = FakeDecoder(only_token_four)
    [found] = search(decoder, [(EOS,)], [one(options, 5)], lambda: None)
    assert found == []
    assert len(decoder.batches[0].row_counts) == 2


def test_samples_depend_on_the_seed_and_are_several():
    model = random_model(5, 20, sharpness=0.5)
    options = SearchOptions(n_best=8, sampling=Sampling())
    by_seed = [run(model, [(EOS,)], [one(options, 12, seed=seed)])[0] for seed in (1, 1, 2)]
    assert by_seed[0] == by_seed[1] != by_seed[2]
    assert len({hypothesis.tokens for hypothesis in by_seed[0]}) > 4


@pytest.mark.parametrize("temperature", [1e-3, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature):
    model = random_model(5, 300)
    options = SearchOptions(n_best=2, sampling=Sampling(temperature=temperature))
    [drawn] = run(model, [(EOS,)], [one(options, 12)])
    [[greedy]] = run(model, [(EOS,)], [one(GREEDY, 12)])
    assert [hypothesis.tokens for hypothesis in drawn] == [greedy.tokens] * 2


@pytest.mark.parametrize("repetition_penalty", [5e-324, 10.0])
def test_extreme_penalties_leave_numbers(repetition_penalty):
    options = SearchOptions(beam_size=2, n_best=2, repetition_penalty=repetition_penalty)
    [found] = run(random_model(5, 9), [(EOS,)], [one(options, 12, min_length=5)])
    assert found
    for hypothesis in found:
        assert math.isfinite(hypothesis.score) and math.isfinite(hypothesis.log_probability)


def test_long_sentences_outgrow_every_array():
    options = SearchOptions(beam_size=2, repetition_penalty=0.9, return_token_scores=True, return_alignment=True)
    model = random_model(3, 8)
    jobs = [Job((number, EOS), one(options, 120 + number, min_length=110), arrives=number) for number in range(20)]
    for job, [found] in zip(jobs, Traffic(model, 2, jobs, logits=True).run(), strict=True):
        path = (BOS, *found.tokens, *([EOS] if found.finished else []))
        steps = [float(model(job.source, path[:i])[path[i]]) for i in range(1, len(path))]
        assert found.length >= 110
        assert found.token_log_probs == pytest.approx(steps, abs=1e-4)


def test_check_is_called_before_every_step_and_may_stop_the_search():
    class StoppedError(Exception):
        pass

    steps_left = iter(range(3, -1, -1))

    def check():
        if next(steps_left) == 0:
            raise StoppedError

    decoder = FakeDecoder(random_model(1, 8))
    with pytest.raises(StoppedError):
        search(decoder, [(EOS,)], [one(SearchOptions(beam_size=4, min_length=9), 50, min_length=9)], check)
    assert len(decoder.batches[0].row_counts) == 3


def test_no_sentences_need_no_step():
    decoder = FakeDecoder(random_model(1, 8))
    assert search(decoder, [], [], lambda: None) == []
    assert decoder.batches == []


def test_misuse_is_refused():
    searches = Searches(1, logits=False, attention=False)
    for wrong in (SearchOptions(beam_size=2), SearchOptions(beam_size=1, return_alignment=True)):
        with pytest.raises(AssertionError, match="batch"):
            searches.admit([one(wrong, 5)])
    with pytest.raises(AssertionError, match="logits"):
        searches.admit([one(GREEDY, 5, prefix=(4,))])
    batch = FakeDecoder(ends_after({4: 0, 5: 3})).batch(1)
    batch.admit([(4, EOS), (5, EOS)])
    searches.admit([one(GREEDY, 5)] * 2)
    searches.step(batch)
    assert searches.done().tolist() == [0]
    with pytest.raises(AssertionError, match="not done"):
        searches.results(1)
    with pytest.raises(AssertionError, match="leave"):
        searches.step(batch)
    with pytest.raises(AssertionError, match="leave"):
        searches.keep(np.array([0, 1]))
    for wrong in ({"max_length": 0}, {"prefix": (EOS,)}, {"prefix": (4, 4, 4)}, {"seed": -1}):
        with pytest.raises(AssertionError):
            SentenceSearch(**{"options": GREEDY, "max_length": 2, **wrong})
