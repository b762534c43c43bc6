"""Whatever values the fields of a request have, the answer is OK or the caller's error, never ours."""

import contextlib

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferryman.v1 import model_pb2, training_pb2, translation_pb2

ALLOWED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
STATE_FORBIDS = grpc.StatusCode.FAILED_PRECONDITION
INTERESTING = [0, 1, 2, 3, 4, 8, 64, 100, 512, 1000]
NUMBERS = {
    Field.CPPTYPE_INT32: st.sampled_from(INTERESTING) | st.integers(-(2**31), 2**31 - 1),
    Field.CPPTYPE_INT64: st.sampled_from(INTERESTING) | st.integers(-(2**63), 2**63 - 1),
    Field.CPPTYPE_UINT64: st.sampled_from(INTERESTING) | st.integers(0, 2**64 - 1),
    Field.CPPTYPE_DOUBLE: st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]) | st.floats(),
    Field.CPPTYPE_BOOL: st.just(True),
    Field.CPPTYPE_ENUM: st.integers(0, 6) | st.integers(-(2**31), 2**31 - 1),
}
TEXTS = {
    "initial_model": st.sampled_from(["en-de", "en-de/1", "pretrained", "pretrained/2"]),
    "model": st.sampled_from(["en-de", "en-de/1", "en-de/2", "nobody", "en-de@production", "en-de@x"]),
    "name": st.sampled_from(["en-de", "nobody"]),
    "alias": st.sampled_from(["production", "x", "7"]),
    "sentences": st.sampled_from(["a dog", "", "word " * 9, "\x00", "\N{DOG FACE}"]),
}


def messages(descriptor, skip=()):
    """Any message of the type: each field left out or with any value."""
    fields = {field.name: values(field) for field in descriptor.fields if field.name not in skip}
    return st.fixed_dictionaries({}, optional=fields).map(without_second_choices(descriptor))


def values(field):
    one = messages(field.message_type) if field.message_type is not None else NUMBERS.get(field.cpp_type)
    if one is None:
        one = TEXTS.get(field.name, st.nothing()) | st.text(max_size=100)
    return st.lists(one, max_size=5) if field.is_repeated else one


def without_second_choices(descriptor):
    """Keep one field of each oneof that a caller can choose in."""

    def choose(found):
        for oneof in descriptor.oneofs:
            names = [field.name for field in oneof.fields if field.name in found]
            for name in names[1:]:
                del found[name]
        return found

    return choose


def check(rpc, request, *also):
    call = rpc.future(request, timeout=20)
    assert call.code() in {*ALLOWED, *also}, (call.code(), call.details(), request)


@pytest.fixture(scope="module")
def a_run(service):
    """The id of a run with three records."""
    return service.claimed_run()


