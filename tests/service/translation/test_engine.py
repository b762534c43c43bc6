"""A loaded model: whoever else is being translated, a sentence has the translation that it has alone."""

import dataclasses
import itertools
import random
import threading
import time

import pytest

from ferryman_service.bundle.manifest import SUBWORDS_FILE, read_manifest
from ferryman_service.domain.errors import Cancelled, DeadlineExceeded, InvalidSentence
from ferryman_service.domain.translation import (
    CancelToken,
    ComputeType,
    EarlyStopping,
    FairShare,
    Hypothesis,
    Sampling,
    SearchOptions,
    SentenceWork,
    Timings,
    slowest,
)
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.text.subwords import Subwords
from ferryman_service.translation.counts import EngineCounts
from ferryman_service.translation.loader import OnnxBundleLoader, OnnxDecoder
from ferryman_service.translation.onnx_model import OnnxConfig, OnnxModel
from ferryman_service.translation.scheduler import Scheduler, SchedulerConfig
from tests.fakes.random_model import random_sentences, small_recipe
from tests.fakes.scripted_decoder import Results

KINDS = [
    SearchOptions(beam_size=1),
    SearchOptions(beam_size=5, n_best=5),
    SearchOptions(
        beam_size=4, length_penalty=0.5, max_length=20, early_stopping=EarlyStopping.OPTIMAL, beam_patience=1.5
    ),
    SearchOptions(beam_size=2, min_length=9, return_token_scores=True),
    SearchOptions(beam_size=3, return_alignment=True),
    SearchOptions(beam_size=2, repetition_penalty=1.3, no_repeat_ngram_size=2),
    SearchOptions(n_best=2, sampling=Sampling(temperature=0.8, top_k=20, top_p=0.9)),
]
SENTENCES = 100


@pytest.fixture
def start(bundle_dir):
    """A maker of engines over the random model; they are closed at the end."""
    made = []

    def make(compute_type=ComputeType.FP32, **config):
        made.append(OnnxBundleLoader(OnnxConfig(), SchedulerConfig(**config)).load(bundle_dir, compute_type))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def engine(bundle_dir):
    engine = OnnxBundleLoader(OnnxConfig(), SchedulerConfig()).load(bundle_dir, ComputeType.FP32)
    yield engine
    engine.close()


def translate(engine, sentences, **options):
    translations, _ = engine.translate(sentences, SearchOptions(**options), CancelToken())
    return translations


@pytest.fixture(scope="module")
def wishes():
    """Sentences with the kind of search that each wants: (sentence, prefix, options, seed)."""
    generator = random.Random(9)
    sentences = random_sentences(SENTENCES, seed=21, max_words=14)
    prefixes = [text if generator.random() < 0.2 else "" for text in random_sentences(SENTENCES, seed=22, max_words=2)]
    return [
        (sentence, prefix, generator.choice(KINDS), generator.randrange(2**64))
        for sentence, prefix in zip(sentences, prefixes, strict=True)
    ]


def submit(engine, wish, done, share=None):
    sentence, prefix, options, seed = wish
    prepared = engine.prepare(sentence, prefix, options)
    work = SentenceWork(
        sentence=prepared,
        options=options,
        token=CancelToken(),
        share=share or FairShare(),
        done=done,
        seed=seed,
    )
    engine.submit([work])


