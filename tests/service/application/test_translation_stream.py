"""Streams: every sentence answered once under its id, bounded in both directions, ended in every way there is."""

import asyncio
import random
import resource
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.application.translating import StreamRequest, TranslationLimits, TranslationUseCases
from ferryman_service.application.translation_stream import SentenceError, StreamSentence
from ferryman_service.domain.errors import DeadlineExceeded, InvalidRequest, ModelNotFound
from ferryman_service.domain.translation import SearchOptions
from ferryman_service.text.sentences import SentencexSplitter
from tests.fakes.translator import FakeBundleLoader


class Server:
    """Use cases over the model "m", and the engine behind them."""

    def __init__(self, models, loader, **limits):
        self._loader = loader
        self.loaded = LoadedModels(models, loader, LoadingLimits())
        self.cases = TranslationUseCases(
            models=models, loaded=self.loaded, splitter=SentencexSplitter(), limits=TranslationLimits(**limits)
        )

    @property
    def engine(self):
        return self._loader.translator

    def stream(self, **fields):
        return self.cases.stream(StreamRequest(**{"model": "m", "options": SearchOptions(beam_size=1), **fields}))


@pytest.fixture
async def make_server(models, publish):
    """A maker of servers; each must have nothing left at the end."""
    publish()
    made = []

    def make(*, limits=None, **engine):
        made.append(Server(models, FakeBundleLoader(**engine), **(limits or {})))
        return made[-1]

    yield make
    for server in made:
        await asyncio.wait_for(asyncio.to_thread(server.cases.close), 10)
        assert server.cases.queued_tokens() == (0, 0)
        assert server.engine.in_flight == 0
        server.loaded.close()


def sentence(number, text=None):
    return StreamSentence(id=f"id {number}", sentence=f"text {number}" if text is None else text)


@asynccontextmanager
async def writing(stream, messages):
    """Put messages in, beside the block, and end the input."""

    async def write():
        for message in messages:
            await stream.put(message)
        stream.end_input()

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


async def drain(stream):
    results = []
    while batch := await stream.results():
        results += batch
    return results


async def test_every_sentence_is_answered_once_under_its_id(make_server):
    server = make_server(delay_s=0.02)
    dice = random.Random(5)
    numbers = iter(range(2000))
    messages = [[sentence(next(numbers)) for _ in range(dice.randrange(1, 30))] for _ in range(60)]
    sent = sum(len(message) for message in messages)
    async with server.stream() as stream, writing(stream, messages):
        results = await drain(stream)
    assert sorted(result.id for result in results) == sorted(f"id {i}" for i in range(sent))
    assert [result.id for result in results] != [f"id {i}" for i in range(sent)], "they come as they finish"
    assert all(result.outcome.hypotheses[0].text == f"TEXT {result.id[3:]}" for result in results)


async def test_a_bad_sentence_has_its_own_error_and_the_stream_goes_on(make_server):
    texts = ["good", "long " * 9, "", "\x00" + "long " * 9, "good"]
    message = [sentence(number, text) for number, text in enumerate(texts)]
    async with make_server().stream() as stream, writing(stream, [message]):
        results = {result.id: result.outcome for result in await drain(stream)}
    errors = {id_: outcome for id_, outcome in results.items() if isinstance(outcome, SentenceError)}
    assert {id_: error.reason for id_, error in errors.items()} == {
        "id 1": "SENTENCE_TOO_LONG",
        "id 3": "CONTROL_CHARACTER",
    }
    assert "sentence holds control characters; sentence has 10 subwords" in errors["id 3"].message
    assert results["id 2"].hypotheses[0].text == ""
    assert len(results) == 5


async def test_texts_are_split(make_server):
    message = [sentence(0, "A dog. A cat!\n\nA bird."), sentence(1, f"Fine. {'long ' * 9}")]
    async with make_server().stream(split_sentences=True) as stream, writing(stream, [message]):
        results = {result.id: result for result in await drain(stream)}
    assert results["id 0"].outcome.hypotheses[0].text == "A DOG. A CAT!\n\nA BIRD."
    assert len(results["id 0"].timings) == 3
    assert results["id 1"].outcome.reason == "SENTENCE_TOO_LONG"


@pytest.mark.parametrize("window", [1, 7, 100])
async def test_the_window_bounds_what_is_not_yet_written(make_server, window):
    server = make_server(delay_s=0.002)
    taken, given = 0, 0

    async def write():
        nonlocal taken
        for number in range(300):
            await stream.wait_for_room()
            await stream.put([sentence(number)])
            taken += 1
            assert taken - given <= window
        stream.end_input()

    async with server.stream(window=window) as stream:
        writer = asyncio.create_task(write())
        while batch := await stream.results():
            await asyncio.sleep(0.0005)  # it is being written
            given += len(batch)
        await writer
    assert given == 300
    assert server.engine.peak <= window


