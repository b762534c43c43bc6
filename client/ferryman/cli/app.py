"""The root command of `ferryman`, and the registration of all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from ferryman import __version__
from ferryman.cli import corpora, models, runs, schedule, translate
from ferryman.cli.common import FerrymanGroup
from ferryman.cli.ending import HELP as EXIT_STATUS
from ferryman.cli.options import FerrymanCommand
from ferryman.cli.output import print_line

app = typer.Typer(
    cls=FerrymanGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_STATUS,
)


def _print_version(requested: bool) -> None:
    if requested:
        print_line(f"ferryman {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    server: Annotated[
        str, typer.Option(envvar="FERRYMAN_SERVER", help="Address of the service.", metavar="HOST:PORT")
    ] = "localhost:50051",
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train encoder-decoder Transformers and translate with them on a Ferryman service."""
    context.obj = server


app.command("schedule")(schedule.show)
app.add_typer(corpora.app, name="corpus")
app.command("train")(runs.train)
app.command("watch")(runs.watch)
app.add_typer(runs.app, name="runs")
app.add_typer(models.app, name="models")
app.command("translate")(translate.translate)

for group in (app, corpora.app, runs.app, models.app):
    for command in group.registered_commands:
        command.cls = FerrymanCommand