@pytest.mark.parametrize("compute_type", [ComputeType.FP32, ComputeType.INT8])
def test_random_arrival_changes_nothing(start, wishes, compute_type):
    """Four callers submit at random moments, to three decoding threads. In int8 the scores are the same too, to the
    last bit."""
    alone, lonely = Results(), start(compute_type)
    for number, wish in enumerate(wishes):
        submit(lonely, wish, alone.of(number))
        alone.wait(number + 1)
    together, busy = Results(), start(compute_type, threads=3, max_rows=48, max_encoded_tokens=100)

    def call(numbers):
        generator, share = random.Random(numbers[0]), FairShare(1.0 + numbers[0])
        for number in numbers:
            submit(busy, wishes[number], together.of(number), share)
            if generator.random() < 0.2:
                time.sleep(generator.random() * 0.01)

    callers = [threading.Thread(target=call, args=(range(first, SENTENCES, 4),)) for first in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    together.wait(SENTENCES, timeout_s=60)
    for number, (sentence, *_) in enumerate(wishes):
        ours, wanted = together[number].translation.hypotheses, alone[number].translation.hypotheses
        assert [one.tokens for one in ours] == [one.tokens for one in wanted], sentence
        assert [one.alignment for one in ours] == [one.alignment for one in wanted], sentence
        tolerance = 0.0 if compute_type is ComputeType.INT8 else 1e-5
        assert [one.score for one in ours] == pytest.approx([one.score for one in wanted], abs=tolerance, rel=0)
    found = {together[number].translation.hypotheses[0].tokens for number in range(SENTENCES)}
    assert len(found) > SENTENCES / 3, "the translations are not all the same"
    rows_per_step = [result[0].timings.row_steps / result[0].timings.steps for result in together.by_name.values()]
    assert max(rows_per_step) > 10, "no search alone has more than five rows"


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_request_of_many_is_translated_as_each_alone(engine, beam_size):
    sentences = random_sentences(32, seed=11)
    together = translate(engine, sentences, beam_size=beam_size, n_best=beam_size)
    for sentence, found in zip(sentences, together, strict=True):
        [alone] = translate(engine, [sentence], beam_size=beam_size, n_best=beam_size)
        assert [one.tokens for one in found.hypotheses] == [one.tokens for one in alone.hypotheses]


def test_the_order_of_the_request_is_kept_and_empty_sentences_are_empty(engine):
    sentences = ["ba", "", "de fi go ba", " \t\n", "hu"]
    translations = translate(engine, sentences, beam_size=2)
    nothing = Hypothesis(text="", score=0.0, log_probability=0.0, target_tokens=0, finished=True)
    for sentence, found in zip(sentences, translations, strict=True):
        if sentence.strip():
            assert found == translate(engine, [sentence], beam_size=2)[0]
        else:
            assert (list(found.hypotheses), found.source_tokens) == ([nothing], 0)
    assert translate(engine, []) == []


def test_every_violation_is_named_at_once(engine):
    with pytest.raises(InvalidSentence) as caught:
        engine.translate(["ba", "ba " * 200, "a\x00b"], SearchOptions(), CancelToken())
    named = {(violation.field, violation.reason) for violation in caught.value.violations}
    assert named == {("sentences[1]", "SENTENCE_TOO_LONG"), ("sentences[2]", "CONTROL_CHARACTER")}


def test_work_that_nobody_wants_is_not_done(engine):
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        engine.translate(["ba"], SearchOptions(), token)
    with pytest.raises(DeadlineExceeded):
        engine.translate(["ba"] * 50, SearchOptions(), CancelToken(time.monotonic() - 1))


def test_a_prefix_begins_the_translation_and_counts(engine):
    for sentence, prefix in itertools.product(["ba de", "hu ka le mi"], ["zu", "ti vo ba"]):
        options = SearchOptions(beam_size=3, n_best=3, return_token_scores=True)
        results = Results()
        submit(engine, (sentence, prefix, options, 0), results.of("it"))
        results.wait(1)
        prepared = engine.prepare(sentence, prefix, options)
        assert prepared.prefix
        for found in results["it"].translation.hypotheses:
            assert found.tokens[: len(prepared.prefix)] == prepared.prefix
            assert found.text.startswith(prefix)
            assert found.target_tokens == len(found.tokens) + found.finished
            assert sum(found.token_log_probabilities) == pytest.approx(found.log_probability, abs=1e-4)


@pytest.mark.parametrize("options", [{"beam_size": 1}, {"beam_size": 4, "n_best": 4, "length_penalty": 0.3}])
def test_token_scores_pieces_and_alignments_fit_the_hypothesis(engine, options):
    sentences = random_sentences(20, seed=5)
    translations = translate(engine, sentences, return_token_scores=True, return_alignment=True, **options)
    penalty = options.get("length_penalty", 1.0)
    for found in translations:
        assert len(found.source_pieces) == found.source_tokens
        for one in found.hypotheses:
            lengths = {len(one.pieces), len(one.token_log_probabilities), len(one.alignment)}
            assert lengths == {one.target_tokens}
            assert one.target_tokens == len(one.tokens) + one.finished
            assert all(log_prob <= 0 for log_prob in one.token_log_probabilities)
            assert sum(one.token_log_probabilities) == pytest.approx(one.log_probability, abs=1e-4)
            assert one.score == pytest.approx(one.log_probability / one.target_tokens**penalty, abs=1e-6)
            assert all(0 <= position < found.source_tokens for position in one.alignment)
            assert one.pieces[-1] == "</s>" or not one.finished
    assert len({position for found in translations for position in found.hypotheses[0].alignment}) > 3


def test_optional_results_are_empty_unless_asked_for(engine):
    [found] = translate(engine, ["ba de fi"])
    assert found.source_pieces == ()
    for one in found.hypotheses:
        assert (tuple(one.pieces), tuple(one.token_log_probabilities), tuple(one.alignment)) == ((), (), ())


def test_asking_for_more_changes_no_translation(engine):
    sentences = random_sentences(30, seed=6)
    plain = translate(engine, sentences, beam_size=3)
    for asked in ({"return_token_scores": True}, {"return_alignment": True}, {"repetition_penalty": 1.0}):
        found = translate(engine, sentences, beam_size=3, **asked)
        for one, other in zip(found, plain, strict=True):
            assert one.hypotheses[0].tokens == other.hypotheses[0].tokens
            assert one.hypotheses[0].score == pytest.approx(other.hypotheses[0].score, abs=1e-5)


def test_samples_are_those_of_their_seed(engine):
    sentences = random_sentences(12, seed=7)

    def sample(seed, sentences=sentences):
        found = translate(engine, sentences, n_best=3, sampling=Sampling(seed=seed, temperature=1.5))
        return [[one.tokens for one in each.hypotheses] for each in found]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, sentences[3:4]) == sample(1)[3:4]
    assert any(len(set(each)) == 3 for each in sample(1)), "samples of a sentence differ"


