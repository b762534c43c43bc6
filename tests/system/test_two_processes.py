"""Two processes that train one run, of which one speaks."""

import time

import pytest

from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.records import RunState, StepMetrics
from ferryman_service.domain.runs import TrainingRun
from ferryman_service.launch.torchrun import LaunchConfig, TorchrunLauncher, torchrun_command
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.runs import SqlRunStore
from tests.fakes.databases import open_migrated
from tests.fakes.namespaces import UNKNOWN_HOST, namespace
from tests.system.conftest import reversal_corpus

pytestmark = pytest.mark.system

RECIPE = {
    "model": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 64},
    "data": {"vocabulary_size": 50, "max_sentence_tokens": 64},
    "optimization": {"batch_target_tokens": 512},
    "stop": {"max_steps": 20},
    "validation": {"interval_steps": 10, "max_translated_pairs": 10},
}


def test_two_processes_train_one_run(tmp_path):
    folder = DataFolder(tmp_path / "data")
    folder.create()
    database = open_migrated(folder.database)
    runs, corpora = SqlRunStore(database), FileCorpusStore(database, folder, CorpusLimits())
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
    # Where the kernel allows it, the machine's name does not resolve, as in a pod without a DNS entry.
    nameless = namespace(UNKNOWN_HOST) or ()
    config = LaunchConfig(
        data_dir=folder.root, command=lambda count: (*nameless, *torchrun_command(count)), threads_per_worker=1
    )
    launcher = TorchrunLauncher(config, folder.worker_log)
    launcher.start(run.run_id, 1, 2)
    deadline_s = time.monotonic() + 90
    while launcher.is_running(run.run_id, 1, None) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert launcher.kill(run.run_id, 1, None)  # harmless after the end
    log = launcher.log_tail(run.run_id, 1)
    assert launcher.exit_description(run.run_id, 1) == "exit status 0", log
    assert runs.get(run.run_id).state is RunState.SUCCEEDED, log
    records = runs.records_after(run.run_id, 0, 1000)
    steps = [record.payload.step for record in records if isinstance(record.payload, StepMetrics)]
    assert steps == list(range(1, 21))
