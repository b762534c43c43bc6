"""Pages end by their size, and no answer is larger than it may be."""

from types import SimpleNamespace

import pytest

from ferryman.v1 import corpus_pb2
from ferryman_service.application.paging import PAGE_BYTES
from ferryman_service.application.translating import TranslateResult
from ferryman_service.domain.errors import AnswerTooLarge
from ferryman_service.domain.translation import Hypothesis, Timings, Translation
from ferryman_service.rpc import convert
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


def test_an_answer_that_is_too_large_is_not_built():
    text = Hypothesis(text="x" * 2**20, score=0, log_probability=0, target_tokens=1, finished=True)
    result = TranslateResult(
        version=SimpleNamespace(reference="m/1"),
        translations=[Translation(hypotheses=[text], source_tokens=1)] * 16,
        sentences=(),
        timings=Timings(),
        mean_batch_rows=0,
        total_ns=0,
    )
    with pytest.raises(AnswerTooLarge, match="may have 16,777,216: ask for less in a call"):
        convert.result_to_wire(result)