@pytest.mark.parametrize("threads", [1, 2])
def test_timings_say_where_the_time_went(start, threads):
    engine = start(threads=threads)
    results = Results()
    wall_ns = time.perf_counter_ns()
    for number, sentence in enumerate(random_sentences(20, seed=8)):
        submit(engine, (sentence, "", SearchOptions(beam_size=3), 0), results.of(number))
    results.wait(20)
    wall_ns = time.perf_counter_ns() - wall_ns
    for number in range(20):
        timings, [best] = results[number].timings, results[number].translation.hypotheses
        assert min(timings.queue_ns, timings.text_ns, timings.encode_ns, timings.decode_ns) > 0
        assert timings.queue_ns + timings.encode_ns + timings.decode_ns <= wall_ns
        assert best.target_tokens <= timings.steps
        assert 3 * timings.steps <= timings.row_steps <= 60 * timings.steps


def test_a_requests_timings_are_those_of_its_slowest_sentence(engine):
    _, timings = engine.translate(random_sentences(9, seed=1), SearchOptions(beam_size=1), CancelToken())
    assert min(dataclasses.astuple(timings)) > 0
    one = Timings(queue_ns=1, text_ns=2, encode_ns=9, decode_ns=4, steps=5, row_steps=50)
    other = Timings(queue_ns=7, text_ns=3, encode_ns=1, decode_ns=6, steps=8, row_steps=20)
    assert slowest([one, other]) == Timings(queue_ns=7, text_ns=5, encode_ns=9, decode_ns=6, steps=8, row_steps=20)
    assert slowest([]) == Timings()


@pytest.mark.parametrize("compute_type", [ComputeType.FP32, ComputeType.INT8])
def test_warming_up_is_a_translation(start, compute_type):
    engine = start(compute_type)
    engine.warm_up()
    assert engine.max_sentence_tokens() == 64
    assert translate(engine, ["ba de"])[0].hypotheses[0].tokens


def test_a_closed_engine_has_done_its_work(start):
    engine, results = start(threads=2), Results()
    for number, sentence in enumerate(random_sentences(40, seed=3)):
        submit(engine, (sentence, "", SearchOptions(), 0), results.of(number))
    engine.close()
    assert len(results.order) == 40
    assert all(results[number].error is None for number in range(40))


