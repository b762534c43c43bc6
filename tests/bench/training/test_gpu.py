"""The GPU benchmark, in small on a CPU: its sections run, and its targets are held against what users get."""

import json
import types
from pathlib import Path

import pytest

from bench.training import gpu as training_gpu
from bench.training.gpu_speed import SMALL, Variant
from ferryman_service.domain.recipe import Preset

FOUND = {
    "device": {"device": "cuda", "name": "NVIDIA H100 80GB HBM3"},
    "floor": {"base": {"target_tokens_per_s": 9.0}},
    "base: whole loop": {
        "25000": {"target_tokens_per_s": 870_000.0, "mfu": 0.4},
        "60000": {"target_tokens_per_s": 855_000.0, "mfu": 0.39},
        "seconds": 50.0,
    },
    f"base: {Variant.GRAPHS}": {"25000": {"target_tokens_per_s": 990_000.0, "mfu": 0.5}, "seconds": 9.0},
    "big: whole loop": {"error": "took longer than 110 s", "seconds": 110.0},
    "check: resuming": {"ok": True},
    "check: exporting": {"error": "exit status 1"},
}


@pytest.mark.parametrize("name", ["floor", "base: whole loop", "check: no waiting"])
def test_small_section_runs_without_gpu(tmp_path, name):
    out = tmp_path / "out.json"
    arguments = types.SimpleNamespace(device="cpu", section_out=out)
    (section,) = (section for section in training_gpu.sections(SMALL) if section.name == name)
    training_gpu.run_here(section, arguments)
    found = json.loads(out.read_text())
    assert "error" not in found
    if name == "base: whole loop":
        assert set(found) == {"512", "1024"}
        assert all(value["target_tokens_per_s"] > 0 and not value["layers_compiled"] for value in found.values())


def test_targets_apply_to_training_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    status = training_gpu.publish_all(FOUND, types.SimpleNamespace(small=False))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    checks, base, big = lines
    assert status == 1
    assert (checks["value"], checks["ok"]) == (0.5, False)
    assert (base["value"], base["ok"], base["mfu"]) == (870_000.0, True, {"25000": 0.4, "60000": 0.39})
    assert base["variants"][Variant.GRAPHS] == {"25000": 990_000.0}
    assert (big["value"], big["ok"]) == (0.0, False)
    assert json.loads(Path(tmp_path, "training-gpu-base.json").read_text()) == base


def test_rates_on_other_gpus_have_no_target(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    training_gpu.publish_all(FOUND | {"device": {"name": "NVIDIA A10G"}}, types.SimpleNamespace(small=False))
    _, base, big = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (base["target"], base["ok"], big["target"], big["ok"]) == (None, True, None, True)


def test_default_configuration_is_measured_first():
    names = [section.name for section in training_gpu.sections(SMALL)]
    assert names[:3] == ["floor", *map(training_gpu.loop_name, (Preset.BASE, Preset.BIG))]
    assert len(set(names)) == len(names)
