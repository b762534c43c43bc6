"""Training runs."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from ferryman_service.domain.recipe import Recipe
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StepMetrics, ValidationMetrics
from ferryman_service.domain.schedule import DecayPlan


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """A process that cannot be mistaken for another: the pid, and when the kernel started it (clock ticks since boot,
    with the boot's id, since pids and ticks begin anew at each boot)."""

    pid: int
    start_ticks: int
    boot_id: str


class FailureReason(enum.StrEnum):
    """Why a run failed."""

    WORKER_DIED = "WORKER_DIED"
    DISK_FULL = "DISK_FULL"
    VOCABULARY_TOO_LARGE = "VOCABULARY_TOO_LARGE"
    VOCABULARY_TOO_SMALL = "VOCABULARY_TOO_SMALL"
    NO_TRAINING_PAIRS = "NO_TRAINING_PAIRS"
    NO_VALIDATION_PAIRS = "NO_VALIDATION_PAIRS"
    EXPORT_MISMATCH = "EXPORT_MISMATCH"
    NON_FINITE_LOSS = "NON_FINITE_LOSS"
    CORPUS_DAMAGED = "CORPUS_DAMAGED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    INITIAL_MODEL_UNUSABLE = "INITIAL_MODEL_UNUSABLE"
    CHECKPOINT_UNUSABLE = "CHECKPOINT_UNUSABLE"


@dataclass(frozen=True, kw_only=True)
class RunFailure:
    """Why a run failed, and the last lines of its worker's log."""

    reason: FailureReason
    message: str
    log_tail: str = ""


class TrainingFailed(Exception):
    """Raised inside a worker for a reason that is not a bug: the run becomes FAILED with this reason and message."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """How far a run is: a summary of its records, kept beside them.

    `reports` counts the records of the series (steps, validations, and the events that belong to them), which a resumed
    worker makes again; `skipped_updates` counts the steps whose update was skipped. `step_time_ns` is when the worker
    reported the last step, nanoseconds since 1970, 0 if that is not known. `decays` are the planned decays of the
    learning rate, by rising first step.
    """

    step: int = 0
    epoch: int = 0
    target_tokens: int = 0
    target_tokens_per_second: float = 0.0
    fraction: float = 0.0
    remaining_s: float | None = None
    last_step: StepMetrics | None = None
    best_validation: ValidationMetrics | None = None
    reports: int = 0
    skipped_updates: int = 0
    step_time_ns: int = 0
    decays: tuple[DecayPlan, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A training run as the store holds it. Times are nanoseconds since 1970, UTC.

    `restarts` counts the workers that died, or were told to end, without getting further than those before them. The
    next attempt starts no earlier than `not_before_ns`, which is 0 unless it follows one that was given up.
    `initial_model` is "" or the version, "name/7", whose weights training starts from. `trace_context` is "" or the
    span (W3C's `traceparent`) that the spans of its workers belong to. `corpus_deleted`, which no store keeps, tells
    that the corpus is gone; it is of no run that is unfinished.
    """

    run_id: str
    state: RunState
    corpus_id: str
    model_name: str
    recipe: Recipe
    create_time_ns: int
    attempt: int = 0
    last_sequence: int = 0
    cancel_requested: bool = False
    model_version: int | None = None
    progress: RunProgress = field(default_factory=RunProgress)
    failure: RunFailure | None = None
    worker: ProcessIdentity | None = None
    start_time_ns: int | None = None
    end_time_ns: int | None = None
    pause_requested: bool = False
    restarts: int = 0
    not_before_ns: int = 0
    processes: int = 1
    initial_model: str = ""
    keep_optimizer: bool = False
    trace_context: str = ""
    corpus_deleted: bool = False

    @property
    def place(self) -> str:
        """Where the run stands in lists, which are ordered by time; it says so also when the run is gone."""
        return f"{self.create_time_ns}/{self.run_id}"


@dataclass(frozen=True, kw_only=True)
class Handover:
    """What becomes of a run when its attempt is given up, unless its caller has asked for something else meanwhile.

    `state` is QUEUED, for another attempt no earlier than `not_before_ns`, or PAUSED. `remark` goes into the records,
    `message` beside the state; `restarts` None leaves the count as it is, and so does an attempt that got further, if
    such are to be `forgiven`.
    """

    state: RunState
    message: str
    remark: RunEvent | None = None
    restarts: int | None = None
    forgiven: bool = False
    not_before_ns: int = 0


def disk_full_handover(cause: str) -> Handover:
    """Return what becomes of a run that the disk has no room for; `cause` names the folder or the file."""
    text = f"the disk is full: {cause}. Free some space, then resume the run: it goes on from its last checkpoint"
    remark = RunEvent(level=EventLevel.ERROR, code="DISK_FULL", message=text)
    return Handover(state=RunState.PAUSED, message=text, remark=remark)


@dataclass(frozen=True, kw_only=True)
class RunFilter:
    """Which runs to list, and in which order."""

    states: Sequence[RunState] = ()
    model_name: str = ""
    oldest_first: bool = False


@dataclass(frozen=True, kw_only=True)
class RequestKey:
    """Makes a creation idempotent: the caller's id and a digest of the body."""

    request_id: str
    body_digest: str


@dataclass(frozen=True, kw_only=True)
class RunHead:
    """The moving part of a run: what a tail has to look at."""

    state: RunState
    last_sequence: int


@dataclass(frozen=True, kw_only=True)
class AppendAck:
    """The answer to an append."""

    last_sequence: int
    cancel_requested: bool
    pause_requested: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A complete checkpoint of a run. `scores` are there if the weights were validated at its step."""

    step: int
    epoch: int
    create_time_ns: int
    size_bytes: int
    is_best: bool
    bleu: float | None = None
    chrf: float | None = None
    nll_per_token: float | None = None
    translated_pairs: int | None = None
