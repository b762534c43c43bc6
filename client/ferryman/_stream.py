"""The state of a `translate_stream`: sentences in flight, sentences to send, results to deliver."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeVar, cast

from google.protobuf.message import Message

from ferryman._checks import checked_reconnect_timeout_s, checked_timeout_s, raise_any
from ferryman._convert import Call, WireSentence, stream_of_version, stream_sentence, stream_sentences
from ferryman._mapping import wrong
from ferryman._reconnect import ReconnectBackoff
from ferryman._rpc_errors import ACCEPTED_KEY, has_lost_status
from ferryman.errors import FerrymanError, InvalidSentence, Unavailable
from ferryman.types import SentenceError, StreamSentence, StreamTranslateResponse, StreamTranslation

T = TypeVar("T")
Sentence: TypeAlias = str | tuple[str, str] | StreamSentence
"""A sentence, an (id, sentence) pair, or a sentence with all its options."""

_DEFAULT_WINDOW: Final = 256
_MESSAGE_SENTENCES: Final = 64
_MESSAGE_BYTES: Final = 1 << 20
"""The largest message, except for a single larger sentence."""

_MAX_LOST_STATUSES: Final = 5
"""How many refusals with a lost status are retried. A race loses the status, so a retry usually receives it."""


class StreamBuffer:
    """The sentences of one `translate_stream`. Both clients wait and make the calls; this class keeps the state.

    On the wire a sentence's id is its number; the caller's ids are arbitrary. `has_capacity` limits the sentences
    without a delivered result to two windows: one on the server, one in transit or waiting for its turn.

    A sentence that no request can hold is sent as an empty one, and its error replaces the translation. So it keeps its
    turn, counts against the window, and reports the model version, like any other sentence.
    """

    def __init__(self, window: int | None, *, in_order: bool) -> None:
        """With `in_order` results come in the order of the sentences, else as they finish."""
        self._limit = 2 * (window or _DEFAULT_WINDOW)
        self._in_order = in_order
        self._ids: dict[int, str] = {}
        self._unanswered: dict[int, WireSentence] = {}
        self._to_send: deque[WireSentence] = deque()
        self._errors: dict[int, SentenceError] = {}
        self._out_of_order: dict[int, StreamTranslation] = {}
        self._added = 0
        self._delivered = 0

    @property
    def has_capacity(self) -> bool:
        """Whether another sentence may be added."""
        return self._added - self._delivered < self._limit

    @property
    def has_pending(self) -> bool:
        """Whether a sentence waits to be sent."""
        return bool(self._to_send)

    def add(self, item: Sentence) -> None:
        """Add a sentence to send. Raises InvalidRequest if it is not a sentence."""
        number = self._added
        sentence = _checked(item, number)
        try:
            wire = stream_sentence(sentence, number)
        except InvalidSentence as error:
            [violation] = error.violations
            self._errors[number] = SentenceError(
                reason=violation.reason, message=f"{violation.field} {violation.description}"
            )
            wire = stream_sentence(dataclasses.replace(sentence, sentence="", target_prefix=""), number)
        self._added += 1
        self._ids[number] = sentence.id
        self._unanswered[number] = wire
        self._to_send.append(wire)

    def requeue(self) -> None:
        """Queue all unanswered sentences again, for a new call."""
        self._to_send = deque(self._unanswered.values())

    def next_request(self) -> Message:
        """Return the next request: as many pending sentences as a message holds, at least one."""
        sentences = [self._to_send.popleft()]
        size = sentences[0].ByteSize()
        while self._to_send and len(sentences) < _MESSAGE_SENTENCES:
            size += self._to_send[0].ByteSize()
            if size > _MESSAGE_BYTES:
                break
            sentences.append(self._to_send.popleft())
        return stream_sentences(sentences)

    def accept(self, response: StreamTranslateResponse) -> Sequence[StreamTranslation]:
        """Record a response; return the results to deliver."""
        results: list[StreamTranslation] = []
        for result in response.translations:
            number = int(result.id)
            del self._unanswered[number]
            named = dataclasses.replace(result, id=self._ids.pop(number), model=response.model)
            if error := self._errors.pop(number, None):
                named = dataclasses.replace(named, translation=None, error=error)
            if self._in_order:
                self._out_of_order[number] = named
            else:
                results.append(named)
        next_number = self._delivered
        while next_number in self._out_of_order:
            results.append(self._out_of_order.pop(next_number))
            next_number += 1
        return results

    def mark_delivered(self) -> None:
        """Count a result that the caller has received."""
        self._delivered += 1


def _checked(item: Any, number: int) -> StreamSentence:  # noqa: ANN401 (it is what is checked)
    if isinstance(item, str):
        return StreamSentence(id=str(number), sentence=item)
    if isinstance(item, tuple) and len(item) == 2:
        item = StreamSentence(id=item[0], sentence=item[1])
    texts = (item.sentence, item.target_prefix) if isinstance(item, StreamSentence) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise_any([wrong(f"sentences[{number}]", item, "a text, an (id, text) pair or a StreamSentence of texts")])
    return cast("StreamSentence", item)


class StreamCalls:
    """The calls of one `translate_stream`: the first, and another one whenever the connection breaks.

    Only two kinds of calls are repeated: one that a server had accepted, and a refused one whose status was lost. Every
    further call asks for the model version of the first, so that a stream never mixes two versions.
    """

    def __init__(
        self, call: Call[StreamTranslateResponse], *, timeout_s: float | None, reconnect_timeout_s: float
    ) -> None:
        """`timeout_s` is the deadline of all calls together. Give up once no call has reached a server for
        `reconnect_timeout_s`.

        Raises InvalidRequest for an invalid timeout.
        """
        self.call = call
        self._deadline_s = None if timeout_s is None else time.monotonic() + checked_timeout_s(timeout_s)
        self._accepted = False
        self._lost_statuses = 0
        self._backoff = ReconnectBackoff(checked_reconnect_timeout_s(reconnect_timeout_s))

    def remaining_s(self) -> float | None:
        """Return the time left for the next call; None without a deadline."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def response_received(self) -> None:
        self._backoff.reset()

    def next_delay_s(self, error: FerrymanError, initial_metadata: Mapping[str, str | bytes]) -> float:
        """Return the delay before the next call. Raises `error` if the stream must end."""
        version = initial_metadata.get(ACCEPTED_KEY)
        if version is not None:
            self._accepted = True
            self.call = stream_of_version(self.call, str(version))
            # A source may be quiet for hours, and its stream too: acceptance counts as contact with the server.
            self._backoff.call_accepted()
        if not isinstance(error, Unavailable):
            raise error
        if not self._accepted:
            if not has_lost_status(error) or self._lost_statuses == _MAX_LOST_STATUSES:
                raise error
            self._lost_statuses += 1
        return self._backoff.next_delay_s(error)


