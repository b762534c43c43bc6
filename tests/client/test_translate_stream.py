"""`translate_stream` of both clients: in finish order or in order, bounded, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

import grpc
import pytest

from ferryman import AsyncClient, Client, Sampling, StreamSentence, StreamTranslation, errors, types
from ferryman._convert import SearchOptions, translate_stream
from ferryman._reconnect import ReconnectBackoff
from ferryman._rpc_errors import error_from_rpc
from ferryman._stream import StreamBuffer, StreamCalls
from ferryman.testing import FakeFerryman

Collect = Callable[..., list[StreamTranslation]]


@pytest.fixture(params=["sync", "async", "async iterable"])
def collect(fake: FakeFerryman, request: pytest.FixtureRequest) -> Collect:
    """Translate with each client; the sentences are a generator."""
    fake.add_model("m")

    def sync(sentences: Iterable[object], **options: object) -> list[StreamTranslation]:
        with Client(fake.target) as client:
            return list(client.translate_stream("m", (item for item in sentences), **options))

    async def collected(sentences: Iterable[object], options: dict[str, object]) -> list[StreamTranslation]:
        async def each() -> AsyncIterator[object]:
            for item in sentences:
                yield item

        async with AsyncClient(fake.target) as client:
            source = each() if request.param == "async iterable" else (item for item in sentences)
            return [result async for result in client.translate_stream("m", source, **options)]

    return sync if request.param == "sync" else lambda sentences, **options: asyncio.run(collected(sentences, options))


def test_result_has_id_of_its_sentence(collect):
    sentences = ["one", ("my id", "two"), StreamSentence(id="ü" * 200, sentence="three", target_prefix="Drei")]
    found = collect(sentences)
    results = {result.id: result.translation.text for result in found}
    assert results == {"0": "ONE", "my id": "TWO", "ü" * 200: "Drei THREE"}
    assert {result.model for result in found} == {"m/1"}


def test_results_come_as_they_finish_or_in_order(collect):
    sentences = [str(number) for number in range(2000)]
    found = [result.translation.text for result in collect(sentences)]
    assert found != sentences
    assert sorted(found, key=int) == sentences
    assert [result.translation.text for result in collect(sentences, in_order=True, window=5)] == sentences


def test_options_reach_the_server(collect):
    [result] = collect(["ein satz"], n_best=2, return_token_scores=True, sampling=Sampling(top_k=3), beam_size=None)
    first, second = result.translation.hypotheses
    assert (first.pieces, len(second.token_log_probabilities)) == (("EIN", "SATZ", "</s>"), 3)
    assert result.translation.source_pieces == ("ein", "satz", "</s>")


def test_untranslatable_sentence_has_an_error(fake, collect):
    def translate(sentence: str) -> str:
        if sentence == "bad":
            violation = errors.Violation(field="sentence", description="is bad", reason="SENTENCE_TOO_LONG")
            raise errors.InvalidSentence("is bad", violations=[violation])
        return sentence

    fake.translate = translate
    good, bad, also_good = collect(["good", "bad", "good"], in_order=True)
    assert (good.error, bad.translation, also_good.error) == (None, None, None)
    assert bad.error == types.SentenceError(reason="SENTENCE_TOO_LONG", message="is bad")


def test_empty_source_yields_no_results(collect):
    assert collect([]) == []


def test_stream_raises_ferryman_errors(fake, collect):
    fake.fail_next("StreamTranslate", errors.ModelTooLarge("too large"), times=9)
    with pytest.raises(errors.ModelTooLarge):
        collect(["x"])
    # Once, unless the race was lost that test_lost_status_is_retried describes.
    assert 1 <= fake.calls.count("StreamTranslate") <= 6


def test_stream_refused_as_unavailable_is_retried_like_any_call(fake, collect):
    fake.fail_next("StreamTranslate", errors.ServerShuttingDown("stopping"), times=9)
    with pytest.raises(errors.ServerShuttingDown):
        collect(["x"])
    assert fake.calls.count("StreamTranslate") >= 4


class _LostStatus(grpc.RpcError):
    """What grpc.aio raises when the server has ended the call while it was sending."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL

    def details(self) -> str:
        return "Internal error from Core"

    def trailing_metadata(self) -> None:
        return None


def test_lost_status_is_retried():
    """The call was not accepted, so nothing was done; its refusal is worth more to the caller than "unavailable"."""
    calls = StreamCalls(translate_stream("m", False, None, {}), timeout_s=None, reconnect_timeout_s=60.0)
    lost = error_from_rpc(_LostStatus())
    for _ in range(5):
        assert calls.next_delay_s(lost, {}) < 10
    with pytest.raises(errors.ModelTooLarge):
        calls.next_delay_s(errors.ModelTooLarge("too large"), {})
    with pytest.raises(errors.Unavailable):
        calls.next_delay_s(lost, {})


