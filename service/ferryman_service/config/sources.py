"""Where the values of the configuration come from: flag over environment over file over default.

Every option X is a flag (--x), a variable (FERRYMAN_X) and a key of the file (x). A value that should not stand in an
environment, such as a secret, is put into a file of its own, which FERRYMAN_X_FILE names.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ferryman_service.config.service_config import (
    ENVIRONMENT_PREFIX,
    HELP,
    ConfigMistakes,
    LogFormat,
    Mistake,
    Role,
    ServiceConfig,
    flag_of,
    variable_of,
)

CONFIG_VARIABLE: Final = "FERRYMAN_CONFIG"
DEFAULT_SOURCE: Final = "default"
_FILE_SUFFIX: Final = "_FILE"
_DEFAULTS: Final = ServiceConfig()
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")
_TRUTHS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}
_SECRET_NAME: Final = re.compile(r"(^|_)(key|password|secret|token)$")
_URL_CREDENTIALS: Final = re.compile(r"(?<=://)[^/@\s]+(?=@)")
# What Kubernetes sets in every pod for a Service that is called ferryman.
_SERVICE_LINK: Final = re.compile(r"FERRYMAN_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)\w*)?)")
# Set where the client runs too: its server.
_OF_THE_CLIENT: Final = frozenset({"FERRYMAN_SERVER"})
_LINK_VALUE: Final = re.compile(r"(tcp|udp)://")
_HIDDEN: Final = "(hidden)"
_SHOWN_CHARS: Final = 80


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The value of an option, and where it was found."""

    option: str
    value: object
    source: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All options, each with its source, and what looks like a mistake but harms nothing."""

    config: ServiceConfig
    settings: Sequence[Setting]
    warnings: Sequence[str]

    def lines(self) -> Iterator[str]:
        """Yield a line for each option, in TOML, its source behind it; secrets are hidden."""
        shown = [f"{setting.option} = {toml_value(setting.option, setting.value)}" for setting in self.settings]
        width = max(len(line) for line in shown)
        for line, setting in zip(shown, self.settings, strict=True):
            yield f"{line:<{width}}  # {setting.source}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config and a flag for every option."""
    parser.add_argument("--config", metavar="FILE", help=f"Read options from this TOML file. [{CONFIG_VARIABLE}]")
    for option, text in HELP.items():
        default = getattr(_DEFAULTS, option)
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {}
        shown = f"{text} [{variable_of(option)}] (default: {plain_value(default)})".replace("%", "%%")
        parser.add_argument(flag_of(option), default=None, help=shown, **kind)


