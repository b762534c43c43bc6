"""Every error that the comments of the contract's methods promise is had, with the status code they name."""

import re
import threading
import uuid
from pathlib import Path

import grpc
import pytest
from sqlalchemy import insert

from ferryman.v1 import corpus_pb2, model_pb2, training_pb2, translation_pb2
from ferryman_service.application.loaded_models import LoadingLimits
from ferryman_service.bundle.manifest import verify
from ferryman_service.domain.errors import DiskFull, ModelDamaged
from ferryman_service.domain.models import parse_model_reference
from ferryman_service.domain.records import RunState
from ferryman_service.stores import tables
from ferryman_service.stores.database import writing
from ferryman_service.stores.free_space import FreeSpace
from tests.fakes.bundle_loader import SpyBundleLoader
from tests.fakes.loopback_service import upload_messages
from tests.fakes.translator import FakeBundleLoader

PROTOS = Path(__file__).parents[2] / "protos/ferryman/v1"
CODES = {code.name for code in grpc.StatusCode}
NO_RUN = "run_0000000000000000000000"
PAIR = [("one", "eins")]


def promises():
    """Return {(method, reason): code}: in a comment the reasons follow the name of their status code."""
    found = {}
    for proto in PROTOS.glob("*.proto"):
        for comment, method in re.findall(r"((?:  // .*\n)+)  rpc (\w+)\(", proto.read_text(encoding="utf-8")):
            code = None
            for word in re.findall(r"\b[A-Z]+(?:_[A-Z0-9]+)*\b", comment):
                if word in CODES:
                    code = word
                elif "_" in word and code is not None:
                    found[method, word] = code
    return found


def start(service, **fields):
    return service.training_stub.StartTraining, training_pb2.StartTrainingRequest(
        **{"corpus_id": service.upload().corpus_id, "model_name": "m", **fields}
    )


def upload(service, pairs=PAIR, **header):
    return service.corpus_stub.UploadCorpus, iter(upload_messages(pairs, **header))


def translate(service, *sentences, model="en-de", beam_size=1):
    options = translation_pb2.TranslateOptions(beam_size=beam_size)
    return service.translation_stub.Translate, translation_pb2.TranslateRequest(
        model=model, sentences=sentences, options=options
    )


def stream(service, run_id, after_sequence=0):
    request = training_pb2.StreamMetricsRequest(run_id=run_id, after_sequence=after_sequence)
    return service.training_stub.StreamMetrics, request


def curve(service, **fields):
    return service.training_stub.GetLRSchedule, training_pb2.GetLRScheduleRequest(**fields)


def by_run(service, method, run_id):
    """Return a call of a method whose request is nothing but a run."""
    return getattr(service.training_stub, method), getattr(training_pb2, f"{method}Request")(run_id=run_id)


def model_of_a_run_that_is_gone(service):
    version = service.import_model("orphan", weights=True)
    return start(service, initial_model=version.reference, keep_optimizer=True)


def run_whose_optimizer_is_needed(service):
    version, run_id = service.trained_model("base")
    call, request = start(service, initial_model=version.reference, keep_optimizer=True)
    call(request)
    return by_run(service, "DeleteTrainingRun", run_id)


def reused_upload(service):
    request_id = str(uuid.uuid4())
    service.upload(request_id=request_id)
    return upload(service, [("another", "text")], request_id=request_id)


def reused_start(service):
    request_id = str(uuid.uuid4())
    service.start_run(request_id=request_id)
    return start(service, request_id=request_id, model_name="another")


def one_run_too_many(service):
    service.start_run()
    return start(service)


def ended_run(service, method="CancelTraining"):
    run_id = service.claimed_run()
    service.runs.change_state(run_id, 1, RunState.FAILED)
    return by_run(service, method, run_id)


def full_disk(service):
    def begin_upload(header, request_id):
        raise DiskFull("the disk of the data folder is full")

    service.corpora.begin_upload = begin_upload
    return upload(service)


