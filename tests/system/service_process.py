"""The real service, as a program of its own, on a data folder of the test's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

START_TIMEOUT_S = 60


class ServiceProcess:
    """`python -m ferryman_service serve` on free loopback ports; its output goes to a file.

    Its workers train with one thread as the tests do, or with `all_cores` as for a user who sets nothing. With a `home`
    the environment is that of a user who has set nothing for caches or for ONNX Runtime.
    """

    def __init__(
        self,
        data_dir: Path,
        *flags: str,
        port: int = 0,
        wrapper: tuple[str, ...] = (),
        all_cores: bool = False,
        working_folder: Path | None = None,
        home: Path | None = None,
    ):
        self.data_dir = data_dir
        self.log = data_dir.parent / f"service-{time.monotonic_ns()}.log"
        command = [
            *wrapper,
            *(sys.executable, "-P", "-m", "ferryman_service", "serve", "--data-dir", str(data_dir)),
            *("--port", str(port), "--metrics-port", "0", "--probe-port", "0", "--heartbeat-s", "0.5", *flags),
        ]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FERRYMAN_")}
        if all_cores:
            environment.pop("OMP_NUM_THREADS", None)
        if home is not None:
            environment["HOME"] = str(home)
            environment = {key: value for key, value in environment.items() if not key.startswith(("XDG_", "ORT_"))}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=working_folder)
        self.port = int(self._wait_for_line(r"serving on 127\.0\.0\.1:(\d+)"))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def metrics_url(self) -> str:
        return self._wait_for_line(r"metrics on (http://\S+)")

    def _wait_for_line(self, pattern: str) -> str:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if found := re.search(pattern, self.log.read_text(errors="replace")):
                return found.group(1)
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in the service's output:\n{self.log.read_text(errors='replace')}")

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to stop, as Kubernetes would; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the service did not stop:\n{self.log.read_text(errors='replace')}") from None
