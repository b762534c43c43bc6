"""What the documents tell people to run is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "bench/README.md", "docs/quality.md", "docs/lab-log.md"]
)
def test_documented_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert {name for name in named if not name.endswith("-")} <= targets
