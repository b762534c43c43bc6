"""The one tree of errors that callers can see.

    FerrymanError
    ├── InvalidArgument          a caller's mistake in the request; holds every violation
    │   ├── InvalidRequest
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
    ├── Unavailable
    │   ├── StoreUnavailable
    │   ├── TooManyOpenFiles
    │   └── ServerShuttingDown
    ├── DeadlineExceeded
    │   └── MessageOverdue
    ├── Cancelled
    ├── DataLoss
    │   ├── DatabaseDamaged
    │   ├── ModelDamaged
    │   └── RowUnreadable
    └── AttemptFenced            never leaves the worker: a newer attempt owns the run

The middle classes carry the status, the leaves the reason: `reason` is the class name in UPPER_SNAKE_CASE.
A message names the bad value, what is legal, and the cure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing that is wrong with a request.

    `field` is the path of the proto field ("recipe.model.heads", "sentences[3]"), `reason` a stable UPPER_SNAKE_CASE
    name.
    """

    field: str
    description: str
    reason: str = "INVALID_VALUE"


class FerrymanError(Exception):
    """The root. `metadata` holds the dynamic parts of the message."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: Mapping[str, str] = {key: str(value) for key, value in metadata.items()}

    @property
    def reason(self) -> str:
        """The stable name that travels in google.rpc.ErrorInfo."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).upper()


class InvalidArgument(FerrymanError):
    """The request is wrong, and will be however often it is sent. `total` counts violations, which may name fewer."""

    def __init__(self, violations: Sequence[Violation], total: int = 0) -> None:
        """Store; `total` 0: the violations are all there are."""
        assert violations, "an InvalidArgument names at least one violation"
        self.total = total or len(violations)
        first = violations[0]
        # The total comes first: a message that is cut keeps it.
        count = f"{self.total:,} violations, the first: " if self.total > 1 else ""
        super().__init__(f"{count}{first.field}: {first.description}")
        self.violations = tuple(violations)


class InvalidRequest(InvalidArgument):
    """A field of the request is missing, malformed or out of range."""


class InvalidRecipe(InvalidArgument):
    """A recipe has values out of range or in conflict."""


class InvalidCorpus(InvalidArgument):
    """The text of a corpus is empty, misaligned, not UTF-8 or has a line over the limit."""


class InvalidSentence(InvalidArgument):
    """A sentence to translate is too long or holds control characters."""


class NotFound(FerrymanError):
    """What the request names does not exist."""


class CorpusNotFound(NotFound):
    """No such corpus."""


class RunNotFound(NotFound):
    """No such training run."""


class ModelNotFound(NotFound):
    """No such model, or no such version or alias of it."""


class AlreadyExists(FerrymanError):
    """What the request would create exists."""


class RequestIdReused(AlreadyExists):
    """The request_id came before, with another body."""


class FailedPrecondition(FerrymanError):
    """The state of the system does not allow it."""


class IllegalTransition(FailedPrecondition):
    """The run's state does not allow it."""


class RunNotFinished(FailedPrecondition):
    """A run that has not ended cannot be deleted."""


class RunStillNeeded(FailedPrecondition):
    """Another run will start with the optimizer in this run's checkpoints."""


class ModelHasNoWeights(FailedPrecondition):
    """The bundle holds no weights to start training from."""


class ModelInUse(FailedPrecondition):
    """An alias points at the version, or an unfinished run starts from it."""


class CorpusInUse(FailedPrecondition):
    """Unfinished runs train on the corpus."""


class OptimizerNotKept(FailedPrecondition):
    """The checkpoints of the run that made the model are gone, and with them Adam's moments."""


class RoleNotServed(FailedPrecondition):
    """This server was started without the role that the request needs."""


class OutOfRange(FerrymanError):
    """A position beyond the end."""


class SequenceOutOfRange(OutOfRange):
    """A sequence number that the run has not reached."""


class ResourceExhausted(FerrymanError):
    """A limit is reached."""


class AnswerTooLarge(ResourceExhausted):
    """The answer is larger than a message may be."""


class AnswersUnread(ResourceExhausted):
    """As many bytes of answers as the operator allows wait for their callers to read them."""


class CorpusTooLarge(ResourceExhausted):
    """A corpus is over the operator's limit."""


class DiskFull(ResourceExhausted):
    """The disk has no space left, or less than the operator keeps for runs in progress."""


class MessageTooLarge(ResourceExhausted):
    """A message of an upload has more bytes than the server accepts."""


class ModelTooLarge(ResourceExhausted):
    """A model by itself takes more memory than the operator allows for all."""


class QueueFull(ResourceExhausted):
    """More waits to be translated than the operator allows; there should be room in `retry_delay_s`."""

    def __init__(self, message: str, *, retry_delay_s: float = 1.0, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_delay_s = retry_delay_s


class TooManyCalls(ResourceExhausted):
    """As many calls of this kind are in flight as the operator allows; `limit` in the metadata names the kind."""


class TooManyRuns(ResourceExhausted):
    """As many runs are waiting, or unfinished, as the operator allows."""


class TooManyAliases(ResourceExhausted):
    """A model has as many aliases as a model may have."""


class Unavailable(FerrymanError):
    """Try again later."""


class StoreUnavailable(Unavailable):
    """The database cannot be reached or is locked."""


class TooManyOpenFiles(Unavailable):
    """The process or the machine has as many files open as it may, or nearly so."""


class ServerShuttingDown(Unavailable):
    """The server is stopping; another one, or the next one, goes on."""


class DeadlineExceeded(FerrymanError):
    """The caller's deadline has passed."""


class MessageOverdue(DeadlineExceeded):
    """The caller has not sent the next message of the call in time."""


class Cancelled(FerrymanError):
    """The caller gave up."""


class DataLoss(FerrymanError):
    """Stored data is damaged."""


class DatabaseDamaged(DataLoss):
    """The database holds bytes that nobody wrote; an operator must restore or rebuild it."""


class ModelDamaged(DataLoss):
    """A file of a published model is missing or is not what was published."""


class RowUnreadable(DataLoss):
    """What the database holds of a run, a corpus or a version of a model cannot be read; it can be deleted."""


class AttemptFenced(FerrymanError):
    """A newer attempt, or nobody, owns the run: this worker must stop and write nothing."""
