"""Programs that answer commands, a line of JSON each: so two engines can be measured by turns, each in a process and an
environment of its own. This file needs only the standard library.

A program prints a line of JSON when it is ready, and one for each line that it reads, `{"command": NAME, ...}`; it ends
at the end of its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

_LOG_TAIL_CHARACTERS: Final = 2000
_KIB_PER_MIB: Final = 1024


class ProcessFailed(Exception):
    """A program ended too early. The message holds the end of its log."""


def take_stdout() -> TextIO:
    """Return the standard output for answers; everything else that the program prints goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def answer_commands(handlers: Mapping[str, Callable[..., Any]], **facts: object) -> None:
    """Send `facts`, then answer commands until the input ends."""
    with take_stdout() as answers:
        answers.write(json.dumps(facts) + "\n")
        for line in sys.stdin:
            arguments = json.loads(line)
            handler = handlers[arguments.pop("command")]
            answers.write(json.dumps(handler(**arguments)) + "\n")


def log_tail(log: Path) -> str:
    """Return the end of a log, as the end of an error message."""
    return f"; {log} ends with:\n{log.read_text(errors='replace')[-_LOG_TAIL_CHARACTERS:]}"


class JsonProcess:
    """A running program that reads lines and answers each with a line of JSON."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start the program; its standard error output goes to `log`."""
        self._name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **environment},
            )

    def send(self, line: str) -> None:
        """Write a line to the program."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the program has ended: `receive` says how
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def receive(self) -> Any:  # noqa: ANN401 (what JSON may hold)
        """Return the program's next answer; raises ProcessFailed."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            status = self._process.wait()
            raise ProcessFailed(f"{self._name} ended with exit status {status}{log_tail(self._log)}")
        return json.loads(line)

    def stop(self) -> None:
        """Kill the program."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # unread input is of no use any more
                pipe.close()


class ServingProcess:
    """A program that answers commands, for the length of a `with` block."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._command = command
        self._environment = environment
        self._log = log
        self._process: JsonProcess | None = None

    def __enter__(self) -> Self:
        """Start the program and wait until it is ready; raises ProcessFailed."""
        self._process = JsonProcess(self.name, self._command, self._environment, self._log)
        try:
            self.facts = self._process.receive()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 (what JSON may hold)
        """Return the answer to a command; raises ProcessFailed."""
        assert self._process is not None, "the process runs in a `with` block"
        self._process.send(json.dumps({"command": command, **arguments}))
        return self._process.receive()

    def stop(self) -> None:
        """Kill the program if it runs."""
        if self._process is not None:
            self._process.stop()
            self._process = None


def memory_mib(pid: int | str = "self") -> dict[str, float]:
    """Return a process's memory: resident (RSS), resident at its peak, and RSS with pages that other processes share
    counted in part (PSS)."""
    names = {"VmRSS": "rss_mib", "VmHWM": "peak_rss_mib", "Pss": "pss_mib"}
    text = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = (line.split() for line in text.splitlines())
    return {names[f[0][:-1]]: round(int(f[1]) / _KIB_PER_MIB, 1) for f in fields if f and f[0][:-1] in names}
