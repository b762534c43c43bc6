"""Writes the locks of the images, deploy/locks/TARGET.txt: every package with its version and digest. `make locks`.

pip resolves the extras of each target within constraints.txt, from the indexes that it is configured with, and reports
the files that it would install. The locks are for the interpreter and the machine that this runs on: run it with the
Python of the base image, CPython 3.11 on x86-64. PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS must lead to PyTorch's CPU
wheels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deploy.image_contents import ROOT, extras_of_targets, read_constraints

LOCKS: Final = ROOT / "deploy/locks"
_CPU_BUILD: Final = "+cpu"


def main() -> int:
    """Write the locks of all targets of the Dockerfile."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = read_constraints((ROOT / "constraints.txt").read_text(encoding="utf-8"))["torch"]
    LOCKS.mkdir(exist_ok=True)
    for target, extras in extras_of_targets((ROOT / "Dockerfile").read_text(encoding="utf-8")).items():
        requirements = [*project["dependencies"], *(text for name in extras for text in project_extra(project, name))]
        if "train" in extras:
            # The build for CPUs has a version of its own; === takes the one of PyPI, which brings CUDA.
            requirements.append(f"torch==={torch}{_CPU_BUILD if 'gpu' not in extras else ''}")
        lines = lock_lines(resolve(requirements))
        text = "\n".join([f"# The packages of the image {target}; written by `make locks`.", *lines, ""])
        (LOCKS / f"{target}.txt").write_text(text, encoding="utf-8")
        print(f"{target}: {len(lines)} packages")
    return 0


def project_extra(project: Mapping[str, Any], name: str) -> Sequence[str]:
    """Return the requirements of one of the product's extras."""
    extra: Sequence[str] = project["optional-dependencies"][name]
    return extra


def resolve(requirements: Iterable[str]) -> Sequence[Mapping[str, Any]]:
    """Return pip's report of what it would install, whatever is installed here."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        how = ("--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", str(report))
        command = [sys.executable, "-m", "pip", "install", *how, "-c", str(ROOT / "constraints.txt"), *requirements]
        subprocess.run(command, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
        found: Sequence[Mapping[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return found


def lock_lines(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each package, by name."""
    lines = {}
    for package in found:
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines[name.lower()] = f"{name}=={version} --hash=sha256:{digest}"
    return [lines[name] for name in sorted(lines)]


if __name__ == "__main__":
    sys.exit(main())