def load(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """Return the effective configuration; raises ConfigMistakes with every mistake of every source."""
    mistakes: list[Mistake] = []
    found = {option: Setting(option=option, value=getattr(_DEFAULTS, option), source=DEFAULT_SOURCE) for option in HELP}
    unread: set[str] = set()
    for option, source, given in _given(arguments, environment, mistakes):
        try:
            value = read_value(option, given)
        except ValueError as error:
            mistakes.append(Mistake(options=(option,), text=f"{source} is {_shown(option, given)}, {error}"))
            unread.add(option)
        else:
            found[option] = Setting(option=option, value=value, source=source)
    try:
        config = ServiceConfig(**{option: found[option].value for option in HELP if option not in unread})  # type: ignore[arg-type]
    except ConfigMistakes as error:
        # What depends on a value that could not be read would be a guess.
        known = [mistake for mistake in error.mistakes if unread.isdisjoint(mistake.options)]
        mistakes += [_with_sources(mistake, found) for mistake in known]
    if mistakes:
        raise ConfigMistakes(mistakes, LogFormat(str(found["log_format"].value)))
    return Settings(config=config, settings=tuple(found.values()), warnings=tuple(_warnings(environment)))


def read_value(option: str, given: object) -> object:
    """Return the option's value for what a flag, a variable (text) or a file (a value of TOML) gives.

    Raises ValueError, which says what it must be.
    """
    default = getattr(_DEFAULTS, option)
    if option == "roles":
        return _roles(given)
    if option == "log_level":
        return _one_of(given if not isinstance(given, str) else given.upper(), LOG_LEVELS)
    if isinstance(default, enum.StrEnum):
        return type(default)(_one_of(given, [str(member) for member in type(default)]))
    if isinstance(default, bool):
        return _truth(given)
    if isinstance(default, int | float):
        return _number(type(default), given)
    if not isinstance(given, str):
        raise ValueError("must be text")
    if "\0" in given:
        raise ValueError("must not contain a NUL character")
    return Path(given) if isinstance(default, Path) else given


def plain_value(value: object) -> str:
    """Return a value as a flag or a variable gives it."""
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def toml_value(option: str, value: object) -> str:
    """Return a value as the file gives it; a secret is hidden."""
    if isinstance(value, bool | int | float):
        return plain_value(value)
    text = plain_value(value)
    if text and _SECRET_NAME.search(option):
        text = _HIDDEN
    text = _URL_CREDENTIALS.sub(_HIDDEN, text)
    escaped = "".join(f"\\u{ord(char):04x}" if ord(char) < 32 or char in '"\\\x7f' else char for char in text)
    return f'"{escaped}"'


def _given(
    arguments: argparse.Namespace, environment: Mapping[str, str], mistakes: list[Mistake]
) -> Iterator[tuple[str, str, object]]:
    """Yield option, source and what it gives, the source that wins last."""
    named = (("--config", arguments.config), (CONFIG_VARIABLE, environment.get(CONFIG_VARIABLE)))
    source, path = next(((source, path) for source, path in named if path), ("", None))
    for key, value in _file(source, path, mistakes).items() if path else ():
        if key in HELP:
            yield key, f"{path}: {key}", value
        else:
            text = f"{path}: unknown option {key}{_nearest(key.replace('-', '_'), HELP)}"
            mistakes.append(Mistake(options=(key,), text=text))
    for option in HELP:
        yield from _from_environment(option, environment, mistakes)
    for option in HELP:
        if (value := getattr(arguments, option)) is not None:
            yield option, flag_of(option), value


def _file(source: str, path: str, mistakes: list[Mistake]) -> Mapping[str, object]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        mistakes.append(Mistake(options=(), text=f"{source}: {path} cannot be read: {why}"))
        return {}


def _from_environment(
    option: str, environment: Mapping[str, str], mistakes: list[Mistake]
) -> Iterator[tuple[str, str, object]]:
    variable = variable_of(option)
    by_file = variable + _FILE_SUFFIX
    if variable in environment and by_file in environment:
        text = f"{variable} and {by_file} are both set; unset one of them"
        mistakes.append(Mistake(options=(option,), text=text))
    elif variable in environment:
        yield option, variable, environment[variable]
    elif by_file in environment:
        path = environment[by_file]
        try:
            # Editors and `echo` end a file with a line feed, which is not meant.
            value = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").removesuffix("\r")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            mistakes.append(Mistake(options=(option,), text=f"{by_file}: {path} cannot be read: {why}"))
        else:
            yield option, by_file, value


def _with_sources(mistake: Mistake, found: Mapping[str, Setting]) -> Mistake:
    text = _URL_CREDENTIALS.sub(_HIDDEN, mistake.text)
    sources = [found[option].source for option in mistake.options]
    if sources == [flag_of(option) for option in mistake.options]:
        return Mistake(options=mistake.options, text=text)  # which names them
    if len(sources) > 1:
        sources = [f"{option}: {source}" for option, source in zip(mistake.options, sources, strict=True)]
    return Mistake(options=mistake.options, text=f"{text} ({', '.join(sources)})")


def _warnings(environment: Mapping[str, str]) -> Iterator[str]:
    known = {CONFIG_VARIABLE, *(variable_of(option) for option in HELP)}
    known |= {variable + _FILE_SUFFIX for variable in known - {CONFIG_VARIABLE}}
    for variable in sorted(environment):
        ours = variable.startswith(ENVIRONMENT_PREFIX) and variable not in known | _OF_THE_CLIENT
        if ours and not _SERVICE_LINK.fullmatch(variable):
            yield f"unknown variable {variable} is ignored{_nearest(variable, known)}"


def _nearest(word: str, legal: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(legal), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(option: str, given: object) -> str:
    """Return the value for a message; of a secret nothing."""
    text = _HIDDEN if _SECRET_NAME.search(option) else _URL_CREDENTIALS.sub(_HIDDEN, repr(given))
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _roles(given: object) -> frozenset[Role]:
    parts = given.split(",") if isinstance(given, str) else given
    legal = [role.value for role in Role]
    if not isinstance(parts, list):
        raise ValueError("must be training, translation, or both")
    names = [part.strip() if isinstance(part, str) else part for part in parts]
    if any(name not in legal for name in names if name != ""):
        raise ValueError("must be training, translation, or both")
    return frozenset(Role(name) for name in names if name)


def _one_of(given: object, legal: Sequence[str]) -> str:
    if not isinstance(given, str) or given not in legal:
        raise ValueError(f"must be one of {', '.join(legal)}")
    return given


def _truth(given: object) -> bool:
    value = _TRUTHS.get(given.lower()) if isinstance(given, str) else given
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _number(kind: type[int | float], given: object) -> int | float:
    if isinstance(given, str) and _LINK_VALUE.match(given):
        raise ValueError(
            "must be a number; Kubernetes sets such a variable for a Service named ferryman: set "
            "enableServiceLinks: false in the pod"
        )
    text = "must be a whole number" if kind is int else "must be a number"
    if isinstance(given, bool) or not isinstance(given, str | int | float) or (kind is int and type(given) is float):
        raise ValueError(text)
    try:
        return kind(given)
    except (ValueError, OverflowError):
        raise ValueError(text) from None


assert set(HELP) == {field.name for field in dataclasses.fields(ServiceConfig)}, "every option has a line of help"
