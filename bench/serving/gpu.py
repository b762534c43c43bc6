"""`make bench-serving-gpu`: translating on a GPU in fp16, checked and timed, in one call of under 8 minutes.

    PYTHONPATH=service:client:. python3 -m bench.serving.gpu --limit-s 450

Each section runs in a process of its own with a time limit; after each, everything so far is written to
serving-gpu.json, in $OUT if that is set, else in bench/results/. The most wanted sections come first; one that does not
fit the time any more is left out and says so. `--device cpu --small` runs every line of it anywhere, in small, and
leaves bench/results/ alone. CTranslate2 is measured too where this interpreter can import it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime
import torch

from bench.serving.gpu_checks import CHECKS
from bench.serving.gpu_profile import measure_heads, measure_host, measure_kernels
from bench.serving.gpu_setting import Setting
from bench.serving.gpu_speed import (
    SEARCHES,
    measure_floor,
    measure_latency,
    measure_peer,
    measure_steps,
    measure_throughput,
)
from bench.shared.gpu_sections import Finding, Section, python_module, run_section, run_sections, target_on
from bench.shared.result import Peer, Result, publish, results_folder, watched_machine
from ferryman_service.translation.device_model import cuda_is_available
from ferryman_service.translation.onnx_model import CPU, CUDA

FOLDER: Final = Path("bench-output/serving-gpu")
LIMIT_S: Final = 450.0
TARGETS: Final = {"latency": 1000 / 0.6, "greedy": 60_000.0, "beam 4": 35_000.0}
"""Target tokens per second; of latency, those of 0.6 ms each."""
FORMS: Final = {"node by node": False, "CUDA graphs": True}
KERNELS: Final = {
    "cuDNN attention": {"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "1"},
    "no cuDNN attention": {"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0"},
    "no XQA": {"ORT_ENABLE_XQA": "0"},
    "tuned products": {"ORT_CUDA_GEMM_AUTO_TUNE": "1"},
}
"""Other kernels for attention that ONNX Runtime has, and the environment that chooses them."""
PEER_SECTION: Final = "peer: CTranslate2"


def sections(setting: Setting) -> list[Section]:
    """Return all sections, the most wanted first."""

    def measured(name: str, form: str, limit_s: float) -> Section:
        graphs = FORMS[form]
        if name == "latency":
            return Section(section_name(name, form), limit_s, lambda: measure_latency(setting, graphs=graphs))
        beam_size = SEARCHES[name]
        work = functools.partial(measure_throughput, setting, beam_size, graphs=graphs)
        return Section(section_name(name, form), limit_s, work)

    forms = ["node by node"] if setting.device == CPU else list(FORMS)
    kernels = [] if setting.device == CPU else list(KERNELS)
    checks = [Section(f"check: {name}", 80, functools.partial(check, setting)) for name, check in CHECKS.items()]
    steps = [
        Section(f"steps: {form}", 60, functools.partial(measure_steps, setting, graphs=FORMS[form])) for form in forms
    ]
    return [
        Section("floor", 120, functools.partial(measure_floor, setting)),  # it also makes the model
        *(measured(name, "node by node", 60) for name in TARGETS),
        *checks,
        *(measured(name, form, 60) for form in forms[1:] for name in TARGETS),
        *steps,
        Section("profile: kernels", 40, functools.partial(measure_kernels, setting)),
        *(
            Section(f"profile: host, {name}", 40, functools.partial(measure_host, setting, beam_size))
            for name, beam_size in SEARCHES.items()
        ),
        Section("profile: heads", 40, functools.partial(measure_heads, setting)),
        *(Section(f"steps: {name}", 40, functools.partial(_steps_with, KERNELS[name], setting)) for name in kernels),
        Section(PEER_SECTION, 90, functools.partial(measure_peer, setting)),
    ]


def _steps_with(environment: Mapping[str, str], setting: Setting) -> Finding:
    os.environ.update(environment)  # of this section's process
    return measure_steps(setting, graphs=False)


def section_name(name: str, form: str) -> str:
    """Return the name of the section that measures a target in a form."""
    return f"{name}: {form}"


def device_facts(device: str) -> Finding:
    """Return what the device is."""
    facts: Finding = {"device": device, "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    facts["providers"] = onnxruntime.get_available_providers()
    if device == CUDA and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    return facts


def rate_of(found: Mapping[str, Finding], section: str) -> float | None:
    """Return the rate that a section has found, target tokens per second."""
    rate = found.get(section, {}).get("tokens_per_s")
    return None if rate is None else float(rate)


def results(found: Mapping[str, Finding], gpu: str, *, small: bool) -> list[Result]:
    """Return a line for the checks and one for each target, which holds for the faster form."""
    suffix = "-small" if small else ""
    checks = {name: value.get("ok", False) for name, value in found.items() if name.startswith("check: ")}
    share = sum(checks.values()) / len(checks) if checks else 0.0
    lines = [
        Result(
            bench=f"serving-gpu-checks{suffix}",
            value=share,
            target=1.0,
            peer=None,
            details={"gpu": gpu, "checks": checks},
        )
    ]
    for name, target in TARGETS.items():
        rates = {form: rate_of(found, section_name(name, form)) for form in FORMS}
        theirs = found.get(PEER_SECTION, {}).get(name, {}).get("tokens_per_s")
        floor = found.get("floor", {}).get("batch 1" if name == "latency" else name)
        lines.append(
            Result(
                bench=f"serving-gpu-{name.replace(' ', '')}{suffix}",
                value=max((rate for rate in rates.values() if rate is not None), default=0.0),
                target=target_on(gpu, target, small=small),
                peer=None if theirs is None else Peer(name="ctranslate2 float16", value=theirs),
                details={"gpu": gpu, "unit": "target tokens/s of base in fp16", "forms": rates, "floor": floor},
            )
        )
    return lines


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Return what was asked for."""
    folder = FOLDER / "small" if arguments.small else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return Setting(
        folder=folder,
        device=arguments.device,
        small=arguments.small,
        model=arguments.model,
        source=arguments.source,
        reference=arguments.reference,
    )


