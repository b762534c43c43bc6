"""Programs that are measured by turns: one works for some seconds while the others wait, then the next, and so on.

A disturbance of the machine so affects all of them alike. This file needs only the standard library, so that it can be
imported in a peer's own environment.

A program prints a line of JSON when it has started, and one after each turn; it reads a line with the seconds of its
next turn, and ends at the end of its input.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.shared.process import JsonProcess, take_stdout

LEAST_UPDATES: Final = 3
_SETTLE_S: Final = 0.5


class TurnsOver(BaseException):
    """Raised in a measured program when no turn will follow. Not an Exception: nothing should handle it on its way."""


class Turns:
    """The measured program's side. Everything else that it prints goes to the standard error output."""

    def __init__(self, **facts: float) -> None:
        """Take the standard output; `facts` go into the first line."""
        self._facts = facts
        self._answers = take_stdout()
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._last_s = self._end_s = 0.0
        self._begun = False

    def boundary(self, tokens: int) -> None:
        """Call before the first update, and after each with its real target tokens. Waits while others have their turn.

        Raises TurnsOver.
        """
        now_s = time.perf_counter()
        if not self._begun:
            self._begun = True
            self._answer(self._facts)
        else:
            self._seconds.append(now_s - self._last_s)
            self._tokens.append(tokens)
            if now_s < self._end_s or len(self._seconds) < LEAST_UPDATES:
                self._last_s = now_s
                return
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self._answer({"seconds": self._seconds, "tokens": self._tokens, "peak_memory_mb": round(memory_mb)})
        if not (line := sys.stdin.readline()):
            raise TurnsOver
        self._seconds, self._tokens = [], []
        self._last_s = time.perf_counter()
        self._end_s = self._last_s + float(line)

    def _answer(self, value: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(value) + "\n")


@dataclass
class Contestant:
    """The measuring program's side of one measured program, and what was measured of it, turn by turn."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    facts: dict[str, float] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    peak_memory_mb: float = 0.0
    _process: JsonProcess | None = None

    def start(self) -> None:
        """Start the program and wait until it is ready. Raises ProcessFailed."""
        self._process = JsonProcess(self.name, self.command, self.environment, self.log)
        self.facts = self._process.receive()

    def turn(self, seconds: float, *, counts: bool = True) -> None:
        """Let the program work; raises ProcessFailed."""
        assert self._process is not None, "`start` comes first"
        self._process.send(str(seconds))
        answer = self._process.receive()
        self.peak_memory_mb = answer.pop("peak_memory_mb")
        if counts:
            self.turns.append(answer)

    def stop(self) -> None:
        """Kill the program if it runs."""
        if self._process is not None:
            self._process.stop()

    def turn_rates(self) -> list[float]:
        """Return the tokens per second of each turn."""
        return [sum(turn["tokens"]) / sum(turn["seconds"]) for turn in self.turns]

    def update_rates(self) -> list[float]:
        """Return the tokens per second of each update."""
        return [n / s for turn in self.turns for n, s in zip(turn["tokens"], turn["seconds"], strict=True)]

    def summary(self) -> dict[str, float]:
        """Return what is reported of the program."""
        rates = self.update_rates()
        tokens = [n for turn in self.turns for n in turn["tokens"]]
        return {
            "tokens_per_s": round(statistics.median(self.turn_rates()), 1),
            "p10": round(quantile(rates, 0.1), 1),
            "p90": round(quantile(rates, 0.9), 1),
            "updates": len(rates),
            "tokens_per_update": round(statistics.fmean(tokens), 1),
            "peak_memory_mb": self.peak_memory_mb,
            **self.facts,
        }


@contextmanager
def started(contestants: Sequence[Contestant]) -> Iterator[None]:
    """Start the programs, one after the other, and end them at the end of the block."""
    try:
        for contestant in contestants:
            contestant.start()
        yield
    finally:
        for contestant in contestants:
            contestant.stop()


def alternate(contestants: Sequence[Contestant], *, rounds: int, turn_s: float) -> None:
    """Give each program a turn to warm up and then one in each round, printing the rates."""
    for number in range(rounds + 1):
        for contestant in contestants:
            time.sleep(_SETTLE_S)  # the threads of the one before spin a little before they sleep
            contestant.turn(turn_s, counts=number > 0)
        if number:
            rates = ", ".join(f"{contestant.name} {contestant.turn_rates()[-1]:,.0f}" for contestant in contestants)
            print(f"round {number}: {rates} target tokens/s", flush=True)


def median_ratio(one: Contestant, other: Contestant) -> float:
    """Return the median over the rounds of how many times as fast `one` was."""
    pairs = zip(one.turn_rates(), other.turn_rates(), strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
