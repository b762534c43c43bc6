"""The serving image on this machine: its environment, made by the commands of the Dockerfile, and run as it says."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from deploy.image_contents import ROOT, all_contents
from ferryman import Client
from ferryman.errors import RoleNotServed
from tests.ops.conftest import need_program

pytestmark = pytest.mark.ops

SIZE_TOLERANCE = 0.05
START_S = 60
# The machine's own where there is one: an interpreter in somebody's home is not for the user of the image.
SYSTEM_PYTHON = Path("/usr/bin/python3")
PYTHON = SYSTEM_PYTHON if SYSTEM_PYTHON.exists() else sys.executable
WRITABLE_BY_ALL = ("/tmp", "/var/tmp", "/dev/shm")
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def lines(instruction, text=DOCKERFILE):
    """Return what follows an instruction wherever it stands, as one line each."""
    return re.findall(rf"^{instruction} (.*)$", re.sub(r" *\\\n *", " ", text), re.MULTILINE)


def stage(name):
    [text] = re.findall(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture(scope="module")
def root():
    """A folder that every user may enter, as a container's root is."""
    folder = Path(tempfile.mkdtemp(prefix="ferryman-image-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def environment(root):
    """The folder that the image has at /opt/ferryman."""
    build = root / "build"
    build.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, build)
    for name, to in (("client", "client"), ("service", "service"), ("deploy/locks", "locks")):
        shutil.copytree(ROOT / name, build / to, ignore=shutil.ignore_patterns("__pycache__"))
    target = root / "opt"
    [make] = [line for line in lines("RUN") if line.startswith("python -m venv")]
    [pip_python] = re.findall(r"^ENV PIP_PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    variables = {**os.environ, "PIP_PYTHON": pip_python.replace("/opt/ferryman", str(target))}
    make_arguments = shlex.split(make.replace("/opt/ferryman", str(target)))[1:]
    subprocess.run([PYTHON, *make_arguments], check=True)
    for install in lines("RUN", stage("builder-serving-cpu")):
        pip, *install_arguments = shlex.split(install)
        subprocess.run([sys.executable, "-m", pip, *install_arguments, "-q"], cwd=build, env=variables, check=True)
    return target


def site_packages(environment):
    [found] = (environment / "lib").glob("python3.*/site-packages")
    return found


def test_it_holds_what_is_computed_for_it(environment):
    [computed] = [each for each in all_contents(ROOT) if each.target == "serving-cpu"]
    packages = site_packages(environment)
    held = {canonicalize_name(each.metadata["Name"]): each.version for each in distributions(path=[str(packages)])}
    assert held == {package.name: package.version for package in computed.packages}
    size_bytes = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())
    assert size_bytes == pytest.approx(computed.known_bytes, rel=SIZE_TOLERANCE)


def test_it_has_no_pip_and_does_not_need_the_folder_that_it_was_built_in(environment):
    packages = site_packages(environment)
    assert not (packages / "pip").exists()
    assert not [path for path in packages.glob("*.pth") if "build" in path.read_text()]


class Container:
    """Runs programs with the variables and, where root runs the tests, as the user of the image."""

    def __init__(self, root, environment):
        self.data, self.tmp = root / "data", root / "tmp"
        [identity] = set(lines("USER")) - {"0:0"}
        user, group = map(int, identity.split(":"))
        self._as = {"user": user, "group": group, "extra_groups": []} if os.geteuid() == 0 else {}
        self.user = user if self._as else None
        for folder in (self.data, self.tmp):
            folder.mkdir()
            if self._as:
                os.chown(folder, user, group)
        paths = {"/opt/ferryman": environment, "/data": self.data, "/tmp": self.tmp, "$PATH": os.environ["PATH"]}
        found = "|".join(map(re.escape, paths))
        [text] = lines("ENV", stage("runtime"))
        text = re.sub(found, lambda match: str(paths[match[0]]), text)
        self.variables = dict(part.split("=", 1) for part in shlex.split(text))
        self.variables["TMPDIR"] = str(self.tmp)
        self.variables |= {f"FERRYMAN_{name}": str(free_port()) for name in ("PORT", "PROBE_PORT", "METRICS_PORT")}

    def start(self, command):
        return subprocess.Popen(command, cwd=self.data, env=self.variables, **self._as)

    def run(self, command):
        command = [str(part) for part in command]
        options = {"capture_output": True, "text": True, "timeout": START_S}
        return subprocess.run(command, cwd=self.data, env=self.variables, **options, **self._as)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def container(root, environment):
    # What it was built from is not there any more.
    shutil.rmtree(root / "build", ignore_errors=True)
    return Container(root, environment)


def test_it_translates_and_ends_as_the_image_says(container, root, bundle_dir):
    need_program("tini", "tini")
    shutil.copytree(bundle_dir, root / "bundle")
    (root / "bundle").chmod(0o755)
    imported = container.run(["ferryman-service", "import-model", root / "bundle", "en-de"])
    assert imported.returncode == 0, imported.stderr
    entry, command = (json.loads(lines(*at)[0]) for at in (("ENTRYPOINT",), ("CMD", stage("serving-cpu"))))
    [check] = re.findall(r"CMD (\[.*\])$", lines("HEALTHCHECK")[0])
    process = container.start([*entry, *command])
    try:
        deadline_s = time.monotonic() + START_S
        while container.run(json.loads(check)).returncode != 0:
            assert process.poll() is None
            assert time.monotonic() < deadline_s
        with Client(f"127.0.0.1:{container.variables['FERRYMAN_PORT']}") as client:
            assert len(client.translate("en-de", ["a b c"]).translations) == 1
            with pytest.raises(RoleNotServed):
                client.start_training("cor_x", "en-de")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
    assert container.run(json.loads(check)).returncode == 1


def test_it_writes_to_its_data_and_tmp_alone(container, root):
    # Nobody else lets this user write, so what it has written is its own, or in a folder that is everybody's.
    if container.user is not None:
        written = [path for folder in WRITABLE_BY_ALL for path in owned_by(container.user, Path(folder))]
        assert written, "at least its data"
        assert all(path.is_relative_to(container.data) or path.is_relative_to(container.tmp) for path in written)


def owned_by(user, folder):
    for path, _, names in os.walk(folder):
        for each in (Path(path, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if each.lstat().st_uid == user:
                    yield each


def test_it_says_that_it_cannot_train(container):
    ended = container.run(["ferryman-service", "serve", "--roles", "training,translation"])
    assert ended.returncode == 1
    assert "torch" in ended.stderr