@pytest.mark.parametrize("in_order", [False, True])
def test_stream_resumes_after_server_restart_with_same_version(fake, collect, in_order):
    stops = iter([300, 900])
    stop_at = next(stops)
    translated: list[str] = []

    def translate(sentence: str) -> str:
        translated.append(sentence)
        return sentence

    fake.translate = translate

    def sentences() -> Iterator[str]:
        nonlocal stop_at
        for number in range(1500):
            if number == stop_at:
                fake.add_model("m")
                fake.stop()
                fake.start()
                stop_at = next(stops, 0)
            yield str(number)

    results = collect(sentences(), in_order=in_order, window=20)
    found = [result.id for result in results]
    assert sorted(found, key=int) == [str(number) for number in range(1500)]
    assert not in_order or found == sorted(found, key=int)
    assert all(result.translation.text == result.id for result in results)
    assert fake.calls.count("StreamTranslate") >= 3
    assert len(translated) - 1500 <= 2 * 2 * 20 + 2 * 64, "what was answered is not sent again"
    assert fake.backend.loaded.keys() == {"m/1"}, "no stream mixes two versions"


def test_stream_raises_unavailable_after_reconnect_timeout(fake, collect):
    def sentences() -> Iterator[str]:
        yield "x"
        time.sleep(0.2)
        fake.stop()
        yield "y"

    with pytest.raises(errors.Unavailable):
        collect(sentences(), reconnect_timeout_s=0.3)


class Breaks:
    """Breaks a stream off again and again, by a clock of its own most of a minute apart; servers are back at once."""

    def __init__(self, fake: FakeFerryman) -> None:
        self._fake = fake
        self._now_s = 0.0

    def backoff(self, timeout_s: float) -> ReconnectBackoff:
        return ReconnectBackoff(timeout_s, clock=lambda: self._now_s)

    def happen(self) -> None:
        # One may come before the client has seen that the call before was accepted: so they are less than a timeout
        # apart, and several.
        for _ in range(4):
            calls = self._fake.calls.count("StreamTranslate")
            self._fake.stop()
            self._fake.start()
            deadline_s = time.monotonic() + 30
            while self._fake.calls.count("StreamTranslate") == calls:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            self._now_s += 40


@pytest.fixture
def breaks(fake: FakeFerryman, monkeypatch: pytest.MonkeyPatch) -> Breaks:
    fake.add_model("m")
    breaks = Breaks(fake)
    monkeypatch.setattr("ferryman._stream.ReconnectBackoff", breaks.backoff)
    return breaks


def test_quiet_stream_survives_server_restarts(fake, client, breaks):
    answered = threading.Event()

    def sentences() -> Iterator[str]:
        yield "one"
        assert answered.wait(timeout=10)
        breaks.happen()
        yield "two"

    results = client.translate_stream("m", sentences(), reconnect_timeout_s=60)
    assert next(results).translation.text == "ONE"
    answered.set()
    assert [result.translation.text for result in results] == ["TWO"]


async def test_quiet_stream_survives_server_restarts_async(fake, breaks):
    answered = asyncio.Event()

    async def sentences() -> AsyncIterator[str]:
        yield "one"
        await answered.wait()
        await asyncio.to_thread(breaks.happen)
        yield "two"

    async with AsyncClient(fake.target) as client:
        results = client.translate_stream("m", sentences(), reconnect_timeout_s=60)
        assert (await anext(results)).translation.text == "ONE"
        answered.set()
        assert [result.translation.text async for result in results] == ["TWO"]


def test_backoff_grows_if_accepted_streams_break():
    backoff = ReconnectBackoff(60, clock=lambda: 0.0)
    delays_s = []
    for _ in range(9):
        backoff.call_accepted()
        delays_s.append(backoff.next_delay_s(errors.Unavailable("gone")))
    assert delays_s[0] <= 0.1
    assert delays_s[-1] >= 2.5


def test_exception_of_sentences_comes_after_earlier_results(fake, client):
    fake.add_model("m")

    def sentences() -> Iterator[str]:
        yield from ["one", "two"]
        raise RuntimeError("the caller's own")

    results = client.translate_stream("m", sentences(), in_order=True)
    assert [next(results).translation.text, next(results).translation.text] == ["ONE", "TWO"]
    with pytest.raises(RuntimeError, match="the caller's own"):
        next(results)


