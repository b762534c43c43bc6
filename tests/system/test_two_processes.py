"""Several processes: two that train one run, of which one speaks; two that translate beside the one that trains."""

import subprocess
import sys
import time

import grpc
import pytest

from ferryman.v1 import metrics_pb2, model_pb2, translation_pb2
from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.records import RunState, StepMetrics
from ferryman_service.domain.runs import TrainingRun
from ferryman_service.launch.torchrun import LaunchConfig, TorchrunLauncher, torchrun_command
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import open_database, upgrade
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.runs import SqlRunStore
from tests.system.conftest import Stubs, reversal_corpus, small_recipe

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
    database = open_database(folder.database)
    upgrade(database)
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
    config = LaunchConfig(data_dir=folder.root, command=torchrun_command, threads_per_worker=1)
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


def test_processes_that_translate_beside_the_one_that_trains(start_service):
    """They share the data folder and nothing else: what one publishes or points at, all translate with."""
    training = start_service("--roles", "training")
    trainer = Stubs(training.address)
    serving = [start_service("--roles", "translation", data_dir=training.data_dir) for _ in range(2)]
    translators = [Stubs(service.address) for service in serving]
    corpus_id = trainer.upload().corpus_id
    run = trainer.start(corpus_id, small_recipe(max_steps=30))
    [*_, last] = trainer.stream(run.run_id)
    assert last.state_change.state == metrics_pb2.RUN_STATE_SUCCEEDED, trainer.run(run.run_id)
    assert models_of(translators, "reversal") == {"reversal/1"}

    command = [sys.executable, "-m", "ferryman_service", "import-model", str(training.data_dir / "models/reversal/1")]
    subprocess.run([*command, "reversal", "--data-dir", str(training.data_dir)], check=True, capture_output=True)
    deadline_s = time.monotonic() + 30
    while models_of(translators, "reversal") != {"reversal/2"}:  # the first serves on until the second is in memory
        assert time.monotonic() < deadline_s, "the new version is not served"
        time.sleep(0.05)
    translators[0].models.SetModelAlias(model_pb2.SetModelAliasRequest(name="reversal", alias="live", version=1))
    assert models_of(translators, "reversal@live") == {"reversal/1"}

    with pytest.raises(grpc.RpcError) as caught:
        translators[0].start(corpus_id, small_recipe())
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    serving[0].kill()
    assert models_of(translators[1:], "reversal@live") == {"reversal/1"}
    assert [service.stop() for service in (training, serving[1])] == [0, 0]


def models_of(translators, reference):
    """The versions that the processes translate with."""
    request = translation_pb2.TranslateRequest(model=reference, sentences=["ba ce di"])
    return {stubs.translation.Translate(request, timeout=30).model for stubs in translators}
