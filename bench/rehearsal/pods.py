"""A pod without Kubernetes: the service as a program with an address of its own, run as the chart's pod is, and ended
as a kubelet ends one.

Every pod has an address of the loopback network 127.0.0.0/8, so all have the same ports, those of the chart.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.rehearsal.chart import PodTemplate

START_TIMEOUT_S: Final = 60.0
_READY: Final = "SERVING"
_LOOK_EVERY_S: Final = 0.05
_LOG_TAIL_CHARACTERS: Final = 3000
_MODULE: Final = re.compile(r"ferryman_service(\..+)?")


class PodFailed(Exception):
    """A pod did not become ready. The message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a pod ended: its exit status, and the seconds from the beginning of its deletion."""

    status: int
    seconds: float
    in_time: bool


class Pod:
    """One pod, which may be started again after it has ended, with its old address."""

    def __init__(self, template: PodTemplate, name: str, address: str, data: Path, folder: Path) -> None:
        """Store. `data` is the data folder that all pods share, `folder` one of the pod's own."""
        self.template = template
        self.name = name
        self.address = address
        self._data = data
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None

    @property
    def target(self) -> str:
        """Where it serves, as HOST:PORT."""
        return f"{self.address}:{self.template.grpc_port}"

    async def start(self) -> float:
        """Start it and wait until it is ready; return the seconds that took."""
        began_s = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._log().open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for the rehearsal, which then ends its pods
            )
        while (state := await self._readiness()) != _READY:
            if self._process.returncode is not None or time.monotonic() - began_s > START_TIMEOUT_S:
                raise PodFailed(f"{self.name} is not ready but {state}; its log ends with:\n{self.log_tail()}")
            await asyncio.sleep(_LOOK_EVERY_S)
        return time.monotonic() - began_s

    async def delete(self) -> Ending:
        """End it as Kubernetes does: preStop, SIGTERM, and SIGKILL once its grace period is over."""
        began_s = time.monotonic()
        process = self._running()
        await asyncio.sleep(self.template.pre_stop_s)
        process.send_signal(signal.SIGTERM)
        left_s = self.template.termination_grace_s - (time.monotonic() - began_s)
        in_time = True
        try:
            await asyncio.wait_for(process.wait(), left_s)
        except TimeoutError:
            in_time = False
            await self.kill()
        assert process.returncode is not None, "it has ended"
        return Ending(status=process.returncode, seconds=time.monotonic() - began_s, in_time=in_time)

    async def kill(self) -> None:
        """End it as a node that dies would."""
        self.signal(signal.SIGKILL)
        await self._running().wait()

    def signal(self, number: int) -> None:
        """Send a signal to the service, not to its workers."""
        with contextlib.suppress(ProcessLookupError):
            self._running().send_signal(number)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it get no processor for the length of the block."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def is_running(self) -> bool:
        """Tell whether its process lives."""
        return self._process is not None and self._process.returncode is None

    def log_tail(self) -> str:
        """Return the end of what it has written."""
        return self._log().read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "the pod was never started"
        return self._process

    def _log(self) -> Path:
        return self._folder / "log"

    def _command(self) -> Sequence[str]:
        """The chart's command line; addresses come last, and the last one counts."""
        arguments = [self._here(argument) for argument in self.template.arguments]
        addresses = ("--host", "--metrics-host", "--probe-host")
        here = [part for flag in addresses for part in (flag, self.address)]
        return (sys.executable, "-m", "ferryman_service", *arguments, *here)

    def _environment(self) -> dict[str, str]:
        """The chart's variables, and of this machine's all that are not settings of the service."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FERRYMAN_")}
        given = {name: self._here(value) for name, value in self.template.environment.items()}
        return {**kept, "PYTHONUNBUFFERED": "1", "FERRYMAN_DATA_DIR": str(self._data), **given}

    def _here(self, text: str) -> str:
        """Put folders of this machine for those of the container."""
        for path in self.template.data_paths:
            text = text.replace(path, str(self._data), 1) if text.startswith(path) else text
        for path, files in self.template.files.items():
            if text.startswith(path):
                folder = self._folder / path.strip("/").replace("/", "-")
                folder.mkdir(parents=True, exist_ok=True)
                for name, content in files.items():
                    (folder / name).write_text(content)
                text = text.replace(path, str(folder), 1)
        return text

    async def _readiness(self) -> str:
        """Ask as the chart's readiness probe does; return the status, or why there is none."""
        probe = self.template.readiness
        # A connection of its own each time: what another one has learnt about the address, seconds ago, is no answer.
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(f"{self.address}:{probe.port}", options) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            try:
                answer = await check(health_pb2.HealthCheckRequest(service=probe.service), timeout=probe.timeout_s)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def kill_all_that_name(text: str) -> None:
    """Kill all processes of the service whose command line holds a text, such as the id of a run or the path of its
    data folder; nobody's shell, editor or log reader."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                arguments = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if _is_of_the_service(arguments) and any(text in argument for argument in arguments):
                    os.kill(int(name), signal.SIGKILL)


def _is_of_the_service(arguments: Sequence[str]) -> bool:
    """Tell whether a command line is that of the service, of a worker, or of what starts several workers."""
    return any(option == "-m" and _MODULE.fullmatch(module) for option, module in itertools.pairwise(arguments))
