"""Every RPC of the contract once, with nothing but the generated stubs."""

import hashlib

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from ferryman.v1 import (
    corpus_pb2,
    metrics_pb2,
    model_pb2,
    recipe_pb2,
    training_pb2,
    translation_pb2,
)
from ferryman_service.bundle import manifest as bundles
from ferryman_service.domain.records import (
    EventLevel,
    RunEvent,
    RunState,
    StepMetrics,
    ValidationMetrics,
)
from ferryman_service.domain.runs import FailureReason, RunFailure, RunProgress

STEP = StepMetrics(
    step=1,
    epoch=1,
    loss=7.5,
    nll_per_token=7.25,
    perplexity=1400.5,
    learning_rate=1.7469281074217107e-07,
    gradient_norm=float("inf"),
    target_tokens=512,
    target_tokens_per_second=5120.5,
    duration_s=0.1,
    padding_share=0.125,
    memory_bytes=3 << 30,
    skipped=True,
    model_flops_utilization=0.25,
)
VALIDATION = ValidationMetrics(
    step=1,
    epoch=1,
    loss=3.5,
    nll_per_token=3.25,
    perplexity=25.79,
    bleu=12.5,
    chrf=40.25,
    translated_pairs=500,
    duration_s=2.5,
    best=True,
    bleu_signature="nrefs:1|tok:zh",
)


def read_fields(message):
    """Return the fields that are set, durations as seconds under the dataclass's name."""
    found = {field.name: value for field, value in message.ListFields()}
    return {name: value for name, value in found.items() if name != "duration"} | {
        "duration_s": found["duration"].ToNanoseconds() / 1e9
    }


def unset_fields(message, path=""):
    """Return the paths of all fields that have presence and are not set."""
    found = []
    for descriptor in message.DESCRIPTOR.fields:
        if descriptor.has_presence and not message.HasField(descriptor.name):
            found.append(path + descriptor.name)
        elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            found += unset_fields(getattr(message, descriptor.name), f"{path}{descriptor.name}.")
    return found


def test_corpora(service):
    corpus = service.upload([("one two", "eins"), ("", "zwei")], display_name="Zahlen")
    assert corpus.corpus_id.startswith("cor_")
    assert (corpus.display_name, corpus.source_language, corpus.target_language) == ("Zahlen", "en", "de")
    assert corpus.train == corpus_pb2.SplitStatistics(
        pairs=2,
        source_words=2,
        target_words=2,
        empty_pairs=1,
        samples=[corpus_pb2.SentencePair(source="one two", target="eins")],
    )
    assert corpus.create_time.seconds > 1_700_000_000
    assert len(corpus.digest) == 64
    assert service.corpus_stub.GetCorpus(corpus_pb2.GetCorpusRequest(corpus_id=corpus.corpus_id)).corpus == corpus
    second = service.upload()
    page = service.corpus_stub.ListCorpora(corpus_pb2.ListCorporaRequest(page_size=1))
    assert [item.corpus_id for item in page.corpora] == [second.corpus_id]
    page = service.corpus_stub.ListCorpora(corpus_pb2.ListCorporaRequest(page_size=1, page_token=page.next_page_token))
    assert list(page.corpora) == [corpus]


def test_a_corpus_of_files(service):
    header = corpus_pb2.UploadHeader(source_language="en", target_language="de")
    messages = [corpus_pb2.UploadCorpusRequest(header=header)]
    for split in (corpus_pb2.SPLIT_TRAIN, corpus_pb2.SPLIT_VALIDATION):
        for side in (corpus_pb2.SIDE_SOURCE, corpus_pb2.SIDE_TARGET):
            for piece in ("schö".encode()[:4], "schö".encode()[4:] + b"n\nja"):
                chunk = corpus_pb2.FileChunk(split=split, side=side, data=piece)
                messages.append(corpus_pb2.UploadCorpusRequest(chunk=chunk))
    corpus = service.corpus_stub.UploadCorpus(iter(messages)).corpus
    assert [pair.source for pair in corpus.train.samples] == ["schön", "ja"]


