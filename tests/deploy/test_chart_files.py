"""What the chart takes over from elsewhere is what is there."""

import json
import re
import tomllib

import pytest
import yaml

from deploy.helm import generate
from deploy.helm.generate import CHART, documented_values, option_schema, schema_of
from ferryman_service.config.service_config import ServiceConfig

ROOT = CHART.parents[2]
VALUES = (CHART / "values.yaml").read_text()


def test_what_is_generated_is_up_to_date(capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_a_difference_is_told(tmp_path):
    same, other, new = tmp_path / "same", tmp_path / "other", tmp_path / "new"
    same.write_text("a")
    other.write_text("a")
    found = generate.stale({**generate.outputs(), same: "a", other: "b", new: "c"})
    assert found == [new, other]


def test_the_chart_is_of_the_products_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_every_option_is_the_charts_or_may_be_given():
    options = set(schema_of(yaml.safe_load(VALUES))["$defs"]["config"]["properties"])
    assert options | generate.OF_THE_CHART == set(ServiceConfig.__dataclass_fields__)
    assert not options & generate.OF_THE_CHART


def test_options_have_the_range_that_the_service_has():
    assert option_schema("max_queued_runs") | {"description": ""} == {
        "type": "integer",
        "minimum": 1,
        "maximum": 100_000,
        "description": "",
    }
    assert option_schema("compute_type")["enum"] == ["auto", "fp32", "int8", "fp16"]
    assert option_schema("reflection")["type"] == "boolean"
    assert option_schema("trace_sample_ratio")["type"] == "number"


def test_every_value_is_used_by_a_template():
    templates = "".join(path.read_text() for path in CHART.rglob("templates/**/*") if path.is_file())
    whole = ("probes.",)  # rendered with all that they hold
    for value in documented_values(VALUES):
        if not value.path.startswith(whole):
            last = value.path.split(".")[-1]
            assert re.search(rf"\.{last}\b", templates), f"{value.path} is used nowhere"


def test_a_value_without_a_comment_is_refused():
    with pytest.raises(ValueError, match=r"image\.tag has no comment"):
        list(documented_values('image:\n  # Where.\n  repository: x\n\n  tag: ""\n'))


def test_a_value_whose_type_the_default_does_not_tell_needs_a_rule():
    with pytest.raises(AssertionError, match=r"image\.labels needs a rule"):
        generate._schema("", {"image": {"labels": {}}}, {}, set())


def test_the_schema_is_closed():
    schema = json.loads((CHART / "values.schema.json").read_text())
    open_maps = [
        path for path, part in parts(schema, "") if part.get("properties") and part.get("additionalProperties") is None
    ]
    assert all("items" in path or "name" in path or path.endswith("extraEnv") for path in open_maps), open_maps


def parts(schema, path):
    yield path, schema
    for key, part in schema.get("properties", {}).items():
        yield from parts(part, f"{path}.{key}")
    if isinstance(schema.get("items"), dict):
        yield from parts(schema["items"], f"{path}.items")
