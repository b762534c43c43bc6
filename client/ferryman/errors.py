"""The errors that the SDK raises for a call. It never raises gRPC errors.

    FerrymanError
    ├── InvalidArgument          the request is invalid; `violations` says why. Also a ValueError
    │   ├── InvalidRequest
    │   │   └── UnknownOption    raised by the client: an unknown keyword argument. Also a TypeError
    │   ├── InvalidRecipe
    │   ├── InvalidCorpus
    │   └── InvalidSentence
    ├── NotFound
    │   ├── CorpusNotFound
    │   ├── RunNotFound
    │   └── ModelNotFound
    ├── AlreadyExists
    │   └── RequestIdReused
    ├── FailedPrecondition
    │   ├── ClientClosed         raised by the client: a call after `close`. Also a ValueError
    │   ├── IllegalTransition
    │   ├── RunNotFinished
    │   ├── RunStillNeeded
    │   ├── ModelHasNoWeights
    │   ├── ModelInUse
    │   ├── CorpusInUse
    │   ├── OptimizerNotKept
    │   └── RoleNotServed
    ├── OutOfRange
    │   └── SequenceOutOfRange
    ├── ResourceExhausted
    │   ├── AnswerTooLarge
    │   ├── AnswersUnread
    │   ├── CorpusTooLarge
    │   ├── DiskFull
    │   ├── MessageTooLarge
    │   ├── ModelTooLarge
    │   ├── QueueFull
    │   ├── TooManyAliases
    │   ├── TooManyCalls
    │   └── TooManyRuns
    ├── Unavailable              also if the server cannot be reached
    │   ├── StoreUnavailable
    │   ├── TooManyOpenFiles
    │   └── ServerShuttingDown
    ├── DeadlineExceeded
    │   └── MessageOverdue
    ├── Cancelled
    └── DataLoss
        ├── DatabaseDamaged
        ├── ModelDamaged
        └── RowUnreadable

The classes directly below the root stand for status codes, the leaves for reasons. A reason that this client does not
know raises the class of its status code; a code without a class raises FerrymanError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import grpc


@dataclass(frozen=True, kw_only=True)
class Violation:
    """An invalid field of a request; `field` is a path such as "recipe.model.heads" or "sentences[3]"."""

    field: str
    description: str
    reason: str = "INVALID_VALUE"


class FerrymanError(Exception):
    """The base class of all errors.

    `message` is for people; `reason` is a stable UPPER_SNAKE_CASE identifier for programs, by default from the class's
    name; `metadata` holds the variable parts of the message; `violations` is set only for InvalidArgument; `code` is
    the gRPC status; `retry_delay_s` is the delay that the server suggests before a retry, or None; `request_id`
    identifies the call in the server's log, and is empty if no server answered.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        code: grpc.StatusCode | None = None,
        retry_delay_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or reason_of(type(self))
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.code = code or self.default_code
        self.retry_delay_s = retry_delay_s
        self.request_id = request_id


class InvalidArgument(FerrymanError, ValueError):
    """The request is invalid; repeating it cannot succeed. `str` lists the violations.

    `violations` holds all violations that the client found, or the first 20 of the server's, fewer if they are long.
    `violations_total` counts all.
    """

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    @property
    def violations_total(self) -> int:
        """The number of all violations; `violations` may hold fewer."""
        total = self.metadata.get("violations_total", "")
        return max(int(total) if total.isdecimal() else 0, len(self.violations))

    def __str__(self) -> str:
        return self.format_with(lambda field: field)

    def format_with(self, name_of: Callable[[str], str]) -> str:
        """Return the message with fields renamed by `name_of`, for example to the options of a command line."""
        lines = [f"{name_of(violation.field)}: {violation.description}" for violation in self.violations]
        if self.violations_total < 2:
            return lines[0] if lines else self.message
        cut = "" if len(lines) == self.violations_total else f", the first {len(lines)}"
        return "\n  ".join([f"{self.violations_total:,} violations{cut}:", *lines])


class InvalidRequest(InvalidArgument):
    """A field of the request is missing, malformed or out of range."""


class UnknownOption(InvalidRequest, TypeError):
    """A keyword argument is not an option of the method. The client raises it, not the server."""


class InvalidRecipe(InvalidArgument):
    """A recipe has values that are out of range or conflict."""


class InvalidCorpus(InvalidArgument):
    """The text of a corpus is empty, misaligned or not UTF-8, or has a line over the limit."""


class InvalidSentence(InvalidArgument):
    """A sentence is too long or has control characters."""


class NotFound(FerrymanError):
    """A resource that the request names does not exist."""

    default_code = grpc.StatusCode.NOT_FOUND


class CorpusNotFound(NotFound):
    """The corpus does not exist."""


class RunNotFound(NotFound):
    """The training run does not exist."""


class ModelNotFound(NotFound):
    """The model does not exist, or it has no such version or alias."""