async def test_a_caller_who_does_not_read_is_not_read_from(make_server):
    server = make_server()
    async with server.stream(window=10) as stream, writing(stream, [[sentence(i)] for i in range(100)]):
        await stream.results()
        await asyncio.sleep(0.05)
        assert server.engine.submitted <= 10
        assert server.cases.queued_tokens() == (0, 0), "who does not read takes no room from others"
        first = await stream.results()
        assert first


async def test_streams_share_the_room_and_wait_for_it(make_server):
    """Three tokens a sentence, 480 for all: however many streams, no more than 160 sentences are under way."""
    server = make_server(limits={"queue_tokens": 480}, delay_s=0.05)

    async def run(name):
        messages = [[StreamSentence(id=f"{name} {i}", sentence="two words")] for i in range(100)]
        async with server.stream() as stream, writing(stream, messages):
            return await drain(stream)

    results = await asyncio.gather(*(run(name) for name in range(8)))
    assert [len({result.id for result in found}) for found in results] == [100] * 8
    assert 100 < server.engine.peak <= 160


async def test_a_stream_that_brings_much_at_once_holds_up_no_other(make_server):
    """A text of 2,000 sentences is some 20 times all the room. The other streams go on between its portions, and what
    they wait for is a portion, not all of it."""
    server = make_server(limits={"queue_tokens": 320}, delay_s=0.01)
    book = StreamSentence(id="book", sentence="A page. " * 2000)

    async def read_book():
        async with server.stream(split_sentences=True) as stream, writing(stream, [[book]]):
            return await drain(stream)

    reading = asyncio.create_task(read_book())
    await asyncio.to_thread(server.engine.began.wait, 10)
    for number in range(10):
        async with server.stream() as stream, writing(stream, [[sentence(number)]]):
            assert len(await drain(stream)) == 1
        assert server.cases.queued_tokens()[1] <= 320 + 20
    assert not reading.done(), "all this took less time than the book"
    [result] = await reading
    assert result.outcome.hypotheses[0].text == " ".join(["A PAGE."] * 2000)


async def test_a_sentence_over_all_the_room_is_translated(make_server):
    server = make_server(limits={"queue_tokens": 4})
    async with server.stream() as stream, writing(stream, [[sentence(i, "of five words or so") for i in range(5)]]):
        assert len(await drain(stream)) == 5


async def test_a_text_that_waits_for_a_thread_is_counted_and_keeps_its_model(make_server):
    """Nobody can stop a thread: the stream ends when it has let go of the text, and holds tokens and model so long."""
    server = make_server()
    async with server.stream() as stream:
        stream.end_input()
    gate = server.engine.preparing_gate = threading.Event()
    opened, ended = asyncio.Event(), asyncio.Event()

    async def run():
        async with server.stream() as stream, writing(stream, [[sentence(i, "ten chars.") for i in range(64)]]):
            opened.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    task.add_done_callback(lambda _: ended.set())
    await opened.wait()
    await asyncio.to_thread(server.engine.preparing.wait, 10)
    assert server.cases.queued_tokens() == (0, (3 + 1) * 64)
    freed = server.loaded.unload(stream.version)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not ended.is_set() and not freed.done()
    assert server.cases.queued_tokens() == (0, (3 + 1) * 64)
    gate.set()
    await asyncio.wait_for(ended.wait(), 10)
    await asyncio.wait_for(asyncio.wrap_future(freed), 10)
    assert server.cases.queued_tokens() == (0, 0)


async def test_texts_that_wait_for_a_thread_take_no_more_than_a_portion(make_server):
    """The portion of 320 is 20; these 64 sentences are expected to cost more."""
    server = make_server(limits={"queue_tokens": 320})
    async with server.stream() as stream:
        stream.end_input()
    gate = server.engine.preparing_gate = threading.Event()
    async with server.stream() as stream, writing(stream, [[sentence(i, "ten chars.") for i in range(64)]]):
        await asyncio.to_thread(server.engine.preparing.wait, 10)
        assert server.cases.queued_tokens() == (0, 20)
        gate.set()
        assert len(await drain(stream)) == 64


