"""The connection and the error handling that all commands share."""

from __future__ import annotations

import sys
from typing import Any, Final, cast

import typer
from typer.core import TyperGroup

from ferryman import Client, errors
from ferryman._rpc_errors import unreachable_text
from ferryman.cli import output
from ferryman.cli.ending import FAILED, USAGE_ERROR, was_interrupted
from ferryman.cli.options import option_of

USAGE_ERRORS: Final = (
    errors.InvalidArgument,
    errors.NotFound,
    errors.AlreadyExists,
    errors.FailedPrecondition,
    errors.OutOfRange,
    OSError,
    UnicodeError,
)
"""Errors that the caller must fix: exit status 2. All other errors end with status 1."""

_UsageError: Final = cast("type[Exception]", typer.BadParameter.__mro__[1])
"""The base class of typer's usage errors. typer exports only a subclass."""


class FerrymanGroup(TyperGroup):
    """The root group; turns an error into a one-line message and an exit status."""

    def main(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 (typer's own)
        """Run the command line and exit with its status, unless `standalone_mode` is off."""
        is_standalone, options["standalone_mode"] = options.get("standalone_mode", True), False
        if not is_standalone:
            return super().main(*arguments, **options)
        try:
            status = super().main(*arguments, **options)
        except _UsageError as error:
            _print_usage_error(error)
            status = USAGE_ERROR
        except SystemExit as end:
            if not isinstance(end.__context__, BrokenPipeError):
                raise
            output.discard()  # the rest of the help text, which rich prints
            status = 0
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (typer's context has no public type here)
        try:
            super().invoke(ctx)
            output.flush()
        except BrokenPipeError:
            # `ferryman … | head`: the reader closed the pipe. Python must not flush into it at exit.
            output.discard()
            raise typer.Exit(0) from None
        except (errors.FerrymanError, OSError, UnicodeError) as error:
            if was_interrupted():
                raise KeyboardInterrupt from None
            output.print_message(f"Error: {_message(error)}")
            raise typer.Exit(USAGE_ERROR if isinstance(error, USAGE_ERRORS) else FAILED) from None


def _print_usage_error(error: Any) -> None:  # noqa: ANN401 (typer's UsageError has no public type)
    """Print the error and a hint to --help on one line."""
    if type(error).__name__ == "NoArgsIsHelpError":  # typer has printed the help
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
    """Return the error message in terms of options and arguments."""
    if isinstance(error, errors.InvalidArgument):
        return error.format_with(option_of)
    if isinstance(error, errors.Unavailable) and "cause" in error.metadata:
        return unreachable_text(error.metadata["target"], error.metadata["cause"], "pass --server HOST:PORT")
    return str(error)


def connect(context: typer.Context) -> Client:
    """Return a client of the service that `--server` names."""
    server = context.obj
    assert isinstance(server, str)
    return Client(server)
