"""Pages end by their size."""

from ferryman.v1 import corpus_pb2
from ferryman_service.application.paging import PAGE_BYTES
from ferryman_service.rpc.messages import LARGE_ANSWERS
from ferryman_service.rpc.pages import WirePage


def page_of(*sizes):
    response = corpus_pb2.ListCorporaResponse()
    page = WirePage(response.corpora, lambda size: corpus_pb2.Corpus(display_name="x" * size))
    return [page.takes(size) for size in sizes], response


def test_a_page_ends_where_it_would_be_too_large():
    taken, response = page_of(*[PAGE_BYTES // 4 - 100] * 4, 1000)
    assert taken == [True] * 4 + [False]
    assert len(response.corpora) == 4
    assert response.ByteSize() <= PAGE_BYTES < LARGE_ANSWERS["/ferryman.v1.CorpusService/ListCorpora"]


def test_the_first_item_is_taken_whatever_its_size():
    assert page_of(2 * PAGE_BYTES, 1)[0] == [True, False]
