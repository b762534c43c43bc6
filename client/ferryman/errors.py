"""The one tree of errors that the SDK raises for a call; a bare gRPC error never reaches you.

    FerrymanError
    ├── InvalidArgument          your mistake in the request; `violations` names what is wrong. Also a ValueError
    │   ├── InvalidRequest
    │   │   └── UnknownOption    made here: a keyword that is no option. Also a TypeError
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
    │   ├── ClientClosed         made here: a call after `close`. Also a ValueError
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
    ├── Unavailable              also: the server cannot be reached
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

The classes below the root stand for a status code, the leaves for a reason. A reason that this client does not know yet
becomes the class of its status code; a code that has no class becomes FerrymanError itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import grpc


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing that is wrong with a request: `field` is a path such as "recipe.model.heads" or "sentences[3]"."""

    field: str
    description: str
    reason: str = "INVALID_VALUE"


class FerrymanError(Exception):
    """The root.

    `message` is for people; `reason` is the stable UPPER_SNAKE_CASE name to tell cases apart, by default the class's
    own; `metadata` holds the dynamic parts of the message; `violations` is empty but for InvalidArgument; `code` is the
    status; `retry_delay_s` is when the server thinks that it is worth another try, None if it does not say;
    `request_id` is what the server's log calls the call, empty if no server has answered it.
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
    """The request is wrong, and will be however often it is sent. Printing it prints the violations.

    Violations that the client finds before it sends anything are all here. Of the server's, `violations` holds the
    first 20, fewer if they are long; `violations_total` counts them all.
    """

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    @property
    def violations_total(self) -> int:
        """How many violations there are; `violations` may hold fewer."""
        told = self.metadata.get("violations_total", "")
        return max(int(told) if told.isdecimal() else 0, len(self.violations))

    def __str__(self) -> str:
        return self.told_as(lambda field: field)

    def told_as(self, name_of: Callable[[str], str]) -> str:
        """Return the text, each field under the name that `name_of` gives it, such as an option of a command line."""
        lines = [f"{name_of(violation.field)}: {violation.description}" for violation in self.violations]
        if self.violations_total < 2:
            return lines[0] if lines else self.message
        rest = "" if len(lines) == self.violations_total else f", the first {len(lines)}"
        return "\n  ".join([f"{self.violations_total:,} violations{rest}:", *lines])


class InvalidRequest(InvalidArgument):
    """A field of the request is missing, malformed or out of range."""


class UnknownOption(InvalidRequest, TypeError):
    """A keyword argument is no option of the method. No server says so: the client finds it."""


class InvalidRecipe(InvalidArgument):
    """A recipe has values out of range or in conflict."""


class InvalidCorpus(InvalidArgument):
    """The text of a corpus is empty, misaligned, not UTF-8 or has a line over the limit."""


class InvalidSentence(InvalidArgument):
    """A sentence to translate is too long or holds control characters."""


class NotFound(FerrymanError):
    """What the request names does not exist."""

    default_code = grpc.StatusCode.NOT_FOUND


class CorpusNotFound(NotFound):
    """No such corpus."""


class RunNotFound(NotFound):
    """No such training run."""


class ModelNotFound(NotFound):
    """No such model, or no such version or alias of it."""


class AlreadyExists(FerrymanError):
    """What the request would create exists."""

    default_code = grpc.StatusCode.ALREADY_EXISTS


class RequestIdReused(AlreadyExists):
    """The request_id came before, with another body."""


class FailedPrecondition(FerrymanError):
    """The state of the system does not allow it."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class ClientClosed(FailedPrecondition, ValueError):
    """The client was used after `close`. No server says so: the client finds it."""


class IllegalTransition(FailedPrecondition):
    """The run's state does not allow it."""


class RunNotFinished(FailedPrecondition):
    """A run that has not ended cannot be deleted."""


class RunStillNeeded(FailedPrecondition):
    """A run with keep_optimizer will start with the optimizer in this run's checkpoints."""


class ModelHasNoWeights(FailedPrecondition):
    """The model was published without the weights that training could start from."""


