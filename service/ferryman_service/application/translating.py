"""The use case of translating: check, find the model, wait for a free decoder, translate."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ferryman_service.application.ports import BundleLoader, ModelStore, Translator
from ferryman_service.domain.errors import InvalidRequest, RoleNotServed, Violation
from ferryman_service.domain.models import ModelVersion, parse_model_reference
from ferryman_service.domain.translation import CancelToken, SearchOptions, Timings, Translation, option_violations


@dataclass(frozen=True, kw_only=True)
class TranslationLimits:
    """What one process may be asked."""

    max_sentences: int = 1024
    threads: int = 1
    max_loaded_models: int = 4


@dataclass(frozen=True, kw_only=True)
class TranslateRequest:
    """What Translate is asked. `timeout_s` None: the caller set no deadline."""

    model: str
    sentences: Sequence[str]
    options: SearchOptions
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TranslateResult:
    """The version that translated, one translation per sentence, and where the time went."""

    version: ModelVersion
    translations: Sequence[Translation]
    timings: Timings
    total_ns: int


class LoadedModels:
    """The models in memory, the least recently used leaving first. Safe to use from every thread."""

    def __init__(self, models: ModelStore, loader: BundleLoader, max_loaded_models: int) -> None:
        """Store the ports; nothing is loaded yet."""
        self._models = models
        self._loader = loader
        self._max_loaded_models = max_loaded_models
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()

    def get(self, version: ModelVersion) -> Translator:
        """Return the translator, loading it at most once however many ask at the same time; raises ModelDamaged."""
        with self._lock:
            slot = self._slots.setdefault(version.reference, _Slot())
            self._slots.move_to_end(version.reference)
            while len(self._slots) > self._max_loaded_models:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.translator is None:
                slot.translator = self._loader.load(self._models.bundle_dir(version))
            return slot.translator


class _Slot:
    """A place for one model. A failed load leaves it empty, so the next caller tries again."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.translator: Translator | None = None


class TranslationUseCases:
    """What TranslationService does."""

    def __init__(self, *, models: ModelStore, loader: BundleLoader | None, limits: TranslationLimits) -> None:
        """Store the ports; without a loader this process does not translate."""
        self._models = models
        self._loaded = LoadedModels(models, loader, limits.max_loaded_models) if loader is not None else None
        self._limits = limits
        self._threads = ThreadPoolExecutor(max_workers=limits.threads, thread_name_prefix="translate")

    async def translate(self, request: TranslateRequest) -> TranslateResult:
        """Translate; cancelling the awaiting task stops the work at its next step.

        Raises RoleNotServed, InvalidRequest, ModelNotFound, InvalidSentence, ModelDamaged, DeadlineExceeded.
        """
        arrived_ns = time.monotonic_ns()
        if self._loaded is None:
            raise RoleNotServed(
                "this server does not translate; start one with --roles translation", role="translation"
            )
        self._check(request)
        deadline_s = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        token = CancelToken(deadline_s)
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, self._work, self._loaded, request, token, arrived_ns
        )
        try:
            return await work
        except asyncio.CancelledError:
            token.cancel()
            raise

    def close(self) -> None:
        """Wait for the work in hand."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _work(
        self, loaded: LoadedModels, request: TranslateRequest, token: CancelToken, arrived_ns: int
    ) -> TranslateResult:
        started_ns = time.monotonic_ns()
        token.check()
        version = self._models.resolve(parse_model_reference(request.model))
        translator = loaded.get(version)
        translations, timings = translator.translate(request.sentences, request.options, token)
        return TranslateResult(
            version=version,
            translations=translations,
            timings=replace(timings, queue_ns=started_ns - arrived_ns),
            total_ns=time.monotonic_ns() - arrived_ns,
        )

    def _check(self, request: TranslateRequest) -> None:
        violations = list(option_violations(request.options))
        count, limit = len(request.sentences), self._limits.max_sentences
        if not 1 <= count <= limit:
            text = f"has {count:,} sentences, must have from 1 to {limit:,}; send more in several calls"
            violations.append(Violation(field="sentences", description=text, reason="OUT_OF_RANGE"))
        try:
            parse_model_reference(request.model)
        except InvalidRequest as error:
            violations = [*error.violations, *violations]
        if violations:
            raise InvalidRequest(violations)
