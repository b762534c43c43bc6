"""The use cases of translating: check, lease the model, prepare, admit, hand to the engine, gather.

What is checked takes no time; what is known is done in the event loop. So a short request for a model that is in memory
wakes no thread but the engine's, and the loop is woken once, when its last sentence is done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from ferryman_service.application.admission import Admission, Held, cost_tokens, expected_tokens
from ferryman_service.application.entries import Entry, Preparation, is_quick
from ferryman_service.application.flight import Caller, Flight, Flights
from ferryman_service.application.loaded_models import Lease, LoadedModels
from ferryman_service.application.model_access import ModelAccess
from ferryman_service.application.ports import ModelStore, SentenceSplitter
from ferryman_service.application.text_threads import TextThreads
from ferryman_service.application.translation_stream import TranslationStream
from ferryman_service.domain.errors import (
    DatabaseDamaged,
    DeadlineExceeded,
    InvalidRequest,
    InvalidSentence,
    ModelNotFound,
    RoleNotServed,
    RowUnreadable,
    StoreUnavailable,
    Violation,
)
from ferryman_service.domain.models import ModelReference, ModelVersion, parse_model_reference
from ferryman_service.domain.tracing import NULL_TRACER, Tracer
from ferryman_service.domain.translation import (
    MAX_TRANSLATION_TOKENS,
    CancelToken,
    FairShare,
    PreparedSentence,
    SearchOptions,
    SentenceResult,
    Timings,
    Translation,
    option_violations,
    slowest,
)
from ferryman_service.text.normalise import size_violations

MAX_CALL_BYTES: Final = 2**20
"""Sentences and prefixes of one Translate call together, bytes of UTF-8."""
MAX_WINDOW: Final = 4096
DEFAULT_WINDOW: Final = 256
_CALL_WEIGHT: Final = 4.0
_STREAM_WEIGHT: Final = 1.0
_TEXT_THREADS: Final = 2
_QUICK_SENTENCES: Final = 1_000
"""So many are measured in the event loop, in a few milliseconds."""
_WAITING_THREADS: Final = 4
_LOADING_THREADS: Final = 16


@dataclass(frozen=True, kw_only=True)
class TranslationLimits:
    """What one process may be asked. `queue_tokens`: row tokens, see application/admission.py.
    `max_translation_tokens`: the longest translation in subwords, 0: as long as the longest source of its model."""

    max_sentences: int = 1024
    queue_tokens: int = 262_144
    max_translation_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TranslateRequest:
    """What Translate is asked. `timeout_s` None: the caller set no deadline. `unknown` are violations that were found
    while the request was read."""

    model: str
    sentences: Sequence[str]
    options: SearchOptions
    target_prefixes: Sequence[str] = ()
    split_sentences: bool = False
    timeout_s: float | None = None
    unknown: Sequence[Violation] = ()


@dataclass(frozen=True, kw_only=True)
class TranslateResult:
    """The version that translated, one translation per entry of the request, and where the time went.

    `sentences` are the timings of every sentence, more than entries if those were split. `mean_batch_rows` is over the
    steps of all sentences.
    """

    version: ModelVersion
    translations: Sequence[Translation]
    sentences: Sequence[Timings]
    timings: Timings
    mean_batch_rows: float
    total_ns: int


@dataclass(frozen=True, kw_only=True)
class StreamRequest:
    """What a stream's translations have in common; see TranslateRequest. `window` None: DEFAULT_WINDOW."""

    model: str
    options: SearchOptions
    split_sentences: bool = False
    window: int | None = None
    timeout_s: float | None = None
    unknown: Sequence[Violation] = ()


