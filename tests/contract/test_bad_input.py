"""Every bad input gets its status code, its reason, and all fields that are wrong."""

import uuid

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from ferryman import Client, errors
from ferryman.v1 import corpus_pb2, model_pb2, recipe_pb2, training_pb2, translation_pb2
from tests.fakes.loopback_service import upload_messages

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
NO_SUCH_RUN = "run_0000000000000000000000"
NO_SUCH_CORPUS = "cor_0000000000000000000000"


def chunk(data, split="SPLIT_TRAIN", side="SIDE_SOURCE"):
    return corpus_pb2.UploadCorpusRequest(chunk=corpus_pb2.FileChunk(split=split, side=side, data=data))


def files(*texts):
    """Chunks of train source, train target, validation source, validation target."""
    places = [(split, side) for split in ("SPLIT_TRAIN", "SPLIT_VALIDATION") for side in ("SIDE_SOURCE", "SIDE_TARGET")]
    return [chunk(text, split, side) for text, (split, side) in zip(texts, places, strict=True)]


HEADER, TRAIN_PAIRS, _ = upload_messages([("one", "eins")])
UNSPECIFIED_PAIRS = corpus_pb2.UploadCorpusRequest(pairs=corpus_pb2.PairBatch())


@pytest.mark.parametrize(
    ("messages", "reason", "violations"),
    [
        ([], "INVALID_REQUEST", [("header", "REQUIRED")]),
        ([TRAIN_PAIRS], "INVALID_REQUEST", [("header", "REQUIRED")]),
        ([HEADER, HEADER], "INVALID_REQUEST", [("header", "UNEXPECTED")]),
        ([HEADER, corpus_pb2.UploadCorpusRequest()], "INVALID_REQUEST", [("upload_part", "REQUIRED")]),
        ([HEADER, UNSPECIFIED_PAIRS], "INVALID_REQUEST", [("pairs.split", "REQUIRED")]),
        ([HEADER, chunk(b"", 0, 1)], "INVALID_REQUEST", [("chunk.split", "REQUIRED")]),
        ([HEADER, chunk(b"", 1, 0)], "INVALID_REQUEST", [("chunk.side", "REQUIRED")]),
        ([HEADER, chunk(b"", 77, 1)], "INVALID_REQUEST", [("chunk.split", "UNKNOWN_ENUM_VALUE")]),
        (
            upload_messages([], request_id="no", display_name="x" * 201, source_language="", target_language="!"),
            "INVALID_REQUEST",
            [
                ("header.request_id", "NOT_A_UUID"),
                ("header.display_name", "TOO_LONG"),
                ("header.source_language", "INVALID_LANGUAGE"),
                ("header.target_language", "INVALID_LANGUAGE"),
            ],
        ),
        ([HEADER], "INVALID_CORPUS", [("train", "EMPTY"), ("validation", "EMPTY")]),
        (
            [HEADER, *files(b"a\nb\n", b"a\n", b"a\n", b"a\n")],
            "INVALID_CORPUS",
            [("train.target", "LINE_COUNT_MISMATCH")],
        ),
        ([HEADER, *files(b"a\n\xff\n", b"a\nb\n", b"a\n", b"a\n")], "INVALID_CORPUS", [("train.source", "NOT_UTF8")]),
        (
            [HEADER, *files("a\nb\n".encode("utf-16"), b"a\nb\n", b"a\n", b"a\n")],
            "INVALID_CORPUS",
            [("train.source", "NOT_UTF8")],
        ),
        (
            [HEADER, *files(b"a" * 70_000, b"a\n", b"a\n", b"a\n")],
            "INVALID_CORPUS",
            [("train.source", "LINE_TOO_LONG")],
        ),
        (
            [HEADER, *files(b"a\n", ("a" + "\u0301" * 31).encode(), b"a\n", b"a\n")],
            "INVALID_CORPUS",
            [("train.target", "TOO_MANY_MARKS")],
        ),
        (
            upload_messages([("a\nb", "a")]),
            "INVALID_CORPUS",
            [("train.source", "LINE_BREAK"), ("validation.source", "LINE_BREAK")],
        ),
        ([HEADER, TRAIN_PAIRS, chunk(b"a\n")], "INVALID_CORPUS", [("train", "MIXED_FORMS")]),
    ],
)
def test_uploads(service, refused, messages, reason, violations):
    refusal = refused(service.corpus_stub.UploadCorpus, iter(messages))
    assert (refusal.code, refusal.reason) == (INVALID, reason)
    assert [field for field, _ in refusal.violations] == [field for field, _ in violations]
    for (_, found), (_, wanted) in zip(refusal.violations, violations, strict=True):
        assert wanted in (found, None)
    assert list(service.folder.incoming.iterdir()) == []


