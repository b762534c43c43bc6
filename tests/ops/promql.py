"""Just enough of PromQL to find the names in it."""

from __future__ import annotations

import re

_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "group_right"}
_LABEL_LISTS = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"


def metric_names(expression: str) -> set[str]:
    """Return the names of the metrics, and recorded series, that an expression reads."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", bare)
    bare = re.sub(_LABEL_LISTS, " ", bare)
    bare = re.sub(r"\boffset\s+\w+", " ", bare)
    names = re.findall(r"(?<![\w:.$])[a-zA-Z_:][\w:]*(?!\w|\s*\()", bare)
    return {name for name in names if name not in _WORDS}


def family(name: str) -> str:
    """Return the name under which a metric is documented: a histogram's, for its buckets, sum and count."""
    return re.sub(r"_(?:bucket|sum|count)$", "", name)


def without_thresholds(expression: str) -> str:
    """Return an alert's expression that holds wherever its series exist: no comparison with a number excludes any."""
    changed, count = re.subn(r"(?:[<>]=?|==) *[\d.]+(?: *\* *[\d.]+)*", "!= -12345.678", expression)
    assert count, f"no threshold: {expression}"
    return changed
