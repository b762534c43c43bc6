"""One request_id, one run, one corpus, however many callers."""

import asyncio
import uuid

import grpc

from ferryman.v1 import corpus_pb2_grpc, training_pb2, training_pb2_grpc
from tests.fakes.loopback_service import upload_messages

CALLERS = 50


async def test_many_callers_with_one_request_id_start_one_run(service):
    request = training_pb2.StartTrainingRequest(
        corpus_id=service.upload().corpus_id, model_name="once", request_id=str(uuid.uuid4())
    )
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        answers = await asyncio.gather(*(stub.StartTraining(request) for _ in range(CALLERS)))
    assert len({answer.run.run_id for answer in answers}) == 1
    listing = training_pb2.ListTrainingRunsRequest(model_name="once")
    assert len(service.training_stub.ListTrainingRuns(listing).runs) == 1


async def test_many_uploads_with_one_request_id_store_one_corpus(make_service):
    service = make_service()
    messages = upload_messages([("one", "eins")], request_id=str(uuid.uuid4()))
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = corpus_pb2_grpc.CorpusServiceStub(channel)
        answers = await asyncio.gather(*(stub.UploadCorpus(iter(messages)) for _ in range(CALLERS)))
    assert len({answer.corpus.corpus_id for answer in answers}) == 1
    assert len(service.corpora.list_page(None, 10)) == 1
    assert len(list(service.folder.corpora.iterdir())) == 2, "the corpus and the folder of uploads in progress"


def test_the_id_of_a_known_run_is_found_in_its_present_state(service):
    request_id = str(uuid.uuid4())
    corpus_id = service.upload().corpus_id
    request = training_pb2.StartTrainingRequest(corpus_id=corpus_id, model_name="m", request_id=request_id)
    run = service.training_stub.StartTraining(request).run
    service.training_stub.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run.run_id))
    request.request_id = request_id.upper()
    again = service.training_stub.StartTraining(request).run
    assert again.run_id == run.run_id
    assert again.HasField("end_time")


def test_checking_alone_takes_no_id(service):
    """validate_only stores nothing, so the id is still free for another body."""
    request = training_pb2.StartTrainingRequest(
        corpus_id=service.upload().corpus_id, model_name="a", request_id=str(uuid.uuid4()), validate_only=True
    )
    assert service.training_stub.StartTraining(request).run.run_id == ""
    request.model_name, request.validate_only = "b", False
    assert service.training_stub.StartTraining(request).run.model_name == "b"
