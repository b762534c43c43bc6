"""Reports errors by option name, and all errors of a command line at once."""

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
    "recipe": "--recipe",
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
"""Fields of requests whose option or argument has another name."""
_RECIPE_NAMES: Final = {"stop.max_duration": "stop.max_duration_s"}
"""Fields of recipes that have another name in the recipe file."""
_PREFIX: Final = re.compile(r"^(?:config\.)?(?:options\.)?(?:sampling\.)?|^header\.|^schedule\.")


class FerrymanCommand(TyperCommand):
    """A command that reports all invalid options, not only the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 (typer's context has no public type here)
        try:
            return super().parse_args(ctx, list(args))
        except typer.BadParameter:
            problems = self._problems(ctx, args)
            if len(problems) > 1:
                ctx.fail("\n".join([f"{len(problems)} errors:", *problems]))
            raise

    def _problems(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        problems: list[str] = []
        for parameter in self.get_params(ctx):
            if parameter.is_eager:
                continue
            try:
                parameter.handle_parse_result(ctx, given, [])
            except typer.BadParameter as error:
                problems.append(error.format_message())
        return problems


def option_of(field: str) -> str:
    """Return the option or argument for a field of a request: "options.beam_size" is "--beam-size".

    The fields of a recipe get their names in the recipe file and in --set. Sentences are counted from 1.
    """
    if field.startswith("recipe."):
        name = field.removeprefix("recipe.")
        return _RECIPE_NAMES.get(name, name)
    if counted := re.fullmatch(r"(sentences|target_prefixes|states)\[(\d+)\]", field):
        number = int(counted[2]) + 1
        return f"sentence {number}" if counted[1] == "sentences" else f"{_NAMES[counted[1]]} {number}"
    if file := re.fullmatch(r"(train|validation)(?:\.(source|target))?(.*)", field):
        return f"--{file[1]}{file[3]} ({file[2]} file)" if file[2] else f"--{file[1]}{file[3]}"
    if field == "sentences":
        return field
    name = _PREFIX.sub("", field)
    return _NAMES.get(name) or f"--{name.replace('_', '-')}"
