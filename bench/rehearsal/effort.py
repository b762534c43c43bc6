"""How long a rehearsal takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

VALUES: Final = Path("deploy/rehearsal")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """`rate` is calls a second, `settle_calls` the calls between two events, `window_s` how long a time is measured."""

    values: Path
    scenarios: str
    rate: float
    settle_calls: int
    window_s: float


FULL: Final = Effort(values=VALUES / "values.yaml", scenarios="abcdef", rate=12.0, settle_calls=60, window_s=10.0)
QUICK: Final = Effort(values=VALUES / "values-quick.yaml", scenarios="abc", rate=12.0, settle_calls=15, window_s=3.0)
