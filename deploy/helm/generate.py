"""Writes what the chart takes over from elsewhere: `make chart`; with --check, tells whether that has been done.

* values.schema.json: types from values.yaml, options of the service from its own configuration, the rest from RULES;
* the table of all values in README.md, from the comments of values.yaml;
* files/: rules and dashboards, since a chart reads only files of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from ferryman_service.config.service_config import HELP, RANGES, ServiceConfig

CHART: Final = Path(__file__).parent / "ferryman"
DEPLOY: Final = CHART.parents[1]
# Options that the chart sets by itself.
OF_THE_CHART: Final = frozenset(
    {
        "host",
        "port",
        "metrics_host",
        "metrics_port",
        "probe_host",
        "probe_port",
        "data_dir",
        "roles",
        "drain_s",
        "grace_s",
    }
)
_TABLE: Final = re.compile(r"(?<=<!-- values -->\n).*?(?=<!-- /values -->)", re.DOTALL)
_LINE: Final = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z]\w*):(?P<value>.*)$")
_COMMENT: Final = re.compile(r"^ *# ?(?P<text>.*)$")

Schema = dict[str, Any]


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _texts(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def _list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _record(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_QUANTITY: Final = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
_OPEN: Final[Schema] = {"type": "object"}
_STRINGS: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string"}}
_AMOUNTS: Final[Schema] = {
    "type": "object",
    "additionalProperties": {"oneOf": [_texts(_QUANTITY), {"type": "number", "minimum": 0}]},
}
_RESOURCES: Final[Schema] = {
    "type": "object",
    "properties": {"requests": _AMOUNTS, "limits": _AMOUNTS},
    "additionalProperties": False,
}
_DOWN: Final[Schema] = {"oneOf": [{"type": "integer", "minimum": 0}, _texts(r"^(100|[1-9]?[0-9])%$")]}
_NAMED: Final[Schema] = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
# Options are for config, which is checked.
_VARIABLE: Final[Schema] = {
    **_NAMED,
    "properties": {"name": {"type": "string", "not": {"pattern": "^FERRYMAN_"}, "minLength": 1}},
}
_SPREAD: Final[Schema] = {
    "type": "object",
    "required": ["maxSkew", "topologyKey", "whenUnsatisfiable"],
    "properties": {
        "maxSkew": _whole(1, 1000),
        "topologyKey": {"type": "string"},
        "whenUnsatisfiable": {"enum": ["DoNotSchedule", "ScheduleAnyway"]},
        "minDomains": _whole(1, 1000),
        "nodeAffinityPolicy": {"enum": ["Honor", "Ignore"]},
        "nodeTaintsPolicy": {"enum": ["Honor", "Ignore"]},
    },
    "additionalProperties": False,
}
# No part of a path starts with a dot, so none leads out of the volume.
_IMPORTED: Final = _record(
    path=_texts(r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$"),
    name=_texts(r"^[a-z0-9][a-z0-9._-]{0,63}$"),
)
_PORT: Final = _whole(1024, 65_535)
_DURATION: Final = _texts(r"^[1-9][0-9]*(ms|s|m)$")

# What the default of a value does not tell, by its path; `*` stands for a key.
RULES: Final[Mapping[str, Schema]] = {
    "image.repository": _texts(r"^[^\s@]+$"),
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "image.pullSecrets": _list_of(_record(name={"type": "string"})),
    "*.image.tag": _texts(r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$"),
    "*.image.digest": _texts(r"^(sha256:[0-9a-f]{64})?$"),
    "nameOverride": _texts(r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"),
    "fullnameOverride": _texts(r"^([a-z]([-a-z0-9]*[a-z0-9])?)?$"),
    "bindAddress": _texts(r"^[0-9a-fA-F.:]+$"),
    "ports.*": _PORT,
    "shutdown.*": _whole(0, 3600),
    "shutdown.marginSeconds": _whole(6, 3600),  # the process allows itself 5
    "persistence.size": _texts(_QUANTITY),
    "persistence.accessModes": {
        **_list_of({"enum": ["ReadWriteOnce", "ReadWriteMany"]}),
        "minItems": 1,
        "uniqueItems": True,
    },
    "*.annotations": _STRINGS,
    "*.*.labels": _STRINGS,
    "*.podAnnotations": _STRINGS,
    "*.podLabels": _STRINGS,
    "*.nodeSelector": _STRINGS,
    "*.affinity": _OPEN,
    "*.tolerations": _list_of(_OPEN),
    "*.resources": _RESOURCES,
    "*.extraEnv": _list_of(_VARIABLE),
    "*.extraVolumes": _list_of(_NAMED),
    "*.extraVolumeMounts": _list_of(_NAMED),
    "*.podDisruptionBudget.maxUnavailable": _DOWN,
    "controlPlane.sharedMemory": _texts(_QUANTITY),
    "serving.replicas": _whole(1, 1000),
    "serving.models.source": {"enum": ["shared", "import"]},
    "serving.models.volume": _OPEN,
    "serving.models.import": _list_of(_IMPORTED),
    "serving.models.localSize": _texts(_QUANTITY),
    "serving.topologySpreadConstraints": _list_of(_SPREAD),
    "serving.autoscaling.kind": {"enum": ["off", "hpa", "keda"]},
    "serving.autoscaling.minReplicas": _whole(1, 1000),
    "serving.autoscaling.maxReplicas": _whole(1, 1000),
    "serving.autoscaling.queueTokensPerPod": _whole(1, 2**40),
    "serving.autoscaling.scaleDownStabilizationSeconds": _whole(0, 3600),
    "serving.autoscaling.prometheusAddress": _texts(r"^(https?://\S+)?$"),
    "probes.*.*": _whole(1, 3600),
    "networkPolicy.clients": _list_of(_OPEN),
    "networkPolicy.monitoring": _list_of(_OPEN),
    "networkPolicy.egress": _list_of(_OPEN),
    "grpcRoute.parentRefs": _list_of(_NAMED),
    "grpcRoute.hostnames": _list_of({"type": "string"}),
    "monitoring.*.interval": _DURATION,
}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value of the chart, as its comment describes it."""

    path: str
    default: object
    text: str


