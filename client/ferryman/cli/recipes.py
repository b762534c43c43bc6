"""Builds recipes from a TOML file and `path=value` overrides."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types as python_types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ferryman._checks import raise_any
from ferryman.errors import InvalidRecipe, Violation
from ferryman.types import Recipe

T = TypeVar("T")


def build_recipe(file: Path | None, preset: str | None, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of the file, replaced in part by the preset and then by overrides such as "model.d_model=64".

    Raises InvalidRecipe for invalid TOML, unknown fields and malformed overrides; OSError.
    """
    values = _read(file) if file is not None else {}
    if preset is not None:
        values["preset"] = preset
    violations = [violation for override in overrides for violation in _apply(values, override)]
    recipe = _build(Recipe, values, "recipe", violations)
    raise_any(violations, InvalidRecipe)
    return recipe


def to_toml(recipe: Recipe) -> str:
    """Return the set fields as TOML, which `build_recipe` can read."""
    tables = dataclasses.asdict(recipe)
    lines = _assignments({name: value for name, value in tables.items() if not isinstance(value, dict)})
    for title, table in tables.items():
        if isinstance(table, dict) and (part := _assignments(table)):
            lines += ["", f"[{title}]", *part]
    return "\n".join(lines).strip()


def _assignments(table: Mapping[str, object]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in table.items() if value is not None]


def _toml(value: object) -> str:
    # JSON strings and booleans are valid TOML; JSON's Infinity is not.
    return json.dumps(str(value)) if isinstance(value, str) else repr(value).lower()


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid("recipe", f"{file} is not valid TOML: {error}") from error


def _apply(values: dict[str, Any], override: str) -> Iterator[Violation]:
    """Apply the override to `values`; yield a violation if it is malformed."""
    path, equals, text = override.partition("=")
    *parents, name = path.strip().split(".")
    if not equals or not name:
        yield Violation(field="set", description=f"{override!r} is not FIELD=VALUE; write it like model.d_model=64")
        return
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            yield Violation(field=f"recipe.{path}", description=f"{parent} is a value, not a table")
            return
    values[name] = _parse(text.strip())


def _parse(text: str) -> object:
    """Return the TOML value, or the text itself if it is not TOML, so that `norm=pre` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _build(cls: type[T], values: object, path: str, violations: list[Violation]) -> T:
    """Build the dataclass from the table; add a violation for each unknown field and skip it."""
    if not isinstance(values, Mapping):
        violations.append(Violation(field=path, description=f"is {values!r}, must be a table of fields"))
        return cls()
    hints = typing.get_type_hints(cls)
    unknown = f"is not a field of {path}; its fields are {', '.join(hints)}"
    violations += [
        Violation(field=f"{path}.{name}", description=unknown, reason="UNKNOWN_FIELD")
        for name in values
        if name not in hints
    ]
    return cls(
        **{
            name: _value(hints[name], value, f"{path}.{name}", violations)
            for name, value in values.items()
            if name in hints
        }
    )


def _value(hint: Any, value: object, path: str, violations: list[Violation]) -> object:  # noqa: ANN401 (an annotation has no common type)
    choices = typing.get_args(hint) if isinstance(hint, python_types.UnionType) else (hint,)
    part = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
    return value if part is None else _build(typing.cast("type[Any]", part), value, path, violations)


def _invalid(field: str, description: str) -> InvalidRecipe:
    return InvalidRecipe(f"{field}: {description}", violations=[Violation(field=field, description=description)])
