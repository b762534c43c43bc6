"""Parts of a benchmark for a GPU, each in a process of its own with a time limit: one that fails, hangs or loses the
device costs only itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Finding = dict[str, Any]
TARGET_GPUS: Final = ("H100", "H200")
"""Targets in tokens per second are those of GPUs whose name holds one of these."""
_LEAST_S: Final = 20.0


@dataclass(frozen=True)
class Section:
    """A part of a benchmark: its work returns what it found. `limit_s` bounds it."""

    name: str
    limit_s: float
    work: Callable[[], Finding]


def target_on(gpu: str, target: float, *, small: bool) -> float | None:
    """Return the target if it is of the GPU with this name; None if the rate is only reported."""
    return target if not small and any(name in gpu for name in TARGET_GPUS) else None


def run_sections(
    sections: Sequence[Section],
    command: Sequence[str],
    limit_s: float,
    save: Callable[[Mapping[str, Finding]], None],
    brief: Callable[[Finding], str] = str,
) -> dict[str, Finding]:
    """Run those sections that fit the time, one after the other; after each, everything so far is saved and a line is
    printed: the error, or what `brief` says of the finding.

    The command runs one section if `--section NAME --section-out FILE` follow.
    """
    started_s = time.monotonic()
    found: dict[str, Finding] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, section in enumerate(sections):
            left_s = limit_s - (time.monotonic() - started_s)
            if left_s < _LEAST_S:
                found[section.name] = {"left_out": "no time was left"}
            else:
                out = Path(folder) / f"{number}.json"
                found[section.name] = _run_alone(section, command, min(left_s, section.limit_s), out)
            print(f"{section.name}: {_line(found[section.name], brief)}", flush=True)
            save(found)
    return found


def run_section(section: Section, out: Path) -> None:
    """Run a section in this process and write what it found."""
    try:
        found = section.work()
    except Exception:  # noqa: BLE001 (the other sections still run)
        found = {"error": traceback.format_exc()[-2000:]}
    out.write_text(json.dumps(found))


def _run_alone(section: Section, command: Sequence[str], limit_s: float, out: Path) -> Finding:
    started_s = time.monotonic()
    whole = [*command, "--section", section.name, "--section-out", str(out)]
    try:
        ended = subprocess.run(whole, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=limit_s)
        failure, log = f"exit status {ended.returncode}", ended.stderr
    except subprocess.TimeoutExpired as error:
        failure, log = f"took longer than {limit_s:.0f} s", _text(error.stderr)
    found: Finding = json.loads(out.read_text()) if out.exists() else {"error": f"{failure}: {log[-1500:]}"}
    if log.strip():
        found["log"] = log[-1500:]
    return found | {"seconds": round(time.monotonic() - started_s, 1)}


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _line(found: Finding, brief: Callable[[Finding], str]) -> str:
    if "error" in found:
        return str(found["error"]).strip().splitlines()[-1]
    return brief({name: value for name, value in found.items() if name != "log"})[:1000]


def python_module(module: str) -> list[str]:
    """Return the command that runs a module with this interpreter."""
    return [sys.executable, "-m", module]
