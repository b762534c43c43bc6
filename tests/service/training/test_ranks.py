"""Two processes on one machine."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ferryman_service.domain.training import RunCancelled
from ferryman_service.training import ranks as ranks_module
from ferryman_service.training.ranks import Verdict, join_ranks

PREAMBLE = """
import os, sys
from pathlib import Path
import numpy as np
import torch
sys.path.insert(0, os.environ["TEST_FOLDER"])
from conftest import RecordingReporter, make_small_recipe
from ferryman_service.domain.training import RunCancelled, TrainingJob
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.batches import make_batch
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.ranks import Group, Ranks, join_ranks
from ferryman_service.training.step import new_trainee

rank = int(os.environ["RANK"])
run_dir = Path(os.environ["RUN_DIR"])
group = Group(rank=rank, size=2, meeting=run_dir / "meeting")
torch.set_num_threads(1)
"""


@pytest.fixture
def two_processes(tmp_path):
    """Runs the code in two processes and returns what they write to stdout."""

    def run(code, **environment):
        common = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        folders = {"TEST_FOLDER": str(Path(__file__).parent), "RUN_DIR": str(tmp_path)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
                env=os.environ | common | folders | environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outcomes = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outcomes
        return [stdout for stdout, _ in outcomes]

    return run


def test_an_update_of_two_ranks_is_that_of_one_on_the_whole_batch(two_processes):
    """The halves have different numbers of tokens, and in the second update one rank has no batch. In the others each
    has several micro-batches; without clipping, which divides in FP32, gradients are equal to the last digits."""
    two_processes("""
        source = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [4]]
        pairs = TokenPairs(TokenSide.from_sentences(source), TokenSide.from_sentences([s[::-1] for s in source]))
        recipe = make_small_recipe(optimization={"adam_epsilon": 1e-3})

        def trainee_of(ranks):
            torch.manual_seed(1)
            return new_trainee(Transformer(TransformerConfig.from_recipe(recipe, 16)).double().train(), recipe, ranks)

        alone = trainee_of(Ranks(rank=0, world_size=1, device=torch.device("cpu")))
        tokens = int(pairs.target.lengths_P.sum())
        with join_ranks(torch.device("cpu"), group) as ranks:
            together = trainee_of(ranks)
            for parts in ([[0, 1], [2, 3]], [[0, 1, 2, 3], None]):
                one = alone.step([make_batch(pairs, np.arange(4))], tokens).read()
                mine = [] if parts[rank] is None else [make_batch(pairs, np.array(parts[rank]))]
                both = together.step(mine, tokens).read()
                assert abs(one.loss - both.loss) < 1e-6, (one, both)
                assert abs(one.gradient_norm - both.gradient_norm) < 1e-6, (one, both)
                for mine, theirs in zip(together.model.parameters(), alone.model.parameters()):
                    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-6)
            recipe = make_small_recipe(optimization={"adam_epsilon": 1e-3, "clip_norm": 0.0})
            for parts in ([[[0], [1]], [[2], [3]]], [[[3], [0, 2]], [[1]]], [[[0], [1], [2, 3]], []]):
                split, whole = trainee_of(ranks), trainee_of(Ranks(rank=0, world_size=1, device=torch.device("cpu")))
                one = whole.step([make_batch(pairs, np.arange(4))], tokens).read()
                both = split.step([make_batch(pairs, np.array(part)) for part in parts[rank]], tokens).read()
                assert abs(one.loss - both.loss) < 1e-12, (one, both)
                for mine, theirs in zip(split.model.parameters(), whole.model.parameters()):
                    assert mine.grad.dtype is torch.float64
                    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=1e-10)
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(together.model.state_dict()[name], weight, atol=1e-5, rtol=1e-4)
    """)


RUN_ENGINE = """
    from ferryman_service.domain.corpora import CorpusFiles, Side, Split
    corpus = CorpusFiles(files={(p, s): run_dir / f"{p}.{s}" for p in Split for s in Side})
    reporter = RecordingReporter()
    if rank == 0 and "CANCEL" in os.environ:
        reporter.checks_left, reporter.error = 30, RunCancelled()
    job = TrainingJob(run_id="run_1", recipe=make_small_recipe(stop={"max_steps": 30}), corpus=corpus, run_dir=run_dir,
        prepared_dir=run_dir / "prepared")
    try:
        trained = TorchTrainingEngine(EngineConfig(device="cpu", threads=1, group=group)).train(job, reporter)
        assert "torch._dynamo" not in sys.modules, "the compiler takes seconds to load, and nothing is compiled"
        print(trained.scores, len(reporter.steps), len(reporter.validations))
    except RunCancelled:
        print("cancelled")
"""


def test_only_the_first_reports_and_all_return_the_same(two_processes, reverse_corpus, tmp_path):
    first, second = two_processes(RUN_ENGINE)
    assert first.endswith(" 30 3\n")
    assert second.endswith(" 0 0\n")
    assert first.removesuffix(" 30 3\n") == second.removesuffix(" 0 0\n")
    assert safetensors.torch.load_file(tmp_path / "weights.safetensors")


def test_all_stop_when_the_first_is_cancelled(two_processes, reverse_corpus):
    assert two_processes(RUN_ENGINE, CANCEL="1") == ["cancelled\n"] * 2


def test_a_process_alone_needs_no_group():
    with join_ranks(torch.device("cpu")) as ranks:
        assert ranks.is_first
        assert ranks.agree(Verdict.FINISH) is Verdict.FINISH
        with pytest.raises(RunCancelled), ranks.others_follow():
            raise RunCancelled
    assert not ranks_module.dist.is_initialized()
