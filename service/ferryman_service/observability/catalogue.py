"""All metrics in one place, and the page about them: `python -m ferryman_service.observability.catalogue FILE`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferryman_service.observability import engine, gpu, launcher, models, process, rpc, run_gauges, store, training
from ferryman_service.observability import translation as translations
from ferryman_service.observability.definitions import Kind, Metric
from ferryman_service.observability.http import new_registry


@dataclass(frozen=True, kw_only=True)
class Group:
    """Metrics that belong together, and what must be known of them."""

    title: str
    text: str
    metrics: Sequence[Metric]


GROUPS: Final[Sequence[Group]] = (
    Group(
        title="Calls",
        text="Every RPC of every service, health and reflection included. A stream's time is that of its whole life.",
        metrics=rpc.METRICS,
    ),
    Group(
        title="This process",
        text="What runs here, how it answers health checks, and the disk of the data folder.",
        metrics=process.METRICS,
    ),
    Group(
        title="Admission and translation",
        text="Calls and their sentences. A sentence costs its source subwords times its rows (beam or samples); what "
        "waits and runs is counted so. Sentences, tokens, times and rows are of calls that succeeded.",
        metrics=translations.METRICS,
    ),
    Group(
        title="Engine",
        text="All decoding threads of all models together, warm-ups included. The mean number of rows is "
        "`rate(ferryman_engine_step_rows_sum[5m]) / rate(ferryman_engine_step_rows_count[5m])`.",
        metrics=engine.METRICS,
    ),
    Group(title="Models", text="What is in memory now, and what it took to get there.", metrics=models.METRICS),
    Group(
        title="Training, all runs",
        text="Counted by the process with the role training, which reads the records of all runs once a second. What "
        "was recorded before it started is not counted.",
        metrics=training.METRICS,
    ),
    Group(
        title="Training, each active run",
        text="There from when a run's first worker begins, through pauses and restarts of worker and service, until "
        "the run ends; at most 50 runs at a time. Whole curves are StreamMetrics' matter.",
        metrics=run_gauges.METRICS,
    ),
    Group(
        title="Launcher and store",
        text="The seams between the service, its workers and the database.",
        metrics=(*launcher.METRICS, *store.METRICS),
    ),
    Group(
        title="GPU",
        text="Only where NVML answers: an NVIDIA driver, and the package nvidia-ml-py of the extra `gpu`.",
        metrics=gpu.METRICS,
    ),
)

LABELS: Final[Mapping[str, str]] = {
    "grpc_service": "the services of the contract, health and reflection; `other` for a call of a method that does not "
    "exist",
    "grpc_method": "their methods; `other`",
    "call_kind": "`unary`, `stream`, `transfer` (an upload or a download), `health`",
    "limit": "`calls`, `streams`, `transfers`, `health_calls`, `message_memory`, `open_files`, `silence`",
    "grpc_type": "`unary`, `client_stream`, `server_stream`, `bidi_stream`",
    "grpc_code": "the 17 status codes, such as `OK`",
    "version": "of `ferryman_build_info` the package's, of models the number",
    "roles": "`training`, `translation`, or both with a comma",
    "service": "the names of the health service; `overall` is the empty one",
    "method": "`Translate`, `StreamTranslate`",
    "stage": "`queue`, `text`, `encode`, `decode`; a sentence has no `text`",
    "model": "models in memory, at most `--max-loaded-models`; gone when the model is unloaded",
    "compute_type": "`fp32`, `int8`, `fp16`",
    "state": "of runs that are not over `queued`, `starting`, `running`, `exporting`, `paused`; of those that ended "
    "`succeeded`, `failed`, `cancelled`",
    "run": "the ids of active runs, at most 50; gone when the run ends",
    "outcome": "`started`, `failed_to_start`",
    "size": "`small`: of a caller that has little in the engine; `large`: of one that has much; `long`: a sentence "
    "that is much by itself, rows times maximum length",
    "gpu": "the GPU's index, from `0`",
    "table": "the tables of the database: `runs`, `records`, `corpora`, `model_versions`, `model_aliases`",
}

_WIDTH: Final = 120
_HEAD: Final = """# Metrics

<!-- Made by `make metrics-docs` from the code; a test compares them. -->

The service answers Prometheus on `--metrics-port` (9464), at `/metrics`. Counters and times are of one process since
its start. Every label takes its values from a small set, never from a caller.
"""


def all_metrics() -> Sequence[Metric]:
    """Return every metric that the service itself defines."""
    return [metric for group in GROUPS for metric in group.metrics]


def page() -> str:
    """Return the page about them, Markdown."""
    return "\n".join((_HEAD, *_groups(), *_library(), *_labels(), *_buckets()))


def _groups() -> Iterator[str]:
    for group in GROUPS:
        yield f"## {group.title}\n\n{textwrap.fill(group.text, _WIDTH)}\n"
        rows = [
            (f"`{metric.name}`", metric.kind.value, _names(metric.labels), metric.unit, metric.text)
            for metric in group.metrics
        ]
        yield _table(("metric", "type", "labels", "unit", "meaning"), rows)


def _library() -> Iterator[str]:
    yield "## Process and interpreter\n\nThose that the Prometheus library brings.\n"
    rows = []
    for family in new_registry().collect():
        suffix = "_total" if family.type == "counter" else ""
        labels = sorted({label for sample in family.samples for label in sample.labels})
        rows.append((f"`{family.name}{suffix}`", family.type, _names(labels), family.documentation))
    yield _table(("metric", "type", "labels", "meaning"), rows)


def _labels() -> Iterator[str]:
    yield "## Labels\n"
    yield _table(("label", "values"), [(f"`{name}`", text) for name, text in LABELS.items()])


def _buckets() -> Iterator[str]:
    yield "## Buckets of the histograms\n"
    histograms = [metric for metric in all_metrics() if metric.kind is Kind.HISTOGRAM]
    rows = [(f"`{metric.name}`", ", ".join(f"{bound:g}" for bound in metric.buckets)) for metric in histograms]
    yield _table(("histogram", "at most"), rows)


def _names(labels: Sequence[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
