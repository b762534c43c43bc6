from __future__ import annotations

import re

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from ferryman import AsyncClient, errors
from ferryman._rpc_errors import error_from_rpc
from ferryman_service.domain import errors as domain


def descendants(root: type) -> list[type]:
    return [cls for child in root.__subclasses__() for cls in (child, *descendants(child))]


def upper_snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()


def status_code(cls: type) -> grpc.StatusCode:
    """The middle classes of the domain's tree are named as the status codes."""
    middle = cls.__mro__[cls.__mro__.index(domain.FerrymanError) - 1]
    return grpc.StatusCode[upper_snake(middle.__name__)]


CALLERS_ERRORS = [cls for cls in descendants(domain.FerrymanError) if cls is not domain.AttemptFenced]


@pytest.mark.parametrize("domain_class", CALLERS_ERRORS, ids=lambda cls: cls.__name__)
def test_every_domain_error_raises_its_namesake(fake, client, domain_class):
    if issubclass(domain_class, domain.InvalidArgument):
        error = domain_class([domain.Violation(field="a[1].b", description="is 3", reason="TOO_ODD")])
    else:
        error = domain_class("what happened", id="x", limit=3)
    violations = [
        errors.Violation(field=v.field, description=v.description, reason=v.reason)
        for v in getattr(error, "violations", ())
    ]
    sent = errors.FerrymanError(
        error.message,
        reason=error.reason,
        metadata=error.metadata,
        violations=violations,
        code=status_code(domain_class),
    )
    fake.fail_next("GetCorpus", sent, times=4)
    with pytest.raises(errors.FerrymanError) as caught:
        client.get_corpus("x")
    received = caught.value
    assert type(received).__name__ == domain_class.__name__
    in_tree = [cls.__name__ for cls in type(received).__mro__ if cls is not ValueError]
    assert in_tree == [cls.__name__ for cls in domain_class.__mro__]
    assert isinstance(received, ValueError) == isinstance(received, errors.InvalidArgument)
    assert (received.message, received.reason, received.code) == (error.message, error.reason, sent.code)
    assert received.metadata == error.metadata
    assert received.violations == tuple(violations)


FOUND_BY_THE_CLIENT = {"ClientClosed", "UnknownOption"}


def test_error_tree_matches_domain():
    names = {cls.__name__ for cls in descendants(errors.FerrymanError)}
    assert names - FOUND_BY_THE_CLIENT == {cls.__name__ for cls in CALLERS_ERRORS}


def test_str_lists_all_violations():
    violations = [errors.Violation(field=f"f[{i}]", description=f"is {i}") for i in range(3)]
    assert str(errors.InvalidRecipe("f[0]: is 0 (and 2 more)", violations=violations)) == (
        "3 violations:\n  f[0]: is 0\n  f[1]: is 1\n  f[2]: is 2"
    )
    assert str(errors.InvalidRecipe("f[0]: is 0", violations=violations[:1])) == "f[0]: is 0"


def test_truncated_violations_show_exact_total():
    violations = [errors.Violation(field=f"f[{i}]", description=f"is {i}") for i in range(20)]
    cut = errors.InvalidRecipe("1,024 violations", violations=violations, metadata={"violations_total": "1024"})
    assert (cut.violations_total, len(cut.violations)) == (1024, 20)
    assert str(cut).startswith("1,024 violations, the first 20:\n  f[0]: is 0\n  f[1]: is 1\n")
    assert errors.InvalidRecipe("x", violations=violations).violations_total == 20


class FailedCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: bytes | None) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "a message"

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...] | None:
        return None if self._details is None else (("grpc-status-details-bin", self._details),)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgument),
        (grpc.StatusCode.UNIMPLEMENTED, errors.FerrymanError),
        (grpc.StatusCode.INTERNAL, errors.FerrymanError),
    ],
)
@pytest.mark.parametrize("details", [None, b"\xff not a status"])
def test_status_code_selects_class_without_reason(code, expected, details):
    error = error_from_rpc(FailedCall(code, details))
    assert type(error) is expected
    assert (error.code, str(error)) == (code, "a message")


def with_info(info: ErrorInfo) -> bytes:
    packed = Any()
    packed.Pack(info)
    return Status(details=[packed]).SerializeToString()


@pytest.mark.parametrize("given", ["page-7/3:a", ""])
async def test_error_has_request_id(fake, client, given):
    sent = errors.QueueFull("full", request_id=given)
    fake.fail_next("GetCorpus", sent, times=2)
    with pytest.raises(errors.QueueFull) as caught:
        client.get_corpus("x")
    assert caught.value.request_id == given
    async with AsyncClient(fake.target) as async_client:
        with pytest.raises(errors.QueueFull) as caught:
            await async_client.get_corpus("x")
    assert caught.value.request_id == given


def test_unanswered_call_has_no_request_id():
    assert error_from_rpc(FailedCall(grpc.StatusCode.UNAVAILABLE, None)).request_id == ""


def test_unknown_reason_raises_class_of_its_code():
    error = error_from_rpc(
        FailedCall(grpc.StatusCode.NOT_FOUND, with_info(ErrorInfo(reason="BERTH_NOT_FOUND", domain="ferryman.v1")))
    )
    assert type(error) is errors.NotFound
    assert error.reason == "BERTH_NOT_FOUND"


def test_reason_of_another_domain_is_ignored():
    error = error_from_rpc(
        FailedCall(grpc.StatusCode.UNAVAILABLE, with_info(ErrorInfo(reason="RUN_NOT_FOUND", domain="proxy.example")))
    )
    assert type(error) is errors.Unavailable


class BrokenOff(FailedCall):
    def __init__(self, code: grpc.StatusCode, words: str, details: bytes | None = None) -> None:
        super().__init__(code, details)
        self._words = words

    def details(self) -> str:
        return self._words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.UNKNOWN, "Stream removed"),
        (grpc.StatusCode.UNKNOWN, "Stream removed (GOAWAY received)"),
    ],
)
def test_broken_stream_is_unavailable_but_server_error_is_not(code, words):
    error = error_from_rpc(BrokenOff(code, words))
    assert (type(error), error.code) == (errors.Unavailable, grpc.StatusCode.UNAVAILABLE)
    bug = with_info(ErrorInfo(reason="INTERNAL", domain="ferryman.v1"))
    assert type(error_from_rpc(BrokenOff(code, words, bug))) is errors.FerrymanError


def test_error_has_retry_delay_of_server(fake, client):
    fake.add_model("m")
    fake.fail_next("Translate", errors.QueueFull("full", retry_delay_s=1.25))
    with pytest.raises(errors.QueueFull) as caught:
        client.translate("m", "x")
    assert caught.value.retry_delay_s == 1.25
    fake.fail_next("Translate", errors.ModelTooLarge("large"))
    with pytest.raises(errors.ModelTooLarge) as caught:
        client.translate("m", "x")
    assert caught.value.retry_delay_s is None