def low_disk(service):
    request = start(service)
    service.space = FreeSpace(service.folder.root, min_free_mib=2**30)
    return request


class CheckingLoader(FakeBundleLoader):
    """A loader that checks the files, as a real one does."""

    def load(self, bundle):
        verify(bundle)
        return super().load(bundle)


def load(service, _, model):
    return by_model(service, "LoadModel", model)


def damaged_model(service, call=translate):
    version = service.import_model("damaged")
    file = service.models.bundle_dir(version) / "decoder.onnx"
    file.chmod(0o644)
    file.write_bytes(b"not what was published")
    return call(service, "a", model="damaged")


def translate_stream(service, *sentences, model="en-de"):
    """Return a call of a stream that sends the sentences in one message, and does not half-close."""
    wire = [translation_pb2.StreamSentence(sentence=sentence) for sentence in sentences]

    def messages():
        yield translation_pb2.StreamTranslateRequest(config=translation_pb2.StreamTranslateConfig(model=model))
        yield translation_pb2.StreamTranslateRequest(sentences=translation_pb2.StreamSentences(sentences=wire))
        threading.Event().wait(2)

    return service.translation_stub.StreamTranslate, messages()


def one_sentence_too_many(service):
    """Return a call that finds the queue full: another one waits in it."""
    call, request = translate(service, "wait")
    service.waiting = call.future(request)  # kept: gRPC cancels a call that nobody holds
    assert service.loader.translator.busy.wait(10)
    return translate(service, "a")


def stopped_stream(service):
    """Return a call of a stream on a server that then stops."""
    call, request = translate_stream(service, "wait")

    def stop():
        assert service.loader.translator.busy.wait(10)
        service.stop()

    threading.Thread(target=stop).start()
    return call, request


def by_model(service, method, model="nobody"):
    """Return a call of a method whose request is nothing but a reference."""
    return getattr(service.model_stub, method), getattr(model_pb2, f"{method}Request")(model=model)


def set_alias(service, name="en-de", alias="production", version=1):
    request = model_pb2.SetModelAliasRequest(name=name, alias=alias, version=version)
    return service.model_stub.SetModelAlias, request


def delete_alias(service, alias="production"):
    request = model_pb2.DeleteModelAliasRequest(name="en-de", alias=alias)
    return service.model_stub.DeleteModelAlias, request


def served_alias(service, *, failures=(), memory_bytes=100):
    """Return a call that moves an alias from a version in memory to one that cannot be loaded."""
    service.import_model("en-de")
    call, request = set_alias(service)
    call(request)
    service.loaded.load(service.models.resolve(parse_model_reference("en-de@production")))
    service.loader.failures += failures
    service.loader.memory_bytes = memory_bytes
    return set_alias(service, version=2)


def aliased_version(service):
    call, request = set_alias(service)
    call(request)
    return by_model(service, "DeleteModelVersion", "en-de/1")


def truncated_model(service):
    version = service.import_model("damaged")
    file = service.models.bundle_dir(version) / "decoder.onnx"
    file.chmod(0o644)
    file.write_bytes(b"")
    return by_model(service, "DownloadModel", "damaged")


def unreadable(service, table):
    """Damage every row of the table."""
    with writing(service.database) as connection:
        connection.exec_driver_sql(f"UPDATE {table} SET create_time_ns = 'x'")


def unreadable_run(service):
    run_id = service.start_run().run_id
    unreadable(service, "runs")
    return by_run(service, "GetTrainingRun", run_id)


def unreadable_corpus(service):
    corpus_id = service.upload().corpus_id
    unreadable(service, "corpora")
    return service.corpus_stub.GetCorpus, corpus_pb2.GetCorpusRequest(corpus_id=corpus_id)


def corpus_in_use(service):
    corpus_id = service.start_run().corpus_id
    return service.corpus_stub.DeleteCorpus, corpus_pb2.DeleteCorpusRequest(corpus_id=corpus_id)


