"""Every expression of the dashboards and of the rules, run against a real Prometheus that scraped a real service.

Meanwhile a run trained, one of its workers was killed, and sentences were translated, or refused.
"""

import contextlib
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml

from deploy.grafana.dashboards import rendered
from ferryman.v1 import translation_pb2
from ferryman_service.observability.gpu import open_nvml
from tests import make_bundle
from tests.ops.conftest import run
from tests.ops.prometheus_server import PrometheusServer, prometheus_server
from tests.ops.promql import family, metric_names, without_thresholds
from tests.system.conftest import Stubs, reversal_corpus, small_recipe
from tests.system.service_process import ServiceProcess
from tests.system.test_crashes import worker_pids

pytestmark = pytest.mark.ops

ROOT = Path(__file__).parents[2]
RULES = [ROOT / "deploy/prometheus/rules.yaml", ROOT / "deploy/prometheus/alerts.yaml"]
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "deploy/grafana").glob("*.json"))}
MODEL = "reversal"
LOAD_S, LOAD_LIMIT_S = 6, 90
WANTED_CODES = {"OK", "NOT_FOUND", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
TIMES = {"$__rate_interval": "1m", "$__interval": "15s", "$__range": "1h"}
# What returns nothing here, and why.
NEEDS_GPU = {"ferryman_gpu_memory_used_bytes", "ferryman_gpu_memory_total_bytes", "ferryman_gpu_utilization_ratio"}


@dataclass(frozen=True, kw_only=True)
class Expression:
    """One expression, where it stands, and the labels that its legend names."""

    board: str
    place: str
    text: str
    legend: str = ""

    def __str__(self):
        return f"{self.board}: {self.place}"


def expressions():
    found = []
    for board, content in BOARDS.items():
        for panel in content["panels"]:
            for target in panel.get("targets", ()):
                place = f"{panel['title']} {target['refId']}"
                found.append(
                    Expression(board=board, place=place, text=target["expr"], legend=target.get("legendFormat", ""))
                )
        for mark in content["annotations"]["list"]:
            found.append(Expression(board=board, place=mark["name"], text=mark["expr"], legend=mark["titleFormat"]))
    return found


EXPRESSIONS = expressions()
ALERTS, RECORDED = (
    [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if kind in rule
    ]
    for kind in ("alert", "record")
)
RUNBOOK_QUERIES = [
    line
    for block in re.findall(r"```promql\n(.*?)```", (ROOT / "docs/runbook.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Prometheus, and what the variables of each dashboard stand for when all is chosen."""

    prometheus: PrometheusServer
    variables: Mapping[str, Mapping[str, str]]

    def query(self, expression, board):
        for name, value in {**TIMES, **self.variables[board]}.items():
            expression = re.sub(rf"{re.escape(name)}\b", lambda _, value=value: value, expression)
        assert "$" not in expression, f"a variable is left: {expression}"
        series = self.prometheus.query(expression)
        return [one for one in series if not math.isnan(float(one["value"][1]))]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    publish_a_model(folder)
    flags = ("--metrics-port", str(port), "--queue-tokens", "400", "--restart-backoff-s", "0.1")
    service = ServiceProcess(folder / "data", *flags)
    try:
        with prometheus_server(folder, {"ferryman": [f"127.0.0.1:{port}"]}, rule_files=RULES) as prometheus:
            make_traffic(service, prometheus)
            yield Watched(prometheus=prometheus, variables={name: choices(prometheus, name) for name in BOARDS})
    finally:
        status = service.stop()
        for pid in worker_pids(str(folder)):  # the workers of a service outlive it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert status == 0


def publish_a_model(folder):
    make_bundle.main(folder / "bundle")
    command = [sys.executable, "-m", "ferryman_service", "import-model", "--data-dir", folder / "data"]
    run([*command, folder / "bundle", MODEL])


def make_traffic(service, prometheus):
    """Translate while a run trains and loses a worker; the run trains on."""
    stubs = Stubs(service.address)
    run_id = stubs.start(stubs.upload().corpus_id, small_recipe(max_steps=100_000)).run_id
    stubs.wait_for_step(run_id, 31)  # the first validation is behind it
    prometheus.wait_for(f'ferryman_training_run_attempt{{run="{run_id}"}} == 1')
    os.kill(max(worker_pids(run_id)), signal.SIGKILL)
    began_s, codes = time.monotonic(), set()

    def enough():
        passed_s = time.monotonic() - began_s
        return passed_s > LOAD_LIMIT_S or (passed_s > LOAD_S and codes >= WANTED_CODES)

    with ThreadPoolExecutor(max_workers=5) as pool:
        callers = [pool.submit(translate, service.address, seed, codes, enough) for seed in range(4)]
        callers.append(pool.submit(stream, service.address, [source for source, _ in reversal_corpus(40, seed=9)]))
        for caller in callers:
            caller.result()
    assert codes >= WANTED_CODES, f"the load was to see {WANTED_CODES}, it saw {codes}"
    prometheus.wait_for(f'ferryman_training_run_attempt{{run="{run_id}"}} == 2')
    prometheus.wait_for(f'ferryman_training_run_validation_bleu{{run="{run_id}"}}')
    prometheus.wait_for("ferryman:translate_slow:ratio30d")


def translate(address, seed, codes, enough):
    """Translate, until it is enough, in ways that succeed and ways that fail; add the codes that come back."""
    stub = Stubs(address).translation
    sentences = [source for source, _ in reversal_corpus(5, seed)]
    good = translation_pb2.TranslateRequest(
        model=MODEL, sentences=sentences, options=translation_pb2.TranslateOptions(beam_size=4)
    )
    unknown = translation_pb2.TranslateRequest(model="nobody", sentences=sentences)
    empty = translation_pb2.TranslateRequest(model=MODEL)
    while not enough():
        for request, timeout_s in ((good, 30), (good, 0.004), (good, 0.015), (unknown, 30), (empty, 30)):
            try:
                stub.Translate(request, timeout=timeout_s)
                codes.add("OK")
            except grpc.RpcError as error:
                codes.add(error.code().name)


def stream(address, sentences):
    stub = Stubs(address).translation
    config = translation_pb2.StreamTranslateConfig(model=MODEL)
    wire = [translation_pb2.StreamSentence(id=str(place), sentence=text) for place, text in enumerate(sentences)]
    requests = [
        translation_pb2.StreamTranslateRequest(config=config),
        translation_pb2.StreamTranslateRequest(sentences=translation_pb2.StreamSentences(sentences=wire)),
    ]
    assert list(stub.StreamTranslate(iter(requests), timeout=60))


def choices(prometheus, board):
    """Ask for the values of each variable, as Grafana does, and return what stands for all of them."""
    chosen = {}
    for variable in BOARDS[board]["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]
            for name, value in chosen.items():
                query = query.replace(name, value)
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()
            values = prometheus.get(f"label/{label}/values", **{"match[]": selector})
            assert values, f"{board}: nothing to choose for {variable['name']}: {query}"
            chosen[f"${variable['name']}"] = "|".join(map(re.escape, values)).replace("\\", "\\\\")
    return chosen


def may_have_no_data(expression):
    """Whether it is about a GPU, and there is none here."""
    return bool(metric_names(expression) & NEEDS_GPU) and open_nvml() is None


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
def test_a_query_returns_data_with_the_labels_of_its_legend(watched, expression):
    series = watched.query(expression.text, expression.board)
    if not series and may_have_no_data(expression.text):
        return
    assert series, f"no data: {expression.text}"
    named = set(re.findall(r"{{(\w+)}}", expression.legend))
    assert any(named <= set(one["metric"]) for one in series), f"no {named} in {series}"


def test_the_variables_choose_among_what_there_is(watched):
    assert set(watched.variables["training"]) == {"$job", "$run"}
    assert set(watched.variables["serving"]) == {"$job", "$instance"}


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
def test_a_recorded_series_has_data(watched, rule):
    assert watched.prometheus.query(rule["record"])


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_is_about_series_that_exist_and_match_each_other(watched, rule):
    """Without its thresholds it would fire."""
    series = watched.prometheus.query(without_thresholds(rule["expr"]))
    assert series or may_have_no_data(rule["expr"])


@pytest.mark.parametrize("query", RUNBOOK_QUERIES)
def test_a_query_of_the_runbook_returns_data(watched, query):
    """Or would, were it not for a threshold: what it looks for is not the matter here."""
    asked = without_thresholds(query) if re.search("[<>]|==", query) else query
    assert watched.prometheus.query(asked) or may_have_no_data(query)


def test_prometheus_evaluates_every_rule_without_a_complaint(watched):
    rules = [rule for group in watched.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(ALERTS) + len(RECORDED)
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}


def test_every_metric_in_a_dashboard_is_documented():
    page = (ROOT / "docs/metrics.md").read_text()
    known = {rule["record"] for rule in RECORDED} | {"up"}
    used = {name for expression in EXPRESSIONS for name in metric_names(expression.text)} - known
    assert {name for name in used if f"`{name}`" not in page and f"`{family(name)}`" not in page} == set()


def test_the_committed_dashboards_are_what_the_code_makes():
    for path, text in rendered().items():
        assert path.read_text() == text, f"{path.name} is out of date: run make dashboards"
    assert {path.stem for path in rendered()} == set(BOARDS)


@pytest.mark.parametrize("board", BOARDS)
def test_panels_do_not_overlap_and_fit_the_width(board):
    taken = set()
    for panel in BOARDS[board]["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
