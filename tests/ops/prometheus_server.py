"""A real Prometheus that scrapes what a test tells it to.

    with prometheus_server(tmp_path, {"ferryman": ["127.0.0.1:9464"]}, rule_files=[rules]) as prometheus:
        prometheus.wait_for('up{job="ferryman"} == 1')
        prometheus.query("sum(ferryman_training_steps_total)")
        prometheus.query_range("rate(ferryman_translate_sentences_total[10s])", start_s, end_s, step_s=1)

It scrapes and evaluates rules every second, listens on a free port of 127.0.0.1, keeps its data below the folder it is
given, and ends with the block. The Debian package starts a server of its own where systemd runs; it is left alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ops.conftest import need_program

_START_TIMEOUT_S = 30
_QUERY_TIMEOUT_S = 10


class PrometheusServer:
    """A running server."""

    def __init__(self, url: str):
        self.url = url

    def query(self, expression: str, at_s: float | None = None) -> list[dict[str, Any]]:
        """Return an instant vector, [{"metric": {label: value}, "value": [time_s, "number"]}]; a scalar is one item
        without labels. Raises AssertionError with Prometheus' words if the expression is wrong."""
        times = {} if at_s is None else {"time": at_s}
        data = self.get("query", query=expression, **times)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        return data["result"]

    def value(self, expression: str, at_s: float | None = None) -> float:
        """Return the number of an expression that has exactly one series."""
        (series,) = self.query(expression, at_s)
        return float(series["value"][1])

    def query_range(self, expression: str, start_s: float, end_s: float, step_s: float = 1) -> list[dict[str, Any]]:
        """Return a matrix, [{"metric": {label: value}, "values": [[time_s, "number"], …]}]."""
        return self.get("query_range", query=expression, start=start_s, end=end_s, step=step_s)["result"]

    def wait_for(self, expression: str, timeout_s: float = 90) -> list[dict[str, Any]]:
        """Return the expression's result as soon as it has one."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline_s, f"nothing within {timeout_s:g} s: {expression}"
            time.sleep(0.2)
        return found

    def get(self, path: str, **parameters: object) -> Any:
        """Return the data of an answer of /api/v1/PATH: "alerts", "rules", "series" (with `match[]`), "targets"."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=_QUERY_TIMEOUT_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode(errors='replace')}") from error


@contextmanager
def prometheus_server(
    folder: Path,
    targets: Mapping[str, Sequence[str]],
    *,
    rule_files: Sequence[Path] = (),
    scrape_configs: Sequence[Mapping[str, Any]] = (),
    interval: str = "1s",
) -> Iterator[PrometheusServer]:
    """Run Prometheus, ready to answer. `targets` are the "host:port" of each job, scraped at /metrics; whole
    `scrape_configs` may be given beside them. Installs the Debian package if it is not there."""
    program = need_program("prometheus", "prometheus")
    jobs = [{"job_name": job, "static_configs": [{"targets": list(hosts)}]} for job, hosts in targets.items()]
    config = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(path.resolve()) for path in rule_files],
        "scrape_configs": [*jobs, *scrape_configs],
    }
    folder.mkdir(parents=True, exist_ok=True)
    config_file, log = folder / "prometheus.yml", folder / "prometheus.log"
    config_file.write_text(json.dumps(config, indent=2))  # JSON is YAML
    flags = (f"--config.file={config_file}", f"--storage.tsdb.path={folder / 'prometheus-data'}")
    with log.open("wb") as output:
        process = subprocess.Popen([program, *flags, "--web.listen-address=127.0.0.1:0"], stdout=output, stderr=output)
    try:
        yield PrometheusServer(_wait_until_ready(process, log))
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        text = log.read_text(errors="replace")
        if found := re.search(r'msg="Listening on" address=(127\.0\.0\.1:\d+)', text):
            url = f"http://{found.group(1)}"
            if _answers(f"{url}/-/ready"):
                return url
        time.sleep(0.05)
    raise AssertionError(f"Prometheus does not start:\n{log.read_text(errors='replace')}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_QUERY_TIMEOUT_S) as answer:
            return answer.status == 200
    except OSError:
        return False
