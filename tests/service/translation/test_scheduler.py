"""Every sentence is answered exactly once, threads are evenly loaded, and nobody is starved."""

import itertools
import random
import threading
import time

import pytest

from ferryman_service.domain.errors import Cancelled, DeadlineExceeded
from ferryman_service.domain.translation import CancelToken, FairShare, Sampling, SearchOptions
from ferryman_service.translation.cache_memory import CacheMemory, CacheShape
from ferryman_service.translation.counts import EngineCounts
from ferryman_service.translation.scheduler import Scheduler, SchedulerConfig
from tests.fakes.scripted_decoder import Results, ScriptedDecoder, ScriptedText, work

GREEDY = SearchOptions(beam_size=1)


@pytest.fixture
def decoder():
    return ScriptedDecoder()


@pytest.fixture
def results():
    return Results()


@pytest.fixture
def start(decoder):
    """A maker of schedulers over the decoder; they are closed at the end."""
    made = []

    def make(counts=None, **config):
        made.append(Scheduler(decoder, ScriptedText(), SchedulerConfig(**config), counts))
        return made[-1]

    yield make
    decoder.gate.set()
    decoder.on_step = decoder.on_admit = lambda *arguments: None
    for scheduler in made:
        scheduler.close()


def hold_up(scheduler, decoder, results, steps=1):
    """Let a sentence of its own begin and wait in its first step; `decoder.gate` lets it go on."""
    entered = threading.Event()
    decoder.gate.clear()
    decoder.on_admit = lambda sources: entered.set()
    scheduler.submit([work(steps, results.of("plug"))])
    assert entered.wait(10)
    decoder.on_admit = lambda sources: None


def test_a_sentence_is_translated(start, results):
    start().submit([work(6, results.of("a"))])
    results.wait(1)
    assert results["a"].error is None
    [hypothesis] = results["a"].translation.hypotheses
    assert (hypothesis.text, hypothesis.finished) == ("5", True)


def test_an_empty_sentence_is_answered_at_once(start, decoder, results):
    empty = work(1, results.of("empty"))
    sentence = type(empty.sentence)(source=())
    start().submit([type(empty)(**{**vars(empty), "sentence": sentence})])
    assert results["empty"].error is None
    assert decoder.admitted == []


@pytest.mark.parametrize(("threads", "seed"), [(1, 0), (3, 1), (3, 2)])
def test_every_sentence_is_answered_once_whatever_happens(start, decoder, results, seed, threads):
    """Random options, cancellations, deadlines and failures of the model, from several callers' threads."""
    generator = random.Random(seed)
    chance = threading.local()

    def fail_sometimes(*arguments):
        if not hasattr(chance, "generator"):
            chance.generator = random.Random(seed)
        if chance.generator.random() < 0.02:
            raise ZeroDivisionError("the model broke")

    decoder.on_step = decoder.on_admit = fail_sometimes
    scheduler = start(threads=threads, max_rows=24, max_encoded_tokens=40)
    kinds = [
        GREEDY,
        SearchOptions(beam_size=4, n_best=2),
        SearchOptions(beam_size=2, repetition_penalty=1.2),
        SearchOptions(sampling=Sampling(), n_best=3),
        SearchOptions(beam_size=30),
        SearchOptions(beam_size=1, return_alignment=True),
    ]
    seeds = [generator.randrange(2**32) for _ in range(4)]

    def call(number):
        mine = random.Random(seeds[number])
        share, tokens = FairShare(mine.choice([1.0, 4.0])), []
        for burst in range(6):
            deadline_s = time.monotonic() + mine.random() * 0.2 if mine.random() < 0.3 else None
            tokens.append(CancelToken(deadline_s))
            scheduler.submit(
                [
                    work(
                        mine.randint(1, 12),
                        results.of((number, burst, index)),
                        source_tokens=mine.randint(2, 20),
                        options=mine.choice(kinds),
                        token=tokens[-1],
                        share=share,
                    )
                    for index in range(mine.randint(0, 25))
                ]
            )
            submitted[number] += [len(results.by_name)]  # so that bursts interleave
            if mine.random() < 0.3:
                mine.choice(tokens).cancel()
            time.sleep(mine.random() * 0.01)

    submitted = [[] for _ in range(4)]
    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    scheduler.close()
    assert all(len(told) == 1 for told in results.by_name.values())
    found = [told[0] for told in results.by_name.values()]
    assert all((one.translation is None) != (one.error is None) for one in found)
    errors = {type(one.error) for one in found if one.error is not None}
    assert errors <= {Cancelled, DeadlineExceeded, ZeroDivisionError}
    assert any(one.translation for one in found)


