"""The page about clients is true: its Python runs, its stubs are generated, its defaults are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from ferryman._channel import channel_options
from ferryman.testing import FakeFerryman

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


def test_the_python_blocks_run(capsys):
    found = blocks("python")
    assert len(found) >= 6

    def translate(sentence: str) -> str:
        time.sleep(sentence == "a long text")
        return sentence.upper()

    with FakeFerryman(translate=translate) as fake, FakeFerryman() as other:
        fake.add_model("en-de")
        other.add_model("en-de")
        program = "\n".join(found).replace("localhost:50051", fake.target)
        program = program.replace("10.0.0.1:50051,10.0.0.2:50051", f"{fake.target},{other.target}")
        exec(compile(program + "\nclient.close()\n", "clients.md", "exec"), {"__name__": "guide"})
    assert capsys.readouterr().out.splitlines() == ["ONE", "DEADLINE_EXCEEDED"]


def test_the_python_stubs_are_generated(tmp_path):
    [command] = [block for block in blocks("shell") if "grpc_tools" in block]
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    assert (tmp_path / "stubs/ferryman/v1/training_pb2_grpc.py").exists()


def test_the_options_are_those_of_the_code():
    options = dict(channel_options((), "localhost:1"))
    rows = re.findall(r"^\| (`grpc\.[^|]+) \| ([^|]+) \|", GUIDE, re.MULTILINE)
    assert len(rows) == 6
    for names, values in rows[1:]:
        for name, value in zip(re.findall(r"`([^`]+)`", names), re.findall(r"[\d,]+(?: MiB)?", values), strict=True):
            number = int(value.removesuffix(" MiB").strip(",").replace(",", ""))
            assert options[name] == number * (2**20 if value.endswith("MiB") else 1), name


def test_every_link_leads_somewhere():
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", GUIDE):
        target = ROOT / "docs" / (path or "clients.md")
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor
