"""The API guide's tables of events, failures and errors are complete, and say the levels and statuses that are used."""

import ast
import itertools
import re
from pathlib import Path

from ferryman_service.domain import errors
from ferryman_service.domain.records import EventLevel
from ferryman_service.domain.runs import FailureReason
from ferryman_service.rpc.errors import INTERNAL_REASON, STATUS_CODES

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")
LEVELS = {level.name: level.value for level in EventLevel}


def table(heading):
    """Return the rows of the guide's table below a heading, the first cell without its backticks."""
    guide = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    below = guide.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def is_code(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(CODE.fullmatch(node.value))


def level_of(node):
    named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "EventLevel"
    return LEVELS[node.attr] if named else None


def events_of(source):
    """Return {code: level, None where it does not stand beside the code} of the events that a module makes.

    An event is RunEvent(level=..., code=...), or a level and a code one after the other in a call or a tuple. A tuple
    of a code and a text stands for an event whose level is said elsewhere.
    """
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            if is_code(named.get("code")):
                found[named["code"].value] = level_of(named.get("level"))
        for items in (getattr(node, "args", None), getattr(node, "elts", None)):
            pairs = itertools.pairwise(items) if isinstance(items, list) else ()
            for first, second in pairs:
                if level_of(first) and is_code(second):
                    found[second.value] = level_of(first)
        returned = node.value if isinstance(node, ast.Return) else None
        if isinstance(returned, ast.Tuple) and len(returned.elts) == 2 and is_code(returned.elts[0]):
            found.setdefault(returned.elts[0].value, None)
    return found


def used_events():
    found = {}
    for path in sorted((ROOT / "service").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "EventLevel" in source:
            for code, level in events_of(source).items():
                assert not (level and found.get(code)) or level == found[code], f"{code} has two levels"
                found[code] = level or found.get(code)
    return found


def test_every_event_is_in_the_table_with_its_level():
    documented = {code: row[0] for code, row in table("Events").items()}
    used = used_events()
    assert set(documented) == set(used)
    assert {code: level for code, level in used.items() if level and documented[code] != level} == {}
    assert set(documented.values()) <= set(LEVELS.values())


def test_every_event_and_reason_is_explained():
    for heading in ("Events", "Why a run failed"):
        assert all(len(row[-1]) > 20 for row in table(heading).values()), heading


def test_every_reason_is_in_the_table():
    assert set(table("Why a run failed")) == {reason.value for reason in FailureReason}


def error_reasons():
    """Return {reason: name of its status} of every error that callers can get."""
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.FerrymanError)]
    sent = {cls: next((STATUS_CODES[base] for base in cls.__mro__ if base in STATUS_CODES), None) for cls in classes}
    # A class with leaves stands for a status; a deadline that passes has no other name.
    named = [cls for cls in classes if not cls.__subclasses__() or cls is errors.DeadlineExceeded]
    found = {cls.__new__(cls).reason: sent[cls].name for cls in named if sent[cls] is not None}
    return found | {INTERNAL_REASON: "INTERNAL"}


def test_every_error_is_in_a_table_with_its_status():
    guide = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    below = guide.split("\n## Errors\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", below, re.MULTILINE)
    assert dict(rows) == error_reasons()


def test_the_scan_sees_every_way_to_make_an_event():
    source = """
reporter.event(EventLevel.INFO, "A_B", "text", repeats=True)
RunEvent(level=EventLevel.ERROR, code="FULL", message=text)
remarks = [(EventLevel.WARNING, "C_D", f"{x}")]
def reason():
    return "E_F", f"{x}"
"""
    assert events_of(source) == {"A_B": "info", "FULL": "error", "C_D": "warning", "E_F": None}
