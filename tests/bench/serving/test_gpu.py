"""The benchmark of translating on a GPU, in small on a CPU: its sections run, and its targets are held against what it
measures."""

import json
import os
import subprocess
import sys
import types

import pytest

from bench.serving import gpu as serving_gpu
from bench.serving.gpu import PEER_SECTION, section_name
from bench.serving.gpu_checks import nodes_by_provider
from bench.serving.gpu_setting import Setting
from bench.shared.gpu_sections import Section, python_module, run_section, run_sections

FOUND = {
    "floor": {"batch 1": {"ms": 0.03}, "greedy": {"ms": 0.1}, "beam 4": {"ms": 0.3}},
    section_name("latency", "node by node"): {"tokens_per_s": 1200.0, "ms_per_token": 0.83},
    section_name("latency", "CUDA graphs"): {"tokens_per_s": 2500.0, "ms_per_token": 0.4},
    section_name("greedy", "node by node"): {"tokens_per_s": 70_000.0},
    section_name("greedy", "CUDA graphs"): {"error": "took longer than 60 s"},
    section_name("beam 4", "node by node"): {"error": "exit status 1"},
    "check: running batch": {"ok": True},
    "check: same tokens": {"error": "exit status 1"},
    PEER_SECTION: {"greedy": {"tokens_per_s": 50_000.0}},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(folder=tmp_path_factory.mktemp("serving-gpu"), device="cpu", small=True)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("floor", "copy_gb_per_s"),
        ("latency: node by node", "tokens_per_s"),
        ("beam 4: node by node", "tokens_per_s"),
        ("steps: node by node", "1 x 1"),
        ("check: nodes on the GPU", "nodes"),
        ("check: same tokens", "share"),
        ("check: running batch", "largest_difference"),
    ],
)
def test_small_section_runs_without_gpu(setting, tmp_path, name, wanted):
    (section,) = (section for section in serving_gpu.sections(setting) if section.name == name)
    run_section(section, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert "error" not in found
    assert found[wanted]
    assert found.get("ok", True)


def test_targets_apply_to_faster_form():
    checks, latency, greedy, beam = serving_gpu.results(FOUND, "NVIDIA H200", small=False)
    assert (checks.value, checks.ok) == (0.5, False)
    assert (latency.value, latency.ok, latency.peer) == (2500.0, True, None)
    assert (greedy.value, greedy.ok, greedy.peer.value) == (70_000.0, True, 50_000.0)
    assert (beam.value, beam.ok) == (0.0, False)
    assert latency.details["forms"] == {"node by node": 1200.0, "CUDA graphs": 2500.0}
    assert latency.details["floor"] == {"ms": 0.03}
    assert all(result.target is None for result in serving_gpu.results(FOUND, "NVIDIA H200", small=True)[1:])


def test_rates_on_other_gpus_have_no_target():
    checks, *rates = serving_gpu.results(FOUND, "a GPU", small=False)
    assert checks.target == 1.0
    assert all(result.target is None and result.ok for result in rates)


def test_default_configuration_comes_first_and_cuda_graphs_need_cuda(tmp_path):
    names = [section.name for section in serving_gpu.sections(Setting(folder=tmp_path, device="cuda"))]
    assert names[:4] == ["floor", *(section_name(name, "node by node") for name in serving_gpu.TARGETS)]
    assert len(set(names)) == len(names)
    assert section_name("latency", "CUDA graphs") in names
    assert not any("CUDA graphs" in name for name in names_on_a_cpu(tmp_path) if not name.startswith("check: "))


def names_on_a_cpu(tmp_path):
    return [section.name for section in serving_gpu.sections(Setting(folder=tmp_path, device="cpu"))]


def test_nodes_are_counted_by_provider():
    node = {"cat": "Node", "name": "Gather_1_kernel_time", "args": {"op_name": "Gather", "provider": "CPU"}}
    events = [node, node, {**node, "name": "Gather_2_kernel_time"}, {"cat": "Session", "name": "run", "args": {}}]
    assert nodes_by_provider(events) == {"CPU": {"Gather": 2}}


def test_small_results_go_to_another_folder(setting, monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    assert serving_gpu.out_folder(setting) == setting.folder
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert serving_gpu.out_folder(setting) == tmp_path / "out"


def test_failed_section_leaves_others_running(tmp_path):
    """The command here is a program that knows one section, dies in another and hangs in a third."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "name, out = sys.argv[2], sys.argv[4]\n"
        "if name == 'dies': sys.exit('it hurts')\n"
        "if name == 'hangs': time.sleep(60)\n"
        "open(out, 'w').write('{\"value\": 1}')\n"
    )
    sections = [Section(name, limit_s, dict) for name, limit_s in (("dies", 20), ("hangs", 1), ("works", 20))]
    saved = []
    found = run_sections(sections, [sys.executable, str(program)], 100, lambda found: saved.append(len(found)))
    assert "it hurts" in found["dies"]["error"]
    assert "longer than 1 s" in found["hangs"]["error"]
    assert found["works"]["value"] == 1
    assert saved == [1, 2, 3]
    late = run_sections(sections[2:], [sys.executable, str(program)], 1, lambda found: None)
    assert late == {"works": {"left_out": "no time was left"}}


def test_missing_gpu_is_reported():
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is there")
    environment = {**os.environ, "PYTHONPATH": "service:client:."}
    ended = subprocess.run(python_module("bench.serving.gpu"), capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    assert "--device cpu --small" in ended.stderr


def test_all_options_reach_sections(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = types.SimpleNamespace(device="cpu", small=True, model=tmp_path, source=None, reference=None)
    setting = serving_gpu.setting_of(arguments)
    assert (setting.device, setting.small, setting.model) == ("cpu", True, tmp_path)
    assert setting.folder.exists()
