"""The machine while a benchmark runs: its load, and the processor time of processes that are not the benchmark's.

The kernel's counters are read before the benchmark, every few seconds meanwhile, and at its end. From the time for
which the processors were busy between two readings, the time of the benchmark, of all its descendants and of kernel
threads is subtracted. Other processes took the rest, also those that this process cannot see. Times are in seconds of
one processor.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from ferryman_service.config.resources import usable_cpus

PROC: Final = Path("/proc")
BUSY_AT_LEAST_CPUS: Final = 0.2
"""Others disturb a benchmark if they keep as many processors busy between two readings."""
FIRST_WINDOW_S: Final = 0.5
WINDOW_S: Final = 5.0
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_BUSY_FIELDS: Final = (1, 2, 3, 8)
"""Of the first line of /proc/stat: user (with guests), nice, system, steal. Interrupts are nobody's."""
_KERNEL: Final = (2, "kthreadd")


@dataclass(frozen=True)
class ProcessTime:
    """A process: its command, its parent, when it started (in ticks), its own processor time, and that of its children
    that have ended."""

    command: str
    parent: int
    started: int
    own_s: float
    ended_children_s: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The counters at a moment: `busy_s` of all processors together."""

    at_s: float
    busy_s: float
    load_averages: tuple[float, float]
    processes: Mapping[int, ProcessTime]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What other processes did between two readings: how many processors all of them kept busy, the command of the
    busiest one (None: no such process can be seen), and how many processors that one kept busy."""

    seconds: float
    foreign_cpus: float
    busiest: str | None = None
    busiest_cpus: float = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether others disturbed the benchmark."""
        return self.foreign_cpus >= BUSY_AT_LEAST_CPUS


@dataclass
class MachineWatch:
    """The first and the last reading of a machine, and the windows between all of them. The process `own` and its
    descendants are not foreign."""

    proc: Path = PROC
    own: int = field(default_factory=os.getpid)
    readings: list[Reading] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    _ours: set[tuple[int, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, least_window_s: float = 0.0) -> Self:
        """Read the counters and compare them with the last ones, unless a shorter time than `least_window_s` has passed
        since."""
        with self._lock:
            reading = read_counters(self.proc)
            self._ours |= _descendants(reading.processes, self.own)  # an orphan that was ours stays ours
            if not self.readings:
                self.readings = [reading]
            elif not self.windows or reading.at_s - self.readings[-1].at_s >= least_window_s:
                self.windows.append(_compare(self.readings[-1], reading, self._ours))
                self.readings = [self.readings[0], reading]
        return self

    @contextlib.contextmanager
    def watching(self) -> Iterator[Self]:
        """Read the counters now, after half a second, and every few seconds in a thread until the block ends."""
        self.read()
        time.sleep(FIRST_WINDOW_S)
        self.read()
        over = threading.Event()
        thread = threading.Thread(target=self._read_until, args=(over,), name="machine", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def as_dict(self) -> dict[str, Any]:
        """Read the counters once more; return a result's fields."""
        self.read(FIRST_WINDOW_S)
        first, last = self.readings[0], self.readings[-1]
        seconds = sum(window.seconds for window in self.windows)
        busy_s = sum(window.seconds for window in self.windows if window.is_busy)
        foreign_s = sum(window.seconds * window.foreign_cpus for window in self.windows)
        busiest = max(self.windows, key=lambda window: window.busiest_cpus)
        return {
            "cpus": usable_cpus().value,
            "cpu_model": cpu_model(self.proc),
            "load_averages_at_start": {"1_min": first.load_averages[0], "5_min": first.load_averages[1]},
            "load_averages_at_end": {"1_min": last.load_averages[0], "5_min": last.load_averages[1]},
            "busy": busy_s > 0,
            "busy_share": round(busy_s / seconds, 3),
            "foreign_cpus": {
                "at_start": round(self.windows[0].foreign_cpus, 2),
                "at_end": round(self.windows[-1].foreign_cpus, 2),
                "mean": round(foreign_s / seconds, 2),
                "most": round(max(window.foreign_cpus for window in self.windows), 2),
            },
            "busiest_process": busiest.busiest if busy_s > 0 else None,
        }

    def _read_until(self, over: threading.Event) -> None:
        while not over.wait(WINDOW_S):
            self.read()


