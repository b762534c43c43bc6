"""Checks of arguments that are not fields of a request, shared by both clients.

A bad argument raises InvalidRequest, which names the argument, its value and the accepted values. Fields of requests
are checked in `ferryman._mapping` and `ferryman._convert`.
"""

from __future__ import annotations

import ipaddress
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard

import grpc

from ferryman._mapping import is_iterable, wrong
from ferryman.errors import ClientClosed, InvalidArgument, InvalidRequest, Violation

LARGEST_REQUEST_BYTES: Final = 4 * 1024 * 1024
"""The largest message that the service accepts."""
LARGEST_UPLOAD_REQUEST_BYTES: Final = 1024 * 1024
"""The largest message of an upload that the service accepts."""
LONGEST_TIMEOUT_S: Final = 1e9
"""About 31 years. gRPC stores a deadline as 64-bit nanoseconds since 1970; a later one overflows into the past."""

_GRPC_SCHEMES: Final = (
    *("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds"),
    *("google-c2p", "google-c2p-experimental"),
)
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HOST_AND_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^][/:,\s]+)(?::([A-Za-z0-9-]+))?")
_DEFAULT_PORT: Final = 50051


def raise_any(violations: Sequence[Violation], error: type[InvalidArgument] = InvalidRequest) -> None:
    """Raise `error` with the violations; do nothing if there are none."""
    if violations:
        first = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        raise error(f"{first.field}: {first.description}{more}", violations=violations)


def check_connection(
    target: object,
    credentials: object,
    timeout_s: object,
    options: Any,  # noqa: ANN401 (it is what is checked)
) -> list[tuple[str, Any]]:
    """Check the arguments of a client and return its channel options. Raises InvalidRequest with every violation."""
    violations = [*_target_violations(target, has_credentials=credentials is not None)]
    if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
        violations.append(
            wrong("credentials", credentials, "None or channel credentials, such as grpc.ssl_channel_credentials()")
        )
    violations += _timeout_violations(timeout_s)
    is_many = is_iterable(options) and not isinstance(options, str | bytes | Mapping)
    pairs = list(options) if is_many else []  # read once: it may be a generator
    if not is_many or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        violations.append(wrong("options", options, 'a list of pairs, such as [("grpc.keepalive_time_ms", 60_000)]'))
    raise_any(violations)
    return [(name, value) for name, value in pairs]


def check_open(*, is_closed: bool) -> None:
    if is_closed:
        raise ClientClosed("the client is closed; create a new one, or make the call inside the `with` block")


def checked_timeout_s(timeout_s: float) -> float:
    """Return the deadline as a float. Raises InvalidRequest if it is not a number or out of range."""
    raise_any(_timeout_violations(timeout_s))
    return float(timeout_s)


def checked_reconnect_timeout_s(timeout_s: float) -> float:
    """Return the timeout as a float: inf retries permanently, 0 not at all. Raises InvalidRequest."""
    if not _is_number(timeout_s) or not timeout_s >= 0:
        raise_any([wrong("reconnect_timeout_s", timeout_s, "a number of seconds, at least 0")])
    return float(timeout_s)


def check_callback(on_record: object) -> None:
    if on_record is not None and not callable(on_record):
        raise_any([wrong("on_record", on_record, "None or a function of one record")])


def check_folder(folder: object) -> None:
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise_any([wrong("folder", folder, "the path of a folder that does not exist yet")])


def check_sentences(sentences: object, *, may_be_async: bool) -> None:
    if isinstance(sentences, str | bytes | Mapping):
        raise_any([wrong("sentences", sentences, "an iterable of sentences; pass [sentence], or call translate")])
    if not is_iterable(sentences) and not (may_be_async and hasattr(sentences, "__aiter__")):
        raise_any([wrong("sentences", sentences, "an iterable of sentences")])


def is_loopback(target: str) -> bool:
    """Whether every address of the target is a loopback address, which a proxy cannot reach."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = re.sub(r"^dns:(//[^/]*/)?|^ipv[46]:", "", target).split(",")
    hosts = [match[1].strip("[]") for address in addresses if (match := _HOST_AND_PORT.fullmatch(address))]
    return len(hosts) == len(addresses) and all(map(_is_loopback_host, hosts))


def _is_loopback_host(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _timeout_violations(timeout_s: object) -> Sequence[Violation]:
    if _is_number(timeout_s) and 0 < timeout_s <= LONGEST_TIMEOUT_S:
        return ()
    return [wrong("timeout_s", timeout_s, f"a number of seconds over 0 and at most {LONGEST_TIMEOUT_S:,.0f}")]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _target_violations(target: object, *, has_credentials: bool) -> Sequence[Violation]:
    form = f"HOST:PORT, such as localhost:{_DEFAULT_PORT}"
    if not isinstance(target, str) or not target.strip():
        return [wrong("target", target, form)]
    url = _URL.fullmatch(target)
    if url and url[1].lower() not in _GRPC_SCHEMES:
        return [wrong("target", target, f"HOST:PORT, without {url[1]}://{_suggestion(url[2].partition('/')[0])}")]
    if target.startswith(tuple(f"{scheme}:" for scheme in _GRPC_SCHEMES)):
        return ()
    match = _HOST_AND_PORT.fullmatch(target)
    if match is None:
        return [wrong("target", target, form)]
    port = match[2]
    if port is None and not has_credentials:
        return [wrong("target", target, f"HOST:PORT{_suggestion(target)}")]
    if port is not None and port.isdigit() and not 1 <= int(port) <= 65_535:
        return [wrong("target", target, "HOST:PORT, with a port from 1 to 65,535")]
    return ()


def _suggestion(address: str) -> str:
    """Return the end of the message that suggests HOST:PORT; empty if the address has no host."""
    match = _HOST_AND_PORT.fullmatch(address)
    return "" if match is None else f"; write {match[1]}:{match[2] or _DEFAULT_PORT}"