def test_closing_translates_what_was_submitted(start, decoder, results):
    scheduler = start(threads=2, max_rows=8)
    hold_up(scheduler, decoder, results)
    scheduler.submit([work(5, results.of(name)) for name in range(100)])
    threading.Timer(0.05, decoder.gate.set).start()
    scheduler.close()
    assert len(results.order) == 101
    assert all(results[name].error is None for name in range(100))
    with pytest.raises(AssertionError, match="closed"):
        scheduler.submit([work(1, results.of("late"))])


@pytest.mark.parametrize("where", ["on_step", "on_admit"])
def test_an_error_of_the_model_reaches_its_batch_and_the_next_work_is_served(start, decoder, results, where):
    scheduler = start()
    hold_up(scheduler, decoder, results, steps=9)
    scheduler.submit([work(9, results.of(name)) for name in range(5)])
    beam = SearchOptions(beam_size=2)
    scheduler.submit([work(9, results.of("beam"), options=beam, source_tokens=3)])
    left = itertools.count()

    def break_once(*arguments):
        if next(left) == 0:
            raise ZeroDivisionError("broken")

    setattr(decoder, where, break_once)
    decoder.gate.set()
    results.wait(7)
    broken = {name for name in results.by_name if results[name].error is not None}
    assert broken in ({"plug"}, {"plug", *range(5)})  # who was in the batch when it broke; beams have another
    assert all(isinstance(results[name].error, ZeroDivisionError) for name in broken)
    scheduler.submit([work(3, results.of("after"))])
    results.wait(8)
    assert results["after"].error is None


def test_a_batch_that_cannot_be_made_is_told_to_its_callers_and_the_next_work_is_served(start, decoder, results):
    """A lack of memory, or a device that is lost: no thread ends of it, else everybody would wait for ever."""
    scheduler = start()
    hold_up(scheduler, decoder, results, steps=9)
    make = decoder.batch

    def refuse(width, *, attention):
        raise MemoryError("no room for a batch")

    def lose_the_device():
        decoder.batch = refuse
        raise ZeroDivisionError("the model broke")

    decoder.on_step = lose_the_device
    decoder.gate.set()
    results.wait(1)
    assert isinstance(results["plug"].error, ZeroDivisionError)
    decoder.on_step = lambda: None
    scheduler.submit([work(3, results.of(name)) for name in range(3)])
    results.wait(4)
    assert all(isinstance(results[name].error, MemoryError) for name in range(3))
    decoder.batch = make
    scheduler.submit([work(3, results.of("after"))])
    results.wait(5)
    assert results["after"].error is None


def test_a_search_that_cannot_begin_is_told_to_its_caller_alone(start, results):
    scheduler = start()
    impossible = work(3, results.of("impossible"), prefix=(7,) * 9)  # longer than the maximum length
    scheduler.submit([impossible, work(3, results.of("fine"))])
    results.wait(2)
    assert isinstance(results["impossible"].error, AssertionError)
    assert results["fine"].error is None


def test_a_single_sentence_does_not_wait_for_a_flood(start, decoder, results):
    """2,000 sentences of a caller of weight 1 wait; who comes then is the next to join, and waits for no more steps
    than the sentences that run."""
    scheduler = start(max_rows=16)
    hold_up(scheduler, decoder, results)
    bulk = FairShare(1.0)
    scheduler.submit([work(10, results.of(name), share=bulk) for name in range(2000)])
    seen = {}

    def come_at_step_50():
        if decoder.steps == 50 and "step" not in seen:
            seen.update(step=decoder.steps, admitted=len(decoder.admitted))
            scheduler.submit([work(7, results.of("single"), share=FairShare(4.0), source_tokens=50)])

    decoder.on_step = come_at_step_50
    decoder.gate.set()
    results.wait(2002)
    joined = next(index for index, source in enumerate(decoder.admitted) if len(source) == 50)
    assert joined == seen["admitted"], "nobody else joined between"
    assert decoder.admitted_at[joined] - seen["step"] <= 10
    assert results["single"].timings.steps == 7


def test_a_flood_of_single_sentences_does_not_starve_a_bulk(start, decoder, results):
    """As one is done the next comes, so that 30 always wait; the bulk gets its share all the same."""
    scheduler = start(max_rows=16)
    hold_up(scheduler, decoder, results)
    bulk, count = FairShare(1.0), itertools.count()
    scheduler.submit([work(4, results.of(("bulk", name)), share=bulk) for name in range(20)])

    def come():
        number = next(count)
        done = results.of(("unary", number))

        def and_the_next(result):
            done(result)
            if number < 10_000 and any(("bulk", name) not in results.by_name for name in range(20)):
                come()

        scheduler.submit([work(4, and_the_next, share=FairShare(4.0))])

    for _ in range(46):
        come()
    decoder.gate.set()
    results.wait_for(lambda: ("bulk", 19) in results.by_name)
    order = [name[0] for name in list(results.order)]
    assert order.count("bulk") == 20
    before_last_bulk = len(order) - order[::-1].index("bulk")
    assert before_last_bulk <= 20 * (4 * 46 + 1)


