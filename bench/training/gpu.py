"""`make bench-training-gpu`: training on a GPU, checked and timed, in one call of under eight minutes.

    PYTHONPATH=service:client:. python3 -m bench.training.gpu --limit-s 450

Each section runs in a process of its own with a time limit, so that one that fails, hangs or loses the device costs
only itself; after each, everything so far is written to training-gpu.json, in $OUT if that is set, else in
bench/results/. The most wanted sections come first; one that does not fit the time any more is left out and says so.
`--device cpu --small` runs every line of it anywhere, in small.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from bench.shared.gpu_sections import Finding, Section, python_module, run_section, run_sections, target_on
from bench.shared.result import Result, publish, results_folder, watched_machine
from bench.training.gpu_checks import CHECKS
from bench.training.gpu_floor import measure_floor
from bench.training.gpu_speed import SMALL, Scale, Variant, measure_loop, measure_speed
from ferryman_service.domain.recipe import Preset

TARGETS: Final = {Preset.BASE: 860_000.0, Preset.BIG: 320_000.0}
# The preset's batch, and one that a GPU of 80 GB still holds.
BATCHES: Final = {Preset.BASE: (25_000, 60_000), Preset.BIG: (25_000, 40_000)}
SMALL_BATCHES: Final = {Preset.BASE: (512, 1024), Preset.BIG: (512, 1024)}
LIMIT_S: Final = 460.0
_SMALL_PATIENCE: Final = 6  # a CPU that others use too, and a C++ compiler


@dataclass(frozen=True)
class DeviceSection:
    """A part of the benchmark: its work is given the device and a folder that is removed afterwards."""

    name: str
    limit_s: float
    work: Callable[[torch.device, Path], Finding]

    def on(self, device: str, patience: float = 1.0) -> Section:
        """Return the section for a device, with that many times the limit."""
        return Section(self.name, self.limit_s * patience, lambda: self._measure(torch.device(device)))

    def _measure(self, device: torch.device) -> Finding:
        with tempfile.TemporaryDirectory() as folder:
            return self.work(device, Path(folder) / "work")


def sections(scale: Scale) -> list[DeviceSection]:
    """Return all sections, the most wanted first."""
    batches = SMALL_BATCHES if scale.small else BATCHES

    def speed(preset: Preset, variant: Variant, limit_s: float, sizes: int = 1) -> DeviceSection:
        def work(device: torch.device, folder: Path) -> dict[str, Any]:
            return _by_size(lambda size: measure_speed(preset, variant, size, scale, device), batches[preset][:sizes])

        return DeviceSection(f"{preset}: {variant}", limit_s, work)

    def loop(preset: Preset) -> DeviceSection:
        def work(device: torch.device, folder: Path) -> dict[str, Any]:
            return _by_size(lambda size: measure_loop(preset, size, scale, device, folder / str(size)), batches[preset])

        return DeviceSection(loop_name(preset), 110, work)

    both = (Preset.BASE, Preset.BIG)
    floor = DeviceSection("floor", 60, lambda device, folder: measure_floor(scale, batches[Preset.BASE][0], device))
    checks = [DeviceSection(f"check: {name}", 90, check) for name, check in CHECKS.items()]
    return [
        floor,
        *(loop(preset) for preset in both),
        *checks,
        *(speed(preset, Variant.COMPILED_LAYERS, 80, 2) for preset in both),
        *(speed(preset, Variant.EAGER, 50, 2) for preset in both),
        speed(Preset.BASE, Variant.BARE_LENGTHS, 60),
        *(speed(preset, Variant.GRAPHS, 110) for preset in both),
        *(speed(preset, Variant.COMPILED, 110) for preset in both),
    ]


def loop_name(preset: Preset) -> str:
    """Return the name of the section that measures what users get, and that the targets are held against."""
    return f"{preset}: whole loop"


def _by_size(measure: Callable[[int], dict[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in sizes:
        try:
            found[str(size)] = measure(size)
        except Exception as error:  # noqa: BLE001 (a batch that fails leaves those before it)
            found[str(size)] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    return found


def run_here(section: DeviceSection, arguments: argparse.Namespace) -> None:
    """Run a section in this process and write what it found."""
    run_section(section.on(arguments.device), arguments.section_out)


@watched_machine()
def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the sections that fit the time, one after the other."""
    facts: dict[str, Any] = {"device": device_facts(arguments.device), "small": arguments.small}
    patience = _SMALL_PATIENCE if arguments.small else 1
    wanted = [section for section in sections(scale_of(arguments)) if arguments.only in section.name]
    command = [*python_module("bench.training.gpu"), "--device", arguments.device]
    command += ["--small"] if arguments.small else []
    found = run_sections(
        [section.on(arguments.device, patience) for section in wanted],
        command,
        arguments.limit_s,
        lambda found: save(facts | dict(found)),
        brief,
    )
    return facts | found


