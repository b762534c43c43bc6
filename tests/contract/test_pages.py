"""Pages: tokens that are ours, for this listing, and nothing else."""

import base64

import grpc
import pytest

from ferryman.v1 import corpus_pb2, metrics_pb2, model_pb2, training_pb2

QUEUED = metrics_pb2.RUN_STATE_QUEUED


@pytest.fixture(scope="module")
def token(service):
    """The token of the second page of queued runs."""
    runs = [service.start_run().run_id for _ in range(3)]
    page = service.training_stub.ListTrainingRuns(listing(page_size=2))
    assert [run.run_id for run in page.runs] == runs[:0:-1]
    return page.next_page_token


def listing(**fields):
    return training_pb2.ListTrainingRunsRequest(**{"states": [QUEUED], **fields})


def test_a_token_leads_to_the_next_page(service, token):
    page = service.training_stub.ListTrainingRuns(listing(page_token=token))
    assert len(page.runs) == 1
    assert page.next_page_token == ""


def test_the_order_and_number_of_the_states_do_not_matter(service):
    states = [metrics_pb2.RUN_STATE_FAILED, QUEUED]
    page = service.training_stub.ListTrainingRuns(listing(page_size=1, states=states))
    again = listing(page_token=page.next_page_token, states=[*states[::-1]] * 8)
    assert len(service.training_stub.ListTrainingRuns(again).runs) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"states": []},
        {"states": [QUEUED, metrics_pb2.RUN_STATE_FAILED]},
        {"model_name": "en-de"},
        {"order": training_pb2.RUN_ORDER_OLDEST_FIRST},
    ],
)
def test_a_token_of_another_filter_is_refused(service, token, refused, other):
    refusal = refused(service.training_stub.ListTrainingRuns, listing(page_token=token, **other))
    assert (refusal.code, refusal.violations) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        [("page_token", "INVALID_PAGE_TOKEN")],
    )


def test_a_token_of_another_listing_is_refused(service, token, refused):
    for rpc, request in (
        (service.corpus_stub.ListCorpora, corpus_pb2.ListCorporaRequest(page_token=token)),
        (service.model_stub.ListModels, model_pb2.ListModelsRequest(page_token=token)),
    ):
        assert refused(rpc, request).violations == [("page_token", "INVALID_PAGE_TOKEN")]


def test_a_token_with_any_bit_changed_is_refused(service, token, refused):
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1
        request = listing(page_token=base64.urlsafe_b64encode(changed).decode().rstrip("="))
        refusal = refused(service.training_stub.ListTrainingRuns, request)
        assert refusal.violations == [("page_token", "INVALID_PAGE_TOKEN")]


def test_both_mistakes_are_told(service, refused):
    refusal = refused(service.training_stub.ListTrainingRuns, listing(page_size=-1, page_token="é"))
    assert refusal.violations == [("page_size", "OUT_OF_RANGE"), ("page_token", "INVALID_PAGE_TOKEN")]


def test_a_huge_page_is_the_largest_page(service):
    request = training_pb2.ListTrainingRunsRequest(page_size=2**31 - 1)
    assert len(service.training_stub.ListTrainingRuns(request).runs) <= 500