def one_alias_too_many(service):
    service.import_model("named")
    rows = [{"name": "named", "alias": f"a{i}", "version": 1, "update_time_ns": 1} for i in range(100)]
    with writing(service.database) as connection:
        connection.execute(insert(tables.model_aliases), rows)
    request = model_pb2.SetModelAliasRequest(name="named", alias="more", version=1)
    return service.model_stub.SetModelAlias, request


PROVOKED = {
    ("UploadCorpus", "INVALID_REQUEST"): lambda service: upload(service, source_language=""),
    ("UploadCorpus", "INVALID_CORPUS"): lambda service: upload(service, []),
    ("UploadCorpus", "CORPUS_TOO_LARGE"): lambda service: upload(service, [("x" * 1000, "y")] * 100),
    ("UploadCorpus", "DISK_FULL"): full_disk,
    ("UploadCorpus", "REQUEST_ID_REUSED"): reused_upload,
    ("GetCorpus", "CORPUS_NOT_FOUND"): lambda service: (
        service.corpus_stub.GetCorpus,
        corpus_pb2.GetCorpusRequest(corpus_id="nobody"),
    ),
    ("GetCorpus", "ROW_UNREADABLE"): unreadable_corpus,
    ("DeleteCorpus", "CORPUS_NOT_FOUND"): lambda service: (
        service.corpus_stub.DeleteCorpus,
        corpus_pb2.DeleteCorpusRequest(corpus_id="nobody"),
    ),
    ("DeleteCorpus", "CORPUS_IN_USE"): corpus_in_use,
    ("DeleteCorpus", "INVALID_REQUEST"): lambda service: (
        service.corpus_stub.DeleteCorpus,
        corpus_pb2.DeleteCorpusRequest(),
    ),
    ("GetTrainingRun", "ROW_UNREADABLE"): unreadable_run,
    ("SetModelAlias", "TOO_MANY_ALIASES"): one_alias_too_many,
    ("ListCorpora", "INVALID_REQUEST"): lambda service: (
        service.corpus_stub.ListCorpora,
        corpus_pb2.ListCorporaRequest(page_token="x"),
    ),
    ("ListModels", "INVALID_REQUEST"): lambda service: (
        service.model_stub.ListModels,
        model_pb2.ListModelsRequest(page_token="x"),
    ),
    ("GetModel", "MODEL_NOT_FOUND"): lambda service: (
        service.model_stub.GetModel,
        model_pb2.GetModelRequest(model="nobody"),
    ),
    ("GetModel", "INVALID_REQUEST"): lambda service: (
        service.model_stub.GetModel,
        model_pb2.GetModelRequest(model="a/b"),
    ),
    ("SetModelAlias", "MODEL_NOT_FOUND"): lambda service: set_alias(service, version=2),
    ("SetModelAlias", "INVALID_REQUEST"): lambda service: set_alias(service, alias="7"),
    ("SetModelAlias", "MODEL_DAMAGED"): lambda service: served_alias(service, failures=[ModelDamaged("broken")]),
    ("SetModelAlias", "MODEL_TOO_LARGE"): lambda service: served_alias(service, memory_bytes=1000),
    ("DeleteModelAlias", "MODEL_NOT_FOUND"): delete_alias,
    ("DeleteModelAlias", "INVALID_REQUEST"): lambda service: delete_alias(service, "../x"),
    ("DeleteModelVersion", "MODEL_NOT_FOUND"): lambda service: by_model(service, "DeleteModelVersion", "en-de/2"),
    ("DeleteModelVersion", "MODEL_IN_USE"): aliased_version,
    ("DeleteModelVersion", "INVALID_REQUEST"): lambda service: by_model(service, "DeleteModelVersion", "en-de"),
    ("DownloadModel", "MODEL_NOT_FOUND"): lambda service: by_model(service, "DownloadModel"),
    ("DownloadModel", "INVALID_REQUEST"): lambda service: by_model(service, "DownloadModel", "../x"),
    ("DownloadModel", "MODEL_DAMAGED"): truncated_model,
    ("LoadModel", "MODEL_NOT_FOUND"): lambda service: by_model(service, "LoadModel"),
    ("LoadModel", "INVALID_REQUEST"): lambda service: by_model(service, "LoadModel", "a@7"),
    ("LoadModel", "MODEL_DAMAGED"): lambda service: damaged_model(service, load),
    ("LoadModel", "MODEL_TOO_LARGE"): lambda service: by_model(service, "LoadModel", "en-de"),
    ("LoadModel", "ROLE_NOT_SERVED"): lambda service: by_model(service, "LoadModel", "en-de"),
    ("UnloadModel", "MODEL_NOT_FOUND"): lambda service: by_model(service, "UnloadModel"),
    ("UnloadModel", "INVALID_REQUEST"): lambda service: by_model(service, "UnloadModel", "a/0"),
    ("UnloadModel", "ROLE_NOT_SERVED"): lambda service: by_model(service, "UnloadModel", "en-de"),
    ("ListLoadedModels", "ROLE_NOT_SERVED"): lambda service: (
        service.model_stub.ListLoadedModels,
        model_pb2.ListLoadedModelsRequest(),
    ),
    ("StartTraining", "CORPUS_NOT_FOUND"): lambda service: start(service, corpus_id="nobody"),
    ("StartTraining", "INVALID_RECIPE"): lambda service: start(service, recipe={"seed": -1}),
    ("StartTraining", "INVALID_REQUEST"): lambda service: start(service, model_name="/"),
    ("StartTraining", "REQUEST_ID_REUSED"): reused_start,
    ("StartTraining", "DISK_FULL"): low_disk,
    ("StartTraining", "TOO_MANY_RUNS"): one_run_too_many,
    ("StreamMetrics", "RUN_NOT_FOUND"): lambda service: stream(service, NO_RUN),
    ("StreamMetrics", "SEQUENCE_OUT_OF_RANGE"): lambda service: stream(service, service.start_run().run_id, 2),
    ("GetLRSchedule", "INVALID_RECIPE"): lambda service: curve(service, schedule={"warmup_steps": 0}),
    ("GetLRSchedule", "INVALID_REQUEST"): lambda service: curve(service),
    ("GetLRSchedule", "RUN_NOT_FOUND"): lambda service: curve(service, run_id=NO_RUN),
    ("GetTrainingRun", "RUN_NOT_FOUND"): lambda service: (
        service.training_stub.GetTrainingRun,
        training_pb2.GetTrainingRunRequest(run_id=NO_RUN),
    ),
    ("ListTrainingRuns", "INVALID_REQUEST"): lambda service: (
        service.training_stub.ListTrainingRuns,
        training_pb2.ListTrainingRunsRequest(page_token="x"),
    ),
    ("CancelTraining", "RUN_NOT_FOUND"): lambda service: by_run(service, "CancelTraining", NO_RUN),
    ("CancelTraining", "ILLEGAL_TRANSITION"): ended_run,
    ("PauseTraining", "RUN_NOT_FOUND"): lambda service: by_run(service, "PauseTraining", NO_RUN),
    ("PauseTraining", "ILLEGAL_TRANSITION"): lambda service: ended_run(service, "PauseTraining"),
    ("ResumeTraining", "RUN_NOT_FOUND"): lambda service: by_run(service, "ResumeTraining", NO_RUN),
    ("ResumeTraining", "ILLEGAL_TRANSITION"): lambda service: ended_run(service, "ResumeTraining"),
    ("ListCheckpoints", "RUN_NOT_FOUND"): lambda service: by_run(service, "ListCheckpoints", NO_RUN),
    ("DeleteTrainingRun", "RUN_NOT_FOUND"): lambda service: by_run(service, "DeleteTrainingRun", NO_RUN),
    ("DeleteTrainingRun", "RUN_NOT_FINISHED"): lambda service: by_run(
        service, "DeleteTrainingRun", service.claimed_run()
    ),
    ("DeleteTrainingRun", "RUN_STILL_NEEDED"): run_whose_optimizer_is_needed,
    ("StartTraining", "MODEL_NOT_FOUND"): lambda service: start(service, initial_model="nobody"),
    ("StartTraining", "MODEL_HAS_NO_WEIGHTS"): lambda service: start(service, initial_model="en-de"),
    ("StartTraining", "OPTIMIZER_NOT_KEPT"): model_of_a_run_that_is_gone,
    ("Translate", "MODEL_NOT_FOUND"): lambda service: translate(service, "a", model="nobody"),
    ("Translate", "INVALID_REQUEST"): lambda service: translate(service),
    ("Translate", "INVALID_SENTENCE"): lambda service: translate(service, "too many words " * 9),
    ("Translate", "MODEL_DAMAGED"): damaged_model,
    ("Translate", "MODEL_TOO_LARGE"): lambda service: translate(service, "a"),
    ("Translate", "ROLE_NOT_SERVED"): lambda service: translate(service, "a"),
    ("Translate", "QUEUE_FULL"): one_sentence_too_many,
    ("StreamTranslate", "MODEL_NOT_FOUND"): lambda service: translate_stream(service, "a", model="nobody"),
    ("StreamTranslate", "INVALID_REQUEST"): lambda service: translate_stream(service),
    ("StreamTranslate", "MODEL_DAMAGED"): lambda service: damaged_model(service, translate_stream),
    ("StreamTranslate", "MODEL_TOO_LARGE"): lambda service: translate_stream(service, "a"),
    ("StreamTranslate", "ROLE_NOT_SERVED"): lambda service: translate_stream(service, "a"),
    ("StreamTranslate", "SERVER_SHUTTING_DOWN"): stopped_stream,
}
SERVICES = {
    "CORPUS_TOO_LARGE": {"max_corpus_bytes": 50_000},
    "TOO_MANY_RUNS": {"max_queued_runs": 1},
    "ROLE_NOT_SERVED": {"translates": False},
    "MODEL_DAMAGED": {"loader": CheckingLoader()},
    "QUEUE_FULL": {"queue_tokens": 2},
    "MODEL_TOO_LARGE": {"loading_limits": LoadingLimits(memory_bytes=999)},
    ("SetModelAlias", "MODEL_DAMAGED"): {"loader": SpyBundleLoader()},
    ("SetModelAlias", "MODEL_TOO_LARGE"): {
        "loader": SpyBundleLoader(),
        "loading_limits": LoadingLimits(memory_bytes=999),
    },
}