def test_all_bad_lines_of_an_upload_are_counted(service, refused):
    pairs = [("a\nb", "a")] * 300
    texts = files(b"a\xff\n" * 300, b"a\n" * 300, b"a\n", b"a" * 70_000)
    for messages, total in ((upload_messages(pairs), "600"), ([HEADER, *texts], "301")):
        refusal = refused(service.corpus_stub.UploadCorpus, iter(messages))
        metadata = {"violations_total": total, "violations_shown": "20"}
        assert (refusal.details["ErrorInfo"].metadata, len(refusal.violations)) == (metadata, 20)
        assert refusal.message.startswith(f"{total} violations, the first: ")


def test_an_upload_over_the_limit(service, refused):
    messages = [HEADER, *(chunk(b"x y z\n" * 10_000) for _ in range(20))]
    refusal = refused(service.corpus_stub.UploadCorpus, iter(messages))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CORPUS_TOO_LARGE")
    assert refusal.details["QuotaFailure"].violations[0].description
    assert list(service.folder.incoming.iterdir()) == []


def start(**fields):
    return training_pb2.StartTrainingRequest(**{"corpus_id": NO_SUCH_CORPUS, "model_name": "m", **fields})


def recipe(**parts):
    return start(recipe=recipe_pb2.Recipe(**parts))


