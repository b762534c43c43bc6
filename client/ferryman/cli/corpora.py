"""`ferryman corpus`: uploads, lists, shows and deletes corpora."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ferryman import Corpus, SplitStatistics
from ferryman.cli.common import connect
from ferryman.cli.output import print_fields, print_line, print_message, print_table, unreadable

app = typer.Typer(no_args_is_help=True, help="Manage parallel corpora.")


@app.command()
def upload(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Display name of the corpus.")],
    source: Annotated[str, typer.Option(help="Source language, such as en.")],
    target: Annotated[str, typer.Option(help="Target language, such as de.")],
    train: Annotated[
        tuple[Path, Path],
        typer.Option(help="Source and target file with the training pairs: one sentence a line, plain or .gz."),
    ],
    validation: Annotated[tuple[Path, Path], typer.Option(help="Source and target file with the validation pairs.")],
    request_id: Annotated[str | None, typer.Option(help="Make the upload idempotent with this UUID.")] = None,
) -> None:
    """Upload a corpus and print its id on the first line. Warnings about the text go to standard error."""
    with connect(context) as client:
        corpus = client.upload_corpus(name, source, target, train=train, validation=validation, request_id=request_id)
    for warning in corpus.warnings:
        print_message(
            f"Warning: {warning.field}: {warning.message} ({warning.code}; first example: {warning.example!r})"
        )
    print_line(corpus.corpus_id)
    print_line(f"{corpus.train.pairs:,} training pairs, {corpus.validation.pairs:,} validation pairs")


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the corpora, newest first."""
    with connect(context) as client:
        rows = [
            (c.corpus_id, c.display_name, f"{c.source_language}-{c.target_language}", c.train.pairs, c.validation.pairs)
            if not c.unreadable
            else (c.corpus_id, unreadable(c.unreadable), "-", "-", "-")
            for c in client.list_corpora()
        ]
    print_table(("corpus", "name", "languages", "training pairs", "validation pairs"), rows)


@app.command()
def show(
    context: typer.Context, corpus_id: Annotated[str, typer.Argument(metavar="CORPUS", help="Id of the corpus.")]
) -> None:
    """Show a corpus and its first sentence pairs."""
    with connect(context) as client:
        corpus = client.get_corpus(corpus_id)
    print_fields(
        [
            ("corpus", corpus.corpus_id),
            ("name", corpus.display_name),
            ("languages", f"{corpus.source_language} to {corpus.target_language}"),
            ("training", _describe(corpus.train)),
            ("validation", _describe(corpus.validation)),
            ("digest", corpus.digest),
            ("stored", corpus.create_time.isoformat(timespec="seconds")),
            *_samples(corpus),
            *(("warning", f"{warning.field}: {warning.message}") for warning in corpus.warnings),
        ]
    )


@app.command()
def delete(
    context: typer.Context, corpus_id: Annotated[str, typer.Argument(metavar="CORPUS", help="Id of the corpus.")]
) -> None:
    """Delete a corpus that no unfinished run uses; models and finished runs remain."""
    with connect(context) as client:
        client.delete_corpus(corpus_id)
    print_line("deleted")


def _describe(split: SplitStatistics) -> str:
    return (
        f"{split.pairs:,} pairs ({split.empty_pairs:,} with an empty side), "
        f"{split.source_words:,} source words, {split.target_words:,} target words"
    )


def _samples(corpus: Corpus) -> list[tuple[str, str]]:
    return [("sample", f"{pair.source} → {pair.target}") for pair in corpus.train.samples]
