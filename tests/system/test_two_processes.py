"""Processes that train one run, of which one speaks."""

import time

import pytest

from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.records import RunState, StepMetrics
from ferryman_service.domain.runs import TrainingRun
from ferryman_service.launch.launcher import LaunchConfig, ProcessLauncher, worker_command
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.runs import SqlRunStore
from tests.fakes.databases import open_migrated
from tests.fakes.namespaces import UNKNOWN_HOST, namespace
from tests.fakes.sockets import group_of, listening
from tests.system.conftest import reversal_corpus

pytestmark = pytest.mark.system

STEPS = list(range(1, 21))
RECIPE = {
    "model": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 64},
    "data": {"vocabulary_size": 50, "max_sentence_tokens": 64},
    "optimization": {"batch_target_tokens": 512},
    "stop": {"max_steps": 20},
    "validation": {"interval_steps": 10, "max_translated_pairs": 10},
}


@pytest.fixture
def folder(tmp_path):
    folder = DataFolder(tmp_path / "a folder, 100 % ours # ü")
    folder.create()
    return folder


@pytest.fixture
def database(folder):
    return open_migrated(folder.database)


@pytest.fixture
def runs(database):
    return SqlRunStore(database)


@pytest.fixture
def run(folder, database, runs):
    """A run whose first attempt waits for its worker."""
    corpora = FileCorpusStore(database, folder, CorpusLimits())
    upload = corpora.begin_upload(CorpusHeader(display_name="", source_language="xx", target_language="yy"), "")
    for split, count in ((Split.TRAIN, 500), (Split.VALIDATION, 20)):
        pairs = reversal_corpus(count, seed=count)
        upload.add_pairs(split, [SentencePair(source=source, target=target) for source, target in pairs])
    run = TrainingRun(
        run_id=new_id(RUN_PREFIX),
        state=RunState.QUEUED,
        corpus_id=upload.finish().corpus_id,
        model_name="pair",
        recipe=resolve_recipe(RECIPE),
        create_time_ns=time.time_ns(),
    )
    runs.create(run, None, 1)
    runs.begin_attempt(run.run_id, 0)
    return run


@pytest.mark.parametrize(
    ("processes", "to_the_end"), [(1, False), (2, True), pytest.param(4, False, marks=pytest.mark.full)]
)
def test_processes_train_one_run_and_nobody_else_can_reach_them(folder, runs, run, processes, to_the_end):
    # Where the kernel allows it, the machine's name does not resolve, as in a pod without a DNS entry.
    nameless = namespace(UNKNOWN_HOST) or ()
    config = LaunchConfig(
        data_dir=folder.root, command=lambda count: (*nameless, *worker_command(count)), threads_per_worker=1
    )
    launcher = ProcessLauncher(config, folder.worker_log, folder.scratch_dir)
    launcher.start(run.run_id, 1, processes)
    found = {}
    deadline_s = time.monotonic() + 180
    while launcher.is_running(run.run_id, 1, None) and time.monotonic() < deadline_s:
        pids = group_of(launcher._workers[run.run_id, 1].pid)
        found |= {pid: found.get(pid, set()) | listening(pid) for pid in pids}
        if not to_the_end and runs.get(run.run_id).progress.step >= 2:
            break
        time.sleep(0.02)
    log = launcher.log_tail(run.run_id, 1)
    assert len(found) >= processes, log
    # Programs that the first process has called for a moment are among them.
    assert sum(map(bool, found.values())) == (processes if processes > 1 else 0), "gloo listens, and nothing else"
    assert all(kind in ("tcp", "tcp6") and address.is_loopback for kind, address in set.union(*found.values()))
    if to_the_end:
        assert launcher.exit_description(run.run_id, 1) == "exit status 0", log
        assert runs.get(run.run_id).state is RunState.SUCCEEDED, log
        records = runs.records_after(run.run_id, 0, 1000)
        assert [record.payload.step for record in records if isinstance(record.payload, StepMetrics)] == STEPS
        assert not folder.scratch_dir(run.run_id, 1).exists(), "temporary files go with the attempt"
        assert "Unable to resolve" not in log, "gloo has looked the machine's name up"
    assert launcher.kill(run.run_id, 1, None)  # harmless after the end
    assert launcher.living() == set()
    assert not folder.scratch_dir(run.run_id, 1).exists()