@pytest.mark.parametrize(
    ("request_message", "reason", "violations"),
    [
        (
            start(request_id="x", corpus_id="", model_name="../up"),
            "INVALID_REQUEST",
            [("request_id", "NOT_A_UUID"), ("corpus_id", "REQUIRED"), ("model_name", "INVALID_MODEL_NAME")],
        ),
        (
            recipe(model={"heads": 3}, data={"vocabulary_size": 5}, schedule={"warmup_steps": 0}, seed=-1),
            "INVALID_RECIPE",
            [
                ("recipe.data.vocabulary_size", "OUT_OF_RANGE"),
                ("recipe.seed", "OUT_OF_RANGE"),
                ("recipe.model.heads", "CONFLICT"),
                ("recipe.schedule.warmup_steps", "OUT_OF_RANGE"),
            ],
        ),
        (recipe(model={"dropout": -0.1}), "INVALID_RECIPE", [("recipe.model.dropout", "OUT_OF_RANGE")]),
        (recipe(model={"dropout": float("nan")}), "INVALID_RECIPE", [("recipe.model.dropout", "OUT_OF_RANGE")]),
        (
            recipe(preset=9, model={"norm": 8}, data={"subword_algorithm": 7}),
            "INVALID_RECIPE",
            [
                ("recipe.preset", "UNKNOWN_ENUM_VALUE"),
                ("recipe.model.norm", "UNKNOWN_ENUM_VALUE"),
                ("recipe.data.subword_algorithm", "UNKNOWN_ENUM_VALUE"),
            ],
        ),
        (recipe(stop={"max_steps": 0}), "INVALID_RECIPE", [("recipe.stop", "CONFLICT")]),
        (
            recipe(
                model={"activation": 4, "positions": 3},
                optimization={"precision": 4},
                validation={"averaging": 4},
            ),
            "INVALID_RECIPE",
            [
                ("recipe.model.activation", "UNKNOWN_ENUM_VALUE"),
                ("recipe.model.positions", "UNKNOWN_ENUM_VALUE"),
                ("recipe.optimization.precision", "UNKNOWN_ENUM_VALUE"),
                ("recipe.validation.averaging", "UNKNOWN_ENUM_VALUE"),
            ],
        ),
        (
            recipe(model={"d_model": 36, "positions": "POSITIONS_ROPE"}, data={"bpe_dropout": 0.1}),
            "INVALID_RECIPE",
            [("recipe.data.bpe_dropout", "CONFLICT"), ("recipe.model.heads", "CONFLICT")],
        ),
        (
            recipe(data={"subword_regularization_alpha": 0.1, "subword_algorithm": "SUBWORD_ALGORITHM_BPE"}),
            "INVALID_RECIPE",
            [("recipe.data.subword_regularization_alpha", "CONFLICT")],
        ),
        (
            recipe(optimization={"accumulation_steps": 5}),
            "INVALID_RECIPE",
            [("recipe.optimization.accumulation_steps", "CONFLICT")],
        ),
        (
            recipe(schedule={"kind": "SCHEDULE_KIND_LINEAR", "total_steps": 0}),
            "INVALID_RECIPE",
            [("recipe.schedule.total_steps", "OUT_OF_RANGE")],
        ),
        (start(processes=-1), "INVALID_REQUEST", [("processes", "OUT_OF_RANGE")]),
        (
            start(processes=5, keep_optimizer=True),
            "INVALID_REQUEST",
            [("processes", "OUT_OF_RANGE"), ("keep_optimizer", "CONFLICT")],
        ),
        (start(initial_model="EN/x"), "INVALID_REQUEST", [("initial_model", "INVALID_MODEL_REFERENCE")]),
        (
            start(
                request_id="x",
                corpus_id="",
                model_name="/",
                initial_model="EN/x",
                processes=99,
                recipe=recipe_pb2.Recipe(preset=9, model={"dropout": 2}, seed=-1),
            ),
            "INVALID_RECIPE",
            [
                ("request_id", "NOT_A_UUID"),
                ("corpus_id", "REQUIRED"),
                ("model_name", "INVALID_MODEL_NAME"),
                ("processes", "OUT_OF_RANGE"),
                ("initial_model", "INVALID_MODEL_REFERENCE"),
                ("recipe.preset", "UNKNOWN_ENUM_VALUE"),
                ("recipe.model.dropout", "OUT_OF_RANGE"),
                ("recipe.seed", "OUT_OF_RANGE"),
            ],
        ),
        # What fits no kind that the server knows may fit the one that was meant; the rest is checked.
        (
            recipe(schedule={"kind": 9, "peak_learning_rate": 1}, model={"heads": 3}),
            "INVALID_RECIPE",
            [("recipe.schedule.kind", "UNKNOWN_ENUM_VALUE"), ("recipe.model.heads", "CONFLICT")],
        ),
        # The updates of "tiny" are too small for five micro-batches; those of the preset that was meant may not be.
        (
            recipe(preset=9, optimization={"accumulation_steps": 5}, stop={"max_steps": -1}),
            "INVALID_RECIPE",
            [("recipe.preset", "UNKNOWN_ENUM_VALUE"), ("recipe.stop.max_steps", "OUT_OF_RANGE")],
        ),
    ],
)
def test_starts(service, refused, request_message, reason, violations):
    refusal = refused(service.training_stub.StartTraining, request_message)
    assert (refusal.code, refusal.reason, refusal.violations) == (INVALID, reason, violations)


INF, NAN = float("inf"), float("nan")
JUST_OUTSIDE = {
    "data.subword_regularization_alpha": [-0.1, 1.1, NAN],
    "data.bpe_dropout": [-0.1, 1.0, NAN],
    "optimization.clip_norm": [-1, 1.1e9, INF],
    "optimization.accumulation_steps": [0, 1025],
    "optimization.weight_decay": [-0.1, 1.1, NAN],
    "optimization.r_drop_alpha": [-0.1, 100.5, INF],
    "optimization.ema_decay": [-0.1, 1.0, NAN],
    "optimization.max_skipped_updates": [-1, 1001],
    "optimization.max_rollbacks": [-1, 101],
    "optimization.rollback_rate_scale": [0.0, 1.1, NAN],
    "stop.max_duration": [Duration(seconds=-1), Duration(nanos=-1), Duration(seconds=10**9 + 1)],
    "stop.patience": [-1, 1_000_001],
    "stop.target_score": [-1.0, 1001.0, NAN],
    "validation.checkpoint_interval_steps": [-1, 10**9 + 1],
}


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in JUST_OUTSIDE.items() for value in values]
)
def test_values_just_outside_their_range(service, refused, path, value):
    part, _, name = path.partition(".")
    bpe = {"subword_algorithm": "SUBWORD_ALGORITHM_BPE"} if name == "bpe_dropout" else {}
    refusal = refused(service.training_stub.StartTraining, recipe(**{part: {name: value, **bpe}}))
    assert (refusal.code, refusal.reason) == (INVALID, "INVALID_RECIPE")
    assert (f"recipe.{path}", "OUT_OF_RANGE") in refusal.violations
    assert {field for field, _ in refusal.violations} == {f"recipe.{path}"}