def test_runs(service):
    recipe = recipe_pb2.Recipe(preset=recipe_pb2.PRESET_BASE, model=recipe_pb2.ModelRecipe(dropout=0))
    run = service.start_run(recipe=recipe)
    assert (run.state, run.model_name, run.attempt, run.last_sequence) == (metrics_pb2.RUN_STATE_QUEUED, "en-de", 0, 1)
    assert run.recipe.model.d_model == 512
    assert run.recipe.model.HasField("dropout")
    assert unset_fields(run.recipe) == [
        # What a Noam schedule does not know.
        "schedule.peak_learning_rate",
        "schedule.minimum_learning_rate",
        "schedule.total_steps",
        "schedule.decay_share",
    ]
    assert service.training_stub.GetTrainingRun(training_pb2.GetTrainingRunRequest(run_id=run.run_id)).run == run
    listing = training_pb2.ListTrainingRunsRequest(states=[metrics_pb2.RUN_STATE_QUEUED], model_name="en-de")
    assert run in service.training_stub.ListTrainingRuns(listing).runs
    cancelled = service.training_stub.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run.run_id)).run
    assert cancelled.state == metrics_pb2.RUN_STATE_CANCELLED
    assert cancelled.HasField("end_time")
    assert run.run_id not in [item.run_id for item in service.training_stub.ListTrainingRuns(listing).runs]


def test_the_order_of_runs(service):
    runs = [service.start_run().run_id for _ in range(3)]
    newest = training_pb2.ListTrainingRunsRequest(page_size=3)
    assert [run.run_id for run in service.training_stub.ListTrainingRuns(newest).runs] == runs[::-1]
    oldest = training_pb2.ListTrainingRunsRequest(order=training_pb2.RUN_ORDER_OLDEST_FIRST)
    assert [run.run_id for run in service.training_stub.ListTrainingRuns(oldest).runs][-3:] == runs


def test_checking_without_starting(service):
    run = service.start_run(validate_only=True)
    assert run.run_id == ""
    assert run.recipe.preset == recipe_pb2.PRESET_TINY


def test_a_failed_run_says_why(service):
    run_id = service.claimed_run()
    service.runs.append(run_id, 1, [STEP, VALIDATION], RunProgress(step=1, epoch=1, fraction=0.5, remaining_s=2.5))
    failure = RunFailure(reason=FailureReason.NON_FINITE_LOSS, message="the loss is inf", log_tail="last words")
    service.runs.change_state(run_id, 1, RunState.FAILED, "the loss is inf", failure)
    run = service.training_stub.GetTrainingRun(training_pb2.GetTrainingRunRequest(run_id=run_id)).run
    assert run.error == training_pb2.RunError(
        reason="NON_FINITE_LOSS", message="the loss is inf", log_tail="last words"
    )
    assert (run.progress.step, run.progress.fraction) == (1, 0.5)
    assert run.progress.remaining.ToNanoseconds() == 2_500_000_000
    assert run.start_time.ToNanoseconds() <= run.end_time.ToNanoseconds()


def test_records_arrive_as_they_were_written(service):
    run_id = service.claimed_run()
    remark = RunEvent(level=EventLevel.WARNING, code="PAIRS_DROPPED", message="3 pairs dropped")
    service.runs.append(run_id, 1, [STEP, VALIDATION, remark], None)
    request = training_pb2.StreamMetricsRequest(run_id=run_id, history_only=True)
    records = [response.record for response in service.training_stub.StreamMetrics(request)]
    assert [record.sequence for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.WhichOneof("payload") for record in records] == [
        *["state_change"] * 3,
        "step",
        "validation",
        "event",
    ]
    assert records[2].state_change == metrics_pb2.StateChange(state=metrics_pb2.RUN_STATE_RUNNING, attempt=1)
    assert read_fields(records[3].step) == vars(STEP)
    assert read_fields(records[4].validation) == vars(VALIDATION)
    assert records[5].event.level == metrics_pb2.EVENT_LEVEL_WARNING
    assert all(record.time.seconds > 1_700_000_000 for record in records)