class TranslationUseCases:
    """What TranslationService does; belongs to an event loop, but for `close` and `queued_tokens`."""

    def __init__(
        self,
        *,
        models: ModelStore,
        loaded: LoadedModels | None,
        splitter: SentenceSplitter,
        limits: TranslationLimits,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        """Store the ports; without loaded models this process does not translate."""
        self._loaded = loaded
        self._splitter = splitter
        self._limits = limits
        self._admission = Admission(limits.queue_tokens)
        # As with budgets: books in streams do not hold up calls.
        self._call_texts = TextThreads(_TEXT_THREADS, "call-text")
        self._stream_texts = TextThreads(_TEXT_THREADS, "stream-text")
        self._waiting = ThreadPoolExecutor(max_workers=_WAITING_THREADS, thread_name_prefix="lease")
        # Several: a model that is slow to load holds up few other loads.
        self._loading = ThreadPoolExecutor(max_workers=_LOADING_THREADS, thread_name_prefix="load")
        self._flights = Flights(self._waiting)
        self._access = None if loaded is None else ModelAccess(models, loaded, self._waiting, self._loading, tracer)

    async def translate(self, request: TranslateRequest, peer: str = "") -> TranslateResult:
        """Translate; cancelling the awaiting task frees its rows at the engine's next step. Callers of one `peer` share
        what a peer gets.

        What can be refused for its size is, before it takes room or anybody looks at its words. A request that is
        refused for its options is told of its sentences too, if they are few and the model is in memory.

        Whether there is room for it is decided before anything is waited for. Raises RoleNotServed, InvalidRequest,
        ModelNotFound, InvalidSentence, ModelDamaged, ModelTooLarge, QueueFull, DeadlineExceeded, ServerShuttingDown.
        """
        arrived_ns = time.monotonic_ns()
        access = self._served()
        reference, violations = self._checked(request)
        if violations:
            raise InvalidRequest([*violations, *await self._sentence_violations(request, access, reference)])
        expected = self._expected(request, access.known(reference))
        held = self._admission.admit(expected, peer)
        try:
            version, entries = await self._translated(request, access, reference, held, peer)
        finally:
            held.release()
        return _result(version, entries, arrived_ns)

    def _expected(self, request: TranslateRequest, version: ModelVersion | None) -> int:
        """Return what a request is expected to cost, row tokens; `version` is None if it is not known yet. Raises
        InvalidSentence and InvalidRequest for what must be refused for its size."""
        longest = None if version is None else version.lineage.recipe.data.max_sentence_tokens
        if longest is not None and not request.split_sentences:
            most = self._limits.max_translation_tokens or longest
            violations = [
                violation
                for index, text in enumerate(request.sentences)
                for violation in size_violations(f"sentences[{index}]", text, "SENTENCE_TOO_LONG", longest)
            ]
            for index, text in enumerate(request.target_prefixes):
                violations += size_violations(f"target_prefixes[{index}]", text, "PREFIX_TOO_LONG", most)
            if violations:
                raise InvalidSentence(violations)
        self._admission.check_texts(request.sentences, request.options)
        most_tokens = self._limits.max_translation_tokens or longest or MAX_TRANSLATION_TOKENS
        return expected_tokens(request.sentences, request.target_prefixes, request.options, most_tokens)

    async def _translated(
        self, request: TranslateRequest, access: ModelAccess, reference: ModelReference, held: Held, peer: str
    ) -> tuple[ModelVersion, list[Entry]]:
        """Translate what is admitted; return the version that did, and the entries, complete."""
        caller = self._caller(request, _CALL_WEIGHT, peer)
        lease = await access.lease(reference)
        gathering = _Gathering()
        flight = Flight(lease, caller, self._flights, gathering.accept)
        try:
            caller.token.check()
            entries = await self._entries(request, lease, caller.token)
            measure = partial(_measured, entries, request.options)
            is_quick = sum(len(entry.sentences) for entry in entries) <= _QUICK_SENTENCES
            sentences, tokens = measure() if is_quick else await asyncio.to_thread(measure)
            self._admission.check_size(tokens)
            await _settle(held, tokens, caller.token)
            held.hand_over()
            gathering.expect(entries)
            await flight.submit_many(sentences)
            await gathering.finished()
        except BaseException:
            caller.token.cancel()
            raise
        finally:
            flight.close()
        return lease.version, entries

    @asynccontextmanager
    async def stream(self, request: StreamRequest, peer: str = "") -> AsyncIterator[TranslationStream]:
        """Open a stream, which keeps its model, and what it has in the engine, until the block ends. Callers of one
        `peer` share what a peer gets.

        Raises RoleNotServed, InvalidRequest, ModelNotFound, ModelDamaged, ModelTooLarge.
        """
        access = self._served()
        reference = self._checked_stream(request)
        caller = self._caller(request, _STREAM_WEIGHT, peer)
        lease = await access.lease(reference)
        preparation = self._preparation(request, lease)
        window = DEFAULT_WINDOW if request.window is None else request.window
        stream = TranslationStream(lease, caller, preparation, window, self._flights, self._stream_texts)
        try:
            yield stream
        finally:
            stream.close()

    def queued_tokens(self) -> tuple[int, int]:
        """Return the row tokens of unary calls and of streams that wait or run now; safe to call from every thread."""
        return self._admission.calls.used, self._admission.streams.used

    def close(self) -> None:
        """Wait for the work in hand; the event loop must still run."""
        self._flights.wait()
        self._call_texts.close()
        self._stream_texts.close()
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._waiting.shutdown(wait=True)

    def _served(self) -> ModelAccess:
        if self._access is None:
            raise RoleNotServed(
                "this server does not translate; start one with --roles translation", role="translation"
            )
        return self._access

    def _checked(self, request: TranslateRequest) -> tuple[ModelReference, list[Violation]]:
        """Return the model that is named, and what is wrong with the rest but the sentences' words; raises
        InvalidRequest with every violation if no model can be told."""
        count, limit, prefixes = len(request.sentences), self._limits.max_sentences, len(request.target_prefixes)
        violations = [*request.unknown, *option_violations(request.options)]
        if not 1 <= count <= limit:
            text = f"has {count:,} sentences, must have from 1 to {limit:,}; send more in several calls, or stream them"
            violations.append(Violation(field="sentences", description=text, reason="OUT_OF_RANGE"))
        elif (size_bytes := _size_bytes(request)) > MAX_CALL_BYTES:
            text = (
                f"have {size_bytes:,} bytes of UTF-8 with their prefixes, may have {MAX_CALL_BYTES:,} together: send "
                "fewer in a call, or stream them"
            )
            violations.append(Violation(field="sentences", description=text, reason="TOO_MANY_BYTES"))
        if prefixes not in (0, count):
            text = f"has {prefixes:,} entries for {count:,} sentences, must have none, or one for each"
            violations.append(Violation(field="target_prefixes", description=text, reason="CONFLICT"))
        if request.split_sentences:
            violations += _split_conflicts(request.options, "options")
            if any(request.target_prefixes):
                text = "must be empty with split_sentences: a text's sentences cannot all begin with the same words"
                violations.append(Violation(field="target_prefixes", description=text, reason="CONFLICT"))
        return _reference(request.model, "model", violations), violations

    async def _sentence_violations(
        self, request: TranslateRequest, access: ModelAccess, reference: ModelReference
    ) -> Sequence[Violation]:
        """Return what is wrong with the sentences of a request that is refused anyway; nothing where that would need
        a load, or more time than it takes to refuse."""
        complete = len(request.target_prefixes) == len(request.sentences)
        # The options are what is wrong: sentences are measured against the default ones.
        checked = replace(request, options=SearchOptions(), target_prefixes=request.target_prefixes if complete else ())
        if checked.split_sentences or not is_quick(checked.sentences, checked.target_prefixes):
            return ()
        try:
            lease = await access.lease_in_memory(reference)
        except (ModelNotFound, RowUnreadable, StoreUnavailable, DatabaseDamaged):
            return ()
        if lease is None:
            return ()
        try:
            self._preparation(checked, lease).entries(checked.sentences, checked.target_prefixes)
        except InvalidSentence as error:
            return error.violations
        finally:
            lease.release(self._waiting)
        return ()

    def _checked_stream(self, request: StreamRequest) -> ModelReference:
        violations = [*request.unknown, *option_violations(request.options, "config.options")]
        if request.window is not None and not 1 <= request.window <= MAX_WINDOW:
            text = f"is {request.window}, must be from 1 to {MAX_WINDOW:,}"
            violations.append(Violation(field="config.window", description=text, reason="OUT_OF_RANGE"))
        if request.split_sentences:
            violations += _split_conflicts(request.options, "config.options")
        reference = _reference(request.model, "config.model", violations)
        if violations:
            raise InvalidRequest(violations)
        return reference

    def _caller(self, request: TranslateRequest | StreamRequest, weight: float, peer: str) -> Caller:
        deadline_s = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        is_call = isinstance(request, TranslateRequest)
        return Caller(
            options=request.options,
            token=CancelToken(deadline_s),
            share=FairShare(weight, peer),
            budget=self._admission.calls if is_call else self._admission.streams,
        )

    def _preparation(self, request: TranslateRequest | StreamRequest, lease: Lease) -> Preparation:
        return Preparation(
            engine=lease.engine,
            options=request.options,
            language=lease.version.lineage.source_language,
            target_language=lease.version.lineage.target_language,
            splitter=self._splitter if request.split_sentences else None,
        )

    async def _entries(self, request: TranslateRequest, lease: Lease, token: CancelToken) -> list[Entry]:
        preparation = self._preparation(request, lease)
        texts, prefixes = request.sentences, request.target_prefixes
        if preparation.is_quick(texts, prefixes):
            return preparation.entries(texts, prefixes)
        return await self._call_texts.run(token, lambda: preparation.entries(texts, prefixes))


def _measured(
    entries: Sequence[Entry], options: SearchOptions
) -> tuple[list[tuple[tuple[Entry, int], PreparedSentence]], int]:
    """Return the sentences of all entries with their places, and what they cost together."""
    sentences = [((entry, place), sentence) for entry in entries for place, sentence in enumerate(entry.sentences)]
    return sentences, sum(cost_tokens(sentence, options) for _, sentence in sentences)


class _Gathering:
    """Waits for the results of a unary call; the first that is an error ends it."""

    def __init__(self) -> None:
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A caller that leaves before it waits never asks for the error.
        self._finished.add_done_callback(lambda finished: finished.cancelled() or finished.exception())
        self._entries_finished = 0
        self._entries = 0

    def expect(self, entries: Sequence[Entry]) -> None:
        """Say whose results will come, before the first one does."""
        self._entries = len(entries)

    async def finished(self) -> None:
        """Wait until every sentence of the entries is translated; raises the error of one that is not."""
        await self._finished

    def accept(self, results: Sequence[tuple[tuple[Entry, int], SentenceResult]]) -> None:
        """Take results; called in the event loop."""
        if self._finished.done():
            return
        for (entry, place), result in results:
            if result.error is not None:
                self._finished.set_exception(result.error)
                return
            self._entries_finished += entry.accept(place, result)
        if self._entries_finished == self._entries:
            self._finished.set_result(None)


async def _settle(held: Held, tokens: int, token: CancelToken) -> None:
    """Hold what the sentences do cost; if that has to wait, then not beyond the caller's deadline."""
    try:
        async with asyncio.timeout(token.remaining_s()):
            await held.settle(tokens)
    except TimeoutError:
        raise DeadlineExceeded("the caller's deadline passed before there was room for the sentences") from None


def _result(version: ModelVersion, entries: Sequence[Entry], arrived_ns: int) -> TranslateResult:
    sentences = [timings for entry in entries for timings in entry.timings]
    steps = sum(timings.steps for timings in sentences)
    return TranslateResult(
        version=version,
        translations=[entry.translation() for entry in entries],
        sentences=sentences,
        timings=slowest(sentences),
        mean_batch_rows=sum(timings.row_steps for timings in sentences) / steps if steps else 0.0,
        total_ns=time.monotonic_ns() - arrived_ns,
    )


def _size_bytes(request: TranslateRequest) -> int:
    return sum(len(text.encode(errors="surrogatepass")) for text in (*request.sentences, *request.target_prefixes))


def _reference(model: str, field: str, violations: Sequence[Violation]) -> ModelReference:
    """Return the model that is named; raises InvalidRequest, with the other violations too, if none is."""
    try:
        reference = parse_model_reference(model, field)
    except InvalidRequest as error:
        raise InvalidRequest([*error.violations, *violations]) from None
    return reference


def _split_conflicts(options: SearchOptions, path: str) -> Iterator[Violation]:
    """Yield the options that make no sense for a text that is split into sentences."""
    if options.n_best > 1:
        text = f"is {options.n_best}, must be 1 with split_sentences"
        yield Violation(field=f"{path}.n_best", description=text, reason="CONFLICT")
    for name in ("return_token_scores", "return_alignment"):
        if getattr(options, name):
            yield Violation(
                field=f"{path}.{name}", description="must not be set with split_sentences", reason="CONFLICT"
            )
