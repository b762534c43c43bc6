"""All output of the command line. Untrusted text (names, messages, translations) is printed literally.

Commands print only through this module; the linter forbids `print` elsewhere. Control characters, which could move the
cursor, change colours or break a row, are printed as escapes ("\\x1b"). No text is
interpreted as markup.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, Final, NoReturn, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# C0 and C1 controls, DEL, line and paragraph separator, lone surrogates (from arguments that are not UTF-8).
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_BUT_NEWLINE: Final = re.compile(_CONTROL.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def printable(text: str) -> str:
    """Return the text on one line, with control characters and line breaks as Python escapes."""
    return _CONTROL.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class Terminal(Console):
    """A rich console for untrusted text: no markup, no highlighting, control characters escaped."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments with escaped text; rich's own control sequences are separate segments."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else _CONTROL_BUT_NEWLINE.sub(_escape, text), style, control)

    def on_broken_pipe(self) -> NoReturn:
        """Raise, so that the root command handles the closed pipe."""
        raise BrokenPipeError


def styled(text: str, style: str = "") -> Text:
    """Return the text as one styled line for a Terminal."""
    return Text(printable(text), style)


def unreadable(why: str) -> str:
    """Return the cell for a row that the server cannot read."""
    return f"unreadable: {why}"


def print_line(text: object = "", *, flush: bool = False) -> None:
    print(printable(str(text)), flush=flush)


def print_lines(text: str) -> None:
    for line in text.splitlines():
        print_line(line)


def print_row(cells: Iterable[object], *, flush: bool = False) -> None:
    """Print one row as tab-separated cells; cells contain no tabs."""
    print("\t".join(printable(str(cell)) for cell in cells), flush=flush)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; if the output is not a terminal, print tab-separated lines."""
    console = Terminal()
    if not console.is_terminal:
        for row in rows:
            print_row(row)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        # Ids and references are for copying: shrink other columns before the first one.
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*(styled(str(cell)) for cell in row))
    console.print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print one "name: value" a line."""
    rows = list(fields)
    width = max(len(name) for name, _ in rows) + 1
    for name, value in rows:
        print_line(f"{name + ':':<{width}} {value}")


def print_translation(text: str) -> None:
    """Print a translation on one line and flush; escape control characters only at a terminal."""
    # With --split a translation may have line breaks, but each input line has one output line.
    line = " ".join(text.splitlines())
    print(printable(line) if sys.stdout.isatty() else line, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """Print an object on one line and flush."""
    line = json.dumps(value, ensure_ascii=not encodes(sys.stdout, "ä€😀"))
    # JSON escapes for characters that json.dumps does not escape: C1 controls, separators and lone surrogates.
    print(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line), flush=True)


def print_message(text: str) -> None:
    """Print a message on standard error; ignore a closed one."""
    with contextlib.suppress(OSError):
        for line in text.splitlines():
            print(printable(line), file=sys.stderr, flush=True)


def encodes(stream: TextIO, text: str) -> bool:
    """Whether the encoding of the stream can represent the text."""
    try:
        text.encode(stream.encoding)
    except UnicodeEncodeError:
        return False
    return True


def write_utf8() -> None:
    """Switch standard output to UTF-8, unless it is a terminal, which has its own encoding."""
    if not sys.stdout.isatty():
        _reconfigure(sys.stdout, encoding="utf-8")


def prepare_streams() -> None:
    """Escape characters that the locale cannot encode; replace closed streams by /dev/null."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream, errors="backslashreplace")


def _reconfigure(stream: TextIO, **options: str) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(**options)


def flush() -> None:
    """Flush standard output. Raises OSError."""
    sys.stdout.flush()


def discard() -> None:
    """Discard unwritten output, because the reader has closed the pipe."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
