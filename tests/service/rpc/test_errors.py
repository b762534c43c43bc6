"""The error table knows the whole tree, and every status fits the header it travels in."""

import base64
import re
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2

from ferryman_service.domain import errors
from ferryman_service.rpc.errors import internal_status, status_code, to_status

HEADER_LIMIT_BYTES = 8192


def descendants(error):
    for child in error.__subclasses__():
        yield child
        yield from descendants(child)


WIRE_ERRORS = [error for error in descendants(errors.FerrymanError) if error is not errors.AttemptFenced]


def make(error, text="what happened"):
    if issubclass(error, errors.InvalidArgument):
        return error([errors.Violation(field="field", description=text)])
    return error(text, name=text)


def unpack(status):
    kinds = (
        details_pb2.ErrorInfo,
        details_pb2.BadRequest,
        details_pb2.ResourceInfo,
        details_pb2.QuotaFailure,
        details_pb2.RetryInfo,
    )
    return {
        kind.__name__: kind.FromString(packed.value)
        for packed in status.details
        for kind in kinds
        if packed.Is(kind.DESCRIPTOR)
    }


def trailer_bytes(status):
    """What the status costs in trailers, at the worst."""
    encoded = base64.b64encode(status.SerializeToString())
    return len(quote(status.message)) + len(encoded) + len("grpc-messagegrpc-status-details-bin") + 3 * 32


@pytest.mark.parametrize("error", WIRE_ERRORS)
def test_every_error_has_a_status_and_a_reason(error):
    status = to_status(make(error))
    assert status.code == status_code(make(error)).value[0]
    assert status_code(make(error)) is not grpc.StatusCode.INTERNAL
    info = unpack(status)["ErrorInfo"]
    assert info.domain == "ferryman.v1"
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", info.reason)
    assert len(info.reason) <= 63


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (errors.InvalidRecipe, grpc.StatusCode.INVALID_ARGUMENT, {"BadRequest"}),
        (errors.RunNotFound, grpc.StatusCode.NOT_FOUND, {"ResourceInfo"}),
        (errors.RequestIdReused, grpc.StatusCode.ALREADY_EXISTS, set()),
        (errors.RoleNotServed, grpc.StatusCode.FAILED_PRECONDITION, set()),
        (errors.SequenceOutOfRange, grpc.StatusCode.OUT_OF_RANGE, set()),
        (errors.DiskFull, grpc.StatusCode.RESOURCE_EXHAUSTED, {"QuotaFailure"}),
        (errors.TooManyRuns, grpc.StatusCode.RESOURCE_EXHAUSTED, {"QuotaFailure", "RetryInfo"}),
        (errors.QueueFull, grpc.StatusCode.RESOURCE_EXHAUSTED, {"QuotaFailure", "RetryInfo"}),
        (errors.DatabaseDamaged, grpc.StatusCode.DATA_LOSS, set()),
        (errors.StoreUnavailable, grpc.StatusCode.UNAVAILABLE, {"RetryInfo"}),
        (errors.ServerShuttingDown, grpc.StatusCode.UNAVAILABLE, {"RetryInfo"}),
        (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, set()),
        (errors.Cancelled, grpc.StatusCode.CANCELLED, set()),
        (errors.ModelDamaged, grpc.StatusCode.DATA_LOSS, set()),
    ],
)
def test_the_details_fit_the_class(error, code, details):
    assert status_code(make(error)) is code
    assert set(unpack(to_status(make(error)))) == {"ErrorInfo", *details}


def test_a_full_queue_says_when_to_come_again():
    details = unpack(to_status(errors.QueueFull("full", retry_delay_s=1.25)))
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1250


def test_an_error_that_must_not_leave_the_worker_is_ours():
    assert status_code(errors.AttemptFenced("stop")) is grpc.StatusCode.INTERNAL


def test_an_internal_error_says_nothing_but_that():
    status = internal_status()
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert unpack(status)["ErrorInfo"].reason == "INTERNAL"


def test_all_violations_that_fit_are_told():
    wanted = [errors.Violation(field=f"f{i}", description=f"is {i}", reason="OUT_OF_RANGE") for i in range(20)]
    bad = unpack(to_status(errors.InvalidRecipe(wanted)))["BadRequest"]
    told = [
        errors.Violation(field=violation.field, description=violation.description, reason=violation.reason)
        for violation in bad.field_violations
    ]
    assert told == wanted
    assert "violations_total" not in unpack(to_status(errors.InvalidRecipe(wanted)))["ErrorInfo"].metadata


@pytest.mark.parametrize("text", ["x" * 100_000, "\N{DOG FACE}" * 50_000, "%" * 1000, "\udcff" * 1000])
def test_no_status_is_too_large_for_a_header(text):
    for error in WIRE_ERRORS:
        assert trailer_bytes(to_status(make(error, text))) < HEADER_LIMIT_BYTES, error


@pytest.mark.parametrize("text", ["short", "\N{DOG FACE}" * 500])
def test_a_cut_list_says_how_long_it_was(text):
    wanted = [errors.Violation(field=f"sentences[{i}]", description=text, reason="R") for i in range(1000)]
    status = to_status(errors.InvalidSentence(wanted))
    assert trailer_bytes(status) < HEADER_LIMIT_BYTES
    found = unpack(status)
    shown = len(found["BadRequest"].field_violations)
    assert shown == 20 if text == "short" else 1 <= shown < 20
    assert found["ErrorInfo"].metadata == {"violations_total": "1000", "violations_shown": str(shown)}
    assert status.message.startswith("1,000 violations, the first: sentences[0]: ")
