"""Compiled layers: what they may change and what not, and what happens if the compiler fails."""

import dataclasses
import functools
import os

import numpy as np
import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config

from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.batches import make_batch
from ferryman_service.training.checkpoint import checkpoint_path, load_checkpoint
from ferryman_service.training.compile import (
    choose_attention,
    compilation_remark,
    compile_layers,
    fused,
    set_up_compilation,
    what_hinders,
)
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.step import new_trainee

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EAGER, COMPILED = (
    TorchTrainingEngine(EngineConfig(device="cpu", threads=1, compilation=setting)) for setting in ("auto", "on")
)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.fixture
def no_compiler(tmp_path):
    """Lets the C++ compiler be one that does not exist, and forgets what was compiled earlier."""
    with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "force_disable_caches": True}):
        yield


@pytest.fixture
def compiler(monkeypatch):
    """Traces and differentiates as for a GPU, and generates no code: that of a CPU takes minutes, and nobody trains
    with it. `make soak` generates it."""
    if not os.environ.get("FERRYMAN_SOAK"):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


PAIRS = TokenPairs(TokenSide.from_sentences([[7], [8, 9, 10]]), TokenSide.from_sentences([[11, 12, 13], [14]]))
BATCH = make_batch(PAIRS, np.array([0, 1]))


def new_model(recipe):
    torch.manual_seed(1)
    return Transformer(TransformerConfig.from_recipe(recipe, 16))


def compiled_frames():
    return sum(torch._dynamo.utils.counters["frames"].values())


def losses(reporter):
    return [step.loss for step in reporter.steps]


def codes(reporter):
    return {code for code, _ in reporter.events}


def test_a_cpu_compiles_nothing_by_itself(small_recipe):
    model = new_model(small_recipe())
    assert not set_up_compilation(model, "auto", CPU)
    assert what_hinders(CPU)
    assert compilation_remark(False, "auto", CPU) is None
    assert fused(len, "cpu") is len
    assert "forward" not in vars(model.encoder_layers[0])


def test_a_run_on_a_gpu_is_told_why_it_is_not_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    _, code, text = compilation_remark(False, "auto", GPU)
    assert code == "LAYERS_NOT_COMPILED"
    assert what_hinders(GPU) in text
    assert "Triton" in text


def test_evaluation_runs_the_layers_as_they_are(small_recipe):
    """Validation has many shapes; each would be compiled anew."""
    model = new_model(small_recipe()).eval()
    source_BS, target_BT = torch.full((2, 5), 7), torch.full((2, 4), 8)
    expected_BTD, names = model.hidden(source_BS, target_BT), list(model.state_dict())
    compile_layers(model)
    before = compiled_frames()
    assert torch.equal(model.hidden(source_BS, target_BT), expected_BTD)
    assert compiled_frames() == before
    assert list(model.state_dict()) == names


@pytest.mark.full
def test_a_compiled_run_learns_as_one_that_is_not(job, small_recipe, tmp_path, reporter, compiler):
    """Also in batches with and without padding. Its checkpoint has the same names, and is gone on from uncompiled."""
    short, long = (small_recipe(stop={"max_steps": steps}) for steps in (10, 20))
    plain, compiled, resumed = (type(reporter)() for _ in range(3))
    EAGER.train(dataclasses.replace(job(long), run_dir=new_folder(tmp_path, "eager")), plain)
    before = compiled_frames()
    COMPILED.train(job(short), compiled)
    assert compiled_frames() > before
    assert "LAYERS_COMPILED" in codes(compiled)
    assert "COMPILATION_FAILED" not in codes(compiled)
    assert losses(compiled)[-1] < losses(compiled)[0]
    assert losses(compiled) == pytest.approx(losses(plain)[:10], rel=1e-3)
    checkpoints = [
        load_checkpoint(checkpoint_path(folder / "checkpoints", 10))
        for folder in (tmp_path / "run", tmp_path / "eager")
    ]
    names = [{group: list(tensors) for group, tensors in each.tensors.items()} for each in checkpoints]
    assert names[0] == names[1]
    EAGER.train(job(long), resumed)
    assert "RESUMED" in codes(resumed)
    assert [step.step for step in resumed.steps] == list(range(11, 21))
    assert losses(resumed) == pytest.approx(losses(plain)[10:], rel=1e-3)


@pytest.mark.system
def test_a_run_whose_compiler_fails_goes_on_without(job, small_recipe, tmp_path, reporter, no_compiler):
    recipe = small_recipe(model={"dropout": 0.1}, stop={"max_steps": 3})
    plain, compiled = type(reporter)(), type(reporter)()
    EAGER.train(dataclasses.replace(job(recipe), run_dir=new_folder(tmp_path, "eager")), plain)
    COMPILED.train(job(recipe), compiled)
    (message,) = compiled.messages("COMPILATION_FAILED")
    assert message.startswith("step 1: compiled code failed")
    assert losses(compiled) == losses(plain)


class Fails(torch.nn.Module):
    """Fails so many times, as compiled code may."""

    def __init__(self, failures):
        super().__init__()
        self.failures = failures

    def forward(self, x):
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError("attn_bias is not correctly aligned\nand more")
        return x


@pytest.mark.parametrize(("failures", "compiled"), [(1, False), (2, True)])
def test_error_that_is_not_the_compilers_is_raised(small_recipe, failures, compiled):
    trainee = trainee_of(small_recipe(), failures, compiled)
    with pytest.raises(RuntimeError, match="not correctly aligned"):
        trainee.step([BATCH], BATCH.target_tokens)


def test_an_update_whose_compiled_code_fails_is_computed_again(small_recipe):
    recipe = small_recipe(model={"dropout": 0.3})
    expected = trainee_of(recipe, 0, compiled=False).step([BATCH], BATCH.target_tokens).read()
    outcome = trainee_of(recipe, 1, compiled=True).step([BATCH], BATCH.target_tokens).read()
    assert outcome.uncompiled == "RuntimeError: attn_bias is not correctly aligned"
    assert dataclasses.replace(outcome, uncompiled="") == expected


def trainee_of(recipe, failures, compiled):
    model = new_model(recipe).train()
    model.decoder_norm = Fails(failures)
    return new_trainee(model, recipe, Ranks(rank=0, world_size=1, device=CPU), compiled=compiled)


def new_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    return folder


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_attention_on_a_gpu_is_not_cudnns_which_plans_anew_for_every_shape(device):
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        choose_attention(device)
        assert torch.backends.cuda.cudnn_sdp_enabled() is (device is CPU)
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
