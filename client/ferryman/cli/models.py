"""`ferryman models`: look at published models."""

from __future__ import annotations

from typing import Annotated

import typer

from ferryman.cli.common import connect, print_fields, print_table

app = typer.Typer(no_args_is_help=True, help="Published models.")


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the models with their latest version."""
    with connect(context) as client:
        rows = [
            (
                latest.reference,
                f"{latest.source_language}-{latest.target_language}",
                f"{latest.scores.bleu:.1f}",
                f"{latest.parameters:,}",
                latest.create_time.isoformat(timespec="seconds"),
            )
            for latest in (model.latest_version for model in client.list_models())
        ]
    print_table(("latest version", "languages", "BLEU", "parameters", "published"), rows)


@app.command()
def show(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help='"name" for the latest version, or "name/version".')],
) -> None:
    """Show a version of a model."""
    with connect(context) as client:
        details = client.get_model(model)
    version, scores = details.version, details.version.scores
    print_fields(
        [
            ("model", version.reference),
            ("all versions", ", ".join(map(str, details.model.versions))),
            ("languages", f"{version.source_language} to {version.target_language}"),
            ("BLEU", f"{scores.bleu:.1f}"),
            ("chrF", f"{scores.chrf:.1f}"),
            ("nll per token", f"{scores.nll_per_token:.4f}"),
            ("weights", f"{scores.weights}, step {scores.step:,}"),
            ("parameters", f"{version.parameters:,}"),
            ("size", f"{version.size_bytes / 1e6:.1f} MB"),
            ("run", version.run_id),
            ("corpus", version.corpus_id),
            ("digest", version.digest),
            ("published", version.create_time.isoformat(timespec="seconds")),
        ]
    )