async def test_streams_whose_sentences_cost_more_than_was_expected_wait_for_room(make_server):
    """Forty streams, each of which expects to take 7 of 200, and takes 49."""
    server = make_server(limits={"queue_tokens": 200}, word_tokens=11)
    async with server.stream() as stream:
        stream.end_input()
    gate = server.engine.preparing_gate = threading.Event()
    taken, submit = [], server.engine.submit

    def watched_submit(work):
        taken.append(server.cases.queued_tokens()[1])
        submit(work)

    server.engine.submit = watched_submit
    # More than is looked at without a thread.
    message = [sentence(0, "a b c d"), *[sentence(i, "") for i in range(1, 5)]]

    async def run():
        async with server.stream() as stream, writing(stream, [message]):
            return await drain(stream)

    running = [asyncio.create_task(run()) for _ in range(40)]
    async with asyncio.timeout(10):
        while server.cases.queued_tokens()[1] < 200:
            await asyncio.sleep(0.001)
    gate.set()
    assert [len(results) for results in await asyncio.gather(*running)] == [5] * 40
    assert max(taken) <= 2 * 200


async def test_a_message_larger_than_the_window_and_the_room_passes(make_server):
    server = make_server(limits={"queue_tokens": 5}, delay_s=0.001)
    async with server.stream(window=3) as stream, writing(stream, [[sentence(i) for i in range(200)]]):
        assert len(await drain(stream)) == 200


async def test_closing_frees_everything_at_the_next_step(make_server):
    server = make_server(limits={"queue_tokens": 6})
    async with server.stream() as stream, writing(stream, [[sentence(i, "wait") for i in range(50)]]):
        await asyncio.to_thread(server.engine.busy.wait, 10)
    async with asyncio.timeout(1):
        while server.engine.in_flight:
            await asyncio.sleep(0.001)
    assert server.cases.queued_tokens() == (0, 0)


async def test_a_deadline_ends_a_stream(make_server):
    async with make_server().stream(timeout_s=0.05) as stream, writing(stream, [[sentence(0, "wait")]]):
        with pytest.raises(DeadlineExceeded):
            await drain(stream)


async def test_a_failure_of_the_input_ends_a_stream_at_once(make_server):
    async with make_server().stream() as stream:
        await stream.put([sentence(0, "wait")])
        stream.end_input(ValueError("cannot be read"))
        with pytest.raises(ValueError, match="cannot be read"):
            await stream.results()


async def test_a_bug_ends_a_stream(make_server):
    async with make_server().stream() as stream, writing(stream, [[sentence(0, "break"), sentence(1, "wait")]]):
        with pytest.raises(ZeroDivisionError):
            await drain(stream)


async def test_a_stream_without_sentences_ends(make_server):
    async with make_server().stream() as stream:
        stream.end_input()
        assert not await stream.results()


async def test_violations_of_the_configuration_are_found_at_once(make_server):
    server = make_server()
    options = SearchOptions(beam_size=0, n_best=2, return_alignment=True)
    with pytest.raises(InvalidRequest) as caught:
        async with server.stream(model="/", options=options, window=4097, split_sentences=True):
            pass
    assert [(violation.field, violation.reason) for violation in caught.value.violations] == [
        ("config.model", "INVALID_MODEL_REFERENCE"),
        ("config.options.beam_size", "OUT_OF_RANGE"),
        ("config.window", "OUT_OF_RANGE"),
        ("config.options.n_best", "CONFLICT"),
        ("config.options.return_alignment", "CONFLICT"),
    ]
    with pytest.raises(ModelNotFound):
        async with server.stream(model="nobody"):
            pass


async def test_a_stream_keeps_its_version(make_server, publish):
    server = make_server()
    async with server.stream() as stream:
        newer = publish()
        server.loaded.load(newer)
        assert stream.version.reference == "m/1"
        async with server.stream() as later:
            assert later.version.reference == "m/2"
        stream.end_input()


async def test_many_lines_take_bounded_memory(make_server):
    """Resident memory is compared between a tenth of the way and the end."""
    server = make_server(delay_s=0.001)
    count, seen, early_bytes = 40_000, bytearray(40_000), 0
    messages = ([sentence(number + i) for i in range(100)] for number in range(0, count, 100))
    async with server.stream() as stream, writing(stream, messages):
        done = 0
        while batch := await stream.results():
            for result in batch:
                seen[int(result.id[3:])] += 1
            done += len(batch)
            if not early_bytes and done > count // 10:
                early_bytes = resident_bytes()
    assert seen == b"\x01" * count
    assert server.engine.peak <= 256
    assert resident_bytes() - early_bytes < 8 * 2**20