CHANGES_ITS_SERVICE = {"DISK_FULL", "MODEL_IN_USE", "ROW_UNREADABLE", "SERVER_SHUTTING_DOWN"}
"""Reasons that need a default service of their own."""


@pytest.fixture
def fitting_service(request, make_service, method, reason):
    """The module's service, or one of the test's own for a reason that needs other options or changes the service."""
    options = SERVICES.get((method, reason), SERVICES.get(reason))
    if options is None and reason not in CHANGES_ITS_SERVICE:
        return request.getfixturevalue("service")
    service = make_service(**(options or {}))
    service.import_model("en-de")
    return service


def test_documented_and_provoked_errors_are_the_same():
    assert set(promises()) == set(PROVOKED)


@pytest.mark.parametrize(("method", "reason"), PROVOKED)
def test_documented_error_has_its_status_code(fitting_service, refused, method, reason):
    service = fitting_service
    refusal = refused(*PROVOKED[method, reason](service))
    assert (refusal.code.name, refusal.reason) == (promises()[method, reason], reason)
    expected = {"NOT_FOUND": "ResourceInfo", "INVALID_ARGUMENT": "BadRequest", "RESOURCE_EXHAUSTED": "QuotaFailure"}
    assert expected.get(refusal.code.name, "ErrorInfo") in refusal.details
    assert not list(service.folder.incoming.iterdir())