class SentenceReader:
    """Reads the caller's sentences in a thread, so that each is sent as soon as it is available."""

    def __init__(self, sentences: Iterable[Sentence], buffer: StreamBuffer) -> None:
        self.failure: BaseException | None = None
        self._call_number = 0
        self._sentences = sentences
        self._buffer = buffer
        self._changed = threading.Condition()
        self._finished = False
        self._closed = False
        # A daemon: the caller's iterable may block, and the end of the program must not wait for it.
        threading.Thread(target=self._read_all, name="ferryman-sentences", daemon=True).start()

    def requests(self, call: Call[StreamTranslateResponse]) -> Iterator[Message]:
        """Return the requests of a call, which replaces the previous call."""
        with self._changed:
            self._call_number += 1
            self._buffer.requeue()
            self._changed.notify_all()
            return self._requests(call, self._call_number)

    def _requests(self, call: Call[StreamTranslateResponse], number: int) -> Iterator[Message]:
        yield call.request
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._buffer.has_pending or self._finished or self._closed or self._call_number > number
                )
                if self._closed or self._call_number > number or not self._buffer.has_pending:
                    return
                message = self._buffer.next_request()
            yield message

    def results(self, response: StreamTranslateResponse) -> Iterator[StreamTranslation]:
        """Yield the results that the response completes."""
        with self._changed:
            results = self._buffer.accept(response)
        for result in results:
            with self._changed:
                self._buffer.mark_delivered()
                self._changed.notify_all()
            yield result

    def close(self) -> None:
        """Stop reading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read_all(self) -> None:
        try:
            for item in self._sentences:
                with self._changed:
                    self._changed.wait_for(lambda: self._buffer.has_capacity or self._closed)
                    if self._closed:
                        return
                    self._buffer.add(item)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 (an exception of the caller's iterable is raised to the caller)
            self.failure = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()


async def read_in_thread(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield the items of an iterable that a thread reads, at most one message ahead. Raises the iterable's error."""
    loop, changed, capacity = asyncio.get_running_loop(), asyncio.Event(), threading.Semaphore(_MESSAGE_SENTENCES)
    ready: deque[T] = deque()
    failures: list[BaseException | None] = []
    closed = threading.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(changed.set)

    def read() -> None:
        try:
            for item in items:
                capacity.acquire()
                if closed.is_set():
                    break
                ready.append(item)
                if len(ready) == 1:
                    wake()
        except BaseException as error:  # noqa: BLE001 (an exception of the caller's iterable is raised to the caller)
            failures.append(error)
        else:
            failures.append(None)
        wake()

    threading.Thread(target=read, name="ferryman-sentences", daemon=True).start()
    try:
        while ready or not failures:
            changed.clear()
            if not ready and not failures:
                await changed.wait()
            while ready:
                capacity.release()
                yield ready.popleft()
        if failures[0] is not None:
            raise failures[0]
    finally:
        closed.set()
        capacity.release()