@pytest.mark.parametrize("kind", ["asynchronous", "ordinary"])
async def test_exception_of_sentences_reaches_async_caller(fake, kind):
    fake.add_model("m")

    async def asynchronous() -> AsyncIterator[str]:
        yield "one"
        raise RuntimeError("the caller's own")

    def ordinary() -> Iterator[str]:
        yield "one"
        raise RuntimeError("the caller's own")

    async with AsyncClient(fake.target) as client:
        results = client.translate_stream("m", asynchronous() if kind == "asynchronous" else ordinary())
        assert (await anext(results)).translation.text == "ONE"
        with pytest.raises(RuntimeError, match="the caller's own"):
            await anext(results)


def test_sentence_is_sent_as_soon_as_available(fake, client):
    """A person who types waits for the answer before the next line."""
    fake.add_model("m")
    answered = threading.Semaphore(0)

    def sentences() -> Iterator[str]:
        for number in range(5):
            yield str(number)
            assert answered.acquire(timeout=10)

    for _ in client.translate_stream("m", sentences()):
        answered.release()


async def test_sentence_is_sent_as_soon_as_available_async(fake):
    fake.add_model("m")
    answered = threading.Semaphore(0)

    def sentences() -> Iterator[str]:
        for number in range(5):
            yield str(number)
            assert answered.acquire(timeout=10)

    async with AsyncClient(fake.target) as client:
        async for _ in client.translate_stream("m", sentences()):
            answered.release()


async def test_stopping_early_leaves_no_thread_async(fake):
    fake.add_model("m")
    async with AsyncClient(fake.target) as client:
        stream = client.translate_stream("m", map(str, itertools.count()))
        async with contextlib.aclosing(stream) as results:
            await anext(results)
    await asyncio.to_thread(no_thread_is_left)


@pytest.mark.parametrize("in_order", [False, True])
def test_source_is_read_at_most_two_windows_ahead(fake, client, in_order):
    fake.add_model("m")
    read = itertools.count()
    sentences = (str(next(read)) for _ in range(10_000))
    with contextlib.closing(client.translate_stream("m", sentences, window=10, in_order=in_order)) as results:
        for taken, _ in enumerate(results, start=1):
            if taken == 100:
                break
        time.sleep(0.1)
        assert next(read) <= 100 + 2 * 10 + 1


async def test_async_source_is_read_at_most_two_windows_ahead(fake):
    fake.add_model("m")
    read = 0

    async def sentences() -> AsyncIterator[str]:
        nonlocal read
        for read in range(10_000):
            yield str(read)

    async with AsyncClient(fake.target) as client:
        stream = client.translate_stream("m", sentences(), window=10)
        async with contextlib.aclosing(stream) as results:
            for _ in range(100):
                await anext(results)
            await asyncio.sleep(0.1)
            assert read <= 100 + 2 * 10


def test_stopping_early_leaves_no_thread_and_no_call(fake, client):
    fake.add_model("m")
    with contextlib.closing(client.translate_stream("m", map(str, itertools.count()))) as results:
        next(results)
    no_thread_is_left()


def no_thread_is_left() -> None:
    deadline_s = time.monotonic() + 10
    while any(thread.name == "ferryman-sentences" for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_deadline_ends_stream(client):
    gate = threading.Event()

    def slow(sentence: str) -> str:
        gate.wait(10)
        return sentence

    with FakeFerryman(translate=slow) as fake, Client(fake.target) as client:
        fake.add_model("m")
        with pytest.raises(errors.DeadlineExceeded):
            list(client.translate_stream("m", ["x"], timeout_s=0.1))
        gate.set()


def test_bad_options_are_refused_before_the_call(fake, client):
    with pytest.raises(errors.InvalidRequest, match="must be one of first, optimal"):
        next(client.translate_stream("m", ["x"], early_stopping="never"))
    with pytest.raises(errors.UnknownOption, match="beam: is no option"):
        next(client.translate_stream("m", ["x"], beam=3))
    assert fake.calls == []


def test_keywords_match_translate_options():
    assert types.TranslateOptions.__annotations__.keys() == SearchOptions.__annotations__.keys()


def test_reorder_buffer_is_bounded():
    buffer = StreamBuffer(4, in_order=True)
    while buffer.has_capacity:
        buffer.add("x")
    assert len(buffer.next_request().sentences.sentences) == 8


def test_many_sentences_come_in_order(fake, client):
    fake.add_model("m")
    count = 0
    for result in client.translate_stream("m", map(str, range(20_000)), in_order=True):
        assert result.translation.text == str(count)
        count += 1
    assert count == 20_000