@pytest.mark.parametrize("duration", [Duration(seconds=1, nanos=-1), Duration(nanos=10**9), Duration(nanos=-(10**9))])
def test_malformed_duration_is_the_only_violation(service, refused, duration):
    stop = recipe_pb2.StopRecipe(max_steps=0, max_duration=duration)
    refusal = refused(service.training_stub.StartTraining, recipe(stop=stop))
    assert (refusal.code, refusal.reason) == (INVALID, "INVALID_RECIPE")
    assert refusal.violations == [("recipe.stop.max_duration", "INVALID_DURATION")]


JUST_INSIDE = {
    "data": {"subword_regularization_alpha": 1.0},
    "optimization": {
        "clip_norm": 1e9,
        "accumulation_steps": 4,
        "weight_decay": 1.0,
        "r_drop_alpha": 100.0,
        "ema_decay": 0.9999,
        "precision": "PRECISION_BF16",
        "max_skipped_updates": 0,
        "max_rollbacks": 0,
        "rollback_rate_scale": 1.0,
    },
    "stop": {"max_duration": Duration(seconds=10**9), "patience": 1_000_000},
    "validation": {"averaging": "AVERAGING_NONE", "checkpoint_interval_steps": 10**9},
}


def test_values_just_inside_their_range_come_back_as_they_were(service):
    wanted = recipe_pb2.Recipe(**JUST_INSIDE)
    request = start(corpus_id=service.upload().corpus_id, recipe=wanted, validate_only=True)
    resolved = service.training_stub.StartTraining(request).run.recipe
    merged = recipe_pb2.Recipe()
    merged.CopyFrom(resolved)
    merged.MergeFrom(wanted)
    assert merged == resolved