any_values = settings(
    max_examples=settings().max_examples // 2,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def a_corpus(service):
    """The id of a corpus; beside it there is a model that training can start from."""
    service.import_model("pretrained", weights=True)
    return service.upload().corpus_id


@any_values
@given(messages(training_pb2.StartTrainingRequest.DESCRIPTOR, skip=["validate_only"]))
def test_start_training(service, a_corpus, fields):
    request = training_pb2.StartTrainingRequest(**fields, validate_only=True)
    check(service.training_stub.StartTraining, request, STATE_FORBIDS)
    request.corpus_id = request.corpus_id and a_corpus
    check(service.training_stub.StartTraining, request, STATE_FORBIDS)


@any_values
@given(
    st.sampled_from(["PauseTraining", "ResumeTraining", "CancelTraining", "ListCheckpoints", "DeleteTrainingRun"]),
    st.booleans(),
    st.text(max_size=100),
)
def test_calls_of_a_run(service, a_run, method, known, run_id):
    request = getattr(training_pb2, f"{method}Request")(run_id=a_run if known else run_id)
    check(getattr(service.training_stub, method), request, STATE_FORBIDS)


@any_values
@given(messages(training_pb2.GetLRScheduleRequest.DESCRIPTOR))
def test_get_lr_schedule(service, fields):
    check(service.training_stub.GetLRSchedule, training_pb2.GetLRScheduleRequest(**fields))


@any_values
@given(messages(translation_pb2.TranslateRequest.DESCRIPTOR))
def test_translate(service, fields):
    check(service.translation_stub.Translate, translation_pb2.TranslateRequest(**fields))


@any_values
@given(
    st.lists(messages(translation_pb2.StreamTranslateConfig.DESCRIPTOR, skip=["options"]), max_size=2),
    st.lists(messages(translation_pb2.StreamTranslateRequest.DESCRIPTOR, skip=["config"]), max_size=3),
)
def test_stream_translate(service, configs, requests):
    """Each sentence of a stream that ends well is answered once."""
    wire = [translation_pb2.StreamTranslateRequest(config=fields) for fields in configs]
    wire += [translation_pb2.StreamTranslateRequest(**fields) for fields in requests]
    call = service.translation_stub.StreamTranslate(iter(wire), timeout=20)
    with contextlib.suppress(grpc.RpcError):
        answered = [item.id for response in call for item in response.translations]
    assert call.code() in ALLOWED, (call.code(), call.details(), wire)
    if call.code() is grpc.StatusCode.OK:
        sent = [sentence.id for request in wire for sentence in request.sentences.sentences]
        assert sorted(answered) == sorted(sent)


@any_values
@given(messages(training_pb2.ListTrainingRunsRequest.DESCRIPTOR))
def test_list_training_runs(service, fields):
    check(service.training_stub.ListTrainingRuns, training_pb2.ListTrainingRunsRequest(**fields))


@any_values
@given(messages(training_pb2.StreamMetricsRequest.DESCRIPTOR, skip=["history_only"]))
def test_stream_metrics(service, a_run, fields):
    request = training_pb2.StreamMetricsRequest(**fields, history_only=True)
    if "run_id" in fields and fields["run_id"] < "A":
        request.run_id = a_run
    call = service.training_stub.StreamMetrics(request, timeout=20)
    sequences = []
    with contextlib.suppress(grpc.RpcError):
        sequences += [response.record.sequence for response in call]
    assert call.code() in {grpc.StatusCode.OK, grpc.StatusCode.OUT_OF_RANGE, *ALLOWED}, (
        call.code(),
        call.details(),
        request,
    )
    if call.code() is grpc.StatusCode.OK:
        assert sequences == list(range(request.after_sequence + 1, 4))


@any_values
@given(st.binary(max_size=200))
def test_any_bytes(service, request_bytes):
    check(service.channel.unary_unary("/ferryman.v1.TranslationService/Translate"), request_bytes)


def test_bytes_that_are_no_message(service, refused):
    """The details of a refusal say so, in a unary call as in a stream."""
    unary = service.channel.unary_unary("/ferryman.v1.TranslationService/Translate")
    stream = service.channel.stream_unary("/ferryman.v1.CorpusService/UploadCorpus")
    for refusal in (refused(unary, b"\xff"), refused(stream, iter([b"\xff"]))):
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert refusal.violations == [("request", "MALFORMED")]


MODEL_REQUESTS = {
    method.name: method.input_type for method in model_pb2.DESCRIPTOR.services_by_name["ModelService"].methods
}


@settings(any_values, max_examples=settings().max_examples)
@given(st.sampled_from(sorted(MODEL_REQUESTS)).flatmap(lambda m: st.tuples(st.just(m), messages(MODEL_REQUESTS[m]))))
def test_models(service, called):
    """Last: it also deletes."""
    if not service.models.list_page(None, 1):
        service.import_model("en-de")
    method, fields = called
    request = getattr(model_pb2, f"{method}Request")(**fields)
    if method != "DownloadModel":
        check(getattr(service.model_stub, method), request, STATE_FORBIDS)
        return
    call = service.model_stub.DownloadModel(request, timeout=20)
    with contextlib.suppress(grpc.RpcError):
        first, *_ = [response.WhichOneof("download_part") for response in call]
        assert first == "header"
    assert call.code() in ALLOWED, (call.code(), call.details(), request)
