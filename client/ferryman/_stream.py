"""The sentences of a `translate_stream`: which are under way, which are still to be sent, which results come next."""

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
from ferryman._reconnect import Reconnection
from ferryman._rpc_errors import ACCEPTED_KEY, has_lost_status
from ferryman.errors import FerrymanError, InvalidSentence, Unavailable
from ferryman.types import SentenceError, StreamSentence, StreamTranslateResponse, StreamTranslation

T = TypeVar("T")
Sentence: TypeAlias = str | tuple[str, str] | StreamSentence
"""A sentence alone, (id, sentence), or all that can be said of one."""

_DEFAULT_WINDOW: Final = 256
_MESSAGE_SENTENCES: Final = 64
_MESSAGE_BYTES: Final = 1 << 20
"""A message holds no more than this, but for a single sentence that is larger."""


_LOST_STATUSES: Final = 5
"""How often a call is repeated that was refused in words that were lost. Each loses them only by a race."""


class StreamBook:
    """The state of one `translate_stream`, shared by both clients: they wait and make the call, this keeps account.

    On the wire a sentence's id is its number; the caller's ids may be anything. `has_room` bounds what was taken from
    the caller and not given back as a result to two windows: one on the server, one on the way or waiting for its
    turn.

    A sentence that fits no request is sent as an empty one, and its error takes the place of that one's translation. So
    it has its turn, its place in the window and the version that answers, as any other.
    """

    def __init__(self, window: int | None, *, in_order: bool) -> None:
        """Store. With `in_order` results come in the order of the sentences, else as they finish."""
        self._limit = 2 * (window or _DEFAULT_WINDOW)
        self._in_order = in_order
        self._ids: dict[int, str] = {}
        self._unanswered: dict[int, WireSentence] = {}
        self._to_send: deque[WireSentence] = deque()
        self._errors: dict[int, SentenceError] = {}
        self._held: dict[int, StreamTranslation] = {}
        self._taken = 0
        self._given = 0

    @property
    def has_room(self) -> bool:
        """Whether another sentence may be taken from the caller."""
        return self._taken - self._given < self._limit

    @property
    def has_news(self) -> bool:
        """Whether a sentence waits to be sent."""
        return bool(self._to_send)

    def take(self, item: Sentence) -> None:
        """Take a sentence from the caller; it is to be sent. Raises InvalidRequest for what is none."""
        number = self._taken
        sentence = _checked(item, number)
        try:
            wire = stream_sentence(sentence, number)
        except InvalidSentence as error:
            [violation] = error.violations
            self._errors[number] = SentenceError(
                reason=violation.reason, message=f"{violation.field} {violation.description}"
            )
            wire = stream_sentence(dataclasses.replace(sentence, sentence="", target_prefix=""), number)
        self._taken += 1
        self._ids[number] = sentence.id
        self._unanswered[number] = wire
        self._to_send.append(wire)

    def rewind(self) -> None:
        """Send again what has no answer: the call that it was sent in has broken off."""
        self._to_send = deque(self._unanswered.values())

    def message(self) -> Message:
        """Return the next request: of what waits to be sent, as much as a message should hold, at least a sentence."""
        sentences = [self._to_send.popleft()]
        size = sentences[0].ByteSize()
        while self._to_send and len(sentences) < _MESSAGE_SENTENCES:
            size += self._to_send[0].ByteSize()
            if size > _MESSAGE_BYTES:
                break
            sentences.append(self._to_send.popleft())
        return stream_sentences(sentences)

    def accept(self, response: StreamTranslateResponse) -> Sequence[StreamTranslation]:
        """Return the results that can be given to the caller, now that this response is here."""
        results: list[StreamTranslation] = []
        for result in response.translations:
            number = int(result.id)
            del self._unanswered[number]
            mine = dataclasses.replace(result, id=self._ids.pop(number), model=response.model)
            if error := self._errors.pop(number, None):
                mine = dataclasses.replace(mine, translation=None, error=error)
            if self._in_order:
                self._held[number] = mine
            else:
                results.append(mine)
        place = self._given
        while place in self._held:
            results.append(self._held.pop(place))
            place += 1
        return results

    def give(self) -> None:
        """Note that a result was given to the caller."""
        self._given += 1


def _checked(item: Any, number: int) -> StreamSentence:  # noqa: ANN401 (it is what is checked)
    if isinstance(item, str):
        return StreamSentence(id=str(number), sentence=item)
    if isinstance(item, tuple) and len(item) == 2:
        item = StreamSentence(id=item[0], sentence=item[1])
    texts = (item.sentence, item.target_prefix) if isinstance(item, StreamSentence) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise_any([wrong(f"sentences[{number}]", item, "a text, an (id, text) pair or a StreamSentence of texts")])
    return cast("StreamSentence", item)