def test_a_request_id_with_another_body(service, refused):
    corpus_id = service.upload().corpus_id
    request = start(corpus_id=corpus_id, request_id=str(uuid.uuid4()))
    first = service.training_stub.StartTraining(request).run
    assert service.training_stub.StartTraining(request).run.run_id == first.run_id
    request.recipe.seed = 7
    refusal = refused(service.training_stub.StartTraining, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


def test_an_upload_id_with_another_text(service, refused):
    request_id = str(uuid.uuid4())
    first = service.upload(request_id=request_id)
    assert service.upload(request_id=request_id) == first
    messages = upload_messages([("another", "text")], request_id=request_id)
    refusal = refused(service.corpus_stub.UploadCorpus, iter(messages))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


@pytest.mark.parametrize(
    ("request_message", "reason", "violations"),
    [
        ({}, "INVALID_REQUEST", [("subject", "REQUIRED")]),
        ({"run_id": ""}, "INVALID_REQUEST", [("run_id", "REQUIRED")]),
        ({"schedule": {"kind": 7}}, "INVALID_RECIPE", [("schedule.kind", "UNKNOWN_ENUM_VALUE")]),
        ({"schedule": {"warmup_steps": 0}}, "INVALID_RECIPE", [("schedule.warmup_steps", "OUT_OF_RANGE")]),
        ({"schedule": {"kind": "SCHEDULE_KIND_COSINE"}}, "INVALID_RECIPE", [("schedule.total_steps", "REQUIRED")]),
        ({"schedule": {"peak_learning_rate": 1}}, "INVALID_RECIPE", [("schedule.peak_learning_rate", "CONFLICT")]),
        (
            {"schedule": {}, "first_step": -1, "last_step": 2**40, "max_points": 1},
            "INVALID_REQUEST",
            [("first_step", "OUT_OF_RANGE"), ("last_step", "OUT_OF_RANGE"), ("max_points", "OUT_OF_RANGE")],
        ),
        ({"schedule": {}, "first_step": 9, "last_step": 8}, "INVALID_REQUEST", [("last_step", "OUT_OF_RANGE")]),
        ({"schedule": {}, "first_step": 2**40}, "INVALID_REQUEST", [("first_step", "OUT_OF_RANGE")]),
        (
            {"first_step": -1, "max_points": 1},
            "INVALID_REQUEST",
            [("subject", "REQUIRED"), ("first_step", "OUT_OF_RANGE"), ("max_points", "OUT_OF_RANGE")],
        ),
        (
            {"run_id": "", "last_step": -1},
            "INVALID_REQUEST",
            [("run_id", "REQUIRED"), ("last_step", "OUT_OF_RANGE")],
        ),
        ({"run_id": NO_SUCH_RUN, "max_points": 1}, "INVALID_REQUEST", [("max_points", "OUT_OF_RANGE")]),
        (
            {"schedule": {"kind": 7, "warmup_steps": 0}, "first_step": -1, "last_step": 2**40, "max_points": 1},
            "INVALID_RECIPE",
            [
                ("first_step", "OUT_OF_RANGE"),
                ("last_step", "OUT_OF_RANGE"),
                ("max_points", "OUT_OF_RANGE"),
                ("schedule.kind", "UNKNOWN_ENUM_VALUE"),
                ("schedule.warmup_steps", "OUT_OF_RANGE"),
            ],
        ),
        (
            {"recipe": {"seed": -1, "model": {"activation": 9}}, "max_points": -5},
            "INVALID_RECIPE",
            [
                ("max_points", "OUT_OF_RANGE"),
                ("recipe.model.activation", "UNKNOWN_ENUM_VALUE"),
                ("recipe.seed", "OUT_OF_RANGE"),
            ],
        ),
    ],
)
def test_curves(service, refused, request_message, reason, violations):
    refusal = refused(service.training_stub.GetLRSchedule, training_pb2.GetLRScheduleRequest(**request_message))
    assert (refusal.code, refusal.reason, refusal.violations) == (INVALID, reason, violations)


def translate(model="en-de", sentences=("hello",), **options):
    return translation_pb2.TranslateRequest(model=model, sentences=sentences, options=options)


@pytest.mark.parametrize(
    ("request_message", "reason", "violations"),
    [
        (translate(sentences=["x"] * 10_000), "INVALID_REQUEST", [("sentences", "OUT_OF_RANGE")]),
        (translate(sentences=["ü" * 8000] * 66), "INVALID_REQUEST", [("sentences", "TOO_MANY_BYTES")]),
        (
            translate("EN/x", [], beam_size=0, n_best=50, length_penalty=9, max_length=-1),
            "INVALID_REQUEST",
            [
                ("model", "INVALID_MODEL_REFERENCE"),
                ("options.beam_size", "OUT_OF_RANGE"),
                ("options.n_best", "OUT_OF_RANGE"),
                ("options.length_penalty", "OUT_OF_RANGE"),
                ("options.max_length", "OUT_OF_RANGE"),
                ("sentences", "OUT_OF_RANGE"),
            ],
        ),
        (translate(beam_size=2, n_best=3), "INVALID_REQUEST", [("options.n_best", "CONFLICT")]),
        (
            translate(
                beam_size=3,
                n_best=40,
                max_length_ratio=float("nan"),
                min_length=-1,
                beam_patience=0,
                early_stopping=9,
                sampling={"temperature": 0, "top_k": -1, "top_p": 1.5},
                repetition_penalty=0,
                no_repeat_ngram_size=-1,
            ),
            "INVALID_REQUEST",
            [
                ("options.early_stopping", "UNKNOWN_ENUM_VALUE"),
                ("options.beam_size", "CONFLICT"),
                ("options.n_best", "OUT_OF_RANGE"),
                ("options.max_length_ratio", "OUT_OF_RANGE"),
                ("options.min_length", "OUT_OF_RANGE"),
                ("options.beam_patience", "OUT_OF_RANGE"),
                ("options.repetition_penalty", "OUT_OF_RANGE"),
                ("options.no_repeat_ngram_size", "OUT_OF_RANGE"),
                ("options.sampling.temperature", "OUT_OF_RANGE"),
                ("options.sampling.top_k", "OUT_OF_RANGE"),
                ("options.sampling.top_p", "OUT_OF_RANGE"),
            ],
        ),
        (translate(min_length=7, max_length=7), "INVALID_REQUEST", [("options.min_length", "CONFLICT")]),
        (
            translate(sentences=["fine", "word " * 20, "too " * 9]),
            "INVALID_SENTENCE",
            [("sentences[1]", "SENTENCE_TOO_LONG"), ("sentences[2]", "SENTENCE_TOO_LONG")],
        ),
    ],
)
def test_translations(service, refused, request_message, reason, violations):
    refusal = refused(service.translation_stub.Translate, request_message)
    assert (refusal.code, refusal.reason, refusal.violations) == (INVALID, reason, violations)


@pytest.mark.parametrize(
    ("stub", "method", "request_message", "violations"),
    [
        ("corpus_stub", "GetCorpus", corpus_pb2.GetCorpusRequest(), [("corpus_id", "REQUIRED")]),
        ("corpus_stub", "ListCorpora", corpus_pb2.ListCorporaRequest(page_size=-1), [("page_size", "OUT_OF_RANGE")]),
        (
            "corpus_stub",
            "ListCorpora",
            corpus_pb2.ListCorporaRequest(page_token="made-up"),
            [("page_token", "INVALID_PAGE_TOKEN")],
        ),
        ("model_stub", "GetModel", model_pb2.GetModelRequest(model="x/0"), [("model", "INVALID_MODEL_REFERENCE")]),
        ("model_stub", "ListModels", model_pb2.ListModelsRequest(page_size=-2), [("page_size", "OUT_OF_RANGE")]),
        (
            "model_stub",
            "SetModelAlias",
            model_pb2.SetModelAliasRequest(name="EN", alias="42", version=-1),
            [("name", "INVALID_MODEL_NAME"), ("alias", "INVALID_ALIAS"), ("version", "OUT_OF_RANGE")],
        ),
        (
            "model_stub",
            "DeleteModelAlias",
            model_pb2.DeleteModelAliasRequest(),
            [("name", "INVALID_MODEL_NAME"), ("alias", "INVALID_ALIAS")],
        ),
        *(
            (
                "model_stub",
                method,
                getattr(model_pb2, f"{method}Request")(model=model),
                [("model", "INVALID_MODEL_REFERENCE")],
            )
            for method, model in (
                ("GetModel", "en-de@"),
                ("DeleteModelVersion", "en-de"),
                ("DeleteModelVersion", "en-de@production"),
                ("DeleteModelVersion", "../../1"),
                ("DownloadModel", "../../etc/passwd"),
                ("LoadModel", ""),
                ("UnloadModel", "en-de@7"),
            )
        ),
        ("training_stub", "GetTrainingRun", training_pb2.GetTrainingRunRequest(), [("run_id", "REQUIRED")]),
        ("training_stub", "CancelTraining", training_pb2.CancelTrainingRequest(), [("run_id", "REQUIRED")]),
        ("training_stub", "PauseTraining", training_pb2.PauseTrainingRequest(), [("run_id", "REQUIRED")]),
        ("training_stub", "ResumeTraining", training_pb2.ResumeTrainingRequest(), [("run_id", "REQUIRED")]),
        ("training_stub", "ListCheckpoints", training_pb2.ListCheckpointsRequest(), [("run_id", "REQUIRED")]),
        ("training_stub", "DeleteTrainingRun", training_pb2.DeleteTrainingRunRequest(), [("run_id", "REQUIRED")]),
        (
            "training_stub",
            "StreamMetrics",
            training_pb2.StreamMetricsRequest(after_sequence=-1),
            [("run_id", "REQUIRED"), ("after_sequence", "OUT_OF_RANGE")],
        ),
        (
            "training_stub",
            "ListTrainingRuns",
            training_pb2.ListTrainingRunsRequest(states=[1, 0, 99]),
            [("states[1]", "REQUIRED"), ("states[2]", "UNKNOWN_ENUM_VALUE")],
        ),
        (
            "training_stub",
            "ListTrainingRuns",
            training_pb2.ListTrainingRunsRequest(order=9),
            [("order", "UNKNOWN_ENUM_VALUE")],
        ),
        (
            "training_stub",
            "ListTrainingRuns",
            training_pb2.ListTrainingRunsRequest(states=[0, 99], order=9, page_size=-1, page_token="made-up"),
            [
                ("states[0]", "REQUIRED"),
                ("states[1]", "UNKNOWN_ENUM_VALUE"),
                ("order", "UNKNOWN_ENUM_VALUE"),
                ("page_size", "OUT_OF_RANGE"),
                ("page_token", "INVALID_PAGE_TOKEN"),
            ],
        ),
    ],
)
def test_other_requests(service, refused, stub, method, request_message, violations):
    refusal = refused(getattr(getattr(service, stub), method), request_message)
    assert (refusal.code, refusal.reason, refusal.violations) == (INVALID, "INVALID_REQUEST", violations)


@pytest.mark.parametrize(
    ("stub", "method", "request_message", "reason", "resource"),
    [
        (
            "corpus_stub",
            "GetCorpus",
            corpus_pb2.GetCorpusRequest(corpus_id="../../etc/passwd"),
            "CORPUS_NOT_FOUND",
            ("corpus", "../../etc/passwd"),
        ),
        ("training_stub", "StartTraining", start(), "CORPUS_NOT_FOUND", ("corpus", NO_SUCH_CORPUS)),
        (
            "training_stub",
            "GetTrainingRun",
            training_pb2.GetTrainingRunRequest(run_id=NO_SUCH_RUN),
            "RUN_NOT_FOUND",
            ("run", NO_SUCH_RUN),
        ),
        (
            "training_stub",
            "CancelTraining",
            training_pb2.CancelTrainingRequest(run_id="x" * 1_000_000),
            "RUN_NOT_FOUND",
            ("run", "x" * 80),
        ),
        (
            "training_stub",
            "StreamMetrics",
            training_pb2.StreamMetricsRequest(run_id=NO_SUCH_RUN),
            "RUN_NOT_FOUND",
            ("run", NO_SUCH_RUN),
        ),
        (
            "training_stub",
            "GetLRSchedule",
            training_pb2.GetLRScheduleRequest(run_id=NO_SUCH_RUN),
            "RUN_NOT_FOUND",
            ("run", NO_SUCH_RUN),
        ),
        *(
            (
                "training_stub",
                method,
                getattr(training_pb2, f"{method}Request")(run_id="../../etc"),
                "RUN_NOT_FOUND",
                ("run", "../../etc"),
            )
            for method in ("PauseTraining", "ResumeTraining", "ListCheckpoints", "DeleteTrainingRun")
        ),
        ("model_stub", "GetModel", model_pb2.GetModelRequest(model="fr-it"), "MODEL_NOT_FOUND", ("model", "fr-it")),
        (
            "model_stub",
            "SetModelAlias",
            model_pb2.SetModelAliasRequest(name="en-de", alias="production", version=99),
            "MODEL_NOT_FOUND",
            ("model", "en-de/99"),
        ),
        (
            "model_stub",
            "DeleteModelAlias",
            model_pb2.DeleteModelAliasRequest(name="en-de", alias="production"),
            "MODEL_NOT_FOUND",
            ("model", "en-de@production"),
        ),
        *(
            (
                "model_stub",
                method,
                getattr(model_pb2, f"{method}Request")(model=model),
                "MODEL_NOT_FOUND",
                ("model", model),
            )
            for method, model in (
                ("DeleteModelVersion", "en-de/99"),
                ("DownloadModel", "en-de@production"),
                ("LoadModel", "fr-it"),
                ("UnloadModel", "en-de/99"),
            )
        ),
        ("translation_stub", "Translate", translate("en-de@x"), "MODEL_NOT_FOUND", ("model", "en-de@x")),
        ("translation_stub", "Translate", translate("en-de/99"), "MODEL_NOT_FOUND", ("model", "en-de/99")),
    ],
)
def test_what_does_not_exist(service, refused, stub, method, request_message, reason, resource):
    refusal = refused(getattr(getattr(service, stub), method), request_message)
    assert (refusal.code, refusal.reason) == (NOT_FOUND, reason)
    found = refusal.details["ResourceInfo"]
    assert (found.resource_type, found.resource_name) == resource


def test_a_position_beyond_the_end(service, refused):
    run_id = service.claimed_run()
    request = training_pb2.StreamMetricsRequest(run_id=run_id, after_sequence=4)
    refusal = refused(service.training_stub.StreamMetrics, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_OUT_OF_RANGE")
    assert refusal.details["ErrorInfo"].metadata["last_sequence"] == "3"


def test_a_role_that_is_not_served(make_service, refused):
    service = make_service(trains=False, translates=False)
    calls = [
        (service.training_stub.StartTraining, start()),
        (service.training_stub.CancelTraining, training_pb2.CancelTrainingRequest(run_id=NO_SUCH_RUN)),
        (service.training_stub.PauseTraining, training_pb2.PauseTrainingRequest(run_id=NO_SUCH_RUN)),
        (service.training_stub.ResumeTraining, training_pb2.ResumeTrainingRequest(run_id=NO_SUCH_RUN)),
        (service.training_stub.DeleteTrainingRun, training_pb2.DeleteTrainingRunRequest(run_id=NO_SUCH_RUN)),
        (service.translation_stub.Translate, translate()),
        (service.model_stub.LoadModel, model_pb2.LoadModelRequest(model="en-de")),
        (service.model_stub.UnloadModel, model_pb2.UnloadModelRequest(model="en-de")),
        (service.model_stub.ListLoadedModels, model_pb2.ListLoadedModelsRequest()),
    ]
    for rpc, request in calls:
        refusal = refused(rpc, request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ROLE_NOT_SERVED")


def test_an_unknown_alias_is_told_which_there_are(service, refused):
    service.models.set_alias("en-de", "canary", 1)
    refusal = refused(service.translation_stub.Translate, translate("en-de@live"))
    assert refusal.message == "model 'en-de' has no alias 'live': its aliases are canary"
    service.models.delete_alias("en-de", "canary")


def test_cancelling_what_has_ended(service, refused):
    from ferryman_service.domain.records import RunState

    run_id = service.claimed_run()
    service.runs.change_state(run_id, 1, RunState.FAILED)
    refusal = refused(service.training_stub.CancelTraining, training_pb2.CancelTrainingRequest(run_id=run_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ILLEGAL_TRANSITION")


def test_a_bug_tells_nothing_of_our_insides(service, refused, caplog):
    refusal = refused(service.translation_stub.Translate, translate(sentences=["break"]))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refusal.message
    assert "the secret of the house" in caplog.text


def test_so_many_violations_that_they_do_not_fit(service, refused):
    refusal = refused(service.translation_stub.Translate, translate(sentences=["слово " * 20] * 1000))
    assert (refusal.code, refusal.reason) == (INVALID, "INVALID_SENTENCE")
    told = refusal.details["ErrorInfo"].metadata
    assert told["violations_total"] == "1000"
    assert told["violations_shown"] == str(len(refusal.violations)) == "20"
    assert refusal.message.startswith("1,000 violations, the first: sentences[0]: has 21 subwords")
    with Client(service.address) as client, pytest.raises(errors.InvalidSentence) as caught:
        client.translate("en-de", ["слово " * 20] * 1000)
    assert (caught.value.violations_total, len(caught.value.violations)) == (1000, 20)
    assert str(caught.value).startswith("1,000 violations, the first 20:\n  sentences[0]: has 21 subwords")


def test_options_and_sentences_are_refused_together(service, refused):
    sentences = ["fine", "word " * 20, "\0"]
    service.translation_stub.Translate(translate())  # so the model is in memory
    request = translate(sentences=sentences, beam_size=99, max_length=-1)
    request.target_prefixes.extend(["", "", "too " * 9])
    refusal = refused(service.translation_stub.Translate, request)
    assert (refusal.code, refusal.reason) == (INVALID, "INVALID_REQUEST")
    assert refusal.violations == [
        ("options.beam_size", "OUT_OF_RANGE"),
        ("options.max_length", "OUT_OF_RANGE"),
        ("sentences[1]", "SENTENCE_TOO_LONG"),
        ("sentences[2]", "CONTROL_CHARACTER"),
        ("target_prefixes[2]", "PREFIX_TOO_LONG"),
    ]


def test_options_are_refused_without_loading_a_model(make_service, refused):
    service = make_service()
    service.import_model("en-de")
    request = translate(sentences=["word " * 20], beam_size=99)
    refusal = refused(service.translation_stub.Translate, request)
    assert refusal.violations == [("options.beam_size", "OUT_OF_RANGE")]
    assert len(service.model_stub.ListLoadedModels(model_pb2.ListLoadedModelsRequest()).loaded_models) == 0
