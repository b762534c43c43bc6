"""`ferryman schedule`: prints a learning-rate curve as a plot or as CSV."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated, Any, Final

import typer

from ferryman import Client, DecayShape, LearningRateCurve, LearningRateSchedule, Preset, Recipe, ScheduleKind
from ferryman.cli.common import connect
from ferryman.cli.output import encodes, print_line, print_lines
from ferryman.cli.plot import CHARACTERS, MIN_WIDTH, draw_curve
from ferryman.cli.progress import describe_decay

_WIDTH: Final = 72


def _steps(text: str) -> Any:  # noqa: ANN401 (typer's own)
    return typer.Option(help=text, min=1, max=10**9)


def show(
    context: typer.Context,
    preset: Annotated[Preset | None, typer.Option(help="Show the schedule of this preset.")] = None,
    run: Annotated[str | None, typer.Option(help="Show the schedule of this run.", metavar="RUN")] = None,
    kind: Annotated[ScheduleKind | None, typer.Option(help="Set the shape of the schedule.")] = None,
    warmup_steps: Annotated[int | None, _steps("Increase the rate linearly for this many steps.")] = None,
    factor: Annotated[float | None, typer.Option(help="Scale the rate (noam).")] = None,
    d_model: Annotated[int | None, typer.Option(help="Set the model dimension (noam).", min=1, max=65_536)] = None,
    peak_learning_rate: Annotated[float | None, typer.Option(help="Set the rate after warmup (not noam).")] = None,
    minimum_learning_rate: Annotated[
        float | None, typer.Option(help="Set the rate at the end of the decay (cosine, linear, wsd).")
    ] = None,
    total_steps: Annotated[int | None, _steps("End the decay at this step (cosine, linear, wsd).")] = None,
    decay_share: Annotated[float | None, typer.Option(help="Decay over this share of the steps (wsd).")] = None,
    decay_shape: Annotated[DecayShape | None, typer.Option(help="Set the shape of the decay (wsd).")] = None,
    first_step: Annotated[int | None, _steps("Start the curve at this step.")] = None,
    last_step: Annotated[int | None, _steps("End the curve at this step.")] = None,
    points: Annotated[
        int | None, typer.Option(help="Limit the number of points of the curve.", min=2, max=100_000)
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print step,learning_rate lines instead of a plot.")] = False,
) -> None:
    """Plot the learning-rate schedule of a preset, of a run, or of the options."""
    schedule = LearningRateSchedule(
        kind=kind,
        warmup_steps=warmup_steps,
        factor=factor,
        d_model=d_model,
        peak_learning_rate=peak_learning_rate,
        minimum_learning_rate=minimum_learning_rate,
        total_steps=total_steps,
        decay_share=decay_share,
        decay_shape=decay_shape,
    )
    window = {"first_step": first_step, "last_step": last_step, "max_points": points}
    with connect(context) as client:
        curve = _fetch(client, preset, run, schedule, window)
    if csv:
        print_line("step,learning_rate")
        for point in curve.points:
            # repr is the shortest text that parses to the same float.
            print_line(f"{point.step},{point.learning_rate!r}")
    else:
        _draw(curve)


def _fetch(
    client: Client,
    preset: Preset | None,
    run: str | None,
    schedule: LearningRateSchedule,
    window: dict[str, Any],
) -> LearningRateCurve:
    is_empty = schedule == LearningRateSchedule()
    if run is not None and not (preset is None and is_empty):
        raise typer.BadParameter("--run cannot be combined with --preset or options of a schedule; pass --run alone")
    if run is not None:
        return client.get_lr_schedule(run_id=run, **window)
    if preset is not None or is_empty:
        recipe = Recipe(preset=preset, schedule=None if is_empty else schedule)
        return client.get_lr_schedule(recipe=recipe, **window)
    return client.get_lr_schedule(schedule=schedule, **window)


def _draw(curve: LearningRateCurve) -> None:
    kind = curve.schedule.kind or "learning rate"
    print_line(f"{kind}: peak {curve.peak.learning_rate:.6g} at step {curve.peak.step:,}")
    for decay in curve.decays:
        print_line(describe_decay(decay))
    width = max(MIN_WIDTH, min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns))
    print_lines(draw_curve(curve.points, width, ascii_only=not encodes(sys.stdout, CHARACTERS)))
    if curve.provisional_from_step is not None:
        print_line(f"provisional from step {curve.provisional_from_step:,}: training may still start its decay")
