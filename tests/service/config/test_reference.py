"""The documentation of the options is what the code says."""

from pathlib import Path

import pytest

from ferryman_service.config.reference import table, with_table
from ferryman_service.config.service_config import HELP

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_documented_options_are_those_of_the_code():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_table(text), "run python -m ferryman_service.config.reference docs/configuration.md"


def test_the_table_has_every_option_with_default_and_range():
    rows = table().splitlines()[2:]
    assert len(rows) == len(HELP)
    [row] = [row for row in rows if row.startswith("| `probe_port` ")]
    assert "| `--probe-port` | `50052` | 0 to 65535, whole |" in row
    [row] = [row for row in rows if row.startswith("| `reflection` ")]
    assert "`--reflection`, `--no-reflection` | `true` | `true`, `false` |" in row


def test_a_document_without_a_place_for_the_table():
    with pytest.raises(ValueError, match="there must be the lines"):
        with_table("no place")
