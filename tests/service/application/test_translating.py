"""Translate as a use case: every answer once and to the right caller, whoever gives up, whatever is full."""

import asyncio
import random
import threading

import pytest

from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.application.translating import (
    StreamRequest,
    TranslateRequest,
    TranslationLimits,
    TranslationUseCases,
)
from ferryman_service.application.translation_stream import StreamSentence
from ferryman_service.domain.errors import (
    DeadlineExceeded,
    InvalidRequest,
    InvalidSentence,
    ModelNotFound,
    QueueFull,
    RoleNotServed,
)
from ferryman_service.domain.translation import CancelToken, EarlyStopping, Sampling, SearchOptions
from ferryman_service.text.sentences import SentencexSplitter
from tests.fakes.translator import STEP_S, FakeBundleLoader

FEW_STEPS_S = 2 * STEP_S + 0.1  # two steps, and what a busy machine may add


@pytest.fixture
async def make_cases(models):
    """A maker of use cases over the model "m"; each is closed at the end, when all its leases must be back."""
    made = []

    def make(*, loader=None, **limits):
        loader = loader or FakeBundleLoader()
        loaded = LoadedModels(models, loader, LoadingLimits())
        cases = TranslationUseCases(
            models=models, loaded=loaded, splitter=SentencexSplitter(), limits=TranslationLimits(**limits)
        )
        made.append((cases, loaded, loader))
        return cases

    yield make
    for cases, loaded, loader in made:
        await asyncio.wait_for(asyncio.to_thread(cases.close), 10)
        assert cases.queued_tokens() == (0, 0)
        loaded.close()
        assert loader.translator.closed or not loader.translator.submitted


def request(*sentences, model="m", timeout_s=None, split=False, prefixes=(), **options):
    return TranslateRequest(
        model=model,
        sentences=sentences,
        options=SearchOptions(**{"beam_size": 2, **options}),
        target_prefixes=prefixes,
        split_sentences=split,
        timeout_s=timeout_s,
    )


def texts(result):
    return [translation.hypotheses[0].text for translation in result.translations]


