"""Checks of arguments that no request holds, written once for both clients.

A mistake becomes an InvalidRequest that names the argument, its value and what to write instead. What a request holds
is checked where the request is made: `ferryman._mapping`, `ferryman._convert`.
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
"""What the service takes as one message."""
LARGEST_UPLOAD_REQUEST_BYTES: Final = 1024 * 1024
"""What the service takes as one message of an upload."""
LONGEST_TIMEOUT_S: Final = 1e9
"""About 31 years. gRPC counts nanoseconds since 1970 in 64 bits, and takes a later deadline for one that has passed."""

_GRPC_SCHEMES: Final = (
    *("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds"),
    *("google-c2p", "google-c2p-experimental"),
)
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HOST_AND_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^][/:,\s]+)(?::([A-Za-z0-9-]+))?")
_DEFAULT_PORT: Final = 50051


def raise_any(violations: Sequence[Violation], error: type[InvalidArgument] = InvalidRequest) -> None:
    """Raise the error with the violations, if there are any."""
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
    """Check the arguments of a client; return its options. Raises InvalidRequest with every violation."""
    violations = [*_target_violations(target, has_credentials=credentials is not None)]
    if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
        violations.append(wrong("credentials", credentials, "None or, such as, grpc.ssl_channel_credentials()"))
    violations += _timeout_violations(timeout_s)
    is_many = is_iterable(options) and not isinstance(options, str | bytes | Mapping)
    pairs = list(options) if is_many else []  # once: they may come from a generator
    if not is_many or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        violations.append(wrong("options", options, 'a list of pairs, such as [("grpc.keepalive_time_ms", 60_000)]'))
    raise_any(violations)
    return [(name, value) for name, value in pairs]


def check_open(*, is_closed: bool) -> None:
    """Raise ClientClosed if the client is closed."""
    if is_closed:
        raise ClientClosed("the client is closed: make a new one, or call inside its `with` block")


def checked_timeout_s(timeout_s: float) -> float:
    """Return the deadline of a call; raises InvalidRequest for one that gRPC cannot keep."""
    raise_any(_timeout_violations(timeout_s))
    return float(timeout_s)


def checked_reconnect_timeout_s(timeout_s: float) -> float:
    """Return for how long a server may be away, which may be for ever (inf) or not at all (0)."""
    if not _is_number(timeout_s) or not timeout_s >= 0:
        raise_any([wrong("reconnect_timeout_s", timeout_s, "a number of seconds, at least 0")])
    return float(timeout_s)


def check_callback(on_record: object) -> None:
    """Raise InvalidRequest for what is neither None nor a function."""
    if on_record is not None and not callable(on_record):
        raise_any([wrong("on_record", on_record, "None or a function of one record")])


def check_folder(folder: object) -> None:
    """Raise InvalidRequest for what is no path."""
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise_any([wrong("folder", folder, "the path of a folder that does not exist yet")])


def check_sentences(sentences: object, *, may_be_async: bool) -> None:
    """Raise InvalidRequest for what is no source of a stream's sentences."""
    if isinstance(sentences, str | bytes | Mapping):
        raise_any([wrong("sentences", sentences, "an iterable of sentences: write [sentence], or call translate")])
    if not is_iterable(sentences) and not (may_be_async and hasattr(sentences, "__aiter__")):
        raise_any([wrong("sentences", sentences, "an iterable of sentences")])


def is_loopback(target: str) -> bool:
    """Tell whether every address of the target is this machine's own, which no proxy can reach."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    rest = re.sub(r"^dns:(//[^/]*/)?|^ipv[46]:", "", target)
    hosts = [match[1].strip("[]") for part in rest.split(",") if (match := _HOST_AND_PORT.fullmatch(part))]
    return len(hosts) == len(rest.split(",")) and all(map(_is_own, hosts))


def _is_own(host: str) -> bool:
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
    wanted = f"over 0 and at most {LONGEST_TIMEOUT_S:,.0f}: it is the deadline of a call, in seconds"
    return [wrong("timeout_s", timeout_s, wanted)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _target_violations(target: object, *, has_credentials: bool) -> Sequence[Violation]:
    form = f"HOST:PORT, such as localhost:{_DEFAULT_PORT}"
    if not isinstance(target, str) or not target.strip():
        return [wrong("target", target, form)]
    url = _URL.fullmatch(target)
    if url and url[1].lower() not in _GRPC_SCHEMES:
        return [wrong("target", target, f"HOST:PORT, without {url[1]}://{_written(url[2].partition('/')[0])}")]
    if target.startswith(tuple(f"{scheme}:" for scheme in _GRPC_SCHEMES)):
        return ()
    match = _HOST_AND_PORT.fullmatch(target)
    if match is None:
        return [wrong("target", target, form)]
    port = match[2]
    if port is None and not has_credentials:
        return [wrong("target", target, f"HOST:PORT{_written(target)}")]
    if port is not None and port.isdigit() and not 1 <= int(port) <= 65_535:
        return [wrong("target", target, "HOST:PORT, with a port from 1 to 65,535")]
    return ()


def _written(place: str) -> str:
    """Return how a place is written as HOST:PORT, "" for what is none."""
    match = _HOST_AND_PORT.fullmatch(place)
    return "" if match is None else f": write {match[1]}:{match[2] or _DEFAULT_PORT}"