def test_a_cancelled_callers_rows_are_free_within_two_steps(start, decoder, results):
    scheduler = start(max_rows=64)
    hold_up(scheduler, decoder, results)
    token = CancelToken()
    beam = SearchOptions(beam_size=4)
    scheduler.submit([work(500, results.of(("gone", name)), token=token, options=beam) for name in range(8)])
    scheduler.submit([work(60, results.of("stays"))])
    seen = {}

    def cancel_at_step_20():
        if decoder.steps >= 20 and "cancelled_at" not in seen:
            seen["cancelled_at"] = decoder.steps
            seen["rows"] = decoder.rows()
            token.cancel()
        elif "cancelled_at" in seen and "free_at" not in seen and decoder.rows() == 1:
            seen["free_at"] = decoder.steps

    decoder.on_step = cancel_at_step_20
    decoder.gate.set()
    results.wait(10)
    assert seen["rows"] == 8 * 4 + 1
    assert seen["free_at"] - seen["cancelled_at"] <= 2
    assert all(isinstance(results[("gone", name)].error, Cancelled) for name in range(8))
    assert results["stays"].error is None


def test_a_deadline_that_passes_in_the_line_is_told_soon(start, decoder, results):
    scheduler = start(max_rows=1)
    scheduler.submit([work(100_000, results.of("endless"), token=(endless := CancelToken()))])
    started_s = time.monotonic()
    scheduler.submit([work(1, results.of("late"), token=CancelToken(started_s + 0.05), max_length=100_000)])
    results.wait(1)
    late_s = time.monotonic() - started_s
    endless.cancel()
    results.wait(2)
    assert isinstance(results["late"].error, DeadlineExceeded)
    assert 0.05 <= late_s < 5.0
    assert results["late"].timings.queue_ns >= 0.05e9
    assert results["late"].timings.steps == 0


def test_a_cancelled_sentence_in_the_line_is_told_though_all_rows_are_taken(start, decoder, results):
    scheduler = start(max_rows=1)
    endless, waiting = CancelToken(), CancelToken()
    scheduler.submit([work(100_000, results.of("endless"), token=endless)])
    scheduler.submit([work(1, results.of(name), token=waiting, max_length=100_000) for name in range(300)])
    waiting.cancel()
    results.wait(300)
    assert all(isinstance(results[name].error, Cancelled) for name in range(300))
    assert len(decoder.admitted) <= 2
    endless.cancel()
    results.wait(301)


def test_cancelled_call_of_many_sentences_halts_no_batch(start, decoder, results):
    scheduler, token, endless = start(max_rows=1), CancelToken(), CancelToken()
    told = []
    decoder.on_step = lambda: told.append(len(results.order))
    scheduler.submit([work(100_000, results.of("endless"), token=endless)])
    scheduler.submit([work(1, results.of(name), token=token, max_length=100_000) for name in range(3_000)])
    token.cancel()
    results.wait(3_000)
    endless.cancel()
    results.wait(3_001)
    assert max(after - before for before, after in itertools.pairwise([0, *told])) <= 256


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_stay_within_the_limit(start, decoder, results, threads):
    generator = random.Random(2)
    scheduler = start(threads=threads, max_rows=12)
    names = range(150)
    for name in names:
        options = SearchOptions(beam_size=generator.choice([1, 2, 5, 12]))
        scheduler.submit([work(generator.randint(1, 9), results.of(name), options=options)])
    results.wait(len(names))
    assert decoder.peak_rows <= 12


def test_a_sentence_wider_than_the_limit_runs_alone(start, decoder, results):
    scheduler = start(max_rows=4)
    widest = SearchOptions(beam_size=9)
    scheduler.submit([work(5, results.of(name), options=widest) for name in range(4)])
    scheduler.submit([work(5, results.of("narrow"), options=GREEDY)])
    results.wait(5)
    assert decoder.peak_rows == 9


def test_source_tokens_are_encoded_in_portions_while_rows_run(start, decoder, results):
    scheduler = start(max_rows=100, max_encoded_tokens=60)
    hold_up(scheduler, decoder, results, steps=40)
    scheduler.submit([work(3, results.of(name), source_tokens=20) for name in range(30)])
    scheduler.submit([work(3, results.of("long"), source_tokens=64, share=FairShare(1e9))])
    decoder.gate.set()
    results.wait(32)
    portions = [sum(map(len, sources)) for sources in decoder.encoded[1:]]
    assert max(portions) <= 64
    assert portions.count(60) >= 9
    assert 64 in portions, "one sentence above the limit is let through"


