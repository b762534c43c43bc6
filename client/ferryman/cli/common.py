"""What all commands share: the connection, errors, and ways to print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, Final

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ferryman import Client, errors
from ferryman._rpc_errors import unreachable_text
from ferryman.cli.options import option_of

CALLERS_MISTAKES: Final = (
    errors.InvalidArgument,
    errors.NotFound,
    errors.AlreadyExists,
    errors.FailedPrecondition,
    errors.OutOfRange,
    OSError,
    UnicodeError,
)
"""What the caller has to put right: exit status 2. Every other error ends with 1."""


class FerrymanGroup(TyperGroup):
    """The root group: an error becomes one clean message and an exit status."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (typer's context has no public type here)
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # `ferryman … | head`: the reader has enough. What Python still flushes when it ends must not hit the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (errors.FerrymanError, OSError, UnicodeError) as error:
            Console(stderr=True).print(f"Error: {_message(error)}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, CALLERS_MISTAKES) else 1) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = failure_text(error)
    request_id = getattr(error, "request_id", "")
    return f"{text} [request {request_id}]" if request_id else text


def failure_text(error: Exception) -> str:
    """Return what the error says, in the words of the command line."""
    if isinstance(error, errors.InvalidArgument):
        return error.told_as(option_of)
    if isinstance(error, errors.Unavailable) and "cause" in error.metadata:
        return unreachable_text(error.metadata["target"], error.metadata["cause"], "pass --server HOST:PORT")
    return str(error)


def connect(context: typer.Context) -> Client:
    """Return a client for the server that the root options name."""
    server = context.obj
    assert isinstance(server, str)
    return Client(server)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; where the output is no terminal, tab-separated lines for other programs."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(str(cell) for cell in row))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        # Ids and references are for copying: the first column is never cut while another can still give way.
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print one "name: value" a line."""
    rows = list(fields)
    width = max(len(name) for name, _ in rows) + 1
    for name, value in rows:
        print(f"{name + ':':<{width}} {value}")
