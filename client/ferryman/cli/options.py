"""Options of the command line: all mistakes at once, and under the names that their user knows."""

from __future__ import annotations

import re
from typing import Any, Final

import typer
from typer.core import TyperCommand

_NAMES: Final = {
    "target": "--server",
    "alias": "ALIAS",
    "corpus_id": "CORPUS",
    "max_points": "--points",
    "model": "MODEL",
    "model_name": "MODEL",
    "name": "NAME",
    "run_id": "RUN",
    "subject": "--run, --preset, --kind",
    "version": "VERSION",
    "display_name": "NAME",
    "source_language": "--source",
    "target_language": "--target",
    "states": "--state",
    "return_token_scores": "--token-scores",
    "return_alignment": "--alignment",
    "split_sentences": "--split",
    "target_prefixes": "--prefix",
    "target_prefix": "--prefix",
}
"""What is no option of the same name."""
_WITHIN: Final = re.compile(r"^(?:config\.)?(?:options\.)?(?:sampling\.)?|^header\.|^schedule\.")


class FerrymanCommand(TyperCommand):
    """A command that names every mistake in its options, not the first alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 (typer's context has no public type here)
        """Parse; a single mistake is told as typer does."""
        try:
            return super().parse_args(ctx, list(args))
        except typer.BadParameter:
            mistakes = self._mistakes(ctx, args)
            if len(mistakes) > 1:
                ctx.fail("\n".join([f"{len(mistakes)} mistakes:", *mistakes]))
            raise

    def _mistakes(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        mistakes: list[str] = []
        for parameter in self.get_params(ctx):
            if parameter.is_eager:
                continue
            try:
                parameter.handle_parse_result(ctx, given, [])
            except typer.BadParameter as error:
                mistakes.append(error.format_message())
        return mistakes


def option_of(field: str) -> str:
    """Return what the user of the command line calls a field of a request: "options.beam_size" is "--beam-size".

    A recipe's fields have the names of its file, which are those of --set; a sentence is counted from 1.
    """
    if field == "recipe" or field.startswith("recipe."):
        return field.removeprefix("recipe.")
    if counted := re.fullmatch(r"(sentences|target_prefixes|states)\[(\d+)\]", field):
        place = int(counted[2]) + 1
        return f"sentence {place}" if counted[1] == "sentences" else f"{_NAMES[counted[1]]} {place}"
    if file := re.fullmatch(r"(train|validation)(?:\.(source|target))?(.*)", field):
        return f"--{file[1]}{file[3]} ({file[2]} file)" if file[2] else f"--{file[1]}{file[3]}"
    if field == "sentences":
        return field
    name = _WITHIN.sub("", field)
    return _NAMES.get(name) or f"--{name.replace('_', '-')}"