def brief(found: Mapping[str, Any]) -> str:
    """Return a line about a section."""
    rates = {
        size: f"{value['target_tokens_per_s']:,.0f} tokens/s, MFU {value['mfu'] or 0:.1%}"
        for size, value in found.items()
        if isinstance(value, dict) and "mfu" in value
    }
    return str(rates or {name: value for name, value in found.items() if name != "curves"})


def scale_of(arguments: argparse.Namespace) -> Scale:
    """Return the scale that was asked for."""
    return SMALL if arguments.small else Scale()


def device_facts(device: str) -> dict[str, Any]:
    """Return what the device is."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    return facts


def save(found: Mapping[str, Any]) -> None:
    """Write everything so far, less what the sections logged."""
    kept = {
        name: {key: part for key, part in value.items() if key != "log"} if isinstance(value, dict) else value
        for name, value in found.items()
    }
    (results_folder() / "training-gpu.json").write_text(json.dumps(kept, indent=1) + "\n")


def rates_of(found: Mapping[str, Any], section: str) -> dict[str, float]:
    """Return the rates of a section, by the target tokens of a batch."""
    return {
        size: round(value["target_tokens_per_s"], 1)
        for size, value in found.get(section, {}).items()
        if isinstance(value, dict) and "target_tokens_per_s" in value
    }


def details_of(found: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """Return what else is known of a preset: the share of the peak, and how fast other ways to run it would be."""
    loops = found.get(loop_name(preset), {})
    return {
        "unit": "target tokens/s of the whole training loop, bf16",
        "rates": rates_of(found, loop_name(preset)),
        "mfu": {size: value["mfu"] for size, value in loops.items() if isinstance(value, dict) and "mfu" in value},
        "variants": {str(variant): rates_of(found, f"{preset}: {variant}") for variant in Variant},
        "floor": found.get("floor", {}).get(preset),
    }


def publish_all(found: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Print a line for each preset and one for the checks; return the exit status."""
    suffix = "-small" if arguments.small else ""
    checks = {name: value.get("ok", False) for name, value in found.items() if name.startswith("check: ")}
    results = [
        Result(
            bench=f"training-gpu-checks{suffix}",
            value=sum(checks.values()) / len(checks) if checks else 0.0,
            target=1.0,
            peer=None,
            details={"checks": checks},
        )
    ]
    for preset, target in TARGETS.items():
        results.append(
            Result(
                bench=f"training-gpu-{preset}{suffix}",
                value=max(rates_of(found, loop_name(preset)).values(), default=0.0),
                target=target_on(found.get("device", {}).get("name", ""), target, small=arguments.small),
                peer=None,
                details=details_of(found, preset),
            )
        )
    return max(publish(result, results_folder()) for result in results)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or one section of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.training.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, no targets: tries every line")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for all of it")
    parser.add_argument("--only", default="", help="sections whose name holds this text")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--section-out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.section:
        run_here({s.name: s for s in sections(scale_of(arguments))}[arguments.section], arguments)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench-training-gpu: torch sees no GPU here; --device cpu --small tries the program itself")
    return publish_all(run_all(arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
