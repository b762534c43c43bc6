"""The rules of deploy/prometheus: valid, tested one by one, explained in the runbook, and about metrics that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from ferryman.cli.app import app
from ferryman_service.config.service_config import ServiceConfig
from tests.ops.conftest import need_program, run
from tests.ops.promql import family, metric_names, without_thresholds

pytestmark = pytest.mark.ops

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
METRICS_PAGE = (ROOT / "docs/metrics.md").read_text()
OF_PROMETHEUS = {"up"}


def rules_of(name):
    return [rule for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"] for rule in group["rules"]]


RECORDED = rules_of("rules.yaml")
ALERTS = {rule["alert"]: rule for rule in rules_of("alerts.yaml")}
TEST_FILES = sorted((PROMETHEUS / "tests").glob("*.yaml"))
TESTS = [yaml.safe_load(path.read_text()) for path in TEST_FILES]


def cases_of(alert, *, firing):
    """The test groups that ask about the alert and expect it, or expect it not, with their evaluation interval."""
    found = []
    for content in TESTS:
        for group in content["tests"]:
            asked = [case for case in group["alert_rule_test"] if case["alertname"] == alert]
            if asked and all(bool(case["exp_alerts"]) is firing for case in asked):
                found.append((content["evaluation_interval"], group))
    return found


def series_of(group):
    return {entry["series"] for entry in group["input_series"]}


@pytest.fixture(scope="module")
def promtool():
    return need_program("promtool", "prometheus")


def test_the_rules_and_the_configuration_are_valid(promtool):
    run([promtool, "check", "rules", "--lint-fatal", PROMETHEUS / "rules.yaml", PROMETHEUS / "alerts.yaml"])
    checked = run([promtool, "check", "config", "--lint-fatal", ROOT / "deploy/prometheus.yml"])
    assert "2 rule files found" in checked


def test_every_alert_fires_when_it_should_and_only_then(promtool):
    run([promtool, "test", "rules", *TEST_FILES])


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_case_that_fires_and_one_of_the_same_series_that_does_not(alert):
    fires = [series_of(group) for _, group in cases_of(alert, firing=True)]
    quiet = [series_of(group) for _, group in cases_of(alert, firing=False)]
    assert fires
    assert any(series in fires for series in quiet), f"{alert} has no quiet case of the series that make it fire"


def table_of_alerts():
    """The table of deploy/prometheus/README.md."""
    lines = ["| alert | severity | fires | does not fire |", "| --- | --- | --- | --- |"]
    for alert, rule in ALERTS.items():
        cells = []
        for firing, verb in ((True, "fires"), (False, "is quiet")):
            names = [group["name"] for _, group in cases_of(alert, firing=firing)]
            assert all(name.startswith(f"{alert} {verb} ") for name in names), names
            cells.append("; ".join(name.removeprefix(f"{alert} {verb} ") for name in names))
        link = f"[{alert}](../../docs/runbook.md#{alert.lower()})"
        lines.append(f"| {link} | {rule['labels']['severity']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_alerts_is_that_of_the_rules_and_their_cases():
    assert (PROMETHEUS / "README.md").read_text().endswith(f"\n\n{table_of_alerts()}")


def still_right(promtool, folder, changed_expression, *, firing):
    """Change the expression of every alert, one at a time, and run its firing, or quiet, cases: the quiet ones of the
    same series as a firing one. Return the alerts of which a case still succeeds."""
    alert_of = {}
    for alert, rule in ALERTS.items():
        (folder / alert).mkdir()
        rules = folder / alert / "rules.yaml"
        recorded = [known for known in RECORDED if "ferryman:" in rule["expr"] and "30d" not in known["record"]]
        altered = {**rule, "expr": changed_expression(rule["expr"])}
        groups = [{"name": name, "rules": content} for name, content in (("r", recorded), ("a", [altered])) if content]
        rules.write_text(yaml.safe_dump({"groups": groups}))
        fires = [series_of(group) for _, group in cases_of(alert, firing=True)]
        for number, (interval, group) in enumerate(cases_of(alert, firing=firing)):
            if series_of(group) in fires:
                test = {"rule_files": [str(rules)], "evaluation_interval": interval, "tests": [group]}
                path = folder / alert / f"case-{number}.yaml"
                path.write_text(yaml.safe_dump(test))
                alert_of[str(path)] = alert
    ended = subprocess.run([promtool, "test", "rules", *alert_of], capture_output=True, text=True)
    begun = re.findall(r"Unit Testing:\s+(\S+)", ended.stdout)
    assert begun == list(alert_of), ended.stderr
    return {alert_of[path] for path in re.findall(r"Unit Testing:\s+(\S+)\n\s+SUCCESS", ended.stdout)}


def test_the_firing_cases_notice_a_rule_that_never_fires(promtool, tmp_path):
    assert still_right(promtool, tmp_path, lambda expression: "vector(0) > 1", firing=True) == set()


def test_the_quiet_cases_are_kept_quiet_by_the_thresholds_alone(promtool, tmp_path):
    """Not by labels that do not match, nor by asking too early: without thresholds they would fire."""
    assert still_right(promtool, tmp_path, without_thresholds, firing=False) == set()


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_what_it_is_and_has_a_section_in_the_runbook(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{alert.lower()}"
    sections = re.findall(rf"^### {alert}\n(.*?)(?=^##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
    assert len(sections) == 1
    for part in ("**Meaning.**", "**Impact.**", "**Diagnosis.**", "**Mitigation.**"):
        assert part in sections[0], f"{alert}: no {part}"


def test_the_runbook_explains_no_alert_that_does_not_exist():
    assert set(re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE)) == set(ALERTS)


def test_the_runbooks_commands_exist():
    """Those of ferryman, down to the last word that is no argument."""
    words = set(re.findall(r"(?:^|`)ferryman((?: [a-z][a-z-]*)+)", RUNBOOK, re.MULTILINE))
    assert {" runs show", " models alias"} <= words
    for path in words:
        command = get_command(app)
        for word in path.split():
            assert word in command.commands, f"ferryman{path}"
            command = command.commands[word]
    for word in set(re.findall(r"(?:^|`)ferryman-service ([a-z-]+)", RUNBOOK, re.MULTILINE)):
        assert word in run([sys.executable, "-m", "ferryman_service", "--help"])


def test_the_runbooks_flags_exist():
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", re.sub(r"`kubectl[^`]*`", "", RUNBOOK)))
    settings = {name.replace("_", "-") for name in ServiceConfig.__dataclass_fields__}
    assert flags - settings == {"server", "state", "check", "deep", "loaded", "json"}


@pytest.mark.parametrize("rule", [*RECORDED, *ALERTS.values()], ids=lambda rule: rule.get("record") or rule["alert"])
def test_every_metric_in_a_rule_exists(rule):
    names = metric_names(rule["expr"])
    assert names
    recorded = {known["record"] for known in RECORDED}
    unknown = {name for name in names - recorded - OF_PROMETHEUS if not is_documented(name)}
    assert unknown == set()


def is_documented(name):
    return f"`{family(name)}`" in METRICS_PAGE or f"`{name}`" in METRICS_PAGE
