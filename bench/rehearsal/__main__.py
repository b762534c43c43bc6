"""`make rehearse`: a rehearsal of the cluster on one machine.

A real Envoy stands in front of three serving processes and one training process that share a data folder. What each
runs with, its ports, probes and grace periods, is what the Helm chart says; Envoy runs what deploy/envoy says. Callers
translate, and meanwhile replicas are restarted and killed, versions are promoted, and one replica is slow. Every call
is accounted for.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from rich.console import Console

from bench.rehearsal import effort as efforts
from bench.rehearsal.chart import ChartFailed, render, unpack_helm
from bench.rehearsal.cluster import Cluster, PreparationFailed, running_cluster
from bench.rehearsal.effort import Effort
from bench.rehearsal.pods import PodFailed
from bench.rehearsal.proxy import ProxyFailed
from bench.rehearsal.report import Report, conditions_of, print_report
from bench.rehearsal.serving import (
    killed_replica,
    killed_replica_headless,
    promoted_version,
    rolling_restart,
    slow_replica,
)
from bench.rehearsal.training import restarted_training
from bench.shared.result import RESULTS, Result, publish, watched_machine

FOLDER: Final = Path("bench-output/rehearsal")
SCENARIOS: Final[Mapping[str, Callable[[Cluster, Effort], Awaitable[Report]]]] = {
    "a": rolling_restart,
    "b": killed_replica,
    "c": promoted_version,
    "d": slow_replica,
    "e": restarted_training,
    "f": killed_replica_headless,
}


async def rehearse(objects: Sequence[dict[str, Any]], folder: Path, effort: Effort, names: str) -> list[Report]:
    """Run scenarios one after the other in one cluster, and print what each found."""
    console, reports = Console(width=150), []
    async with running_cluster(folder, objects) as cluster:
        for name in names:
            began_s = time.monotonic()
            report = await SCENARIOS[name](cluster, effort)
            report.figures["seconds"] = round(time.monotonic() - began_s, 1)
            print_report(report, console)
            reports.append(report)
    return reports


def result_of(reports: Sequence[Report], *, quick: bool) -> Result:
    """Return the line to publish: the share of conditions that hold."""
    conditions = conditions_of(reports)
    return Result(
        bench="rehearsal-quick" if quick else "rehearsal",
        value=sum(condition.holds for condition in conditions) / len(conditions),
        target=1.0,
        peer=None,
        details={
            "conditions": len(conditions),
            "broken": [condition.text for condition in conditions if not condition.holds],
            "scenarios": [report.as_dict() for report in reports],
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make rehearse", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run scenarios a, b and c with short waits")
    parser.add_argument("--scenarios", default="", help=f"some of {''.join(SCENARIOS)}, such as ab")
    parser.add_argument("--manifest", type=Path, help="what the chart has rendered already (default: render it)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="working folder for logs; it is removed first")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the line of JSON")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.scenarios) - set(SCENARIOS):
        parser.error(f"--scenarios: there is no {', '.join(sorted(unknown))}")
    return arguments


def rendered(arguments: argparse.Namespace, effort: Effort) -> list[dict[str, Any]]:
    """Return the chart's objects; raises ChartFailed."""
    if arguments.manifest is not None:
        return [each for each in yaml.safe_load_all(arguments.manifest.read_text()) if each]
    with tempfile.TemporaryDirectory() as tools:
        values = [efforts.FULL.values] if effort is efforts.FULL else [efforts.FULL.values, effort.values]
        return render(unpack_helm(Path(tools)), values)


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse; the exit status is 0 if everything holds that must."""
    arguments = parse(argv)
    effort = efforts.QUICK if arguments.quick else efforts.FULL
    names = arguments.scenarios or effort.scenarios
    try:
        objects = rendered(arguments, effort)
        with watched_machine():
            reports = asyncio.run(rehearse(objects, arguments.folder, effort, names))
    except (ChartFailed, PreparationFailed, PodFailed, ProxyFailed) as error:
        sys.exit(f"rehearse: {error}")
    return publish(result_of(reports, quick=arguments.quick), arguments.results)


if __name__ == "__main__":
    sys.exit(main())