class AlreadyExists(FerrymanError):
    """The resource that the request would create exists already."""

    default_code = grpc.StatusCode.ALREADY_EXISTS


class RequestIdReused(AlreadyExists):
    """The request_id was used before with other arguments."""


class FailedPrecondition(FerrymanError):
    """The state of the server does not allow the request."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class ClientClosed(FailedPrecondition, ValueError):
    """The client was used after `close`. The client raises it, not the server."""


class IllegalTransition(FailedPrecondition):
    """The state of the run does not allow the transition."""


class RunNotFinished(FailedPrecondition):
    """A run that is not terminal cannot be deleted."""


class RunStillNeeded(FailedPrecondition):
    """Another run, with keep_optimizer, still needs the optimizer state in this run's checkpoints."""


class ModelHasNoWeights(FailedPrecondition):
    """The model was published without the weights that fine-tuning needs."""


class ModelInUse(FailedPrecondition):
    """The version cannot be deleted: an alias points at it, or an unfinished run starts from it."""


class CorpusInUse(FailedPrecondition):
    """The corpus cannot be deleted: unfinished runs train on it."""


class OptimizerNotKept(FailedPrecondition):
    """The checkpoints of the run that trained the model are gone, and its optimizer state with them."""


class RoleNotServed(FailedPrecondition):
    """The server was started without the role that the request needs."""


class OutOfRange(FerrymanError):
    """A position is beyond the end."""

    default_code = grpc.StatusCode.OUT_OF_RANGE


class SequenceOutOfRange(OutOfRange):
    """The run has not reached the sequence number."""


class ResourceExhausted(FerrymanError):
    """A limit of the server is reached."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class AnswerTooLarge(ResourceExhausted):
    """The response exceeds the maximum message size; request less in one call."""


class AnswersUnread(ResourceExhausted):
    """Too many bytes of responses are unread by clients, on this connection or on all."""


class CorpusTooLarge(ResourceExhausted):
    """The corpus exceeds the operator's limit."""


class DiskFull(ResourceExhausted):
    """The server's disk is full, or has less free space than the operator reserves for runs in progress."""


class MessageTooLarge(ResourceExhausted):
    """A message of an upload exceeds the maximum size."""


class ModelTooLarge(ResourceExhausted):
    """The model alone needs more memory than the operator allows for all models."""


class QueueFull(ResourceExhausted):
    """The translation queue is full; retry after `retry_delay_s`."""


class TooManyCalls(ResourceExhausted):
    """Too many calls of this kind are in flight; retry after `retry_delay_s`."""


class TooManyRuns(ResourceExhausted):
    """The number of queued or unfinished runs has reached the operator's limit."""


class TooManyAliases(ResourceExhausted):
    """The model has reached the maximum number of aliases."""


class Unavailable(FerrymanError):
    """The server is unavailable; retry later."""

    default_code = grpc.StatusCode.UNAVAILABLE


class StoreUnavailable(Unavailable):
    """The server's database cannot be reached or is locked."""


class TooManyOpenFiles(Unavailable):
    """The server has reached, or nearly reached, its limit of open files."""


class ServerShuttingDown(Unavailable):
    """The server is shutting down; retry on another server, or after its restart."""


class DeadlineExceeded(FerrymanError):
    """The call's deadline has passed."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class MessageOverdue(DeadlineExceeded):
    """The client did not send the next message of the call in time."""


class Cancelled(FerrymanError):
    """The call was cancelled."""

    default_code = grpc.StatusCode.CANCELLED


class DataLoss(FerrymanError):
    """Stored data is damaged."""

    default_code = grpc.StatusCode.DATA_LOSS


class DatabaseDamaged(DataLoss):
    """The server's database is damaged; its operator must restore or rebuild it."""


class ModelDamaged(DataLoss):
    """A file of a published model is missing or corrupt, on the server or after a download."""


class RowUnreadable(DataLoss):
    """The server cannot read its database entry of a run, a corpus or a model version; delete it."""


def reason_of(error: type[FerrymanError]) -> str:
    """Return the reason of the class: its name in UPPER_SNAKE_CASE."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", error.__name__).upper()


def error_class(reason: str, code: grpc.StatusCode) -> type[FerrymanError]:
    """Return the class of the reason, else the class of the status code, else FerrymanError."""
    return _BY_REASON.get(reason) or _BY_CODE.get(code, FerrymanError)


def _descendants(root: type[FerrymanError]) -> Iterator[type[FerrymanError]]:
    for child in root.__subclasses__():
        yield child
        yield from _descendants(child)


# Built once at import, so that a subclass defined by a user never handles a reason.
_BY_REASON: Final = {reason_of(error): error for error in _descendants(FerrymanError)}
_BY_CODE: Final = {error.default_code: error for error in FerrymanError.__subclasses__()}
