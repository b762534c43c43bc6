"""The Python of the API guide runs, block after block, as one program."""

from __future__ import annotations

import re
from pathlib import Path

from ferryman.testing import FakeFerryman

GUIDE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the guide downloads a model
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    with FakeFerryman() as fake:
        program = "\n".join(blocks).replace("localhost:50051", fake.target) + "\nclient.close()\n"
        exec(compile(program, str(GUIDE), "exec"), {"__name__": "guide"})
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["succeeded 1", "ONE -0.1", "TWO -0.1"]
    assert "MODEL_NOT_FOUND" in printed
    assert "recipe.model.norm is 'mid', must be one of post, pre, deep" in printed
