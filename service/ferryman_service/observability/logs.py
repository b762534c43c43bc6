"""Lines of the log, for a person or for a program; what they are about is in `domain/log_context.py`.

No line holds the text of a sentence unless `sentences` allows it. What is logged is therefore names, ids and numbers;
where an exception may quote a text, its message is left out (`MAY_HOLD_TEXT`).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from ferryman_service.config.service_config import LogFormat
from ferryman_service.domain.errors import Unavailable
from ferryman_service.domain.log_context import FIELDS, MAY_HOLD_TEXT, log_fields

_NUMBERS_ONLY: Final = ("model", "search", "translation")
"""Layers that see ids of subwords and no text: what goes wrong there can be told."""
_PACKAGE_DIR: Final = Path(__file__).resolve().parent.parent
_CHATTY: Final = ("alembic",)
"""Libraries whose INFO tells nothing of what the service does."""
_WITHHELD: Final = "(left out, since it may quote a sentence: --log-sentences shows it)"


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How to log: `level` and above; `sentences` allows the text of sentences. `fields` are in every line.
    `reads_text`: the main thread of this process works on texts, so that the error that it dies of may quote one."""

    format: LogFormat = LogFormat.CONSOLE
    level: str = "INFO"
    sentences: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    reads_text: bool = False


def configure_logging(config: LogConfig) -> None:
    """Let everything that this process logs, its warnings, and the errors that it, or a thread of it, dies of, or that
    nobody could be told of, go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(config))
    logging.basicConfig(level=config.level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    sys.excepthook = partial(_log_uncaught, config.reads_text)
    threading.excepthook = _log_uncaught_of_thread
    sys.unraisablehook = _log_unraisable


def formatter(config: LogConfig) -> logging.Formatter:
    """Return what makes lines of records."""
    return JsonFormatter(config) if config.format is LogFormat.JSON else ConsoleFormatter(config)


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, logger, message, the fields, and the error if there is one."""

    def __init__(self, config: LogConfig) -> None:
        super().__init__()
        self._config = config

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(self._config, record),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = type(record.exc_info[1]).__name__
            line["traceback"] = _traceback(self._config, record, record.exc_info[1])
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, ensure_ascii=False, default=str)


class ConsoleFormatter(logging.Formatter):
    """Time, level, logger and message, then the fields in brackets; a traceback below."""

    def __init__(self, config: LogConfig) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._config = config

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Return the first line."""
        fields = " ".join(f"{name}={value}" for name, value in _fields(self._config, record).items())
        return super().formatMessage(record) + (f" [{fields}]" if fields else "")

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines."""
        record.exc_text = None  # another formatter's, which may tell more
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = _traceback(self._config, record, record.exc_info[1])
        text = super().format(record)
        record.exc_text = None
        return text


def _fields(config: LogConfig, record: logging.LogRecord) -> Mapping[str, Any]:
    return {**config.fields, **log_fields(), **getattr(record, FIELDS, {})}


def _traceback(config: LogConfig, record: logging.LogRecord, error: BaseException) -> str:
    if config.sentences or not getattr(record, MAY_HOLD_TEXT, False):
        return "".join(traceback.format_exception(error)).rstrip("\n")
    parts = []
    for each in reversed(list(_chain(error))):
        quotes_none = isinstance(each, Unavailable) or _sees_numbers_only(each.__traceback__)
        message = str(each) if quotes_none else _WITHHELD
        stack = "".join(traceback.format_tb(each.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{stack}{type(each).__qualname__}: {message}")
    return "\n\n".join(parts)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, what it came of, and so on."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        context = None if following.__suppress_context__ else following.__context__
        following = following.__cause__ or context


def _sees_numbers_only(stack: TracebackType | None) -> bool:
    """Tell whether the error was raised in, or below, a layer that sees no text."""
    layers = [layer for frame, _ in traceback.walk_tb(stack) if (layer := _layer(frame.f_code.co_filename))]
    return bool(layers) and layers[-1] in _NUMBERS_ONLY


def _layer(filename: str) -> str:
    """Return the folder of the service that a source file lies in, "" for other files."""
    path = Path(filename)
    parts: Sequence[str] = path.relative_to(_PACKAGE_DIR).parts if path.is_relative_to(_PACKAGE_DIR) else ()
    return parts[0] if len(parts) > 1 else ""


def _log_uncaught(
    may_hold_text: bool, kind: type[BaseException], error: BaseException, stack: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, stack)
        return
    extra = {MAY_HOLD_TEXT: may_hold_text}
    _own_log().critical("this process ends with an error", exc_info=(kind, error, stack), extra=extra)


def _log_uncaught_of_thread(uncaught: threading.ExceptHookArgs) -> None:
    if uncaught.exc_value is None or issubclass(uncaught.exc_type, SystemExit):
        return
    name = "that is gone" if uncaught.thread is None else uncaught.thread.name
    told = uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback
    _own_log().critical("the thread %s ends with an error", name, exc_info=told, extra={MAY_HOLD_TEXT: True})


def _log_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # Not the object itself, which may be a text.
    where = getattr(unraisable.object, "__qualname__", type(unraisable.object).__qualname__)
    said = unraisable.err_msg or "Exception ignored in"
    told = None
    if unraisable.exc_value is not None:
        told = unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback
    _own_log().error("%s: %s", said, where, exc_info=told, extra={MAY_HOLD_TEXT: True})


def _own_log() -> logging.Logger:
    return logging.getLogger("ferryman_service")