def test_learning_rates(service):
    request = training_pb2.GetLRScheduleRequest(schedule=recipe_pb2.LearningRateSchedule(), last_step=16_000)
    curve = service.training_stub.GetLRSchedule(request)
    assert curve.schedule.kind == recipe_pb2.SCHEDULE_KIND_NOAM
    assert (curve.schedule.d_model, curve.schedule.warmup_steps, curve.schedule.factor) == (512, 4000, 1)
    assert (curve.peak.step, round(curve.peak.learning_rate, 9)) == (4000, 6.98771e-4)
    assert curve.points[0].learning_rate == pytest.approx(1.74693e-7, rel=1e-5)
    assert curve.points[-1].learning_rate == pytest.approx(curve.peak.learning_rate / 2)
    of_recipe = service.training_stub.GetLRSchedule(training_pb2.GetLRScheduleRequest(recipe=recipe_pb2.Recipe()))
    of_run = service.training_stub.GetLRSchedule(training_pb2.GetLRScheduleRequest(run_id=service.start_run().run_id))
    assert of_recipe == of_run
    assert of_run.points[-1].step == 10_000


def test_models(service):
    service.import_model("model-b")
    service.import_model("model-a")
    page = service.model_stub.ListModels(model_pb2.ListModelsRequest(page_size=1))
    names = [model.name for model in page.models]
    while page.next_page_token:
        page = service.model_stub.ListModels(model_pb2.ListModelsRequest(page_size=1, page_token=page.next_page_token))
        names += [model.name for model in page.models]
    assert names == ["en-de", "model-a", "model-b"]
    found = service.model_stub.GetModel(model_pb2.GetModelRequest(model="en-de/1"))
    assert found.model.latest_version == found.version
    assert list(found.model.versions) == [1]
    version = found.version
    assert (version.version, version.source_language, version.parameters) == (1, "en", 1000)
    assert version.scores == model_pb2.ModelScores(
        bleu=30.5, chrf=60.25, nll_per_token=1.25, weights="PUBLISHED_WEIGHTS_CHECKPOINT", step=100, translated_pairs=40
    )
    assert version.recipe.model.d_model == 128


def test_aliases(service):
    service.import_model("aliased"), service.import_model("aliased")
    stub = service.model_stub
    stub.SetModelAlias(model_pb2.SetModelAliasRequest(name="aliased", alias="canary", version=2))
    model = stub.SetModelAlias(model_pb2.SetModelAliasRequest(name="aliased", alias="live", version=1)).model
    assert [(alias.alias, alias.version) for alias in model.aliases] == [("canary", 2), ("live", 1)]
    assert model.aliases[0].update_time.seconds > 1_700_000_000
    found = stub.GetModel(model_pb2.GetModelRequest(model="aliased@live"))
    assert (found.model, found.version.version) == (model, 1)
    assert model in stub.ListModels(model_pb2.ListModelsRequest()).models
    request = translation_pb2.TranslateRequest(model="aliased@canary", sentences=["a dog"])
    assert service.translation_stub.Translate(request).model == "aliased/2"
    tuned = service.import_model("pretrained", weights=True)
    stub.SetModelAlias(model_pb2.SetModelAliasRequest(name="pretrained", alias="live", version=1))
    assert service.start_run(initial_model="pretrained@live").initial_model == tuned.reference
    stub.DeleteModelAlias(model_pb2.DeleteModelAliasRequest(name="aliased", alias="live"))
    found = stub.GetModel(model_pb2.GetModelRequest(model="aliased"))
    assert [alias.alias for alias in found.model.aliases] == ["canary"]