def out_folder(setting: Setting) -> Path:
    """Return where results go: those in small to bench/results/ never."""
    return setting.folder if setting.small and "OUT" not in os.environ else results_folder()


@watched_machine()
def run_all(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the sections that fit the time, with models made anew; return the exit status."""
    shutil.rmtree(setting_of(arguments).folder)
    setting = setting_of(arguments)
    facts, out = device_facts(arguments.device), out_folder(setting)

    def save(found: Mapping[str, Finding]) -> None:
        whole: dict[str, Any] = {"device": facts, "small": arguments.small, **found}
        (out / "serving-gpu.json").write_text(json.dumps(whole, indent=1) + "\n")

    wanted = [section for section in sections(setting) if arguments.only in section.name]
    found = run_sections(wanted, [*python_module("bench.serving.gpu"), *argv], arguments.limit_s, save)
    return max(publish(result, out) for result in results(found, facts.get("name", "none"), small=arguments.small))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving.gpu", description=__doc__)
    parser.add_argument("--device", choices=(CUDA, CPU), default=CUDA)
    parser.add_argument("--small", action="store_true", help="small sizes, no targets: tries every line")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for all of it")
    parser.add_argument("--only", default="", help="sections whose name holds this text")
    parser.add_argument("--model", type=Path, help="folder of a trained bundle, for BLEU")
    parser.add_argument("--source", type=Path, help="file of source sentences, a line each")
    parser.add_argument("--reference", type=Path, help="file of their translations")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--section-out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark, or one section of it."""
    arguments = parse(argv)
    if arguments.device == CUDA and not cuda_is_available():
        sys.exit("bench-serving-gpu: ONNX Runtime has no GPU here; --device cpu --small tries the program itself")
    if arguments.section:
        run_section(
            {each.name: each for each in sections(setting_of(arguments))}[arguments.section], arguments.section_out
        )
        return 0
    return run_all(arguments, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
