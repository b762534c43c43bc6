"""The README and CONTRIBUTING name commands, folders and extras that exist."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs.markdown import blocks_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", README))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"`ferryman ([a-z]+(?: [a-z]+)?)[ `]", (ROOT / "docs/api.md").read_text())))
)
def test_every_command_of_the_api_guide_exists(command):
    program = [sys.executable, "-m", "ferryman.cli", *command.split(), "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ferryman {command}: {done.stderr}"


def test_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 125


def test_pictures_for_light_and_dark_say_the_same():
    light, dark = ((ROOT / f"docs/images/overview{name}.svg").read_text() for name in ("", "-dark"))
    assert light != dark
    assert re.sub(r"#[0-9a-f]{6}\b", "", light) == re.sub(r"#[0-9a-f]{6}\b", "", dark)


def test_repository_layout_is_that_of_the_repository():
    [tree] = [block.text for block in blocks_of("CONTRIBUTING.md") if block.text.startswith("protos/")]
    missing = []
    for line in tree.splitlines():
        inside = line.startswith("  ")
        names = re.match(r"\s*((?:[\w./]+ )+) ", line + "  ").group(1).split()
        base = ROOT / "service/ferryman_service" if inside else ROOT
        missing += [name for name in names if not (base / name).exists()]
    assert missing == []


def test_every_extra_is_described():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    operations = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([a-z]+)`", "".join(re.findall(r"^\| `.*", operations, re.MULTILINE))))
    assert extras - {"demo", "dev", "ops"} <= described
