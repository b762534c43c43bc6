"""CTranslate2 with our weights: it finds what we find. Only where a benchmark has installed it."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from bench.peers.environment import FOLDER
from bench.shared.process import ServingProcess
from ferryman_service.domain.recipe import Activation, NormPlacement
from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.export import OnnxExporter
from tests.fakes.random_model import random_sentences, random_trained_model, small_recipe, some_lineage

PYTHON = FOLDER / "ctranslate2" / "bin" / "python"
HERE = {"PYTHONPATH": os.getcwd()}

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not PYTHON.exists(), reason="make bench-serving-cpu installs CTranslate2"),
]


def new_bundle(folder, **model):
    parts, bundle = folder / "parts", folder / "bundle"
    parts.mkdir()
    bundle.mkdir()
    trained = random_trained_model(parts, small_recipe(**model))
    weights = load_file(trained.weights)
    weights["embedding.weight"][[PAD, BOS]] = 0.0  # our search never predicts them, CTranslate2's might
    save_file(weights, trained.weights)
    OnnxExporter().export(trained, some_lineage(trained.recipe), bundle)
    return bundle


def convert(bundle, folder):
    command = [str(PYTHON), "-m", "bench.peers.ctranslate2_convert", str(bundle), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **HERE})


@pytest.mark.parametrize(
    "model", [{"norm": NormPlacement.POST}, {"norm": NormPlacement.PRE, "activation": Activation.GELU}]
)
def test_both_engines_find_same_translations(tmp_path, model):
    bundle = new_bundle(tmp_path, **model)
    assert convert(bundle, tmp_path / "converted").returncode == 0
    sentences = [[*ids, EOS] for ids in Subwords.load(bundle / "subwords.model").encode(random_sentences(40, seed=9))]
    peer = [str(PYTHON), "-m", "bench.peers.ctranslate2_worker", "--model", str(tmp_path / "converted")]
    ours = [sys.executable, "-m", "bench.serving.worker", "--bundle", str(bundle), "--compute-type", "fp32"]
    with (
        ServingProcess("ferryman", ours, HERE, tmp_path / "ours.log") as mine,
        ServingProcess("ctranslate2", [*peer, "--compute-type", "float32"], HERE, tmp_path / "peer.log") as theirs,
    ):
        for process in (mine, theirs):
            process.ask("sentences", ids=sentences)
        # In ours, what is cut at the limit ranks behind what has ended; in theirs, by its score. Rounding decides ties.
        for beam_size, least in ((1, 39), (5, 32)):
            answers = (process.ask("translate", beam_size=beam_size, max_length=12) for process in (mine, theirs))
            same = [(one, other) for one, other in zip(*answers, strict=True) if one["tokens"] == other["tokens"]]
            assert len(same) >= least
            assert all(one["score"] == pytest.approx(other["score"], abs=2e-3) for one, other in same)
        for process in (mine, theirs):
            forced = process.ask("translate", beam_size=5, max_length=12, forced=True)
            assert {len(one["tokens"]) for one in forced} == {12}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"norm": "deep"}, "norm is 'deep': only post and pre can be converted"),
        ({"activation": "swiglu"}, "activation is 'swiglu'"),
        ({"positions": "rope"}, "positions is 'rope'"),
    ],
)
def test_unconvertible_option_is_named(tmp_path, change, text):
    model = {"norm": "post", "activation": "relu", "positions": "sinusoidal"} | change
    (tmp_path / "manifest.json").write_text(json.dumps({"header": {"lineage": {"recipe": {"model": model}}}}))
    ended = convert(tmp_path, tmp_path / "converted")
    assert ended.returncode == 1
    assert text in ended.stderr
