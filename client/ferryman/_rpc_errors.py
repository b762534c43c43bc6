"""gRPC errors to the SDK's tree, and back (for the fake server of `ferryman.testing`)."""

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
"""In the initial metadata of a stream whose configuration the server has accepted."""
_STATUS_FORGOTTEN: Final = "Internal error from Core"
"""What grpc.aio says when it could not send: the status that the server ended the call with is lost by then."""
_STATUS_LOST: Final = "the server ended the call while a message was on its way to it"
_BROKEN_OFF: Final = (
    (grpc.StatusCode.INTERNAL, "RST_STREAM"),
    (grpc.StatusCode.UNKNOWN, "Stream removed"),
)
"""What gRPC says of a stream that was broken off without a status. A proxy that has passed on a stream's first message
can do nothing else when the server behind it is gone."""
_NOT_CONNECTED: Final = (
    "connections to all backends failing",
    "failed to connect to all addresses",
    "errors resolving",
)
"""What gRPC says of a call for which it has no connection."""
_CAUSES: Final = (
    ("connection refused", "connection refused"),
    ("errors resolving", "the name has no address"),
    ("http1.x server", "a web server is there, which does not speak gRPC"),
    ("handshake", "the TLS handshake failed"),
    ("no such file", "there is no such socket"),
    ("timed out", "the connection timed out"),
    ("timeout", "the connection timed out"),
    ("unreachable", "the network does not reach it"),
    ("proxy", "the proxy of http_proxy or https_proxy does not let it through"),
)
_TOO_LARGE: Final = "message larger than max"
_DETAILS_KEY: Final = "grpc-status-details-bin"
REQUEST_ID_KEY: Final = "x-request-id"
"""In the trailing metadata of every call that the service has answered."""


def error_from_rpc(error: Any, target: str = "") -> FerrymanError:  # noqa: ANN401 (grpc.RpcError is a Call only by convention)
    """Return the error that a failed call to the target stands for; `error` is a grpc.Call or a grpc.aio.AioRpcError.

    The metadata of one that has reached no server names the `target`, and the `cause` in a few words.
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
    # Another domain's reason says nothing here: a proxy may have answered.
    reason = info.reason if info.domain == ERROR_DOMAIN else ""
    if not reason and any(code is broken and words in message for broken, words in _BROKEN_OFF):
        code, message = grpc.StatusCode.UNAVAILABLE, f"the connection to the server broke: {message}"
    metadata = dict(info.metadata)
    if not reason:
        message, found = _own_words(code, message, target)
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
    """Whether the server gave another status than this error's, which the asynchronous gRPC library has dropped."""
    return error.message == _STATUS_LOST


def unreachable_text(target: str, cause: str, cure: str) -> str:
    """Return what to tell a caller whose call has reached no server."""
    return f"no service answers at {target} ({cause}): start one with `ferryman-service serve`, or {cure}"


def _own_words(code: grpc.StatusCode, message: str, target: str) -> tuple[str, dict[str, str]]:
    """Return message and metadata for what gRPC itself says, which speaks of its insides."""
    if code is grpc.StatusCode.UNAVAILABLE and any(words in message for words in _NOT_CONNECTED):
        cause = next((text for words, text in _CAUSES if words in message.lower()), "no connection")
        where = target or "the target"
        text = unreachable_text(where, cause, "give the client the address of a running one, HOST:PORT")
        return text, {"target": where, "cause": cause}
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and target:
        return f"{target} has not ended the call before its deadline: is a service there, or give it more time", {}
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in message:
        return f"{message}: send less in one call, such as fewer sentences", {}
    return message, {}


def status_from_error(error: FerrymanError) -> Status:
    """Return the status that `error_from_rpc` reads."""
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
                return []  # the code and the message are still worth having
    return []


def _violation(item: BadRequest.FieldViolation) -> Violation:
    return Violation(field=item.field, description=item.description, reason=item.reason or "INVALID_VALUE")


def _add(status: Status, detail: ErrorInfo | BadRequest | RetryInfo) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)
