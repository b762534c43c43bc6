"""The table of all options in docs/configuration.md.

`python -m ferryman_service.config.reference docs/configuration.md` writes it anew; a test compares the two.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Final

from ferryman_service.config.service_config import HELP, RANGES, Role, ServiceConfig, flag_of
from ferryman_service.config.sources import LOG_LEVELS, plain_value, toml_value

BEGIN: Final = "<!-- options: written by python -m ferryman_service.config.reference -->\n"
END: Final = "<!-- end of options -->\n"


def table() -> str:
    """Return the options as a table in Markdown."""
    rows = ["| key of the file | flag | default | may be | what |", "| --- | --- | --- | --- | --- |"]
    for option, text in HELP.items():
        default = getattr(ServiceConfig(), option)
        cells = (f"`{option}`", _flag(option), f"`{toml_value(option, default)}`", _legal(option), text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def with_table(document: str) -> str:
    """Return the document with the table of now; raises ValueError if it has no place for one."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there must be the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _flag(option: str) -> str:
    default = getattr(ServiceConfig(), option)
    return f"`{flag_of(option)}`" + (f", `--no-{option.replace('_', '-')}`" if isinstance(default, bool) else "")


def _legal(option: str) -> str:
    default = getattr(ServiceConfig(), option)
    if option in RANGES:
        low, high = RANGES[option]
        return f"{plain_value(low)} to {plain_value(high)}{'' if isinstance(default, float) else ', whole'}"
    if isinstance(default, bool):
        return "`true`, `false`"
    if option == "log_level":
        return ", ".join(f"`{level}`" for level in LOG_LEVELS)
    if isinstance(default, enum.StrEnum):
        return ", ".join(f"`{member}`" for member in type(default))
    if isinstance(default, frozenset):
        return ", ".join(f"`{role}`" for role in Role) + ", or both"
    return "a path" if isinstance(default, Path) else "text"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
