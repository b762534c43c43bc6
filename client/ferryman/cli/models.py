"""`ferryman models`: lists, shows, aliases, downloads, deletes, loads and unloads published models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from ferryman.cli.common import connect
from ferryman.cli.output import print_fields, print_line, print_message, print_table, unreadable
from ferryman.types import Int8Outcome, ModelVersion

app = typer.Typer(no_args_is_help=True, help="Manage published models.")

_LOAD_TIMEOUT_S: Final = 600.0
"""Big models take longer to load than the client's default deadline."""
_REFERENCE: Final = typer.Argument(
    metavar="MODEL", help='Model: "name" (latest version), "name/version" or "name@alias".'
)


@app.command("list")
def list_(
    context: typer.Context,
    loaded: Annotated[bool, typer.Option("--loaded", help="List the models in the server's memory instead.")] = False,
) -> None:
    """List the models and their latest versions."""
    if loaded:
        _list_loaded(context)
        return
    with connect(context) as client:
        versions = [model.latest_version for model in client.list_models()]
    rows = [
        (
            latest.reference,
            _languages(latest),
            f"{latest.scores.bleu:.1f}",
            latest.scores.translated_pairs or "-",
            f"{latest.parameters:,}",
            latest.create_time.isoformat(timespec="seconds"),
        )
        if not latest.unreadable
        else (latest.reference, unreadable(latest.unreadable), "-", "-", "-", "-")
        for latest in versions
    ]
    print_table(("latest version", "languages", "BLEU", "pairs", "parameters", "published"), rows)
    for warning in score_warnings([version for version in versions if not version.unreadable]):
        print_message(f"warning: {warning}")


@app.command()
def show(
    context: typer.Context,
    model: Annotated[str, _REFERENCE],
) -> None:
    """Show a version of a model."""
    with connect(context) as client:
        details = client.get_model(model)
        version, scores = details.version, details.version.scores
    print_fields(
        [
            ("model", version.reference),
            ("all versions", ", ".join(map(str, details.model.versions))),
            ("aliases", ", ".join(f"{alias.alias} → {alias.version}" for alias in details.model.aliases) or "-"),
            *(("unreadable", line) for line in details.model.unreadable),
            ("languages", f"{version.source_language} to {version.target_language}"),
            ("BLEU", f"{scores.bleu:.1f}{_of(scores.translated_pairs)}"),
            ("chrF", f"{scores.chrf:.1f}{_of(scores.translated_pairs)}"),
            ("signature", scores.bleu_signature or "-"),
            ("nll per token", f"{scores.nll_per_token:.4f}{_of(scores.loss_pairs)}"),
            ("int8", int8_text(version.int8)),
            ("weights", f"{scores.weights}, step {scores.step:,}"),
            ("parameters", f"{version.parameters:,}"),
            ("size", f"{version.size_bytes / 1e6:.1f} MB"),
            ("initial model", version.initial_model or "-"),
            ("run", version.run_id),
            ("corpus", version.corpus_id),
            ("digest", version.digest),
            ("published", version.create_time.isoformat(timespec="seconds")),
        ]
    )


def score_warnings(versions: Sequence[ModelVersion]) -> Iterator[str]:
    """Yield a warning for each language pair whose versions have BLEU scores that are not comparable: of other
    validation pairs or signatures, or of unknown ones."""
    by_languages: dict[str, list[ModelVersion]] = {}
    for version in versions:
        by_languages.setdefault(_languages(version), []).append(version)
    for languages, group in by_languages.items():
        if len(group) < 2:
            continue
        reasons = []
        if len({version.corpus_id for version in group}) > 1:
            reasons.append("validated on different corpora")
        numbers = {version.scores.translated_pairs for version in group}
        if len(numbers) > 1 or 0 in numbers:
            reasons.append("of different numbers of pairs (" + ", ".join(map(_number, sorted(numbers))) + ")")
        signatures = {version.scores.bleu_signature for version in group}
        if len(signatures) > 1 or "" in signatures:
            reasons.append("of different or unknown signatures")
        if reasons:
            names = ", ".join(version.reference for version in group)
            yield f"the {languages} scores of {names} are not comparable: they are {', '.join(reasons)}"


def _number(pairs: int) -> str:
    return f"{pairs:,}" if pairs else "unknown"


def _languages(version: ModelVersion) -> str:
    return f"{version.source_language}-{version.target_language}"


def int8_text(outcome: Int8Outcome | None) -> str:
    """Return the measured effect of int8 on BLEU."""
    if outcome is None:
        return "-"
    kept = "" if outcome.kept else ", not published"
    if outcome.fp32_bleu is None or outcome.int8_bleu is None:
        return f"not measured{kept}"
    # Adding zero turns -0.0 into 0.0.
    gained = round(outcome.int8_bleu - outcome.fp32_bleu, 2) + 0.0
    return f"{gained:+.2f} BLEU against fp32 ({outcome.pairs:,} pairs){kept}"


def _of(pairs: int) -> str:
    """Return the number of scored pairs; empty if the model does not record it."""
    return f" ({pairs:,} pairs)" if pairs else ""


@app.command()
def alias(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")],
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help='Name of the alias, such as "production".')],
    version: Annotated[
        int | None, typer.Argument(metavar="[VERSION]", help="Version to point the alias at.", min=1, max=2**31 - 1)
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the alias.")] = False,
) -> None:
    """Point the alias NAME@ALIAS at a version, or delete it."""
    if delete == (version is not None):
        raise typer.BadParameter("pass either VERSION or --delete")
    with connect(context) as client:
        if version is None:
            client.delete_model_alias(name, alias)
            print_line("deleted")
        else:
            client.set_model_alias(name, alias, version, timeout_s=_LOAD_TIMEOUT_S)
            print_line(f"{name}@{alias} is {name}/{version}")


@app.command()
def delete(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help='Model version: "name/version".')],
) -> None:
    """Delete a model version permanently; its number is not reused."""
    with connect(context) as client:
        client.delete_model_version(model)
    print_line("deleted")


@app.command()
def download(
    context: typer.Context,
    model: Annotated[str, _REFERENCE],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder to create.")],
) -> None:
    """Download a model version. To publish it on another server: `ferryman-service import-model FOLDER NAME`."""
    if not folder.name:
        raise typer.BadParameter(f"FOLDER is {str(folder)!r}, which has no name; pass the path of a new folder")
    with connect(context) as client:
        version = client.download_model(model, folder)
    print_line(f"{version.reference}: {version.size_bytes / 1e6:.1f} MB in {folder}")


@app.command()
def load(context: typer.Context, model: Annotated[str, _REFERENCE]) -> None:
    """Load a model version into the server's memory before the first translation."""
    with connect(context) as client:
        loaded = client.load_model(model, timeout_s=_LOAD_TIMEOUT_S)
    print_line(f"{loaded.model}: {loaded.memory_bytes / 1e6:.1f} MB, loaded in {loaded.load_duration_s:.1f} s")


@app.command()
def unload(context: typer.Context, model: Annotated[str, _REFERENCE]) -> None:
    """Unload a model version from the server's memory, after its translations in progress."""
    with connect(context) as client:
        was_loaded = client.unload_model(model, timeout_s=_LOAD_TIMEOUT_S)
    print_line("unloaded" if was_loaded else "was not loaded")


def _list_loaded(context: typer.Context) -> None:
    with connect(context) as client:
        rows = [
            (loaded.model, f"{loaded.memory_bytes / 1e6:.1f} MB", f"{loaded.load_duration_s:.1f} s")
            for loaded in client.list_loaded_models()
        ]
    print_table(("loaded model", "memory", "load time"), rows)
