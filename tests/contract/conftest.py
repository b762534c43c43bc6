"""A service on loopback, called with the generated stubs, and what its refusals say."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, ResourceInfo, RetryInfo
from grpc_status import rpc_status

from tests.fakes.loopback_service import LoopbackService

DETAILS = (BadRequest, ErrorInfo, QuotaFailure, ResourceInfo, RetryInfo)


@dataclass
class Refusal:
    """A failed call, unpacked. `violations` holds (field, reason); `details` the google.rpc details by type name."""

    code: grpc.StatusCode
    message: str
    reason: str
    violations: list[tuple[str, str]]
    details: dict[str, object]


@pytest.fixture(scope="session")
def refusal_of():
    """A reader of a grpc.RpcError; every refusal of ours must carry an ErrorInfo.

    FERRYMAN_GOLDEN_REFUSALS names a file for all that were read: a change of the inside must not change it.
    """
    seen = set()

    def read(error):
        details = {}
        for packed in rpc_status.from_call(error).details:
            kind = next(kind for kind in DETAILS if packed.Is(kind.DESCRIPTOR))
            assert kind.__name__ not in details, "at most one detail of each type"
            details[kind.__name__] = kind.FromString(packed.value)
        assert details["ErrorInfo"].domain == "ferryman.v1"
        violations = details.get("BadRequest", BadRequest()).field_violations
        assert all(violation.description for violation in violations)
        refusal = Refusal(
            code=error.code(),
            message=error.details(),
            reason=details["ErrorInfo"].reason,
            violations=[(violation.field, violation.reason) for violation in violations],
            details=details,
        )
        seen.update(
            f"{refusal.code.name} {refusal.reason} {field} {reason}".strip()
            for field, reason in refusal.violations or [("", "")]
        )
        return refusal

    yield read
    if path := os.environ.get("FERRYMAN_GOLDEN_REFUSALS"):
        Path(path).write_text("".join(f"{line}\n" for line in sorted(seen)))


@pytest.fixture(scope="session")
def refused(refusal_of):
    """Make a call that must fail; return its Refusal."""

    def call(rpc, request, **options):
        def make():
            answer = rpc(request, **{"timeout": 10, **options})
            if hasattr(answer, "__next__"):
                next(answer)

        with pytest.raises(grpc.RpcError) as caught:
            make()
        return refusal_of(caught.value)

    return call


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One service for all tests of a module, with the model "en-de"."""
    service = LoopbackService(tmp_path_factory.mktemp("service"))
    service.import_model("en-de")
    yield service
    service.close()


@pytest.fixture(scope="session")
def eventually():
    """Wait until the condition holds: what the server does after its caller has the answer, or is gone."""

    def wait(condition, timeout_s=10):
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "it did not happen"
            time.sleep(0.005)

    return wait


@pytest.fixture
def make_service(tmp_path):
    """A maker of services of a test's own; they are stopped at its end."""
    services = []

    def make(**options):
        services.append(LoopbackService(tmp_path / str(len(services)), **options))
        return services[-1]

    yield make
    for service in services:
        service.close()
