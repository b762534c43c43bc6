"""The rehearsal's bookkeeping: what it counts, what it notices, and what it reads from a chart."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
import yaml

from bench.rehearsal.__main__ import parse, result_of
from bench.rehearsal.chart import ChartFailed, Probe, pod_template
from bench.rehearsal.load import OK, Answer, Ledger, Line, Load, Trickle, Work
from bench.rehearsal.pods import Pod, kill_all_that_name
from bench.rehearsal.proxy import REPLICA_HEADER, configuration, notices_within_s
from bench.rehearsal.report import Report
from bench.rehearsal.serving import Kill, _check_kill, _check_promotion, _check_return
from ferryman.errors import Unavailable

EXPECTED = {"m/1": {"one": "eins", "two": "zwei"}, "m/2": {"one": "un", "two": "deux"}}
MANIFEST = """
kind: ConfigMap
metadata: {name: settings}
data: {serving.toml: "max_sentences = 7"}
---
kind: Deployment
metadata: {name: serving}
spec:
  replicas: 3
  template:
    spec:
      terminationGracePeriodSeconds: 40
      containers:
        - args: [serve, --roles, translation]
          env:
            - {name: FERRYMAN_CONFIG, value: /etc/config/ferryman.toml}
            - {name: FERRYMAN_DATA_DIR, value: /data}
            - {name: FERRYMAN_DRAIN_S, value: "4"}
            - {name: FERRYMAN_HOST, value: 0.0.0.0}
          ports: [{name: grpc, containerPort: 50051}, {name: probe, containerPort: 50052}]
          readinessProbe: {grpc: {port: 50052, service: a.Service}, timeoutSeconds: 3}
          lifecycle: {preStop: {sleep: {seconds: 5}}}
          volumeMounts: [{name: data, mountPath: /data}, {name: config, mountPath: /etc/config}]
      volumes:
        - {name: data, persistentVolumeClaim: {claimName: data}}
        - {name: config, configMap: {name: settings, items: [{key: serving.toml, path: ferryman.toml}]}}
