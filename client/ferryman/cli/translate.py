"""`ferryman translate`: translate arguments or standard input."""

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
from ferryman.cli.ending import CALLERS_MISTAKE, was_interrupted
from ferryman.cli.lines import Line, read_lines, standard_input
from ferryman.errors import FerrymanError, InvalidSentence, reason_of

_INVALID: Final = reason_of(InvalidSentence)


def _option(text: str, *names: str) -> Any:  # noqa: ANN401 (typer's own)
    return typer.Option(*names, help=text, show_default=False)


def translate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='"name" for the latest version, "name/version", or "name@alias".')
    ],
    text: Annotated[
        list[str] | None, typer.Argument(help="Sentences; without any, the lines of standard input.")
    ] = None,
    beam_size: Annotated[int | None, _option("Hypotheses kept at each step; 1 is greedy.")] = None,
    n_best: Annotated[int | None, _option("Hypotheses to print: number, score and text, by tabs.")] = None,
    length_penalty: Annotated[float | None, _option("Exponent of the length normalisation.")] = None,
    max_length: Annotated[int | None, _option("Longest translation, in subwords.")] = None,
    max_length_ratio: Annotated[float | None, _option("Longest translation, as a multiple of the source.")] = None,
    min_length: Annotated[int | None, _option("Shortest translation, in subwords.")] = None,
    beam_patience: Annotated[
        float | None, _option("Multiply the number of hypotheses that the beam waits for.")
    ] = None,
    early_stopping: Annotated[EarlyStopping | None, _option("When a beam has found enough.")] = None,
    sample: Annotated[bool, _option("Draw at random instead of searching.", "--sample")] = False,
    temperature: Annotated[float | None, _option("Divides the logits; implies --sample.")] = None,
    top_k: Annotated[int | None, _option("Draw from so many subwords; implies --sample.")] = None,
    top_p: Annotated[float | None, _option("Draw from so much probability; implies --sample.")] = None,
    seed: Annotated[int | None, _option("The same seed draws the same; implies --sample.")] = None,
    repetition_penalty: Annotated[float | None, _option("Above 1, what was said becomes less probable.")] = None,
    no_repeat_ngram_size: Annotated[int | None, _option("No so many subwords in a row twice.")] = None,
    prefix: Annotated[str, _option("Words that every translation must begin with.")] = "",
    split: Annotated[bool, _option("Split each text or line into sentences first.", "--split")] = False,
    token_scores: Annotated[bool, _option("Subwords and scores, with --json.", "--token-scores")] = False,
    alignment: Annotated[bool, _option("Subwords and what they look at, with --json.", "--alignment")] = False,
    as_json: Annotated[bool, _option("Print one JSON object a sentence, and one if the call fails.", "--json")] = False,
) -> None:
    """Translate sentences, one a line: arguments, or standard input as UTF-8, to UTF-8.

    A line of standard input that cannot be translated (too long, not UTF-8, control characters) gives an empty line and
    a message with its number on standard error. The others are translated; the exit status is 2 then.
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
    try:
        if text:
            _translate_arguments(context, job, text)
        else:
            _translate_lines(context, job)
    except FerrymanError as error:
        job.show_failure(error)
        raise


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be done with every sentence, and how it is printed."""

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
        """The call has failed, and no sentence has a result any more: an object without a source."""
        if self.as_json and not was_interrupted():
            named = {"reason": error.reason, "message": failure_text(error), "request_id": error.request_id}
            output.print_json({"error": named})


def _lean(value: Translation | SentenceError) -> dict[str, Any]:
    """Return the fields, without what nobody asked for."""
    return asdict(value, dict_factory=lambda fields: {name: item for name, item in fields if item != ()})


def _translate_arguments(context: typer.Context, job: _Job, sentences: Sequence[str]) -> None:
    prefixes = [job.prefix] * len(sentences) if job.prefix else []
    with connect(context) as client:
        result = client.translate(
            job.model, sentences, target_prefixes=prefixes, split_sentences=job.split, **job.options
        )
    for number, (source, translation) in enumerate(zip(sentences, result.translations, strict=True)):
        job.show(number, source, translation, result.model)


def _translate_lines(context: typer.Context, job: _Job) -> None:
    """Translate standard input as a stream: any number of lines in bounded memory, in order."""
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
        raise typer.Exit(CALLERS_MISTAKE)


def _sentences(lines: Iterable[Line], sources: deque[Line], prefix: str) -> Iterator[StreamSentence]:
    """Yield the lines as sentences, and remember them in `sources`.

    A line that is no text goes as an empty sentence: its result comes in its turn, and soon.
    """
    for line in lines:
        sources.append(line)
        if line.problem:
            yield StreamSentence(id="", sentence="")
        else:
            yield StreamSentence(id="", sentence=line.text, target_prefix=prefix)