def test_damaged_database_is_data_loss(make_service, refused):
    service = make_service()
    service.import_model("en-de")
    service.database.dispose()
    service.folder.database.write_bytes(b"\xff" * service.folder.database.stat().st_size)
    refusal = refused(service.model_stub.ListModels, model_pb2.ListModelsRequest())
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "DATABASE_DAMAGED")
    assert "ferryman-service repair" in refusal.message


def test_deleting_versions(service):
    for _ in range(2):
        service.import_model("short-lived")
    for version in (2, 1):
        request = model_pb2.DeleteModelVersionRequest(model=f"short-lived/{version}")
        assert service.model_stub.DeleteModelVersion(request) == model_pb2.DeleteModelVersionResponse()
    names = [model.name for model in service.model_stub.ListModels(model_pb2.ListModelsRequest()).models]
    assert "short-lived" not in names
    assert service.import_model("short-lived").version == 3


def test_downloads(service):
    version = service.import_model("downloaded")
    encoder = service.models.bundle_dir(version) / "encoder.onnx"
    header, *chunks = (
        getattr(response, response.WhichOneof("download_part"))
        for response in service.model_stub.DownloadModel(model_pb2.DownloadModelRequest(model="downloaded"))
    )
    assert header.version == service.model_stub.GetModel(model_pb2.GetModelRequest(model="downloaded/1")).version
    names = ["manifest.json", *sorted(bundles.CONTENT_FILES)]
    assert [file.name for file in header.files] == names
    assert header.files[0].sha256 == version.digest
    assert sum(file.size_bytes for file in header.files) == version.size_bytes
    assert [(chunk.file, chunk.offset) for chunk in chunks] == [(number, 0) for number in range(len(names))]
    assert chunks[names.index("encoder.onnx")].data == encoder.read_bytes()
    assert [hashlib.sha256(chunk.data).hexdigest() for chunk in chunks] == [file.sha256 for file in header.files]


def test_models_in_memory(make_service):
    service = make_service()
    service.import_model("a"), service.import_model("b")
    stub = service.model_stub
    first = stub.LoadModel(model_pb2.LoadModelRequest(model="a")).loaded_model
    assert (first.model, first.memory_bytes) == ("a/1", 1000)
    assert first.load_duration.ToNanoseconds() > 0
    service.translation_stub.Translate(translation_pb2.TranslateRequest(model="b", sentences=["x"]))
    assert stub.LoadModel(model_pb2.LoadModelRequest(model="a/1")).loaded_model == first
    listed = stub.ListLoadedModels(model_pb2.ListLoadedModelsRequest()).loaded_models
    assert [loaded.model for loaded in listed] == ["a/1", "b/1"]
    assert listed[0] == first
    unload = model_pb2.UnloadModelRequest(model="b")
    assert [stub.UnloadModel(unload).was_loaded for _ in range(2)] == [True, False]
    listed = stub.ListLoadedModels(model_pb2.ListLoadedModelsRequest()).loaded_models
    assert [loaded.model for loaded in listed] == ["a/1"]


def test_translations(service):
    options = translation_pb2.TranslateOptions(beam_size=4, n_best=2)
    request = translation_pb2.TranslateRequest(model="en-de", sentences=["a dog", ""], options=options)
    answer = service.translation_stub.Translate(request)
    assert answer.model == "en-de/1"
    first, empty = answer.translations
    assert [hypothesis.text for hypothesis in first.hypotheses] == ["A DOG", "A DOG"]
    assert first.hypotheses[1] == translation_pb2.Hypothesis(
        text="A DOG", score=-1.0, log_probability=-3.0, target_tokens=3, finished=True
    )
    assert (first.source_tokens, empty.source_tokens) == (3, 0)
    assert answer.timings.decode.ToNanoseconds() == 3_000_000_000
    assert answer.timings.total.ToNanoseconds() > answer.timings.queue.ToNanoseconds() > 0


def test_a_method_that_does_not_exist(service):
    call = service.channel.unary_unary("/ferryman.v1.TrainingService/Fly")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
