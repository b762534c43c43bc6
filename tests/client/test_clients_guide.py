"""The page about clients gives the defaults of the code; tests/docs runs its programs."""

from __future__ import annotations

import re
from pathlib import Path

from ferryman._channel import channel_options

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")


def test_documented_options_match_code():
    options = dict(channel_options((), "localhost:1"))
    rows = re.findall(r"^\| (`grpc\.[^|]+) \| ([^|]+) \|", GUIDE, re.MULTILINE)
    assert len(rows) == 6
    for names, values in rows[1:]:
        for name, value in zip(re.findall(r"`([^`]+)`", names), re.findall(r"[\d,]+(?: MiB)?", values), strict=True):
            number = int(value.removesuffix(" MiB").strip(",").replace(",", ""))
            assert options[name] == number * (2**20 if value.endswith("MiB") else 1), name