async def becomes(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_answers_come_in_the_order_of_the_sentences(make_cases, publish):
    publish()
    cases = make_cases(loader=FakeBundleLoader(delay_s=0.02))
    sentences = [f"sentence {i}" for i in range(100)]
    result = await cases.translate(request(*sentences))
    assert texts(result) == [sentence.upper() for sentence in sentences]
    assert result.version.reference == "m/1"


async def test_fifty_callers_each_get_their_own_answers_once(make_cases, publish):
    publish()
    loader = FakeBundleLoader(delay_s=0.05, seed=7)
    cases = make_cases(loader=loader)
    dice = random.Random(7)

    async def call(number):
        for round_ in range(4):
            sentences = [f"caller {number} round {round_} {i}" for i in range(dice.randrange(1, 12))]
            result = await cases.translate(request(*sentences))
            assert texts(result) == [sentence.upper() for sentence in sentences]
            assert len(result.sentences) == len(sentences)

    await asyncio.gather(*(call(number) for number in range(50)))
    assert loader.translator.in_flight == 0


async def test_callers_that_give_up_at_random_harm_nobody(make_cases, publish):
    publish()
    cases = make_cases(loader=FakeBundleLoader(delay_s=0.05, seed=3))
    dice = random.Random(3)

    async def call(number):
        sentences = [f"caller {number} {i}" for i in range(dice.randrange(1, 12))]
        task = asyncio.create_task(cases.translate(request(*sentences)))
        if dice.random() < 0.5:
            await asyncio.sleep(dice.random() * 0.06)
            task.cancel()
        try:
            assert texts(await task) == [sentence.upper() for sentence in sentences]
        except asyncio.CancelledError:
            return

    await asyncio.gather(*(call(number) for number in range(200)))


async def test_many_sentences_are_submitted_beside_the_event_loop(make_cases, publish):
    """It turns while the engine takes them; a caller that leaves meanwhile gives back all its tokens, as make_cases
    checks."""
    publish()
    loader = FakeBundleLoader()
    cases = make_cases(loader=loader, max_sentences=3_000)
    assert texts(await cases.translate(request(*["one"] * 3_000))) == ["ONE"] * 3_000
    submit, begun, released = loader.translator.submit, threading.Event(), threading.Event()

    def slow_submit(work):
        begun.set()
        assert released.wait(10)
        submit(work)

    loader.translator.submit = slow_submit
    leaving = asyncio.create_task(cases.translate(request(*["one"] * 3_000)))
    await becomes(begun.is_set)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert cases.queued_tokens()[0] > 0, "they are on their way to the engine"
    released.set()
    await becomes(lambda: cases.queued_tokens() == (0, 0))


async def test_timings_are_of_the_slowest_sentence(make_cases, publish):
    publish()
    result = await make_cases().translate(request("one", "two words", ""))
    assert (result.timings.decode_ns, result.timings.steps) == (3_000_000_000, 4)
    assert result.timings.text_ns == 3_000_000
    assert result.mean_batch_rows == 10
    assert len(result.sentences) == 3


async def test_texts_are_split_and_joined(make_cases, publish):
    publish()
    result = await make_cases().translate(request("A dog. A cat.\n\nA bird.", "One.", split=True))
    assert texts(result) == ["A DOG. A CAT.\n\nA BIRD.", "ONE."]
    assert len(result.sentences) == 4


async def test_prefixes_belong_to_their_sentences(make_cases, publish):
    publish()
    result = await make_cases().translate(request("one", "two", prefixes=("Eins", "")))
    assert texts(result) == ["Eins ONE", "TWO"]


async def test_every_violation_is_found_at_once(make_cases, publish):
    publish()
    bad = request(
        *["x"] * 4,
        model="!",
        split=True,
        prefixes=("a", "b"),
        n_best=3,
        return_token_scores=True,
        return_alignment=True,
        min_length=5,
        max_length=5,
        max_length_ratio=0.0,
        beam_patience=0.5,
        repetition_penalty=float("nan"),
        no_repeat_ngram_size=33,
        early_stopping=EarlyStopping.OPTIMAL,
    )
    with pytest.raises(InvalidRequest) as caught:
        await make_cases(max_sentences=3).translate(bad)
    assert [(violation.field, violation.reason) for violation in caught.value.violations] == [
        ("model", "INVALID_MODEL_REFERENCE"),
        ("options.max_length_ratio", "OUT_OF_RANGE"),
        ("options.beam_patience", "OUT_OF_RANGE"),
        ("options.repetition_penalty", "OUT_OF_RANGE"),
        ("options.no_repeat_ngram_size", "OUT_OF_RANGE"),
        ("options.n_best", "CONFLICT"),
        ("options.min_length", "CONFLICT"),
        ("sentences", "OUT_OF_RANGE"),
        ("target_prefixes", "CONFLICT"),
        ("options.n_best", "CONFLICT"),
        ("options.return_token_scores", "CONFLICT"),
        ("options.return_alignment", "CONFLICT"),
        ("target_prefixes", "CONFLICT"),
    ]


@pytest.mark.parametrize("count", [1, 100])
async def test_bad_sentences_are_all_named(make_cases, publish, count):
    publish()
    with pytest.raises(InvalidSentence) as caught:
        await make_cases().translate(
            request(*["fine"] * count, "long " * 9, "\x00", prefixes=["long " * 9] * (count + 2))
        )
    fields = [violation.field for violation in caught.value.violations]
    assert fields[-4:] == [
        f"sentences[{count}]",
        f"target_prefixes[{count}]",
        f"sentences[{count + 1}]",
        f"target_prefixes[{count + 1}]",
    ]
    assert len(fields) == count + 4


async def test_a_model_that_does_not_exist(make_cases):
    with pytest.raises(ModelNotFound):
        await make_cases().translate(request("x", model="nobody"))


async def test_a_process_without_the_role(models):
    cases = TranslationUseCases(models=models, loaded=None, splitter=SentencexSplitter(), limits=TranslationLimits())
    with pytest.raises(RoleNotServed):
        await cases.translate(request("x"))
    with pytest.raises(RoleNotServed):
        async with cases.stream(StreamRequest(model="m", options=SearchOptions())):
            pass


async def test_a_caller_who_gives_up_frees_the_rows_at_the_next_step(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    cases = make_cases(loader=loader)
    task = asyncio.create_task(cases.translate(request(*["wait"] * 50)))
    await becomes(loader.translator.busy.is_set)
    assert cases.queued_tokens() == (50 * 2 * 2, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(FEW_STEPS_S):
        await becomes(lambda: cases.queued_tokens() == (0, 0))
    assert loader.translator.in_flight == 0


async def test_a_deadline_ends_the_work(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    with pytest.raises(DeadlineExceeded):
        await make_cases(loader=loader).translate(request("wait", "wait", timeout_s=0.05))
    await becomes(lambda: loader.translator.in_flight == 0)


async def test_a_deadline_that_is_past_begins_nothing(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    with pytest.raises(DeadlineExceeded):
        await make_cases(loader=loader).translate(request("x", timeout_s=0.0))
    assert loader.translator.submitted == 0


async def test_a_bug_in_one_sentence_stops_the_others(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    with pytest.raises(ZeroDivisionError):
        await make_cases(loader=loader).translate(request("wait", "break", "wait"))
    await becomes(lambda: loader.translator.in_flight == 0)


async def test_a_full_queue_refuses_and_forgets_nothing(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    cases = make_cases(loader=loader, queue_tokens=12)
    holding = [asyncio.create_task(cases.translate(request("wait"))) for _ in range(3)]
    await becomes(lambda: loader.translator.in_flight == 3)
    for _ in range(20):
        with pytest.raises(QueueFull) as caught:
            await cases.translate(request("one"))
    assert 0.1 <= caught.value.retry_delay_s <= 30
    assert cases.queued_tokens() == (12, 0)
    holding[0].cancel()
    await becomes(lambda: cases.queued_tokens() == (8, 0))
    assert texts(await cases.translate(request("one two three four five"))) == ["ONE TWO THREE FOUR FIVE"], "any size"
    for task in holding[1:]:
        task.cancel()
    await becomes(lambda: cases.queued_tokens() == (0, 0))


async def test_a_call_over_the_whole_queue_is_refused_with_the_limit(make_cases, publish):
    publish()
    cases = make_cases(queue_tokens=80)
    assert len(texts(await cases.translate(request(*["one two three"] * 10)))) == 10
    with pytest.raises(InvalidRequest, match=r"take 88 row tokens .* at most 80 ") as caught:
        await cases.translate(request(*["one two three"] * 11))
    assert [(v.field, v.reason) for v in caught.value.violations] == [("sentences", "TOO_MANY_TOKENS")]
    assert cases.queued_tokens() == (0, 0)


async def test_call_that_is_too_large_is_refused_before_it_takes_room_or_is_split(make_cases, publish):
    """1024 sentences would take the whole queue while they are cut into subwords, and other calls would be refused."""
    publish()
    loader = FakeBundleLoader()
    cases = make_cases(loader=loader, queue_tokens=1000)
    await cases.translate(request("x"))
    loader.translator.preparing.clear()
    long, options = "x" * 4096, {"n_best": 3, "max_length": 1}
    refused = [
        (request(*["fine"] * 9, long), InvalidSentence, [("sentences[9]", "SENTENCE_TOO_LONG")]),
        (request("fine", prefixes=[long]), InvalidSentence, [("target_prefixes[0]", "PREFIX_TOO_LONG")]),
        (request(*["x" * 800] * 20), InvalidRequest, [("sentences", "TOO_MANY_TOKENS")]),
        (request(*["x" * 800] * 20, split=True), InvalidRequest, [("sentences", "TOO_MANY_TOKENS")]),
        (request(*["long " * 9] * 20, **options), InvalidRequest, [("options.n_best", "CONFLICT")]),
    ]
    seen, take = [], cases._admission.calls.try_take
    cases._admission.calls.try_take = lambda *arguments: seen.append(arguments) or take(*arguments)
    for bad, error, violations in refused:
        with pytest.raises(error) as caught:
            await cases.translate(bad)
        assert [(violation.field, violation.reason) for violation in caught.value.violations] == violations
    assert (seen, loader.translator.preparing.is_set()) == ([], False)


async def test_peer_is_served_while_another_has_filled_the_queue(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    cases = make_cases(loader=loader, queue_tokens=100)
    flood = [asyncio.create_task(cases.translate(request(*["wait"] * 5), "a")) for _ in range(10)]
    await becomes(lambda: cases.queued_tokens() == (200, 0) or cases.queued_tokens()[0] >= 100)
    with pytest.raises(QueueFull):
        await cases.translate(request("one"), "a")
    for number in range(50):
        assert texts(await cases.translate(request(f"call {number}"), "b")) == [f"CALL {number}"]
    assert set(loader.translator.peers) == {"a", "b"}
    for call in flood:
        call.cancel()
    await asyncio.wait(flood)


async def test_calls_that_wait_for_a_load_are_counted(models, publish, loader):
    publish()
    loaded = LoadedModels(models, loader, LoadingLimits())
    limits = TranslationLimits(queue_tokens=100)
    cases = TranslationUseCases(models=models, loaded=loaded, splitter=SentencexSplitter(), limits=limits)
    loader.gate.clear()
    calls = [asyncio.ensure_future(cases.translate(request("of 12 chars."))) for _ in range(50)]
    await asyncio.sleep(0.05)
    waiting = [call for call in calls if not call.done()]
    assert len(waiting) == 13, "eight row tokens each: three subwords and the end symbol, two rows"
    assert cases.queued_tokens() == (13 * 8, 0)
    assert {type(call.exception()) for call in calls if call.done()} == {QueueFull}
    waiting.pop().cancel()
    loader.gate.set()
    results = await asyncio.gather(*waiting)
    assert [texts(result) for result in results] == [["m/1"]] * 12, "what was accepted is not refused any more"
    assert cases.queued_tokens() == (0, 0)
    await asyncio.to_thread(cases.close)
    loaded.close()


async def dense_calls(cases, loader, count, text="a b c"):
    """Start calls of five sentences, each of whose words is ten subwords, and return them when texts are looked at."""
    await cases.translate(request("x"))
    loader.translator.preparing.clear()
    loader.translator.preparing_gate = threading.Event()
    calls = [asyncio.create_task(cases.translate(request(*[text] * 5))) for _ in range(count)]
    await asyncio.to_thread(loader.translator.preparing.wait, 10)
    return calls


async def test_calls_that_cost_more_than_was_expected_wait_for_room_and_none_is_lost(make_cases, publish):
    publish()
    loader = FakeBundleLoader(delay_s=0.01, word_tokens=10)
    cases = make_cases(loader=loader, queue_tokens=1000)
    calls = await dense_calls(cases, loader, 40)
    assert cases.queued_tokens() == (34 * 5 * 3 * 2, 0)
    taken, submit = [], loader.translator.submit

    def watched_submit(work):
        taken.append(cases.queued_tokens()[0])
        submit(work)

    loader.translator.submit = watched_submit
    loader.translator.preparing_gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, QueueFull)]
    assert [texts(result) for result in results if result not in refused] == [["A B C"] * 5] * 34
    assert len(refused) == 6
    assert max(taken) <= 2 * 1000, "each costs 310, which is more than three times the budget for all"


async def test_a_call_waits_for_room_no_longer_than_its_deadline(make_cases, publish, monkeypatch):
    publish()
    loader = FakeBundleLoader(word_tokens=10)
    cases = make_cases(loader=loader, queue_tokens=110)
    calls = await dense_calls(cases, loader, 5, "wait")
    hurried = asyncio.create_task(cases.translate(request(*["wait"] * 5, timeout_s=60)))
    await becomes(lambda: cases.queued_tokens() == (6 * 5 * 2 * 2, 0))
    real_remaining_s = CancelToken.remaining_s
    monkeypatch.setattr(CancelToken, "remaining_s", lambda token: None if real_remaining_s(token) is None else 0.0)
    loader.translator.preparing_gate.set()
    with pytest.raises(DeadlineExceeded, match="before there was room"):
        await asyncio.wait_for(hurried, 10)
    await becomes(lambda: cases.queued_tokens() == (110, 0))
    assert not any(call.done() for call in calls), "one has room, and the others wait for it"
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    await becomes(lambda: cases.queued_tokens() == (0, 0))


async def test_calls_that_wait_for_a_thread_are_counted_and_dropped_when_cancelled(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    cases = make_cases(loader=loader)
    await cases.translate(request("x"))
    loader.translator.preparing.clear()
    gate = loader.translator.preparing_gate = threading.Event()
    calls = [asyncio.create_task(cases.translate(request(*["1234"] * 8))) for _ in range(5)]
    await asyncio.to_thread(loader.translator.preparing.wait, 10)
    assert cases.queued_tokens() == (5 * 8 * 2 * 2, 0)
    for call in calls[1:]:
        call.cancel()
    await asyncio.sleep(0.02)
    assert cases.queued_tokens() == (5 * 8 * 2 * 2, 0), "the threads have their texts still"
    gate.set()
    assert texts(await calls[0]) == ["1234"] * 8
    for call in calls[1:]:
        with pytest.raises(asyncio.CancelledError):
            await call
    assert loader.translator.submitted == 1 + 8
    assert cases.queued_tokens() == (0, 0)


async def test_texts_of_streams_do_not_hold_up_calls(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    cases = make_cases(loader=loader)
    await cases.translate(request("x"))
    gate = loader.translator.preparing_gate = threading.Event()
    loader.translator.preparing.clear()

    async def stream_texts():
        async with cases.stream(StreamRequest(model="m", options=SearchOptions())) as stream:
            await stream.put([StreamSentence(id="", sentence="x")] * 60)
            stream.end_input()
            while await stream.results():
                pass

    streams = [asyncio.create_task(stream_texts()) for _ in range(4)]
    await asyncio.to_thread(loader.translator.preparing.wait, 10)
    loader.translator.preparing_gate = None
    result = await asyncio.wait_for(cases.translate(request(*["x"] * 60)), 5)
    assert texts(result) == ["X"] * 60
    gate.set()
    await asyncio.gather(*streams)


async def test_weights_favour_unary_calls(make_cases, publish):
    publish()
    loader = FakeBundleLoader()
    cases = make_cases(loader=loader)
    await cases.translate(request("x"))
    async with cases.stream(StreamRequest(model="m", options=SearchOptions())) as stream:
        await stream.put([StreamSentence(id="", sentence="x")])
        await stream.results()
    assert loader.translator.shares == [4, 1]


@pytest.mark.parametrize(("seed", "different"), [(None, 3), (2**64 - 1, 1)])
async def test_a_seed_is_kept_or_drawn_for_each_sentence(make_cases, publish, seed, different):
    publish()
    loader = FakeBundleLoader()
    await make_cases(loader=loader).translate(request("x", "x", "x", sampling=Sampling(seed=seed)))
    assert len(set(loader.translator.seeds)) == different
    assert seed is None or set(loader.translator.seeds) == {seed}


async def test_moved_names_take_effect_with_the_next_call(make_cases, models, publish):
    publish(), publish()
    cases = make_cases()

    async def served(model):
        return (await cases.translate(request("x", model=model))).version.version

    models.set_alias("m", "production", 1)
    for _ in range(2):
        assert (await served("m"), await served("m@production"), await served("m/1")) == (2, 1, 1)
    models.set_alias("m", "production", 2)
    assert await served("m@production") == 2
    publish()
    assert await served("m/3") == 3
    assert await served("m") == 3
    models.delete_version("m", 3)
    assert await served("m") == 2
    with pytest.raises(ModelNotFound):
        await served("m/3")


async def test_a_model_that_is_unloaded_under_its_callers_stays_until_they_end(make_cases, models, publish):
    version = publish()
    loader = FakeBundleLoader(delay_s=0.05)
    loaded = LoadedModels(models, loader, LoadingLimits())
    cases = TranslationUseCases(models=models, loaded=loaded, splitter=SentencexSplitter(), limits=TranslationLimits())
    for _ in range(20):
        calls = [asyncio.create_task(cases.translate(request(f"call {i}"))) for i in range(5)]
        await asyncio.sleep(0.01)
        engine = loader.translator
        freed = loaded.unload(version)
        assert [texts(call) for call in await asyncio.gather(*calls)] == [[f"CALL {i}"] for i in range(5)]
        if freed is not None:
            await asyncio.wait_for(asyncio.wrap_future(freed), 10)
            assert engine.closed
    await asyncio.to_thread(cases.close)
    loaded.close()


async def test_a_caller_who_gives_up_while_the_model_loads_leaves_no_lease(models, publish, loader):
    version = publish()
    loaded = LoadedModels(models, loader, LoadingLimits())
    cases = TranslationUseCases(models=models, loaded=loaded, splitter=SentencexSplitter(), limits=TranslationLimits())
    loader.gate.clear()
    task = asyncio.create_task(cases.translate(request("x")))
    await becomes(loader.began.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    loader.gate.set()
    await becomes(lambda: loaded.is_loaded(version))
    freed = loaded.unload(version)
    await asyncio.wait_for(asyncio.wrap_future(freed), 10)
    await asyncio.to_thread(cases.close)


async def test_a_short_request_for_a_loaded_model_wakes_no_thread(make_cases, publish, monkeypatch):
    publish()
    cases = make_cases()
    await cases.translate(request("x"))

    def run_in_executor(*_):
        raise AssertionError("a thread was asked")

    monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", run_in_executor)
    assert texts(await cases.translate(request("x", "y"))) == ["X", "Y"]


async def test_the_loop_is_not_woken_for_each_sentence(make_cases, publish, monkeypatch):
    publish()
    cases = make_cases()
    await cases.translate(request("x"))
    loop, wakes = asyncio.get_running_loop(), []
    wake = loop.call_soon_threadsafe

    def count(callback, *arguments, **options):
        wakes.append(callback)
        return wake(callback, *arguments, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    await cases.translate(request(*["x"] * 1000))
    assert len(wakes) < 500, "a wake for each would be 1,000"
