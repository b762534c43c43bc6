"""Runs a local Ferryman service, as a separate process, during a `with` block."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.1
_LOG_TAIL_LINES: Final = 20
_SERVING = re.compile(r"^serving on (\S+)$", re.MULTILINE)


class ServiceFailed(Exception):
    """The service did not start, or its exit status is not 0. The message includes the end of its log."""


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a free port of 127.0.0.1 during the block. A server that sets SO_REUSEADDR can still bind it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextlib.contextmanager
def local_service(
    data_dir: Path, log_path: Path, arguments: Sequence[str] = (), metrics_port: int = 0
) -> Iterator[str]:
    """Run `ferryman-service serve` on a free loopback port; yield its address once it is SERVING; stop it at the end.

    Creates `data_dir` if needed and overwrites `log_path`. `metrics_port` 0 disables the Prometheus endpoint.
    Raises ServiceFailed.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    process = _start(data_dir, log_path, ["--metrics-port", str(metrics_port), *arguments])
    try:
        address = _wait_for_address(process, log_path)
        _wait_until_serving(address)
        yield address
    except BaseException:
        _stop(process)
        raise
    if status := _stop(process):
        raise ServiceFailed(f"the service exited with status {status}{_log_tail(log_path)}")


def _start(data_dir: Path, log_path: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "ferryman_service", "serve", "--host", "127.0.0.1", "--port", "0"]
    command += ["--probe-port", "0", "--data-dir", str(data_dir), *arguments]
    with log_path.open("wb") as log:
        # A separate session: Ctrl-C reaches only the caller, which then stops the service cleanly.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _wait_for_address(process: subprocess.Popen[bytes], log_path: Path) -> str:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if match := _SERVING.search(log_path.read_text(errors="replace")):
            return match[1]
        if process.poll() is not None:
            raise ServiceFailed(f"the service did not start; exit status {process.returncode}{_log_tail(log_path)}")
        time.sleep(_POLL_S)
    raise ServiceFailed(f"the service did not start within {START_TIMEOUT_S:g} s{_log_tail(log_path)}")


def _wait_until_serving(address: str) -> None:
    """Poll grpc.health.v1 until the status is SERVING."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(address, (("grpc.enable_http_proxy", 0),)) as channel:  # a proxy cannot reach it
        check = health_pb2_grpc.HealthStub(channel).Check
        while time.monotonic() < deadline_s:
            response = check(health_pb2.HealthCheckRequest(), timeout=START_TIMEOUT_S, wait_for_ready=True)
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(_POLL_S)
    raise ServiceFailed(f"the service at {address} is not SERVING after {START_TIMEOUT_S:g} s")


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Send SIGTERM and return the exit status; kill the service if it does not stop in time."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _log_tail(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return "".join(f"\n  | {line}" for line in lines)
