"""Callers that leave in the middle: nothing half is kept, nobody works for them any more."""

import threading

import grpc
import pytest

from ferryman.v1 import corpus_pb2, translation_pb2
from tests.fakes.loopback_service import upload_messages


def handled(service, rpc_service, method, kind, code):
    labels = {"grpc_service": f"ferryman.v1.{rpc_service}", "grpc_method": method, "grpc_type": kind}
    return service.metric("grpc_server_handled_total", **labels, grpc_code=code)


@pytest.mark.parametrize("sent", range(1, 4))
def test_an_upload_that_is_given_up_stores_nothing(make_service, sent, eventually):
    """Also when every message has come, and only their end is missing."""
    service = make_service()
    for _ in range(10):
        at_the_end = threading.Event()
        gone = threading.Event()

        def messages(at_the_end=at_the_end, gone=gone):
            yield from upload_messages([("one", "eins")] * 100)[:sent]
            at_the_end.set()
            gone.wait(10)

        call = service.corpus_stub.UploadCorpus.future(messages())
        assert at_the_end.wait(10)
        call.cancel()
        gone.set()
    eventually(lambda: not any(service.folder.incoming.iterdir()))
    eventually(lambda: handled(service, "CorpusService", "UploadCorpus", "client_stream", "CANCELLED") == 10)
    assert list(service.corpus_stub.ListCorpora(corpus_pb2.ListCorporaRequest()).corpora) == []


def test_an_upload_whose_deadline_passes_stores_nothing(service, refused, eventually):
    never = threading.Event()

    def messages():
        yield from upload_messages([("deadline", "frist")])
        never.wait(5)

    with pytest.raises(grpc.RpcError) as caught:
        service.corpus_stub.UploadCorpus(messages(), timeout=0.3)
    never.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: not any(service.folder.incoming.iterdir()))
    eventually(lambda: handled(service, "CorpusService", "UploadCorpus", "client_stream", "DEADLINE_EXCEEDED") == 1)
    stored = service.corpus_stub.ListCorpora(corpus_pb2.ListCorporaRequest()).corpora
    assert "deadline" not in [corpus.train.samples[0].source for corpus in stored]


WAIT = translation_pb2.TranslateRequest(model="en-de", sentences=["wait"])


def test_a_translation_that_is_cancelled_is_not_worked_on(service, eventually):
    translator = service.loader.translator
    translator.busy.clear()
    translator.given_up.clear()
    call = service.translation_stub.Translate.future(WAIT)
    assert translator.busy.wait(10)
    call.cancel()
    assert translator.given_up.wait(10)
    eventually(lambda: handled(service, "TranslationService", "Translate", "unary", "CANCELLED") == 1)


def test_a_translation_whose_deadline_passes_is_not_worked_on(service, eventually):
    translator = service.loader.translator
    translator.given_up.clear()
    with pytest.raises(grpc.RpcError) as caught:
        service.translation_stub.Translate(WAIT, timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert translator.given_up.wait(10)
    eventually(lambda: handled(service, "TranslationService", "Translate", "unary", "DEADLINE_EXCEEDED") == 1)
