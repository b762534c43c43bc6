"""Everything the command line prints. Text from elsewhere (names, messages, translations) goes out as text.

Commands print through this module only: the linter refuses `print` in the others. Control characters, which would move
the cursor, change colours or break a row, are shown as escapes ("\\x1b"); no text is taken for markup.
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

# C0 and C1 controls, DEL, line and paragraph separator, lone surrogates (an argument that is not UTF-8 has them).
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_BUT_NEWLINE: Final = re.compile(_CONTROL.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def printable(text: str) -> str:
    """Return the text on one line, its control characters and line breaks escaped as Python writes them."""
    return _CONTROL.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class Terminal(Console):
    """A rich console for text from elsewhere: no markup, no guessed colours, control characters escaped."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments, their text escaped; control sequences of rich itself are segments of their own."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else _CONTROL_BUT_NEWLINE.sub(_escape, text), style, control)

    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the root command, which ends for a closed pipe as it does for every other output."""
        raise BrokenPipeError


def styled(text: str, style: str = "") -> Text:
    """Return one line for a Terminal."""
    return Text(printable(text), style)


def unreadable(why: str) -> str:
    """Say in a list that the server cannot read this row."""
    return f"unreadable: {why}"


def print_line(text: object = "", *, flush: bool = False) -> None:
    """Print one line on standard output."""
    print(printable(str(text)), flush=flush)


def print_lines(text: str) -> None:
    """Print a text that may have several lines."""
    for line in text.splitlines():
        print_line(line)


def print_row(cells: Iterable[object], *, flush: bool = False) -> None:
    """Print one row for other programs: cells separated by tabs, which no cell contains."""
    print("\t".join(printable(str(cell)) for cell in cells), flush=flush)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; where the output is no terminal, tab-separated lines for other programs."""
    console = Terminal()
    if not console.is_terminal:
        for row in rows:
            print_row(row)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        # Ids and references are for copying: the first column is never cut while another can still give way.
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
    """Print a translation on one line, at once: as it is for another program, escaped at a terminal."""
    # A text that was split may have line breaks; what is printed has one line for each.
    line = " ".join(text.splitlines())
    print(printable(line) if sys.stdout.isatty() else line, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """Print an object on one line, at once."""
    line = json.dumps(value, ensure_ascii=not encodes(sys.stdout, "ä€😀"))
    # JSON's own escapes for what json.dumps leaves: C1 controls, separators and lone surrogates.
    print(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line), flush=True)


def print_message(text: str) -> None:
    """Print a message for the person at the terminal, on standard error. Nobody may be there to read it."""
    with contextlib.suppress(OSError):
        for line in text.splitlines():
            print(printable(line), file=sys.stderr, flush=True)


def encodes(stream: TextIO, text: str) -> bool:
    """Tell whether the stream can carry the text."""
    try:
        text.encode(stream.encoding)
    except UnicodeEncodeError:
        return False
    return True


def write_utf8() -> None:
    """Let standard output carry UTF-8 whatever the locale says, unless it is a terminal, which knows better."""
    if not sys.stdout.isatty():
        _reconfigure(sys.stdout, encoding="utf-8")


def prepare_streams() -> None:
    """Escape what the encoding of the locale cannot carry; without a stream, print to nowhere."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (it is open until the process ends)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream, errors="backslashreplace")


def _reconfigure(stream: TextIO, **options: str) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(**options)


def flush() -> None:
    """Write what was printed. Raises OSError."""
    sys.stdout.flush()


def discard() -> None:
    """Drop what standard output has not taken: nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