"""


def line(begun_s=0.0, ended_s=1.0, status=OK, model="m/1", texts=("eins", "zwei"), replica="a:1"):
    answer = Answer(status=status, model=model, texts=texts, replica=replica)
    return Line(begun_s=begun_s, ended_s=ended_s, sentences=("one", "two"), answer=answer)


def ledger(*lines, lost=0):
    return Ledger(lines=list(lines), begun=len(lines) + lost)


def broken(report):
    return [condition.text for condition in report.conditions if not condition.holds]


def objects():
    return list(yaml.safe_load_all(MANIFEST))


@pytest.mark.parametrize(
    "answer",
    [
        line(texts=("eins", "deux")),
        line(model="m/2"),
        line(texts=("zwei", "eins")),
        line(texts=("eins",)),
        line(model="m/3"),
    ],
    ids=["mixed", "of another version", "in another order", "short", "of an unknown version"],
)
def test_answer_of_no_version_is_wrong(answer):
    assert ledger(answer, line(), line(status="UNAVAILABLE")).wrong(EXPECTED) == 1


def test_report_fails_on_lost_wrong_and_failed_calls():
    for seen, count in (
        (ledger(line()), 0),
        (ledger(line(), lost=1), 1),
        (ledger(line(model="m/2")), 1),
        (ledger(), 1),
    ):
        report = Report("x", "")
        report.count(seen, EXPECTED)
        report.must_not_fail(seen)
        assert len(broken(report)) == count
    report.must_not_fail(ledger(line(status="INTERNAL")))
    assert not report.ok
    assert not Report("x", "").ok


class SlowCaller:
    """Answers after a while; the third call fails."""

    def __init__(self):
        self.calls = 0

    async def translate(self, sentences, work):
        self.calls += 1
        status = "UNAVAILABLE" if self.calls == 3 else OK
        await asyncio.sleep(0.01)
        return Answer(status=status, model="m/1", texts=tuple(EXPECTED["m/1"][each] for each in sentences))


@pytest.mark.parametrize("how", [{"rate": 200.0}, {"callers": 4}])
async def test_load_has_line_for_every_call(how):
    caller = SlowCaller()
    async with Load(caller, ["one", "two"], Work(sentences=3), **how) as load:
        await load.answered(20)
    assert load.ledger.begun == caller.calls == len(load.ledger.lines) > 20
    assert load.ledger.failures() == {"UNAVAILABLE": 1}
    assert load.ledger.wrong(EXPECTED) == 0


def test_stream_needs_one_answer_for_each_sentence():
    assert not stream(3, ("0", "eins"), ("2", "eins")).is_complete()
    assert not stream(3, ("0", "eins"), ("2", "eins"), ("1", "zwei"), ("1", "zwei")).is_complete()
    whole = stream(3, ("0", "eins"), ("2", "eins"), ("1", "zwei"))
    assert whole.is_complete() and whole.wrong(EXPECTED["m/1"]) == 0 and whole.wrong(EXPECTED["m/2"]) == 3
    whole.failure = Unavailable("gone")
    assert not whole.is_complete()


def stream(sent, *answers):
    found = Trickle("", ["one", "two"])
    found.sent, found.answers = sent, list(answers)
    return found


def killed(*raw, sdk=None, streams=()):
    ledgers = {"raw": ledger(*raw), "sdk": sdk or ledger(line())}
    return Kill(killed_s=10.0, gone_s=10.1, restarted_s=15.0, streams=streams, **ledgers)


@pytest.mark.parametrize(
    ("kill", "count"),
    [
        (killed(line(9.9, 10.2, "UNAVAILABLE"), line(9.9, 10.2), line(11.0, 12.0)), 0),
        (killed(line(9.9, 10.2)), 1),  # it has hit nobody, so nothing is shown
        (killed(line(9.9, 10.2, "INTERNAL")), 1),
        (killed(line(9.9, 10.2, "UNAVAILABLE"), line(11.0, 12.0, "UNAVAILABLE")), 1),
        (killed(line(9.9, 10.2, "UNAVAILABLE"), line(8.0, 9.0, "UNAVAILABLE")), 1),
        (killed(line(9.9, 10.2, "UNAVAILABLE"), sdk=ledger(line(status="UNAVAILABLE"))), 1),
        (killed(line(9.9, 10.2, "UNAVAILABLE"), sdk=ledger(line(), lost=1)), 1),
        (killed(line(9.9, 10.2, "UNAVAILABLE"), streams=[stream(1, ("0", "eins"))]), 0),
        (killed(line(9.9, 10.2, "UNAVAILABLE"), streams=[stream(2, ("0", "eins"))]), 1),
        (killed(line(9.9, 10.2, "UNAVAILABLE"), streams=[stream(2, ("0", "un"), ("1", "deux"))]), 0),
        (killed(line(9.9, 10.2, "UNAVAILABLE"), streams=[stream(2, ("0", "un"), ("1", "zwei"))]), 1),
    ],
)
def test_kill_fails_only_calls_in_flight_without_retries(kill, count):
    report, cluster = Report("b", ""), type("Cluster", (), {"expected": EXPECTED})
    _check_kill(report, kill, cluster)
    assert len(broken(report)) == count


A_NEW, B_NEW = (line(5.2, 5.3, model="m/2", replica=name) for name in ("a:1", "b:1"))


@pytest.mark.parametrize(
    ("lines", "is_cold", "count"),
    [
        ([line(4.9, 5.3), A_NEW, B_NEW], False, 0),
        ([line(5.1, 5.2), A_NEW, B_NEW], False, 1),
        ([line(5.1, 5.2), A_NEW, B_NEW], True, 0),  # it has not loaded it yet
        ([A_NEW, B_NEW, line(6.0, 6.1)], True, 1),  # it has gone back
        ([line(4.9, 5.3), A_NEW], True, 1),
        ([line(4.9, 5.3)], False, 1),
        ([A_NEW, line(9.9, 10.1, model="m/2", replica="b:1")], True, 1),  # late
    ],
)
def test_promotion_fails_if_replica_is_late_or_reverts(lines, is_cold, count):
    report, cluster = Report("c", ""), type("Cluster", (), {"serving": ["a:1", "b:1"]})
    _check_promotion(report, ledger(*lines), "m/2", 5.0, cluster, is_cold=is_cold)
    assert len(broken(report)) == count


def test_replica_is_back_after_answer_since_restart():
    for lines, count in (([line(6.0)], 0), ([line(4.0)], 1), ([line(6.0, status="UNAVAILABLE")], 1)):
        report = Report("a", "")
        _check_return(report, ledger(*lines), {"a:1": 5.0})
        assert len(broken(report)) == count


def test_pod_is_read_from_rendered_chart():
    template = pod_template(objects(), "translation")
    assert (template.name, template.replicas, template.grpc_port) == ("serving", 3, 50051)
    assert (template.pre_stop_s, template.drain_s, template.termination_grace_s) == (5.0, 4.0, 40.0)
    assert template.readiness == Probe(port=50052, service="a.Service", timeout_s=3)
    assert template.files == {"/etc/config": {"ferryman.toml": "max_sentences = 7"}}
    with pytest.raises(ChartFailed, match="training"):
        pod_template(objects(), "training")


def test_pod_runs_command_line_of_chart(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "FERRYMAN_LOG_LEVEL", "DEBUG")
    pod = Pod(pod_template(objects(), "translation"), "serving-1", "127.0.0.9", tmp_path / "data", tmp_path / "pod")
    assert pod._command()[3:6] == ("serve", "--roles", "translation")
    assert pod._command()[6:8] == ("--host", "127.0.0.9")
    environment = pod._environment()
    assert environment["FERRYMAN_DATA_DIR"] == str(tmp_path / "data")
    assert "FERRYMAN_LOG_LEVEL" not in environment
    with open(environment["FERRYMAN_CONFIG"]) as file:
        assert file.read() == "max_sentences = 7"


def test_only_named_processes_of_service_are_killed(tmp_path):
    (tmp_path / "ferryman_service").mkdir()
    for name in ("ferryman_service/__init__", "ferryman_service/__main__", "ferryman_service/worker", "somebody"):
        (tmp_path / f"{name}.py").write_text("import sys; sys.stdin.read()" if "__init__" not in name else "")

    def started(*arguments):
        return subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, stdin=subprocess.PIPE)

    ours = [started("-m", module, "run_7_x/data") for module in ("ferryman_service", "ferryman_service.worker")]
    others = [
        started("-m", "ferryman_service", "run_8_x"),
        started("-m", "somebody", "run_7_x"),
        started("-c", "import sys; sys.stdin.read()", "ferryman_service", "run_7_x"),
    ]
    kill_all_that_name("run_7_x")
    assert [process.wait(timeout=10) for process in ours] == [-signal.SIGKILL] * 2
    for process in ours:
        process.stdin.close()
    for process in others:
        process.communicate(timeout=10)
    assert [process.returncode for process in others] == [0] * 3


def test_unsupported_hook_is_refused():
    rendered = objects()
    rendered[1]["spec"]["template"]["spec"]["containers"][0]["lifecycle"] = {"preStop": {"exec": {"command": ["x"]}}}
    with pytest.raises(ChartFailed, match="preStop"):
        pod_template(rendered, "translation")


def test_envoy_gets_shipped_configuration_with_pod_addresses(tmp_path):
    template = pod_template(objects(), "translation")
    pods = [Pod(template, f"p{n}", f"127.0.0.{n}", tmp_path, tmp_path) for n in (2, 3)]
    config = configuration("127.0.0.1", {"translation": pods, "training": pods[:1]})
    translation, training = config["static_resources"]["clusters"]
    endpoints = translation["load_assignment"]["endpoints"][0]["lb_endpoints"]
    found = [each["endpoint"]["address"]["socket_address"] for each in endpoints]
    assert found == [{"address": f"127.0.0.{n}", "port_value": 50051} for n in (2, 3)]
    assert {each["endpoint"]["health_check_config"]["port_value"] for each in endpoints} == {50052}
    assert len(training["load_assignment"]["endpoints"][0]["lb_endpoints"]) == 1
    assert REPLICA_HEADER in str(config["static_resources"]["listeners"])
    assert notices_within_s(config) == 4.0


def test_result_is_share_of_conditions_that_hold(capsys):
    report = Report("a", "")
    report.must("this", 1, holds=True)
    report.must("that", 2, holds=False)
    result = result_of([report], quick=True)
    assert (result.bench, result.value, result.ok) == ("rehearsal-quick", 0.5, False)
    assert result.details["broken"] == ["that"]
    with pytest.raises(SystemExit):
        parse(["--scenarios", "ax"])
    assert "no x" in capsys.readouterr().err