def test_an_idle_engine_takes_all_at_once(start, decoder, results):
    entered = threading.Event()
    decoder.gate.clear()
    decoder.on_admit = lambda sources: entered.set()
    start(max_rows=100, max_encoded_tokens=60).submit(
        [work(3, results.of(name), source_tokens=20) for name in range(30)]
    )
    assert entered.wait(10)
    decoder.gate.set()
    results.wait(30)
    assert len(decoder.encoded[0]) == 30


def test_sentences_join_in_numbers_when_the_rows_are_nearly_all_taken(start, decoder, results):
    """To encode one sentence whenever a row is free would take longer than to wait for an eighth of the rows."""
    scheduler = start(max_rows=64, max_encoded_tokens=10_000)
    hold_up(scheduler, decoder, results)
    scheduler.submit([work(2 + name % 13, results.of(name)) for name in range(600)])
    decoder.gate.set()
    results.wait(601)
    # Those who join when many wait are at least 8; only the last ones may be fewer.
    sizes = [len(sources) for sources in decoder.encoded[1:]]
    assert min(sizes[:-10]) >= 8


@pytest.mark.parametrize("threads", [2, 4])
def test_the_threads_share_the_sentences_evenly(start, decoder, results, threads):
    decoder.gate.clear()
    scheduler = start(threads=threads, max_rows=1000)
    scheduler.submit([work(5, results.of(name)) for name in range(40 * threads)])
    threading.Timer(0.1, decoder.gate.set).start()
    results.wait(40 * threads)
    assert len(decoder.peak_sentences) == threads
    assert max(decoder.peak_sentences.values()) == 40


def test_the_longest_of_a_request_come_first(start, decoder, results):
    scheduler = start()
    scheduler.submit([work(2, results.of(tokens), source_tokens=tokens) for tokens in (5, 30, 2, 17)])
    results.wait(4)
    assert [len(source) for source in decoder.admitted] == [30, 17, 5, 2]


def test_batches_that_nobody_uses_any_more_are_let_go(start, decoder, results):
    scheduler = start()
    for beam_size in range(1, 33):
        scheduler.submit([work(2, results.of(beam_size), options=SearchOptions(beam_size=beam_size))])
        results.wait(beam_size)
    [worker] = scheduler._workers
    assert len(worker._lanes) <= 7
    made = decoder.made
    for name in range(5):  # and those used last stay
        scheduler.submit([work(2, results.of(f"again {name}"), options=SearchOptions(beam_size=32))])
        results.wait(33 + name)
    assert decoder.made == made


def test_timings_count_the_sentences_own_steps_and_the_rows_beside_it(start, decoder, results):
    scheduler = start()
    hold_up(scheduler, decoder, results, steps=10)
    scheduler.submit([work(4, results.of(name)) for name in range(3)])
    decoder.gate.set()
    results.wait(4)
    plug, short = results["plug"].timings, results[0].timings
    assert (plug.steps, plug.row_steps) == (10, 1 + 4 * 4 + 5)
    assert (short.steps, short.row_steps) == (4, 16)
    assert min(short.queue_ns, short.encode_ns, short.decode_ns) > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_sentences_wait_for_cache_memory_and_small_callers_have_some_kept(start, decoder, results, threads):
    """A large caller's sentence is booked with 2 rows of 64 positions, 1,280 bytes; 8 have room beside what is kept."""
    memory = CacheMemory(12_000)
    booked = []
    decoder.on_step = lambda: booked.append(memory.booked_bytes)
    scheduler = start(EngineCounts(memory), threads=threads, max_rows=40, cache_shape=CacheShape(row_position_bytes=10))
    beam, large = SearchOptions(beam_size=2), FairShare()
    scheduler.submit([work(9, results.of(name), options=beam, share=large, max_length=40) for name in range(60)])
    results.wait(5)
    scheduler.submit([work(3, results.of("small"), options=beam)])
    results.wait(61)
    assert results.order.index("small") < 40
    assert max(booked) <= 12_000
    assert max(booked) >= 8 * 1280, "what has room is used"
    assert scheduler.waiting() == {"small": 0, "large": 0, "long": 0}
    assert (large.booked, memory.booked_bytes) == (0, 0)


def test_sentence_above_the_cache_memory_runs_alone(start, decoder, results):
    memory = CacheMemory(10)
    scheduler = start(EngineCounts(memory), cache_shape=CacheShape(row_position_bytes=10, source_position_bytes=1))
    scheduler.submit([work(9, results.of(name)) for name in range(5)])
    results.wait(5)
    assert decoder.peak_rows == 1
