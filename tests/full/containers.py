"""Images and containers without a registry or a Docker engine: buildah and podman, on a storage folder of their own.

The choices are those that work on most kernels and inside other containers: builds by chroot, runc, cgroups by their
file system, the host's network, and where no overlay can be mounted the storage driver vfs, which copies every layer.
"""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferryman_service.rpc.health import check_health
from tests.ops.conftest import need_program

ROOT = Path(__file__).parents[2]
BASE = "localhost/ferryman-base"
REPOSITORY = "localhost/ferryman"
START_S = 120
STOP_S = 60
_BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
_BASE_DOCKERFILE = "FROM scratch\nADD base.tar /\nRUN ln -s /usr/bin/python3 /usr/local/bin/python\n"
_CERTIFICATES = ("/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates")
# Where pip finds packages; the rest of its configuration concerns this machine alone.
_PIP_OPTIONS = {
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "constraint"),
    *("cert", "client-cert", "proxy", "timeout", "default-timeout", "retries"),
}


def pip_configuration() -> dict[str, str]:
    """Return the options by which pip finds packages on this machine, from its files and variables."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    entries = dict(line.split("=", 1) for line in listed.splitlines())
    # Variables win over files, as in pip itself.
    ordered = sorted(entries.items(), key=lambda entry: entry[0].startswith(":env:"))
    options = {name.split(".", 1)[1]: ast.literal_eval(value) for name, value in ordered if "." in name}
    return {name: value for name, value in options.items() if name in _PIP_OPTIONS}


def local_paths(options: Mapping[str, str]) -> set[Path]:
    """Return the files and folders of this machine that the options of pip name."""
    found = set()
    for word in (word for value in options.values() for word in value.split()):
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            # The files of an index lie beside it: its links begin with "../../".
            found.add(path.parent if word.startswith("file://") else path)
    return found


class ContainerEngine:
    """Builds images and runs containers; `close` removes all of them."""

    def __init__(self, folder: Path) -> None:
        assert os.geteuid() == 0, "root builds the base image and sets limits of cgroups: run this as root"
        for program in ("buildah", "runc", "mmdebstrap", "catatonit"):
            need_program(program, program)
        # Without netavark podman does not start, not even for the host's network.
        need_program("podman", "podman", "netavark")
        self.folder = folder
        configuration = folder / "containers.conf"
        configuration.write_text(_podman_configuration())
        # Podman would let systemd time the health checks, with the storage folder of the machine.
        own = {"CONTAINERS_CONF": str(configuration), "TMPDIR": str(folder), "DISABLE_HC_SYSTEMD": "true"}
        self._environment = {**os.environ, **own}
        driver = "overlay" if can_mount_overlay(folder) else "vfs"
        self._storage = ("--root", folder / "storage", "--runroot", folder / "run", "--storage-driver", driver)

    def build_base(self) -> None:
        """Build the image that stands for python:3.11-slim-bookworm, from Debian's packages."""
        context = self.folder / "base"
        context.mkdir()
        self._run("mmdebstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", "bookworm", context / "base.tar")
        (context / "Dockerfile").write_text(_BASE_DOCKERFILE)
        self.buildah("bud", "--isolation", "chroot", "--network", "host", "--tag", BASE, context)
        shutil.rmtree(context)

    def image(self, target: str) -> str:
        """Return the name of a target's image."""
        return f"{REPOSITORY}:{target}"

    def has_image(self, image: str) -> bool:
        """Tell whether an image is there."""
        return self.try_podman("image", "exists", image).returncode == 0

    def build(self, target: str) -> None:
        """Build a target of the Dockerfile; the ways in which this machine finds packages are inherited."""
        pip = self.folder / "pip.conf"
        options = pip_configuration()
        pip.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in options.items()), ""]))
        same_paths = {*map(Path, _CERTIFICATES), *local_paths(options)}
        volumes = {Path("/etc/pip.conf"): pip, **{path: path for path in sorted(same_paths) if path.exists()}}
        mounts = [part for to, path in volumes.items() for part in ("--volume", f"{path}:{to}:ro")]
        how = ("--isolation", "chroot", "--network", "host", "--format", "docker", *mounts)
        self.buildah(
            "bud", *how, "--target", target, "--build-arg", f"PYTHON_IMAGE={BASE}", "--tag", self.image(target), ROOT
        )

    def size_bytes(self, image: str) -> int:
        """Return the size of an image, its base included."""
        return int(self.inspect(image, "image")["Size"])

    def inspect(self, name: str, kind: str = "container") -> dict[str, Any]:
        """Return what podman knows of an image, a container or a pod."""
        found = json.loads(self.podman(kind, "inspect", name))
        return dict(found[0] if isinstance(found, list) else found)

    def buildah(self, *arguments: str | Path) -> str:
        """Run buildah, which must succeed; return its output."""
        return self._run("buildah", *self._storage, *arguments)

    def podman(self, *arguments: str | Path) -> str:
        """Run podman, which must succeed; return its output."""
        return self._run(*self._podman(), *arguments)

    def try_podman(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run podman; return how it ended."""
        command = [str(part) for part in (*self._podman(), *arguments)]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True)

    def _podman(self) -> Sequence[str | Path]:
        return ("podman", *self._storage, "--tmpdir", self.folder / "tmp", "--runtime", "runc")

    def _run(self, *command: str | Path) -> str:
        ended = subprocess.run(
            [str(part) for part in command], env=self._environment, cwd=self.folder, capture_output=True, text=True
        )
        printed = ended.stdout[-4000:] + ended.stderr[-4000:]
        assert ended.returncode == 0, f"{' '.join(map(str, command))}: exit status {ended.returncode}\n{printed}"
        return ended.stdout

    def remove_containers(self) -> None:
        """Remove pods, containers and volumes; after this the storage folder may be removed too."""
        self.podman("pod", "rm", "--all", "--force", "--time", "0")
        self.podman("rm", "--all", "--force", "--time", "0")
        self.podman("volume", "rm", "--all", "--force")
        # Whoever removes the folder would also remove what is mounted in it.
        for point in reversed(mounts_below(self.folder)):
            self._run("umount", point)


def _podman_configuration() -> str:
    # Podman's defaults are above what this process may grant where it runs in a container itself.
    wanted = {"nofile": (resource.RLIMIT_NOFILE, 65536), "nproc": (resource.RLIMIT_NPROC, 4096)}
    hard = {name: resource.getrlimit(limit)[1] for name, (limit, _) in wanted.items()}
    numbers = {
        name: most if hard[name] == resource.RLIM_INFINITY else min(most, hard[name])
        for name, (_, most) in wanted.items()
    }
    ulimits = [f"{name}={number}:{number}" for name, number in numbers.items()]
    return f"""
[containers]
default_ulimits = {json.dumps(ulimits)}
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
"""


def can_mount_overlay(folder: Path) -> bool:
    """Try to mount an overlay file system below a folder."""
    with tempfile.TemporaryDirectory(dir=folder) as trial:
        lower, upper, work, merged = (Path(trial, name) for name in ("lower", "upper", "work", "merged"))
        for each in (lower, upper, work, merged):
            each.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        mounted = subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], capture_output=True)
        if mounted.returncode == 0:
            subprocess.run(["umount", merged], check=True)
        return mounted.returncode == 0


def mounts_below(folder: Path) -> list[str]:
    """Return where something is mounted below a folder, outer mounts first."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if Path(point).is_relative_to(folder)]


def free_port() -> int:
    """Return a port that nobody has on loopback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a container may use; `cpus` None is no limit."""

    cpus: float | None
    memory: str


class Container:
    """A container of the engine, and its processes as the host sees them."""

    def __init__(self, engine: ContainerEngine, name: str) -> None:
        self.engine, self.name = engine, name
        self.id = str(engine.inspect(name)["Id"])

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside; return how it ended."""
        return self.engine.try_podman("exec", self.name, *command)

    def stop(self) -> int:
        """Send SIGTERM, and SIGKILL after STOP_S; return the exit code."""
        self.engine.podman("stop", "--time", str(STOP_S), self.name)
        return self.exit_code()

    def exit_code(self) -> int:
        """Return the exit code of a container that has ended."""
        state = self.engine.inspect(self.name)["State"]
        assert state["Status"] == "exited", state
        return int(state["ExitCode"])

    def processes(self) -> Iterator[Path]:
        """Yield the folder in /proc of each process."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_inside = self.id in (folder / "cgroup").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if is_inside:
                yield folder

    def log(self) -> str:
        """Return what its processes have printed."""
        ended = self.engine.try_podman("logs", self.name)
        return ended.stdout + ended.stderr

    def usable_cpus(self) -> int:
        """Return the number of CPUs that the service inside reports as usable."""
        shown = self.execute("ferryman-service", "config", "--show")
        found = re.search(r"^# usable CPUs: (\d+) ", shown.stdout, re.MULTILINE)
        assert found is not None, shown
        return int(found[1])


class ServiceContainer(Container):
    """A running service with a volume as its data folder, on free ports of loopback."""

    def __init__(
        self, engine: ContainerEngine, image: str, volume: str, limits: Limits, *, read_only: bool = True
    ) -> None:
        names = ("PORT", "PROBE_PORT", "METRICS_PORT")
        ports = {name: free_port() for name in names}
        self.port, self.probe_port, self.metrics_port = ports.values()
        # The host's network has no ports to publish: what the service listens on is loopback instead.
        variables = {"HOST": "127.0.0.1", "PROBE_HOST": "127.0.0.1", "METRICS_HOST": "127.0.0.1", **ports}
        settings = [part for name, value in variables.items() for part in ("--env", f"FERRYMAN_{name}={value}")]
        # Podman would add writable folders of its own to a read-only root.
        root = ("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp") if read_only else ()
        cpus = () if limits.cpus is None else ("--cpus", str(limits.cpus))
        bounds = (*cpus, "--memory", limits.memory, "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
        name = engine.podman(
            *("run", "--detach", "--network", "host", "--http-proxy=false", *root, *bounds),
            *("--volume", f"{volume}:/data", *settings, image),
        ).strip()
        super().__init__(engine, name)
        self._wait_until_serving()

    @property
    def address(self) -> str:
        """Where gRPC is served."""
        return f"127.0.0.1:{self.port}"

    def metrics(self) -> str:
        """Return the page of metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as page:
            return str(page.read().decode())

    def _wait_until_serving(self) -> None:
        deadline_s = time.monotonic() + START_S
        while check_health(f"127.0.0.1:{self.probe_port}", "", 5) != "SERVING":
            assert self.engine.inspect(self.name)["State"]["Running"], self.log()
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.2)
