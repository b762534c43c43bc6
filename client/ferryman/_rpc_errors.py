"""Converts gRPC errors to the SDK's errors, and back for the fake server of `ferryman.testing`."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from ferryman.errors import FerrymanError, Violation, error_class

ERROR_DOMAIN: Final = "ferryman.v1"
ACCEPTED_KEY: Final = "ferryman-model"
"""Key in the initial metadata of an accepted stream; its value is the model version, "name/7"."""
_STATUS_FORGOTTEN: Final = "Internal error from Core"
"""The message of grpc.aio when sending failed; the server's own status is lost by then."""
_STATUS_LOST: Final = "the server ended the call while the client was sending a message"
_BROKEN_OFF: Final = (
    (grpc.StatusCode.INTERNAL, "RST_STREAM"),
    (grpc.StatusCode.UNKNOWN, "Stream removed"),
)
"""Code and text of gRPC for a stream that broke without a status. A proxy that has forwarded the first message of a
stream reports the death of its server this way."""
_NOT_CONNECTED: Final = (
    "connections to all backends failing",
    "failed to connect to all addresses",
    "errors resolving",
)
"""Texts of gRPC for a call without a connection."""
_CAUSES: Final = (
    ("connection refused", "connection refused"),
    ("errors resolving", "the host name does not resolve"),
    ("http1.x server", "the server speaks HTTP/1, not gRPC"),
    ("handshake", "the TLS handshake failed"),
    ("no such file", "no such socket"),
    ("timed out", "the connection timed out"),
    ("timeout", "the connection timed out"),
    ("unreachable", "network unreachable"),
    ("proxy", "the proxy in http_proxy or https_proxy refused the connection"),
)
_TOO_LARGE: Final = "message larger than max"
_DETAILS_KEY: Final = "grpc-status-details-bin"
REQUEST_ID_KEY: Final = "x-request-id"
"""Key in the trailing metadata of every call that the service answered."""


def error_from_rpc(error: Any, target: str = "") -> FerrymanError:  # noqa: ANN401 (grpc.RpcError is a Call only by convention)
    """Return the SDK's error for a failed call to the target; `error` is a grpc.Call or a grpc.aio.AioRpcError.

    If the call reached no server, the metadata holds `target` and a short `cause`.
    """
    code: grpc.StatusCode = error.code()
    message = error.details() or code.name
    if code is grpc.StatusCode.INTERNAL and message == _STATUS_FORGOTTEN:
        code, message = grpc.StatusCode.UNAVAILABLE, _STATUS_LOST
    info, violations, retry_delay_s = ErrorInfo(), [], None
    for detail in _details(error):
        if detail.Is(ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(BadRequest.DESCRIPTOR):
            bad_request = BadRequest()
            detail.Unpack(bad_request)
            violations = [_violation(item) for item in bad_request.field_violations]
        elif detail.Is(RetryInfo.DESCRIPTOR):
            retry = RetryInfo()
            detail.Unpack(retry)
            retry_delay_s = retry.retry_delay.ToNanoseconds() / 1e9
    # Ignore the reason of another domain: a proxy may have answered.
    reason = info.reason if info.domain == ERROR_DOMAIN else ""
    if not reason and any(code is broken and words in message for broken, words in _BROKEN_OFF):
        code, message = grpc.StatusCode.UNAVAILABLE, f"the connection to the server broke: {message}"
    metadata = dict(info.metadata)
    if not reason:
        message, found = _explained(code, message, target)
        metadata |= found
    return error_class(reason, code)(
        message,
        reason=reason or None,
        metadata=metadata,
        violations=violations,
        code=code,
        retry_delay_s=retry_delay_s,
        request_id=str(dict(error.trailing_metadata() or ()).get(REQUEST_ID_KEY, "")),
    )


def has_lost_status(error: FerrymanError) -> bool:
    """Whether grpc.aio dropped the status that the server sent."""
    return error.message == _STATUS_LOST


def unreachable_text(target: str, cause: str, cure: str) -> str:
    """Return the error message for a call that reached no server; `cure` is an imperative clause."""
    return f"cannot reach a service at {target} ({cause}); start one with `ferryman-service serve`, or {cure}"


def _explained(code: grpc.StatusCode, message: str, target: str) -> tuple[str, dict[str, str]]:
    """Return a message and metadata in place of gRPC's own message, which describes its internals."""
    if code is grpc.StatusCode.UNAVAILABLE and any(words in message for words in _NOT_CONNECTED):
        cause = next((text for words, text in _CAUSES if words in message.lower()), "no connection")
        where = target or "the target"
        text = unreachable_text(where, cause, "pass the client the address of a running one, HOST:PORT")
        return text, {"target": where, "cause": cause}
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and target:
        return f"{target} did not answer before the deadline; check that a service runs there, or raise timeout_s", {}
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in message:
        return f"{message}; send less in one call, such as fewer sentences", {}
    return message, {}


def status_from_error(error: FerrymanError) -> Status:
    """The inverse of `error_from_rpc`."""
    status = Status(code=error.code.value[0], message=error.message)
    _add(status, ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata))
    if error.violations:
        violations = [
            BadRequest.FieldViolation(field=item.field, description=item.description, reason=item.reason)
            for item in error.violations
        ]
        _add(status, BadRequest(field_violations=violations))
    if error.retry_delay_s is not None:
        retry = RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        _add(status, retry)
    return status


def _details(error: Any) -> list[AnyMessage]:  # noqa: ANN401
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                return list(Status.FromString(value).details)
            except DecodeError:
                return []  # the code and the message are still useful
    return []


def _violation(item: BadRequest.FieldViolation) -> Violation:
    return Violation(field=item.field, description=item.description, reason=item.reason or "INVALID_VALUE")


def _add(status: Status, detail: ErrorInfo | BadRequest | RetryInfo) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)
