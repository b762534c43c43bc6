"""`ferryman translate`: translates arguments or standard input."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import typer

from ferryman import EarlyStopping, Sampling, SentenceError, StreamSentence, TranslateOptions, Translation
from ferryman.cli import output
from ferryman.cli.common import connect, failure_text
from ferryman.cli.ending import USAGE_ERROR, was_interrupted
from ferryman.cli.lines import Line, read_lines, standard_input
from ferryman.errors import FerrymanError, InvalidSentence, reason_of

_INVALID: Final = reason_of(InvalidSentence)
_TOP_P_HELP: Final = "Sample from the smallest set of tokens with this total probability; implies --sample."


def _option(text: str, *names: str) -> Any:  # noqa: ANN401 (typer's own)
    return typer.Option(*names, help=text, show_default=False)


def translate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='Model: "name" (latest version), "name/version" or "name@alias".')
    ],
    text: Annotated[
        list[str] | None, typer.Argument(help="Sentences to translate; by default the lines of standard input.")
    ] = None,
    beam_size: Annotated[int | None, _option("Set the beam size; 1 is greedy search.")] = None,
    n_best: Annotated[int | None, _option("Print this many hypotheses, each with sentence number and score.")] = None,
    length_penalty: Annotated[float | None, _option("Set the exponent of the length normalization.")] = None,
    max_length: Annotated[int | None, _option("Limit the length to this many subwords.")] = None,
    max_length_ratio: Annotated[
        float | None, _option("Limit the length to this multiple of the source length.")
    ] = None,
    min_length: Annotated[int | None, _option("Set the minimum length, in subwords.")] = None,
    beam_patience: Annotated[
        float | None, _option("End the search after patience × beam size finished hypotheses.")
    ] = None,
    early_stopping: Annotated[
        EarlyStopping | None,
        _option("Set when beam search stops."),
    ] = None,
    sample: Annotated[bool, _option("Sample at random instead of using beam search.", "--sample")] = False,
    temperature: Annotated[float | None, _option("Divide the logits by this temperature; implies --sample.")] = None,
    top_k: Annotated[int | None, _option("Sample from this many most probable tokens; implies --sample.")] = None,
    top_p: Annotated[float | None, _option(_TOP_P_HELP)] = None,
    seed: Annotated[int | None, _option("Set the random seed, for reproducible samples; implies --sample.")] = None,
    repetition_penalty: Annotated[float | None, _option("Penalize repeated tokens; 1 is off.")] = None,
    no_repeat_ngram_size: Annotated[int | None, _option("Forbid repeating any n-gram of this size.")] = None,
    prefix: Annotated[str, _option("Force every translation to begin with this target prefix.")] = "",
    split: Annotated[bool, _option("Split each text or line into sentences.", "--split")] = False,
    token_scores: Annotated[bool, _option("Print subword scores (needs --json).", "--token-scores")] = False,
    alignment: Annotated[bool, _option("Print source alignments (needs --json).", "--alignment")] = False,
    as_json: Annotated[bool, _option("Print one JSON object per sentence.", "--json")] = False,
) -> None:
    """Translate sentences: the arguments, or the lines of standard input. Input and output are UTF-8.

    For a line of standard input that cannot be translated (too long, not UTF-8, control characters), print an empty
    line and an error with the line number on standard error, translate the others, and end with exit status 2.
    """
    output.write_utf8()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    options = TranslateOptions(
        beam_size=beam_size,
        n_best=n_best,
        length_penalty=length_penalty,
        max_length=max_length,
        max_length_ratio=max_length_ratio,
        min_length=min_length,
        beam_patience=beam_patience,
        early_stopping=early_stopping,
        sampling=sampling if sample or sampling != Sampling() else None,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        return_token_scores=token_scores or None,
        return_alignment=alignment or None,
    )
    job = _Job(model=model, prefix=prefix, split=split, as_json=as_json, numbered=n_best is not None, options=options)
    _run(context, job, text or ())


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The model, the options and the output format of one command."""

    model: str
    prefix: str
    split: bool
    as_json: bool
    numbered: bool
    options: TranslateOptions

    def show(self, number: int, source: str, translation: Translation, model: str) -> None:
        if self.as_json:
            output.print_json({"source": source, "model": model, **_lean(translation)})
        elif self.numbered:
            for hypothesis in translation.hypotheses:
                output.print_row((number, f"{hypothesis.score:.4f}", hypothesis.text), flush=True)
        else:
            output.print_translation(translation.text)

    def show_error(self, number: int, source: str, error: SentenceError, model: str) -> None:
        if self.as_json:
            output.print_json({"source": source, "model": model, "error": _lean(error)})
        elif not self.numbered:
            output.print_line(flush=True)
        output.print_message(f"line {number + 1}: {error.reason}: {error.message}")

    def show_failure(self, error: FerrymanError) -> None:
        """Print the error of a failed call as an object without a source."""
        if self.as_json and not was_interrupted():
            fields = {"reason": error.reason, "message": failure_text(error), "request_id": error.request_id}
            output.print_json({"error": fields})


def _lean(value: Translation | SentenceError) -> dict[str, Any]:
    """Return the fields, without empty tuples."""
    return asdict(value, dict_factory=lambda fields: {name: item for name, item in fields if item != ()})


def _run(context: typer.Context, job: _Job, text: Sequence[str]) -> None:
    """Translate the arguments, or standard input if there are none."""
    try:
        if text:
            _translate_arguments(context, job, text)
        else:
            _translate_lines(context, job)
    except FerrymanError as error:
        job.show_failure(error)
        raise


def _translate_arguments(context: typer.Context, job: _Job, sentences: Sequence[str]) -> None:
    prefixes = [job.prefix] * len(sentences) if job.prefix else []
    with connect(context) as client:
        result = client.translate(
            job.model, sentences, target_prefixes=prefixes, split_sentences=job.split, **job.options
        )
    for number, (source, translation) in enumerate(zip(sentences, result.translations, strict=True)):
        job.show(number, source, translation, result.model)


def _translate_lines(context: typer.Context, job: _Job) -> None:
    """Translate the lines of standard input in order, as a stream in bounded memory."""
    sources: deque[Line] = deque()
    failed = False
    lines = read_lines(standard_input())
    with connect(context) as client:
        stream = client.translate_stream(
            job.model, _sentences(lines, sources, job.prefix), in_order=True, split_sentences=job.split, **job.options
        )
        with closing(stream) as results:
            for number, result in enumerate(results):
                source = sources.popleft()
                error = SentenceError(reason=_INVALID, message=source.problem) if source.problem else result.error
                if error is not None:
                    job.show_error(number, source.text, error, result.model)
                    failed = True
                elif result.translation is not None:
                    job.show(number, source.text, result.translation, result.model)
    if failed:
        raise typer.Exit(USAGE_ERROR)


def _sentences(lines: Iterable[Line], sources: deque[Line], prefix: str) -> Iterator[StreamSentence]:
    """Yield the lines as sentences, and append them to `sources`.

    A line that is not text is sent as an empty sentence, so that its result keeps its position.
    """
    for line in lines:
        sources.append(line)
        if line.problem:
            yield StreamSentence(id="", sentence="")
        else:
            yield StreamSentence(id="", sentence=line.text, target_prefix=prefix)
