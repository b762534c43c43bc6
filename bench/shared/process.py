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
from typing import Any, Final, Self

_LOG_TAIL_CHARACTERS: Final = 2000
_KIB_PER_MIB: Final = 1024


class ProcessFailed(Exception):
    """A program ended too early. The message holds the end of its log."""


def answer_commands(handlers: Mapping[str, Callable[..., Any]], **facts: object) -> None:
    """Answer until no command follows; `facts` are told first. What the program prints itself goes to the standard
    error output from here on."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        answers.write(json.dumps(facts) + "\n")
        for line in sys.stdin:
            arguments = json.loads(line)
            handler = handlers[arguments.pop("command")]
            answers.write(json.dumps(handler(**arguments)) + "\n")


class ServingProcess:
    """The measuring program's side of one program; start it with `with`."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._command = command
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Start the program and wait until it is ready; raises ProcessFailed."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self._environment},
            )
        try:
            self.facts = self._read()
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
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading says how
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the program, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # what was not read is of no use any more
                    pipe.close()
            self._process = None

    def _read(self) -> Any:  # noqa: ANN401
        assert self._process is not None and self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            status = self._process.wait()
            tail = self._log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
            raise ProcessFailed(f"{self.name} ended with exit status {status}; {self._log} ends with:\n{tail}")
        return json.loads(line)


def memory_mib(pid: int | str = "self") -> dict[str, float]:
    """Return a process's memory: resident (RSS), resident at its peak, and RSS with pages that other processes share
    counted in part (PSS)."""
    names = {"VmRSS": "rss_mib", "VmHWM": "peak_rss_mib", "Pss": "pss_mib"}
    text = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = (line.split() for line in text.splitlines())
    return {names[f[0][:-1]]: round(int(f[1]) / _KIB_PER_MIB, 1) for f in fields if f and f[0][:-1] in names}
