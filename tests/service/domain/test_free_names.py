"""The rule for names that callers choose freely."""

import pytest

from ferryman_service.domain.names import name_violations


@pytest.mark.parametrize(
    "name",
    ["", "News, 2024 (en–de) v1.2", "é" * 200, "名前", "می\u200cخواهم", "👩\u200d💻", "a\u00a0b", "ab\u0301"],
)
def test_a_printable_line_is_a_name(name):
    assert list(name_violations(name, "name")) == []


@pytest.mark.parametrize(
    "char",
    [
        "\n",
        "\r",
        "\t",
        "\0",
        "\x1b",
        "\x7f",
        "\x85",
        "\u2028",
        "\u2029",
        "\u202e",
        "\u2066",
        "\u200f",
        "\ufeff",
        "\U000e0041",
    ],
)
def test_controls_are_named_with_their_place(char):
    [violation] = name_violations(f"ab{char}c", "header.display_name")
    assert (violation.field, violation.reason) == ("header.display_name", "CONTROL_CHARACTER")
    assert f"U+{ord(char):04X} as character 3" in violation.description


def test_every_violation_is_told():
    assert [violation.reason for violation in name_violations("\n" * 201, "name")] == ["TOO_LONG", "CONTROL_CHARACTER"]