def option_schema(option: str) -> Schema:
    """Return what the service takes for an option in its file."""
    default = getattr(ServiceConfig(), option)
    if isinstance(default, enum.StrEnum):
        schema: Schema = {"enum": [str(member) for member in type(default)]}
    elif isinstance(default, bool):
        schema = {"type": "boolean"}
    elif isinstance(default, int | float):
        low, high = RANGES[option]
        kind = "integer" if isinstance(default, int) else "number"
        schema = {"type": kind, "minimum": low, "maximum": high}
    else:
        schema = {"type": "string"}
    return {**schema, "description": HELP[option]}


def schema_of(values: Mapping[str, Any]) -> Schema:
    """Return the schema of all values."""
    options = [field.name for field in dataclasses.fields(ServiceConfig) if field.name not in OF_THE_CHART]
    config: Schema = {
        "type": "object",
        "properties": {option: option_schema(option) for option in options},
        "additionalProperties": False,
    }
    reference = _record(name=_texts(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"), key=_texts(r"^[-._a-zA-Z0-9]+$"))
    rules = {
        **RULES,
        "config": {"$ref": "#/$defs/config"},
        "*.config": {"$ref": "#/$defs/config"},
        "configFromSecrets": {
            "type": "object",
            "propertyNames": {"enum": options},
            "additionalProperties": reference,
        },
    }
    unused = set(rules)
    schema = _schema("", values, rules, unused)
    assert not unused, f"no value has the path {', '.join(sorted(unused))}"
    schema["properties"]["global"] = _OPEN  # Helm itself adds it where the chart is part of another
    return {"$schema": "http://json-schema.org/draft-07/schema#", "$defs": {"config": config}, **schema}


def _schema(path: str, default: object, rules: Mapping[str, Schema], unused: set[str]) -> Schema:
    """Return the schema of the value at the path: of the most particular rule, else of the type of its default."""
    fitting = [rule for rule in rules if _fits(rule, path)]
    unused.difference_update(fitting)
    if fitting:
        return rules[min(fitting, key=lambda rule: rule.count("*"))]
    if isinstance(default, dict):
        assert default, f"{path} needs a rule: what may an empty map hold?"
        inner = {key: _schema(f"{path}.{key}".lstrip("."), value, rules, unused) for key, value in default.items()}
        return {"type": "object", "properties": inner, "additionalProperties": False}
    kinds: Mapping[type, str] = {bool: "boolean", int: "integer", str: "string"}
    assert type(default) in kinds, f"{path} needs a rule"
    return {"type": kinds[type(default)]}


def _fits(rule: str, path: str) -> bool:
    wanted, found = rule.split("."), path.split(".")
    return len(wanted) == len(found) and all(part in ("*", key) for part, key in zip(wanted, found, strict=True))


def documented_values(text: str) -> Iterator[Value]:
    """Yield the values of values.yaml, each with the comment above it.

    A map's comment is for the map as a whole; a map without defaults, or with a comment and a rule of its own, is one
    value. Raises ValueError where a value has no comment.
    """
    values = yaml.safe_load(text)
    keys: list[tuple[int, str]] = []
    comment: list[str] = []
    skip_below: int | None = None
    for line in text.splitlines():
        if found := _COMMENT.match(line):
            comment.append(found["text"])
            continue
        matched = _LINE.match(line)
        if matched is None:
            comment = [] if not line.strip() else comment
            continue
        indent = len(matched["indent"])
        if skip_below is not None and indent > skip_below:
            continue
        skip_below = None
        keys = [(depth, key) for depth, key in keys if depth < indent] + [(indent, matched["key"])]
        path = ".".join(key for _, key in keys)
        default = _at(values, path)
        whole = bool(matched["value"].strip()) or not isinstance(default, dict) or _has_rule(path)
        if whole:
            if not comment:
                raise ValueError(f"{path} has no comment in values.yaml")
            yield Value(path=path, default=default, text=" ".join(comment))
            skip_below = indent
        comment = []


def _has_rule(path: str) -> bool:
    return any(_fits(rule, path) for rule in (*RULES, "config", "*.config", "configFromSecrets"))


def _at(values: Any, path: str) -> Any:  # noqa: ANN401 - whatever YAML holds
    for key in path.split("."):
        values = values[key]
    return values


def table_of(values: Sequence[Value]) -> str:
    """Return the values as a table of Markdown."""
    rows = ["| value | default | what |", "| --- | --- | --- |"]
    for value in values:
        default = json.dumps(value.default, ensure_ascii=False).replace("|", "\\|")
        text = value.text.replace("|", "\\|")
        rows.append(f"| `{value.path}` | `{default}` | {text} |")
    return "\n".join(rows) + "\n"


def outputs() -> dict[Path, str]:
    """Return every file that is generated, with its text."""
    values_text = (CHART / "values.yaml").read_text(encoding="utf-8")
    schema = schema_of(yaml.safe_load(values_text))
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    table = table_of(list(documented_values(values_text)))
    files = {
        CHART / "values.schema.json": json.dumps(schema, indent=2) + "\n",
        CHART / "README.md": _TABLE.sub(lambda _: table, readme),
    }
    for path in sorted((DEPLOY / "prometheus").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "groups" in yaml.safe_load(text):
            files[CHART / "files" / "prometheus" / path.name] = text
    for path in sorted((DEPLOY / "grafana").rglob("*.json")):
        files[CHART / "files" / "grafana" / path.name] = path.read_text(encoding="utf-8")
    return files


def stale(files: Mapping[Path, str]) -> list[Path]:
    """Return the files that are not as they should be, or should not be there."""
    extra = [path for path in (CHART / "files").rglob("*") if path.is_file() and path not in files]
    changed = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return sorted([*changed, *extra])


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or check; 1 if the check finds a difference."""
    parser = argparse.ArgumentParser(description="Writes what the chart takes over from elsewhere.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    arguments = parser.parse_args(argv)
    files = outputs()
    for path in stale(files):
        if arguments.check:
            print(f"{path.relative_to(DEPLOY)} is out of date: run `make chart`", file=sys.stderr)
        elif path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
        else:
            path.unlink()
    return 1 if arguments.check and stale(files) else 0


if __name__ == "__main__":
    sys.exit(main())
