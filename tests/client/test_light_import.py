from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = {"numpy", "torch", "onnxruntime", "sqlalchemy", "typer", "rich", "sentencepiece", "ferryman_service"}


def loaded_by(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_sdk_import_is_light():
    modules = loaded_by("import ferryman, ferryman.testing")
    assert "grpc" in modules
    assert modules & HEAVY == set()


def test_command_without_extra_says_how_to_install_it(tmp_path: Path):
    # -S leaves site-packages out; what the SDK itself needs is not reached.
    client = Path(__file__).parents[2] / "client"
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import runpy, sys; sys.path.insert(0, sys.argv[1]);"
         "runpy.run_path(sys.argv[1] + '/ferryman/cli/__main__.py', run_name='__main__')", str(client)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "ferryman: the command line needs typer and rich; run `pip install 'ferryman[cli]'`\n"
    assert result.stdout == ""
