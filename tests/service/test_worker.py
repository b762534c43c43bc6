"""The training worker's program: what it says when it dies."""

import subprocess
import sys

import pytest

from ferryman_service.config.resources import Machine, Usable
from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.worker import torch_threads

DYING = """
import sys
from ferryman_service import worker

def fail(*_):
    raise ValueError("geheim")

worker._build = fail
sys.exit(worker.main())
"""


@pytest.mark.parametrize(("flags", "quoted"), [([], False), (["--log-sentences"], True)])
def test_the_error_that_it_dies_of_quotes_no_line_of_a_corpus_unless_it_may(tmp_path, flags, quoted):
    run_id = new_id(RUN_PREFIX)
    command = [sys.executable, "-c", DYING, "--data-dir", str(tmp_path), "--run-id", run_id, "--attempt", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "in fail" in done.stderr
    assert "ValueError" in done.stderr
    assert ("geheim" in done.stderr) is quoted


@pytest.mark.parametrize(
    ("environment", "processes", "threads"),
    [({}, 1, 6), ({}, 2, 3), ({}, 8, 1), ({"OMP_NUM_THREADS": ""}, 1, 6), ({"OMP_NUM_THREADS": "9"}, 2, None)],
)
def test_worker_started_by_hand_takes_its_share_of_the_usable_cpus(environment, processes, threads):
    machine = Machine(cpus=Usable(value=6, source="affinity"), memory=None)
    assert torch_threads(machine, environment, processes) == threads