def test_int8_translates_much_as_float32_does(start, engine):
    sentences = random_sentences(60, seed=12)
    exact, int8 = translate(engine, sentences, beam_size=1), translate(start(ComputeType.INT8), sentences, beam_size=1)
    pairs = [(one.hypotheses[0], other.hypotheses[0]) for one, other in zip(exact, int8, strict=True)]
    same = [(one, other) for one, other in pairs if one.tokens == other.tokens]
    assert len(same) > 30, f"{len(same)} of 60 are the same"
    assert max(abs(one.score - other.score) for one, other in same) < 0.2


def test_idle_batches_are_freed_when_asked_and_made_again(start):
    engine = start(threads=2)
    sentences = random_sentences(20, seed=4, max_words=9)
    before = translate(engine, sentences, beam_size=3)
    assert engine.cache_bytes() > 0
    engine.drop_caches()
    deadline_s = time.monotonic() + 10
    while engine.cache_bytes() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert engine.cache_bytes() == 0
    assert translate(engine, sentences, beam_size=3) == before


def test_batches_in_use_are_not_freed(start):
    engine = start()
    sentences = random_sentences(60, seed=5, max_words=9)
    before = translate(engine, sentences, beam_size=3)
    stop = threading.Event()

    def ask():
        while not stop.wait(0.0005):
            engine.drop_caches()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert translate(engine, sentences, beam_size=3) == before
    finally:
        stop.set()
        asking.join()


HOT = Sampling(temperature=50.0)


class StepClock(EngineCounts):
    """Counts steps, tells the rows of all of them as the time, and calls `on_step` after each, in its thread."""

    def __init__(self):
        super().__init__()
        self.steps = self.rows = 0
        self.on_step = lambda: None

    def __call__(self):
        return float(self.rows)

    def step(self, rows):
        self.steps, self.rows = self.steps + 1, self.rows + rows
        self.on_step()


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        (SearchOptions(n_best=32, sampling=HOT, max_length=4096), 12),
        (SearchOptions(beam_size=32, beam_patience=10.0, max_length=4096, min_length=4000), 6),
        (SearchOptions(max_length=4096, min_length=4000), 40),
        (SearchOptions(beam_size=1, repetition_penalty=1.3), 400),
    ],
    ids=["long samples", "long beams", "long beams of five", "greedy with penalty"],
)
def test_large_request_gives_way_to_neighbours_and_finds_the_same(bundle_dir, options, sentences):
    """A neighbour who calls with one sentence, again and again, waits for few steps besides its own; the request finds
    the same, token for token, as alone. Rows are what time is counted in."""
    texts = random_sentences(sentences, seed=3, max_words=1)
    alone, waited = searched_beside_neighbours(bundle_dir, options, texts, has_neighbours=False)
    assert not waited
    together, waited = searched_beside_neighbours(bundle_dir, options, texts, has_neighbours=True)
    assert waited
    assert max(waited) <= 3
    assert together == alone
    assert max(map(len, itertools.chain(*alone))) <= small_recipe().data.max_sentence_tokens


def searched_beside_neighbours(bundle_dir, options, texts, *, has_neighbours):
    """Return the tokens that were found for each text, and how many steps that were not its own each neighbour saw."""
    header = read_manifest(bundle_dir).header
    decoder = OnnxDecoder(OnnxModel.load(bundle_dir, header.architecture, OnnxConfig()))
    text = SentenceText(Subwords.load(bundle_dir / SUBWORDS_FILE), header.max_sentence_tokens)
    results, clock, waited, share = Results(), StepClock(), [], FairShare(4.0)
    scheduler = Scheduler(decoder, text, SchedulerConfig(), clock, clock)

    def one(sentence, options, share, done, seed=0):
        prepared = text.prepare(sentence, "", options)
        return SentenceWork(sentence=prepared, options=options, token=CancelToken(), share=share, done=done, seed=seed)

    def call():
        begin = clock.steps
        if has_neighbours and begin % 50 == 40 and len(results.order) < len(texts):
            done = lambda result: waited.append(clock.steps - begin - result.timings.steps)  # noqa: E731
            scheduler.submit([one("ba de", SearchOptions(), FairShare(4.0), done)])

    clock.on_step = call
    works = [one(each, options, share, results.of(number), number) for number, each in enumerate(texts)]
    scheduler.submit(works)
    results.wait(len(texts), timeout_s=120)
    scheduler.close()
    found = [results[number].translation.hypotheses for number in range(len(texts))]
    return [[hypothesis.tokens for hypothesis in each] for each in found], waited
