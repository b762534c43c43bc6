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
        text="All RPCs of all services, including health and reflection. The duration of a stream is its whole "
        "lifetime.",
        metrics=rpc.METRICS,
    ),
    Group(
        title="This process",
        text="Version, roles, health, and the disk of the data folder.",
        metrics=process.METRICS,
    ),
    Group(
        title="Admission and translation",
        text="Calls and their sentences. The queue counts source subwords times rows (beam or samples). Sentences, "
        "tokens, durations and rows count successful calls only.",
        metrics=translations.METRICS,
    ),
    Group(
        title="Engine",
        text="All decoding threads of all models together, including warm-ups. The mean number of rows per step is "
        "`rate(ferryman_engine_step_rows_sum[5m]) / rate(ferryman_engine_step_rows_count[5m])`.",
        metrics=engine.METRICS,
    ),
    Group(title="Models", text="Loaded models and model loads.", metrics=models.METRICS),
    Group(
        title="Training, all runs",
        text="The process with the role training exports these metrics. It reads the records of all runs once a "
        "second, "
        "and does not count records from before its start.",
        metrics=training.METRICS,
    ),
    Group(
        title="Training, each active run",
        text="Exported from the start of a run's first worker until the run ends, also while it is paused or restarts; "
        "for at most 50 runs at a time. For complete curves use StreamMetrics.",
        metrics=run_gauges.METRICS,
    ),
    Group(
        title="Launcher and store",
        text="Starts of workers, and access to the database.",
        metrics=(*launcher.METRICS, *store.METRICS),
    ),
    Group(
        title="GPU",
        text="Exported only where NVML works: it needs an NVIDIA driver and the package nvidia-ml-py of the extra "
        "`gpu`.",
        metrics=gpu.METRICS,
    ),
)

LABELS: Final[Mapping[str, str]] = {
    "grpc_service": "the services of the API, health and reflection; `other` for calls of unknown methods",
    "grpc_method": "the methods of these services; `other` for unknown methods",
    "call_kind": "`unary`, `stream`, `transfer` (an upload or a download), `health`",
    "limit": "`calls`, `streams`, `transfers`, `health_calls`, `health_watches`, `message_memory`, `open_files`, "
    "`silence`",
    "grpc_type": "`unary`, `client_stream`, `server_stream`, `bidi_stream`",
    "grpc_code": "the 17 status codes, such as `OK`",
    "version": "in `ferryman_build_info` the version of the package, otherwise the number of the model version",
    "roles": "`training`, `translation`, or both, separated by a comma",
    "service": "the service names of grpc.health.v1; `overall` stands for the empty name",
    "method": "`Translate`, `StreamTranslate`",
    "stage": "`queue`, `text`, `encode`, `decode`; sentences have no stage `text`",
    "model": "the models in memory, at most `--max-loaded-models`; removed when the model is unloaded",
    "compute_type": "`fp32`, `int8`, `fp16`",
    "state": "unfinished runs: `queued`, `starting`, `running`, `exporting`, `paused`; ended runs: `succeeded`, "
    "`failed`, `cancelled`",
    "run": "the ids of active runs, at most 50; removed when the run ends",
    "outcome": "`started`, `failed_to_start`",
    "size": "`small`: sentences of callers with little work in the engine; `large`: of callers with much work; `long`: "
    "sentences that are much work by themselves, by rows times maximum length",
    "gpu": "the GPU's index, from `0`",
    "table": "the database tables `runs`, `records`, `corpora`, `model_versions`, `model_aliases`",
}

_WIDTH: Final = 120
_HEAD: Final = """# Metrics

<!-- Made by `make metrics-docs` from the code; a test compares them. -->

The service exports Prometheus metrics on `--metrics-port` (9464), at `/metrics`. Counters and histograms cover one
process since its start. Label values come from small fixed sets, never from callers.
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
    yield "## Process and interpreter\n\nStandard metrics of the Prometheus client library.\n"
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
    yield "## Histogram buckets\n"
    histograms = [metric for metric in all_metrics() if metric.kind is Kind.HISTOGRAM]
    rows = [(f"`{metric.name}`", ", ".join(f"{bound:g}" for bound in metric.buckets)) for metric in histograms]
    yield _table(("histogram", "upper bounds"), rows)


def _names(labels: Sequence[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
