"""The training worker's program: what it says when it dies."""

import subprocess
import sys

import pytest

from ferryman_service.domain.ids import RUN_PREFIX, new_id

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