class ModelInUse(FailedPrecondition):
    """An alias points at the version, or an unfinished run starts from it: it cannot be deleted."""


class CorpusInUse(FailedPrecondition):
    """Unfinished runs train on the corpus: it cannot be deleted."""


class OptimizerNotKept(FailedPrecondition):
    """The checkpoints of the run that made the model are gone, and with them Adam's moments."""


class RoleNotServed(FailedPrecondition):
    """The server was started without the role that the request needs."""


class OutOfRange(FerrymanError):
    """A position beyond the end."""

    default_code = grpc.StatusCode.OUT_OF_RANGE


class SequenceOutOfRange(OutOfRange):
    """A sequence number that the run has not reached."""


class ResourceExhausted(FerrymanError):
    """A limit is reached."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class AnswerTooLarge(ResourceExhausted):
    """The answer is larger than a message may be: ask for less in a call."""


class AnswersUnread(ResourceExhausted):
    """Too many bytes of answers wait for their callers to read them, on this connection or on all."""


class CorpusTooLarge(ResourceExhausted):
    """A corpus is over the operator's limit."""


class DiskFull(ResourceExhausted):
    """The server's disk has no space left, or less than its operator keeps for runs in progress."""


class MessageTooLarge(ResourceExhausted):
    """A message of an upload has more bytes than the server accepts."""


class ModelTooLarge(ResourceExhausted):
    """A model by itself takes more memory than the operator allows for all."""


class QueueFull(ResourceExhausted):
    """More waits to be translated than the server admits; there should be room in `retry_delay_s`."""


class TooManyCalls(ResourceExhausted):
    """As many calls of this kind are in flight as the server allows; call again after `retry_delay_s`."""


class TooManyRuns(ResourceExhausted):
    """As many runs are waiting, or unfinished, as the operator allows."""


class TooManyAliases(ResourceExhausted):
    """A model has as many aliases as a model may have."""


class Unavailable(FerrymanError):
    """Try again later."""

    default_code = grpc.StatusCode.UNAVAILABLE


class StoreUnavailable(Unavailable):
    """The server's database cannot be reached or is locked."""


class TooManyOpenFiles(Unavailable):
    """The server has as many files open as it may, or nearly so."""


class ServerShuttingDown(Unavailable):
    """The server is stopping; another one, or the next one, goes on."""


class DeadlineExceeded(FerrymanError):
    """The call's deadline has passed."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class MessageOverdue(DeadlineExceeded):
    """The client has not sent the next message of the call in time."""


class Cancelled(FerrymanError):
    """The call was cancelled."""

    default_code = grpc.StatusCode.CANCELLED


class DataLoss(FerrymanError):
    """Stored data is damaged."""

    default_code = grpc.StatusCode.DATA_LOSS


class DatabaseDamaged(DataLoss):
    """The server's database is damaged; its operator must restore or rebuild it."""


class ModelDamaged(DataLoss):
    """A file of a published model is missing or is not what was published, on the server or after a download."""


class RowUnreadable(DataLoss):
    """What the server's database holds of a run, a corpus or a version of a model cannot be read; it can be deleted."""


def reason_of(error: type[FerrymanError]) -> str:
    """Return the reason that stands for the class: its name in UPPER_SNAKE_CASE."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", error.__name__).upper()


def error_class(reason: str, code: grpc.StatusCode) -> type[FerrymanError]:
    """Return the class of the reason; if there is none, the class of the status code; else FerrymanError."""
    return _BY_REASON.get(reason) or _BY_CODE.get(code, FerrymanError)


def _descendants(root: type[FerrymanError]) -> Iterator[type[FerrymanError]]:
    for child in root.__subclasses__():
        yield child
        yield from _descendants(child)


# Made once, at import: a class that a user derives later never answers for a reason.
_BY_REASON: Final = {reason_of(error): error for error in _descendants(FerrymanError)}
_BY_CODE: Final = {error.default_code: error for error in FerrymanError.__subclasses__()}
