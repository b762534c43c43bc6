"""A disk that is full, or nearly: refused with a reason and a cure, and what was begun leaves nothing."""

import grpc
import pytest

from ferryman.v1 import training_pb2
from ferryman_service.stores.free_space import FreeSpace
from tests.fakes.failpoints import Failpoints, Fault
from tests.fakes.loopback_service import upload_messages

MESSAGES = upload_messages([("one two", "eins zwei")] * 2000)


def assert_is_refused(refusal):
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert set(refusal.details) == {"ErrorInfo", "QuotaFailure"}


@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "COMMIT"])
def test_an_upload_that_does_not_fit_frees_what_it_took(service, refused, eventually, call):
    """The disk is full from some call of the operating system on, and stays so while the upload is aborted."""
    with Failpoints(service.folder.root) as points:
        service.corpus_stub.UploadCorpus(iter(MESSAGES))
    first = next(number for number, name in enumerate(points.seen) if name.startswith(call))
    before = set(service.folder.corpora.iterdir())
    with Failpoints(service.folder.root, Fault.ENOSPC, first):
        assert_is_refused(refused(service.corpus_stub.UploadCorpus, iter(MESSAGES)))
        eventually(lambda: not list(service.folder.incoming.iterdir()))
    assert set(service.folder.corpora.iterdir()) == before
    assert service.upload().train.pairs == 1


def test_below_the_mark_nothing_new_begins_and_all_else_goes_on(make_service, refused):
    service = make_service()
    run_id, corpus_id = service.claimed_run(), service.upload().corpus_id
    service.import_model("en-de")
    service.corpora._space = service.space = FreeSpace(service.folder.root, min_free_mib=2**30)
    assert_is_refused(refused(service.corpus_stub.UploadCorpus, iter(MESSAGES)))
    request = training_pb2.StartTrainingRequest(corpus_id=corpus_id, model_name="en-de")
    refusal = refused(service.training_stub.StartTraining, request)
    assert_is_refused(refusal)
    assert "--min-free-mib" in refusal.message
    request.validate_only = True
    assert service.training_stub.StartTraining(request).run.corpus_id == corpus_id
    assert service.runs.append(run_id, 1, [], None).last_sequence == 3
    service.training_stub.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run_id))
