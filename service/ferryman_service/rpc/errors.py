"""The one table from domain errors to gRPC statuses, and the google.rpc details that every error carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from ferryman_service.domain import errors

DOMAIN: Final = "ferryman.v1"
INTERNAL_REASON: Final = "INTERNAL"
_RETRY_S: Final = 5.0
# Message and details travel as HTTP/2 trailers, which many peers refuse above 8 KiB in all. In the worst case the
# message takes three times its size there (percent-encoding) and the details four thirds of theirs (base64).
_MAX_MESSAGE_BYTES: Final = 512
_MAX_METADATA_BYTES: Final = 256
_MAX_VIOLATIONS_BYTES: Final = 3584
_MAX_VIOLATIONS: Final = 20

STATUS_CODES: Final[Mapping[type[errors.FerrymanError], grpc.StatusCode]] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
}


def status_code(error: errors.FerrymanError) -> grpc.StatusCode:
    """Return the status of an error: that of its nearest ancestor in the table."""
    for ancestor in type(error).__mro__:
        if ancestor in STATUS_CODES:
            return STATUS_CODES[ancestor]
    return grpc.StatusCode.INTERNAL


def to_status(error: errors.FerrymanError) -> status_pb2.Status:
    """Return the google.rpc.Status of an error: ErrorInfo always, and the details that fit its class."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={key: _cut(value, _MAX_METADATA_BYTES) for key, value in error.metadata.items()},
    )
    text = _cut(error.message, _MAX_MESSAGE_BYTES)
    details: list[message.Message] = [info]
    match error:
        case errors.InvalidArgument():
            details.append(_bad_request(error, info))
        case errors.NotFound():
            resource = type(error).__name__.removesuffix("NotFound").lower()
            name = next(iter(error.metadata.values()), "")
            details.append(
                error_details_pb2.ResourceInfo(resource_type=resource, resource_name=_cut(name, _MAX_METADATA_BYTES))
            )
        case errors.ResourceExhausted():
            violation = error_details_pb2.QuotaFailure.Violation(subject=error.reason, description=text)
            details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    match error:
        case errors.Unavailable() | errors.TooManyRuns() | errors.TooManyCalls():
            details.append(_retry_info(_RETRY_S))
        case errors.QueueFull():
            details.append(_retry_info(error.retry_delay_s))
    return _status(status_code(error), text, details)


def internal_status() -> status_pb2.Status:
    """Return the status of a bug: it says nothing of our insides."""
    info = error_details_pb2.ErrorInfo(reason=INTERNAL_REASON, domain=DOMAIN)
    return _status(grpc.StatusCode.INTERNAL, "an internal error; the server's log tells more", [info])


def _retry_info(delay_s: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(delay_s * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _bad_request(error: errors.InvalidArgument, info: error_details_pb2.ErrorInfo) -> error_details_pb2.BadRequest:
    """Return the first 20 violations, or as many of them as fit; where some are left out, the ErrorInfo says how many
    there are and how many are shown."""
    details = error_details_pb2.BadRequest()
    for violation in error.violations[:_MAX_VIOLATIONS]:
        details.field_violations.add(
            field=_cut(violation.field, _MAX_METADATA_BYTES),
            description=_cut(violation.description, _MAX_MESSAGE_BYTES),
            reason=violation.reason,
        )
        if details.ByteSize() > _MAX_VIOLATIONS_BYTES:
            del details.field_violations[-1]
            break
    shown = len(details.field_violations)
    if shown < error.total:
        info.metadata["violations_total"] = str(error.total)
        info.metadata["violations_shown"] = str(shown)
    return details


def _status(code: grpc.StatusCode, text: str, details: list[message.Message]) -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=text)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _cut(text: str, max_bytes: int) -> str:
    """Return the text, or as much of its beginning as fits, with an ellipsis."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - 3].decode("utf-8", "ignore") + "…"