def read_counters(proc: Path = PROC) -> Reading:
    """Read the kernel's counters."""
    fields = (proc / "stat").read_text().partition("\n")[0].split()
    one_min, five_min = (proc / "loadavg").read_text().split()[:2]
    return Reading(
        at_s=float((proc / "uptime").read_text().split()[0]),
        busy_s=sum(int(fields[number]) for number in _BUSY_FIELDS) / _TICKS_PER_S,
        load_averages=(float(one_min), float(five_min)),
        processes=dict(_read_processes(proc)),
    )


def cpu_model(proc: Path = PROC) -> str:
    """Return the processor's name, such as "Intel(R) Xeon(R)"."""
    for line in (proc / "cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unnamed CPU"


def busy_warning(facts: Mapping[str, Any]) -> str | None:
    """Return a warning about a machine that other processes used too; None if none did."""
    if not facts["busy"]:
        return None
    name = f", most of all {facts['busiest_process']!r}" if facts["busiest_process"] else ""
    return (
        f"warning: the machine was busy for {100 * facts['busy_share']:.0f} % of the run: other processes took up to "
        f"{facts['foreign_cpus']['most']:.1f} processors{name}; stop them and run the benchmark again"
    )


def _read_processes(proc: Path) -> Iterator[tuple[int, ProcessTime]]:
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended
            before, _, after = (proc / name / "stat").read_text(errors="replace").rpartition(")")
            rest = after.split()  # from field 3 of proc_pid_stat(5) on
            times_s = [int(ticks) / _TICKS_PER_S for ticks in rest[11:15]]
            command = before.partition("(")[2]
            yield (
                int(name),
                ProcessTime(command, int(rest[1]), int(rest[19]), sum(times_s[:2]), sum(times_s[2:])),
            )


def _descendants(processes: Mapping[int, ProcessTime], own: int) -> set[tuple[int, int]]:
    """Return number and start of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for number, process in processes.items():
        children.setdefault(process.parent, []).append(number)
    found, new = set[tuple[int, int]](), [own] if own in processes else []
    while new:
        number = new.pop()
        found.add((number, processes[number].started))
        new += children.get(number, ())
    return found


def _compare(before: Reading, after: Reading, ours: set[tuple[int, int]]) -> Window:
    seconds = max(after.at_s - before.at_s, 1 / _TICKS_PER_S)
    nobodys = ours | _kernel_threads(after.processes)
    foreign = [
        (process.own_s - _own_s_before(before, number, process), process.command)
        for number, process in after.processes.items()
        if (number, process.started) not in nobodys
    ]
    not_foreign_s = _time_of(after, nobodys) - _time_of(before, nobodys)
    busiest_s, busiest = max(foreign, default=(0.0, ""))
    return Window(
        seconds=seconds,
        foreign_cpus=max(0.0, after.busy_s - before.busy_s - not_foreign_s) / seconds,
        busiest=busiest if busiest_s > 0 else None,
        busiest_cpus=busiest_s / seconds,
    )


def _kernel_threads(processes: Mapping[int, ProcessTime]) -> set[tuple[int, int]]:
    number, command = _KERNEL
    is_visible = number in processes and processes[number].command == command
    return _descendants(processes, number) if is_visible else set()


def _time_of(reading: Reading, ours: set[tuple[int, int]]) -> float:
    """Return the time of these processes and of their children that have ended."""
    return sum(
        process.own_s + process.ended_children_s
        for number, process in reading.processes.items()
        if (number, process.started) in ours
    )


def _own_s_before(before: Reading, number: int, process: ProcessTime) -> float:
    known = before.processes.get(number)
    return known.own_s if known is not None and known.started == process.started else 0.0
