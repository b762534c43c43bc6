"""The dashboard *Serving*: what is translated, how well, and by which servers."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import (
    FULL_WIDTH,
    Marks,
    Query,
    finished,
    graph,
    heat_map,
    label_variable,
    listing,
    mean,
    new_dashboard,
    newest,
    quantiles,
    summed_rate,
)

_SERVERS: Final = 'job=~"$job", instance=~"$instance"'
_TRANSLATE: Final = f'{_SERVERS}, grpc_service="ferryman.v1.TranslationService", grpc_method="Translate"'


def serving() -> models.Dashboard:
    """Return the dashboard *Serving*."""
    board = new_dashboard("Ferryman / Serving", "ferryman-serving", "Translating, and the servers that do it.")
    board.with_variable(label_variable("job", "ferryman_build_info", "job"))
    board.with_variable(label_variable("instance", 'ferryman_build_info{job=~"$job"}', "instance"))
    board.annotation(
        Marks(
            name="Server started",
            expression=f"process_start_time_seconds{{{_SERVERS}}} * 1000",
            title="{{instance}} started",
            color="blue",
            at_value=True,
        )
    )
    rows = {
        "Service level of Translate, 30 days": _service_level(),
        "Traffic": _traffic(),
        "Latency of Translate": _latency(),
        "Queue and batch": _batch(),
        "Models": _models(),
        "Other calls": _other_calls(),
        "Servers": _servers(),
    }
    return finished(board, rows)


def _service_level() -> list[Builder[models.Panel]]:
    def left(what: str, budget: float) -> Query:
        return Query(expression=f'1 - ferryman:translate_{what}:ratio30d{{job=~"$job"}} / {budget}', legend="{{job}}")

    def burn(what: str, budget: float) -> list[Query]:
        return [
            Query(
                expression=f'ferryman:translate_{what}:ratio{window}{{job=~"$job"}} / {budget}',
                legend=f"{{{{job}}}} {what} {window}",
            )
            for window in ("5m", "1h", "6h")
        ]

    return [
        newest(
            "Budget for failures left",
            left("failed", 0.001),
            unit="percentunit",
            width=6,
            text="Of the 0.1 % of calls that may fail by the server's fault.",
        ),
        newest(
            "Budget for slowness left",
            left("slow", 0.01),
            unit="percentunit",
            width=6,
            text="Of the 1 % of calls that may take over one second of server time.",
        ),
        newest(
            "Serving",
            Query(
                expression=f'sum by (job) (ferryman_health_serving{{{_SERVERS}, service="overall"}})', legend="{{job}}"
            ),
            unit="none",
            width=6,
            text="Servers that say SERVING of themselves.",
        ),
        newest("Scraped", Query(expression=f"sum by (job) (up{{{_SERVERS}}})", legend="{{job}}"), unit="none", width=6),
        graph(
            "How fast the budgets burn",
            *burn("failed", 0.001),
            *burn("slow", 0.01),
            unit="none",
            width=FULL_WIDTH,
            text="At 1 a budget lasts 30 days. From 14.4 over an hour, or 6 over six hours, somebody is woken.",
        ),
    ]


def _traffic() -> list[Builder[models.Panel]]:
    handled = "grpc_server_handled_total"
    codes = summed_rate(f"{handled}{{{_TRANSLATE}}}", by="grpc_code")
    not_ok = summed_rate(f'{handled}{{{_TRANSLATE}, grpc_code!="OK"}}', by="grpc_code")
    all_calls = summed_rate(f"{handled}{{{_TRANSLATE}}}")
    in_flight = f"sum by (method) (ferryman_translate_in_flight{{{_SERVERS}}})"

    def per_second(name: str, legend: str, by: str = "") -> Query:
        return Query(expression=summed_rate(f"ferryman_translate_{name}_total{{{_SERVERS}}}", by=by), legend=legend)

    return [
        graph("Translate calls by code", Query(expression=codes, legend="{{grpc_code}}"), unit="reqps", stacked=True),
        graph(
            "Share of calls that are no OK",
            Query(expression=f"{not_ok} / ignoring (grpc_code) group_left {all_calls}", legend="{{grpc_code}}"),
            unit="percentunit",
            stacked=True,
            text="Callers' mistakes too; what counts for the service level is in the row above.",
        ),
        graph("Calls read", per_second("requests", "{{method}}", "method"), unit="reqps"),
        graph("Calls in flight", Query(expression=in_flight, legend="{{method}}"), unit="none"),
        graph("Sentences", per_second("sentences", "sentences"), unit="none", text="Per second."),
        graph(
            "Tokens",
            per_second("source_tokens", "source"),
            per_second("target_tokens", "target"),
            unit="none",
            text="Subwords per second.",
        ),
    ]


def _latency() -> list[Builder[models.Panel]]:
    stages = f"ferryman_translate_sentence_seconds_bucket{{{_SERVERS}}}"
    return [
        graph(
            "Server time of a call",
            *quantiles(f"grpc_server_handling_seconds_bucket{{{_TRANSLATE}}}"),
            unit="s",
        ),
        graph(
            "Where the time of a call goes, mean",
            Query(expression=mean("ferryman_translate_seconds", _SERVERS, by="stage"), legend="{{stage}}"),
            unit="s",
            stacked=True,
            text="queue: waiting for a place; text: subwords and back; encode and decode: the model.",
        ),
        heat_map(
            "Server time of all calls",
            summed_rate(f"grpc_server_handling_seconds_bucket{{{_TRANSLATE}}}", by="le"),
            unit="s",
        ),
        graph("A sentence, by stage", *quantiles(stages, by=("stage",), legend="{{stage}}"), unit="s"),
        graph(
            "Length of a translation",
            *quantiles(f"ferryman_translate_sentence_target_tokens_bucket{{{_SERVERS}}}"),
            unit="none",
            text="Subwords.",
        ),
        graph(
            "Decoding steps of a sentence",
            *quantiles(f"ferryman_translate_sentence_steps_bucket{{{_SERVERS}}}"),
            unit="none",
        ),
    ]


def _batch() -> list[Builder[models.Panel]]:
    queue, limit = (f"ferryman_translate_queue_{part}tokens{{{_SERVERS}}}" for part in ("", "limit_"))
    rejected = summed_rate(f"ferryman_translate_rejected_total{{{_SERVERS}}}", by="instance")
    step_rows = Query(expression=mean("ferryman_engine_step_rows", _SERVERS, by="instance"), legend="{{instance}} mean")
    steps = summed_rate(f"ferryman_engine_steps_total{{{_SERVERS}}}", by="instance")
    call_rows = Query(expression=mean("ferryman_translate_batch_rows", _SERVERS), legend="mean as calls see it")
    return [
        graph(
            "Queue",
            Query(expression=queue, legend="{{instance}} {{method}}"),
            Query(expression=limit, legend="{{instance}} {{method}} limit"),
            unit="none",
            text="Source subwords times rows. At the limit Translate is refused, and StreamTranslate waits.",
        ),
        graph(
            "Queue, share of the limit",
            Query(expression=f"{queue} / {limit}", legend="{{instance}} {{method}}"),
            unit="percentunit",
        ),
        graph("Calls refused", Query(expression=rejected, legend="{{instance}}"), unit="reqps"),
        graph(
            "Rows of a decoding step",
            step_rows,
            call_rows,
            *quantiles(f"ferryman_engine_step_rows_bucket{{{_SERVERS}}}"),
            unit="none",
            text="Sentences times beam that are computed together: the more, the cheaper each.",
        ),
        graph(
            "Decoding steps per second",
            Query(expression=steps, legend="{{instance}}"),
            unit="none",
        ),
        graph(
            "Key and value caches",
            Query(expression=f"ferryman_engine_cache_bytes{{{_SERVERS}}}", legend="{{instance}}"),
            unit="bytes",
        ),
    ]


def _models() -> list[Builder[models.Panel]]:
    loaded = f"ferryman_model_loaded_info{{{_SERVERS}}}"
    failures = f"sum by (instance) (increase(ferryman_model_load_failures_total{{{_SERVERS}}}[1h]))"
    loads = f"sum by (instance) (increase(ferryman_model_load_seconds_count{{{_SERVERS}}}[1h]))"
    load_time = f"sum by (le) (rate(ferryman_model_load_seconds_bucket{{{_SERVERS}}}[1h]))"
    return [
        listing("Models in memory", Query(expression=loaded, legend=""), width=12),
        graph(
            "Memory of models",
            Query(expression=f"ferryman_model_memory_bytes{{{_SERVERS}}}", legend="{{instance}} {{model}}/{{version}}"),
            unit="bytes",
            width=12,
            stacked=True,
        ),
        graph(
            "Time of a load",
            *(Query(expression=f"histogram_quantile({q}, {load_time})", legend=f"p{q * 100:g}") for q in (0.5, 0.95)),
            unit="s",
            width=12,
            text="Of those in the last hour, warm-up included.",
        ),
        graph(
            "Loads in the last hour",
            Query(expression=loads, legend="{{instance}}"),
            Query(expression=failures, legend="{{instance}} failed"),
            unit="none",
            width=12,
        ),
    ]


def _other_calls() -> list[Builder[models.Panel]]:
    method = "grpc_service, grpc_method"
    legend = "{{grpc_service}}/{{grpc_method}}"
    started = summed_rate(f"grpc_server_started_total{{{_SERVERS}}}", by=method)
    failed = summed_rate(f'grpc_server_handled_total{{{_SERVERS}, grpc_code!="OK"}}', by=f"{method}, grpc_code")
    received = summed_rate(f"grpc_server_msg_received_total{{{_SERVERS}}}", by=method)
    sent = summed_rate(f"grpc_server_msg_sent_total{{{_SERVERS}}}", by=method)
    return [
        graph("Calls begun", Query(expression=started, legend=legend), unit="reqps"),
        graph("Calls that ended in no OK", Query(expression=failed, legend=legend + " {{grpc_code}}"), unit="reqps"),
        graph(
            "Messages",
            Query(expression=received, legend=f"{legend} received"),
            Query(expression=sent, legend=f"{legend} sent"),
            unit="none",
            text="Per second.",
        ),
    ]


def _servers() -> list[Builder[models.Panel]]:
    def each(expression: str, legend: str = "{{instance}}") -> Query:
        return Query(expression=expression, legend=legend)

    free = f"ferryman_data_free_bytes{{{_SERVERS}}} / ferryman_data_size_bytes{{{_SERVERS}}}"
    gpu = f"ferryman_gpu_memory_used_bytes{{{_SERVERS}}} / ferryman_gpu_memory_total_bytes{{{_SERVERS}}}"
    errors = summed_rate(f"ferryman_store_errors_total{{{_SERVERS}}}", by="instance")
    health = f"ferryman_health_serving{{{_SERVERS}}}"
    cores = f"process_cpu_seconds_total{{{_SERVERS}}}"
    files = f"process_open_fds{{{_SERVERS}}} / process_max_fds{{{_SERVERS}}}"
    return [
        listing("Servers", each(f"ferryman_build_info{{{_SERVERS}}}"), width=12),
        graph("Health", each(health, "{{instance}} {{service}}"), unit="none", width=12, text="1 is SERVING."),
        graph("Processor cores in use", each(f"rate({cores}[$__rate_interval])"), unit="none"),
        graph("Memory", each(f"process_resident_memory_bytes{{{_SERVERS}}}"), unit="bytes"),
        graph("Open files, share of the limit", each(files), unit="percentunit"),
        graph(
            "Disk of the data folder, free",
            each(free),
            unit="percentunit",
            text="Below 5 % it is an alert: DiskNearlyFull.",
        ),
        graph("Store errors per second", each(errors), unit="none"),
        graph(
            "GPU",
            each(f"ferryman_gpu_utilization_ratio{{{_SERVERS}}}", "{{instance}} {{gpu}} busy"),
            each(gpu, "{{instance}} {{gpu}} memory"),
            unit="percentunit",
        ),
    ]
