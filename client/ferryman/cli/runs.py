"""`ferryman train`, `watch` and `runs`: starts, follows, lists, shows, pauses, cancels and deletes training runs."""

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

app = typer.Typer(no_args_is_help=True, help="Manage training runs.")
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run.")]


def train(
    context: typer.Context,
    corpus_id: Annotated[str, typer.Argument(metavar="CORPUS", help="Id of the corpus.")],
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model to publish.")],
    recipe: Annotated[Path | None, typer.Option(help="Read the recipe from this TOML file.")] = None,
    preset: Annotated[Preset | None, typer.Option(help="Start from this preset, instead of the file's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field, such as model.d_model=64; repeatable.", metavar="FIELD=VALUE"),
    ] = None,
    request_id: Annotated[str | None, typer.Option(help="Make the start idempotent with this UUID.")] = None,
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Validate the request only.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run until it ends.")] = False,
    initial_model: Annotated[str | None, typer.Option(help="Fine-tune this model, such as en-de or en-de/7.")] = None,
    keep_optimizer: Annotated[
        bool, typer.Option("--keep-optimizer", help="Continue with the optimizer state of --initial-model.")
    ] = False,
    processes: Annotated[int | None, typer.Option(help="Set the number of data-parallel processes.")] = None,
) -> None:
    """Start a training run and print its id on the first line.

    With --validate-only, print the complete recipe instead, as a file for --recipe.
    """
    built = build_recipe(recipe, preset, overrides or [])
    with connect(context) as client:
        run = client.start_training(
            corpus_id,
            model_name,
            built,
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
    """Replay the history of a run and follow it until it ends.

    Ctrl-C stops watching; the run continues. The exit status is 1 if the run failed.
    """
    with connect(context) as client:
        _watch(client, run_id)


def _watch(client: Client, run_id: str) -> None:
    try:
        run = follow(client, run_id, Terminal())
    except KeyboardInterrupt:
        print_message(f"{run_id} continues; to follow it again: ferryman watch {run_id}")
        raise typer.Exit(INTERRUPTED) from None
    if run.state is RunState.FAILED:
        raise typer.Exit(FAILED)


@app.command("list")
def list_(
    context: typer.Context,
    state: Annotated[list[RunState] | None, typer.Option(help="List only runs in this state; repeatable.")] = None,
    model: Annotated[str, typer.Option(help="List only runs of this model.")] = "",
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
        ("corpus", f"{run.corpus_id} (deleted)" if run.corpus_deleted else run.corpus_id),
        ("model", f"{run.model_name}{version}"),
        ("step", f"{run.progress.step:,} (epoch {run.progress.epoch}, {run.progress.fraction:.0%})"),
        ("target tokens", f"{run.progress.target_tokens:,}"),
        ("best BLEU", bleu if pairs == "-" else f"{bleu} ({pairs} pairs)"),
        ("attempt", f"{run.attempt} ({run.restarts} restarts without progress)" if run.restarts else run.attempt),
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
    """Show the events of a run so far, except training steps, with their times in UTC."""
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
    """Pause a run: it writes a checkpoint and its worker stops. Resume it with `runs resume`."""
    with connect(context) as client:
        run = client.pause_training(run_id)
    print_line("pause requested" if run.pause_requested else str(run.state))


@app.command()
def resume(context: typer.Context, run_id: RunArgument) -> None:
    """Resume a paused run from its last checkpoint."""
    with connect(context) as client:
        run = client.resume_training(run_id)
    print_line(str(run.state))


@app.command()
def delete(context: typer.Context, run_id: RunArgument) -> None:
    """Delete a finished or unreadable run with its records and checkpoints; its published model remains."""
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
    return f"{run.initial_model} with its optimizer" if run.keep_optimizer else run.initial_model


def _best_bleu(run: TrainingRun) -> tuple[str, str]:
    """Return the score and the number of translated pairs."""
    best = run.progress.best_validation
    return (f"{best.bleu:.1f}", f"{best.translated_pairs:,}") if best is not None else ("-", "-")


def _time(run: TrainingRun) -> str:
    return run.create_time.isoformat(timespec="seconds") if run.create_time else "-"