class StreamRoad:
    """The calls of one `translate_stream`: one, and a further one whenever a server goes away half-way.

    Only a call that a server had accepted is taken up again, or a refused one whose status was lost on the way. Its
    first version is that of all of them, so that one stream never mixes two.
    """

    def __init__(
        self, call: Call[StreamTranslateResponse], *, timeout_s: float | None, reconnect_timeout_s: float
    ) -> None:
        """Store. `timeout_s` is the deadline of all calls together, `reconnect_timeout_s` bounds the silence.

        Raises InvalidRequest for what is no time.
        """
        self.call = call
        self._ends_s = None if timeout_s is None else time.monotonic() + checked_timeout_s(timeout_s)
        self._accepted = False
        self._lost_statuses = 0
        self._reconnection = Reconnection(checked_reconnect_timeout_s(reconnect_timeout_s))

    def remaining_s(self) -> float | None:
        """Return the deadline of the next call."""
        return None if self._ends_s is None else max(0.0, self._ends_s - time.monotonic())

    def sign_of_life(self) -> None:
        """Note a response."""
        self._reconnection.sign_of_life()

    def pause_s(self, error: FerrymanError, initial_metadata: Mapping[str, str | bytes]) -> float:
        """Return how long to wait before the next call; raise `error` if there is to be none."""
        version = initial_metadata.get(ACCEPTED_KEY)
        if version is not None:
            self._accepted = True
            self.call = stream_of_version(self.call, str(version))
            # A source may be quiet for hours, and so is its stream: that the server took it up is word enough.
            self._reconnection.accepted()
        if not isinstance(error, Unavailable):
            raise error
        if not self._accepted:
            if not has_lost_status(error) or self._lost_statuses == _LOST_STATUSES:
                raise error
            self._lost_statuses += 1
        return self._reconnection.pause_s(error)


class SentencePump:
    """Reads the caller's sentences in a thread of its own, so that each is sent as soon as it is there."""

    def __init__(self, sentences: Iterable[Sentence], book: StreamBook) -> None:
        """Store, and start to read."""
        self.failure: BaseException | None = None
        self._calls = 0
        self._sentences = sentences
        self._book = book
        self._changed = threading.Condition()
        self._read_all = False
        self._closed = False
        # A caller's iterable may wait for ever; the end of the program must not wait for it.
        threading.Thread(target=self._read, name="ferryman-sentences", daemon=True).start()

    def requests(self, call: Call[StreamTranslateResponse]) -> Iterator[Message]:
        """Return the requests of a call, which takes the place of the one before."""
        with self._changed:
            self._calls += 1
            self._book.rewind()
            self._changed.notify_all()
            return self._requests(call, self._calls)

    def _requests(self, call: Call[StreamTranslateResponse], number: int) -> Iterator[Message]:
        yield call.request
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._book.has_news or self._read_all or self._closed or self._calls > number
                )
                if self._closed or self._calls > number or not self._book.has_news:
                    return
                message = self._book.message()
            yield message

    def results(self, response: StreamTranslateResponse) -> Iterator[StreamTranslation]:
        """Yield the results that the caller can have now."""
        with self._changed:
            results = self._book.accept(response)
        for result in results:
            with self._changed:
                self._book.give()
                self._changed.notify_all()
            yield result

    def close(self) -> None:
        """Read no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read(self) -> None:
        try:
            for item in self._sentences:
                with self._changed:
                    self._changed.wait_for(lambda: self._book.has_room or self._closed)
                    if self._closed:
                        return
                    self._book.take(item)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 (whatever the caller's iterable raises, the caller gets it back)
            self.failure = error
        finally:
            with self._changed:
                self._read_all = True
                self._changed.notify_all()


async def each_in_thread(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield the items, which are read in a thread of their own, at most a message's worth ahead; raises what that
    raises."""
    loop, news, room = asyncio.get_running_loop(), asyncio.Event(), threading.Semaphore(_MESSAGE_SENTENCES)
    found: deque[T] = deque()
    failures: list[BaseException | None] = []
    closed = threading.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(news.set)

    def read() -> None:
        failure: BaseException | None = None
        try:
            for item in items:
                room.acquire()
                if closed.is_set():
                    return
                found.append(item)
                if len(found) == 1:
                    wake()
        except BaseException as error:  # noqa: BLE001 (whatever the caller's iterable raises, the caller gets it back)
            failure = error
        finally:
            failures.append(failure)
            wake()

    threading.Thread(target=read, name="ferryman-sentences", daemon=True).start()
    try:
        while found or not failures:
            news.clear()
            if not found and not failures:
                await news.wait()
            while found:
                room.release()
                yield found.popleft()
        if failures[0] is not None:
            raise failures[0]
    finally:
        closed.set()
        room.release()
