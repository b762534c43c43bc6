"""The fenced blocks of a document, and the marks that say who runs them.

A program without a mark is run by tests/docs/test_documents.py. An HTML comment on the line before a block, or below a
heading for all blocks of that section, says otherwise:

    <!-- run by: ops -->             a test of `make ops` runs it, with the tools that it needs (or `full`: `make full`)
    <!-- rendered by: ops -->        a test of `make ops` renders what it would send to a cluster, and validates that
    <!-- recorded in: FILE -->       its output is that of a recorded run
    <!-- not run: REASON -->         no test runs it

What a block promises to print stands in it, below `$ command` in a `console` block, or in the `text` block that follows
a program without any prose between. `…` stands for any text of a line, a line `…` for any number of lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/api.md", "docs/clients.md", "docs/operations.md")
PROGRAMS = ("console", "shell", "python", "ts")
"""The languages of blocks that are run."""

DATA = ("text", "toml", "ini")
"""The languages of blocks that are no programs."""

WILDCARD = "…"
_MARK = re.compile(r"<!-- (not run|run by|rendered by|recorded in): (.+) -->")
_HEADING = re.compile(r"(#+) (.+)")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What a comment says of blocks: (`kind`, `value`) is ("not run", its reason), ("run by", "ops") and so on."""

    kind: str
    value: str
    document: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block. `line` is its first line of text, from 1; `promised` the output below a program, or None."""

    document: str
    line: int
    heading: str
    language: str
    text: str
    mark: Mark | None
    promised: Text | None = None

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Promised lines, and the line of the document at which they begin."""

    line: int
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of a `console` block with the output below it, which is empty if nothing is promised."""

    line: int
    text: str
    promised: Text


def blocks_of(document: str, text: str | None = None) -> list[Block]:
    """Return the blocks of a document of the repository, or of the text, in order."""
    lines = ((ROOT / document).read_text(encoding="utf-8") if text is None else text).splitlines()
    found: list[Block] = []
    sections: list[tuple[int, Mark | None]] = []  # the open headings: level, mark of the section
    heading, last_mark, after_heading, after_program = "", None, False, False
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if mark := _MARK.fullmatch(line):
            last_mark = Mark(kind=mark[1], value=mark[2], document=document, line=number)
            if after_heading and not lines[number].startswith("```"):
                sections[-1] = (sections[-1][0], last_mark)
        elif opening := re.match(r"(`{3,})(\w*)", line):
            closing = next(at for at in range(number, len(lines)) if lines[at] == opening[1])
            text_lines, first = lines[number:closing], number + 1
            number = closing + 1
            if opening[2] == "text" and after_program:
                promised = Text(line=first, lines=tuple(text_lines))
                found[-1] = Block(**{**vars(found[-1]), "promised": promised})
                after_program = False
            else:
                section_mark = next((mark for _, mark in reversed(sections) if mark is not None), None)
                found.append(
                    Block(
                        document=document,
                        line=first,
                        heading=heading,
                        language=opening[2],
                        text="".join(f"{each}\n" for each in text_lines),
                        mark=last_mark or section_mark,
                    )
                )
                after_program = opening[2] in PROGRAMS
            last_mark, after_heading = None, False
        elif title := _HEADING.fullmatch(line):
            heading = title[2]
            sections = [*(each for each in sections if each[0] < len(title[1])), (len(title[1]), None)]
            last_mark, after_heading, after_program = None, True, False
        elif line:
            last_mark, after_heading, after_program = None, False, False
    return found


def marked(document: str, kind: str, value: str) -> list[Block]:
    """Return the programs of a document with that mark."""
    return [
        block
        for block in blocks_of(document)
        if block.language in PROGRAMS and block.mark and (block.mark.kind, block.mark.value) == (kind, value)
    ]


def unmarked(document: str) -> list[Block]:
    """Return the programs of a document that have no mark."""
    return [block for block in blocks_of(document) if block.language in PROGRAMS and block.mark is None]


def commands_of(block: Block) -> list[Command]:
    """Return the commands of a `console` block: `$ ` begins one, `> ` or a backslash at the end continues it."""
    commands: list[Command] = []
    continued = False
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        if line.startswith("$ "):
            commands.append(Command(line=number, text=line[2:], promised=Text(line=number + 1, lines=())))
        elif continued or line.startswith("> "):
            last = commands[-1]
            text = f"{last.text}\n{line.removeprefix('> ')}"
            commands[-1] = Command(line=last.line, text=text, promised=Text(line=number + 1, lines=()))
        else:
            last = commands[-1]
            promised = Text(line=last.promised.line, lines=(*last.promised.lines, line))
            commands[-1] = Command(line=last.line, text=last.text, promised=promised)
            continue
        continued = line.endswith("\\")
    return commands


def first_broken_promise(promised: Text, printed: str) -> int | None:
    """Return the line of the document from which on the output is not what it promises; None if it is."""
    output = [line.rstrip() for line in printed.splitlines()]
    wanted = [line.rstrip() for line in promised.lines]
    # at[n]: the numbers of printed lines that the first n promised lines can cover.
    at = {0}
    for number, line in enumerate(wanted):
        if line == WILDCARD:
            at = set(range(min(at), len(output) + 1))
        else:
            pattern = re.compile(".*".join(map(re.escape, line.split(WILDCARD))))
            at = {place + 1 for place in at if place < len(output) and pattern.fullmatch(output[place])}
        if not at:
            return promised.line + number
    return None if len(output) in at else promised.line + len(wanted)
