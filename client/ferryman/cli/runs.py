"""`ferryman train`, `watch` and `runs`: start training, follow it, look at it, rest it, stop it, remove it."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import Annotated

import typer

from ferryman import Client, Preset, RunState, TrainingRun
from ferryman.cli.common import connect
from ferryman.cli.ending import FAILED, INTERRUPTED
from ferryman.cli.output import (
    Terminal,
    print_fields,
    print_line,
    print_lines,
    print_message,
    print_table,
    unreadable,
)
from ferryman.cli.progress import describe, follow, log_lines
from ferryman.cli.recipes import build_recipe, to_toml

app = typer.Typer(no_args_is_help=True, help="Training runs.")
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]


def train(
    context: typer.Context,
    corpus_id: Annotated[str, typer.Argument(metavar="CORPUS", help="The corpus's id.")],
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="The model to publish a version of.")],
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with the fields of a recipe.")] = None,
    preset: Annotated[Preset | None, typer.Option(help="The starting point, before the file's.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A field, such as model.d_model=64.", metavar="FIELD=VALUE")
    ] = None,
    request_id: Annotated[str | None, typer.Option(help="A UUID that makes the start repeatable.")] = None,
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check everything, start nothing.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run to its end.")] = False,
    initial_model: Annotated[str | None, typer.Option(help="The model to fine-tune, such as en-de or en-de/7.")] = None,
    keep_optimizer: Annotated[
        bool, typer.Option("--keep-optimizer", help="Fine-tune with the optimizer's moments of the run that made it.")
    ] = False,
    processes: Annotated[int | None, typer.Option(help="Processes that train together.")] = None,
) -> None:
    """Start a training run; prints its id on the first line.

    With --validate-only the recipe is printed instead, complete and ready for --recipe.
    """
    wanted = build_recipe(recipe, preset, overrides or [])
    with connect(context) as client:
        run = client.start_training(
            corpus_id,
            model_name,
            wanted,
            request_id=request_id,
            validate_only=validate_only,
            initial_model=initial_model,
            keep_optimizer=keep_optimizer,
            processes=processes,
        )
        if validate_only:
            print_lines(to_toml(run.recipe))
            print_message("valid")
            return
        print_line(run.run_id, flush=True)
        if watch:
            _watch(client, run.run_id)


def watch(context: typer.Context, run_id: RunArgument) -> None:
    """Follow a run to its end, from its beginning. Ctrl-C leaves the run on; a failed run ends with status 1."""
    with connect(context) as client:
        _watch(client, run_id)


def _watch(client: Client, run_id: str) -> None:
    try:
        run = follow(client, run_id, Terminal())
    except KeyboardInterrupt:
        print_message(f"{run_id} continues; see it again with: ferryman watch {run_id}")
        raise typer.Exit(INTERRUPTED) from None
    if run.state is RunState.FAILED:
        raise typer.Exit(FAILED)


@app.command("list")
def list_(
    context: typer.Context,
    state: Annotated[list[RunState] | None, typer.Option(help="Only runs in this state; repeatable.")] = None,
    model: Annotated[str, typer.Option(help="Only runs for this model.")] = "",
) -> None:
    """List the runs, newest first."""
    with connect(context) as client:
        rows = [
            (run.run_id, run.state, run.model_name, run.progress.step, *_best_bleu(run), _time(run))
            if not run.unreadable
            else (run.run_id, unreadable(run.unreadable), "-", "-", "-", "-", "-")
            for run in client.list_training_runs(states=state or (), model_name=model)
        ]
    print_table(("run", "state", "model", "step", "best BLEU", "pairs", "accepted"), rows)


@app.command()
def show(context: typer.Context, run_id: RunArgument) -> None:
    """Show a run and its recipe."""
    with connect(context) as client:
        run = client.get_training_run(run_id)
    version = f"/{run.model_version}" if run.model_version else ""
    bleu, pairs = _best_bleu(run)
    fields: list[tuple[str, object]] = [
        ("run", run.run_id),
        ("state", f"{run.state}{_requested(run)}"),
        ("corpus", f"{run.corpus_id}, which was deleted" if run.corpus_deleted else run.corpus_id),
        ("model", f"{run.model_name}{version}"),
        ("step", f"{run.progress.step:,} (epoch {run.progress.epoch}, {run.progress.fraction:.0%})"),
        ("target tokens", f"{run.progress.target_tokens:,}"),
        ("best BLEU", bleu if pairs == "-" else f"{bleu} ({pairs} pairs)"),
        ("attempt", f"{run.attempt}, {run.restarts} workers in a row got no further" if run.restarts else run.attempt),
        ("processes", run.processes),
        ("starts from", _start(run)),
        ("accepted", _time(run)),
    ]
    if run.error is not None:
        fields += [("error", f"{run.error.reason}: {run.error.message}")]
        fields += [("log", line) for line in log_lines(run.error)]
    print_fields(fields)
    print_line()
    print_lines(to_toml(run.recipe))


@app.command()
def events(context: typer.Context, run_id: RunArgument) -> None:
    """Show what has happened to a run so far, a line each with its time (UTC): all but the training steps."""
    with connect(context) as client:
        for record in client.stream_metrics(run_id, follow=False):
            if (line := describe(record)) is not None:
                print_line(f"{record.time.astimezone(UTC):%Y-%m-%d %H:%M:%S}  {line.plain}")


@app.command()
def cancel(context: typer.Context, run_id: RunArgument) -> None:
    """Ask a run to stop; nothing is published."""
    with connect(context) as client:
        run = client.cancel_training(run_id)
    print_line("cancel requested" if run.cancel_requested else str(run.state))


@app.command()
def pause(context: typer.Context, run_id: RunArgument) -> None:
    """Ask a run to rest; `runs resume` lets it go on."""
    with connect(context) as client:
        run = client.pause_training(run_id)
    print_line("pause requested" if run.pause_requested else str(run.state))


@app.command()
def resume(context: typer.Context, run_id: RunArgument) -> None:
    """Let a paused run go on from its last checkpoint."""
    with connect(context) as client:
        run = client.resume_training(run_id)
    print_line(str(run.state))


@app.command()
def delete(context: typer.Context, run_id: RunArgument) -> None:
    """Remove a run that has ended or is unreadable, with its records and checkpoints; what it published stays."""
    with connect(context) as client:
        client.delete_training_run(run_id)
    print_line("deleted")


@app.command()
def checkpoints(context: typer.Context, run_id: RunArgument) -> None:
    """List the checkpoints of a run."""
    with connect(context) as client:
        rows = [
            (
                f"{item.step:,}",
                item.epoch,
                "-" if item.bleu is None else f"{item.bleu:.1f}",
                item.translated_pairs or "-",
                "best" if item.best else "",
                f"{item.size_bytes / 1e6:.1f} MB",
                item.create_time.isoformat(timespec="seconds"),
            )
            for item in client.list_checkpoints(run_id)
        ]
    print_table(("step", "epoch", "BLEU", "pairs", "", "size", "written"), rows)


def _requested(run: TrainingRun) -> str:
    if run.cancel_requested:
        return ", cancel requested"
    return ", pause requested" if run.pause_requested else ""


def _start(run: TrainingRun) -> str:
    if run.initial_model is None:
        return "random weights"
    return f"{run.initial_model}, with its optimizer" if run.keep_optimizer else run.initial_model


def _best_bleu(run: TrainingRun) -> tuple[str, str]:
    """Return the score, and of how many translated pairs it is."""
    best = run.progress.best_validation
    return (f"{best.bleu:.1f}", f"{best.translated_pairs:,}") if best is not None else ("-", "-")


def _time(run: TrainingRun) -> str:
    return run.create_time.isoformat(timespec="seconds") if run.create_time else "-"
