"""ONNX Runtime's telemetry is off before ONNX Runtime is imported, in every program of the project."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWITCHED_OFF = {
    "service/ferryman_service/": "service/ferryman_service/__init__.py",
    "bench/": "bench/__init__.py",
    "tests/": "tests/conftest.py",
}
"""Folders whose modules may import ONNX Runtime, and the file that Python, or pytest, executes before each of them."""
IMPORTING = """
import importlib, sys
importlib.import_module(sys.argv[1])
import onnxruntime
"""


def imports_onnxruntime(path):
    for node in ast.walk(ast.parse(path.read_bytes())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "onnxruntime" for name in names):
            return True
    return False


def test_only_packages_that_turn_telemetry_off_import_onnxruntime():
    folders = ("bench", "client", "deploy", "examples", "service", "tests")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if imports_onnxruntime(path)]
    names = {path.relative_to(ROOT).as_posix() for path in found}
    assert "service/ferryman_service/translation/loader.py" in names
    assert [name for name in names if not name.startswith(tuple(SWITCHED_OFF))] == []
    for first in SWITCHED_OFF.values():
        text = (ROOT / first).read_text()
        assert "ORT_DISABLE_TELEMETRY" in text or "import ferryman_service" in text


@pytest.mark.parametrize("module", ["ferryman_service.worker", "bench.shared.result"])
def test_importing_writes_nothing_into_a_fresh_home(tmp_path, module):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "XDG_"))}
    environment |= {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", IMPORTING, module], cwd=ROOT, env=environment, check=True, timeout=120)
    assert list(tmp_path.rglob("*")) == []
