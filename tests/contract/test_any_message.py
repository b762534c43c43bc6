"""Random messages for every RPC of the contract: an answer or the caller's error, bounded memory, a service that lives.

Three messages for each RPC and example of the Hypothesis profile: 300 in `ci`. `make soak` sends 10,000.
"""

import contextlib
import os
from pathlib import Path
from random import Random

import grpc
import pytest
from hypothesis import settings

from bench.load.random_requests import RequestMaker, all_rpcs
from ferryman.v1 import model_pb2

SOAK = bool(os.environ.get("FERRYMAN_SOAK"))
MESSAGES = 10_000 if SOAK else 3 * settings().max_examples
LARGEST_BYTES = 1 << 20 if SOAK else 1 << 16
OURS = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE,
}
"""What a service in order never answers, whatever it is asked."""


@pytest.fixture(scope="module")
def known(service):
    """What the fields of requests may name; a model that is deleted meanwhile is one more name of nothing."""
    service.import_model("pretrained", weights=True)
    return {
        "run_id": [service.claimed_run()],
        "corpus_id": [service.upload().corpus_id],
        "model": ["en-de", "en-de/1", "en-de@live"],
        "name": ["en-de", "pretrained"],
        "model_name": ["en-de", "new"],
        "initial_model": ["pretrained/1"],
        "alias": ["live"],
        "sentence": ["a dog", ""],
        "sentences": ["a dog", ""],
    }


@pytest.mark.parametrize("rpc", all_rpcs(), ids=lambda rpc: rpc.name)
def test_any_message(service, known, rpc):
    random = Random(rpc.name)
    maker = RequestMaker(random, known)
    before_mib = resident_mib()
    for number in range(MESSAGES):
        size = round(LARGEST_BYTES ** random.random()) if random.random() < 0.05 else 0
        messages = maker.request(rpc, size)
        if random.random() < 0.2:
            messages[-1] = maker.damaged(messages[-1])
        if not service.models.list_page(None, 1):
            service.import_model("en-de")
        code, details = outcome(service.channel, rpc, messages)
        # A run that goes on is watched until the deadline.
        assert code not in OURS, (number, code, details, messages)
        assert code is not grpc.StatusCode.DEADLINE_EXCEEDED or rpc.name == "StreamMetrics", (number, messages)
    assert resident_mib() - before_mib < 256
    service.model_stub.ListModels(model_pb2.ListModelsRequest(), timeout=10)


def outcome(channel, rpc, messages):
    """Make the call with the serialized messages; return status code and details."""
    arity = ("stream" if rpc.streams_requests else "unary") + "_" + ("stream" if rpc.streams_responses else "unary")
    method = getattr(channel, arity)(rpc.path)
    request = iter(messages) if rpc.streams_requests else messages[0]
    timeout_s = 0.05 if rpc.name == "StreamMetrics" else 20
    if rpc.streams_responses:
        call = method(request, timeout=timeout_s)
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        return call.code(), call.details()
    try:
        method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def resident_mib():
    """Return the memory of this process, which holds the service too."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
