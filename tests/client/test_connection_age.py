"""The client against the real service, whose connections end every second."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from ferryman import Client, RunState
from tests.system.conftest import Stubs, reversal_corpus, small_recipe
from tests.system.service_process import ServiceProcess

pytestmark = pytest.mark.full

AGE_FLAGS = ("--max-connection-age-s", "1", "--max-connection-age-grace-s", "1")
SENTENCES = 200


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    service = ServiceProcess(tmp_path / "data", *AGE_FLAGS)
    yield service
    assert service.stop() == 0


def until_it_arrives(call: Callable[[], str]) -> str:
    """Bare stubs repeat nothing that the end of a connection cuts."""
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise


def test_connection_age_interrupts_neither_run_nor_translation(service):
    stubs = Stubs(service.address)
    request_id = str(uuid.uuid4())
    corpus_id = until_it_arrives(lambda: stubs.upload().corpus_id)
    run_id = until_it_arrives(lambda: stubs.start(corpus_id, small_recipe(max_steps=200), request_id=request_id).run_id)

    def slowly() -> Iterator[str]:
        for source, _ in reversal_corpus(SENTENCES, seed=5):
            time.sleep(0.03)
            yield source

    with Client(service.address) as client:
        sequences = [record.sequence for record in client.stream_metrics(run_id)]
        run = client.get_training_run(run_id)
        results = list(client.translate_stream("reversal", slowly(), in_order=True))
    assert run.state is RunState.SUCCEEDED
    assert sequences == list(range(1, run.last_sequence + 1))
    assert [result.id for result in results] == [str(number) for number in range(SENTENCES)]
    assert all(result.translation for result in results)
    log = service.log.read_text()
    assert log.count("TrainingService/StreamMetrics ") >= 2, "the stream was cut"
    assert log.count("TranslationService/StreamTranslate ") >= 2, "the stream was cut"
