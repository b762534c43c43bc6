"""What all commands share: the connection, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import Any, Final, cast

import typer
from typer.core import TyperGroup

from ferryman import Client, errors
from ferryman._rpc_errors import unreachable_text
from ferryman.cli import output
from ferryman.cli.ending import CALLERS_MISTAKE, FAILED, was_interrupted
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

_UsageError: Final = cast("type[Exception]", typer.BadParameter.__mro__[1])
"""The base of what typer raises for a wrong command line; typer exports only this descendant."""


class FerrymanGroup(TyperGroup):
    """The root group: an error becomes one clean message and an exit status."""

    def main(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 (typer's own)
        """Run the command line, and end with its status unless the option `standalone_mode` is off."""
        is_standalone, options["standalone_mode"] = options.get("standalone_mode", True), False
        if not is_standalone:
            return super().main(*arguments, **options)
        try:
            status = super().main(*arguments, **options)
        except _UsageError as error:
            _show_usage_error(error)
            status = CALLERS_MISTAKE
        except SystemExit as end:
            if not isinstance(end.__context__, BrokenPipeError):
                raise
            output.discard()  # of the help, which rich prints
            status = 0
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (typer's context has no public type here)
        """Run the command."""
        try:
            super().invoke(ctx)
            output.flush()
        except BrokenPipeError:
            # `ferryman … | head`: the reader has enough. What Python still flushes when it ends must not hit the pipe.
            output.discard()
            raise typer.Exit(0) from None
        except (errors.FerrymanError, OSError, UnicodeError) as error:
            if was_interrupted():
                raise KeyboardInterrupt from None
            output.print_message(f"Error: {_message(error)}")
            raise typer.Exit(CALLERS_MISTAKE if isinstance(error, CALLERS_MISTAKES) else FAILED) from None


def _show_usage_error(error: Any) -> None:  # noqa: ANN401 (typer's UsageError has no public type)
    """Say on one line what is wrong with the command line, and where the right one is described."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
        return
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    output.print_message(f"Error: {message}{hint}")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:80]!r} is not UTF-8"
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
