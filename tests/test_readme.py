"""The README is true: its Python runs, its commands exist, its tree is the tree, its links lead somewhere."""

import gzip
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ferryman.testing import FakeFerryman

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """Return the fenced blocks of a language ("" for none)."""
    found, opened, current = [], "", None
    for line in README.splitlines(keepends=True):
        if not line.startswith("```"):
            if current is not None:
                current.append(line)
        elif current is not None:
            found.append((opened, "".join(current)))
            current = None
        else:
            opened, current = line[3:].strip(), []
    return [text for kind, text in found if kind == language]


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("train.en", "train.de", "val.en", "val.de"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"a line\nanother\n"))
    [program] = blocks("python")
    with FakeFerryman() as fake:
        exec(compile(program.replace("localhost:50051", fake.target), "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("1 StateChange")
    assert printed[-1] == "TWO DOGS PLAY IN THE SNOW."


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", README))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`ferryman ([a-z]+(?: [a-z]+)?)[ `]", README))))
def test_every_command_exists(command):
    program = [sys.executable, "-m", "ferryman.cli", *command.split(), "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ferryman {command}: {done.stderr}"


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not leads_somewhere(*link.partition("#")[::2])] == []


def leads_somewhere(path, anchor):
    if not anchor:
        return (ROOT / path).exists()
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_the_tree_is_the_tree():
    [tree] = [block for block in blocks("") if block.startswith("protos/")]
    missing = []
    for line in tree.splitlines():
        inside = line.startswith("  ")
        names = re.match(r"\s*((?:[\w./]+ )+) ", line + "  ").group(1).split()
        base = ROOT / "service/ferryman_service" if inside else ROOT
        missing += [name for name in names if not (base / name).exists()]
    assert missing == []


def test_every_extra_is_described():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    described = set(re.findall(r"`([a-z]+)`", "".join(line for line in README.splitlines() if line.startswith("| `"))))
    assert extras - {"demo", "dev", "ops"} <= described
