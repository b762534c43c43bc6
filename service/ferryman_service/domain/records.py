"""The durable, numbered records of a run, and the places where its state may go."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ferryman_service.domain.schedule import DecayPlan, DecayReason


class RunState(enum.StrEnum):
    """Where a run stands. A PAUSED run waits for ResumeTraining; a run that waits for its restart is QUEUED."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    EXPORTING = "exporting"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the run can change no more."""
        return self in _TERMINAL

    def may_become(self, state: RunState) -> bool:
        """Whether the transition is legal."""
        return state in _TRANSITIONS[self]


_TERMINAL: Final = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})
_ENDS: Final = frozenset({RunState.FAILED, RunState.CANCELLED})
_TRANSITIONS: Final[Mapping[RunState, frozenset[RunState]]] = {
    RunState.QUEUED: _ENDS | {RunState.STARTING, RunState.PAUSED},
    # STARTING -> STARTING: the service died between recording the attempt and starting its worker, and tries again.
    # To QUEUED from here on: the worker died or was told to stop, and another will take over.
    RunState.STARTING: _ENDS | {RunState.STARTING, RunState.QUEUED, RunState.RUNNING, RunState.PAUSED},
    RunState.RUNNING: _ENDS | {RunState.EXPORTING, RunState.QUEUED, RunState.PAUSED},
    RunState.EXPORTING: _ENDS | {RunState.SUCCEEDED, RunState.QUEUED, RunState.PAUSED},
    RunState.PAUSED: _ENDS | {RunState.QUEUED},
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset(),
    RunState.CANCELLED: frozenset(),
}
ACTIVE_STATES: Final = (RunState.STARTING, RunState.RUNNING, RunState.EXPORTING)


class EventLevel(enum.StrEnum):
    """How serious an event is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One update of the weights. Losses in nats per target token; padding is never counted as a token.

    `skipped`: the gradient was not finite and the weights were left alone. `model_flops_utilization` is the share of
    the device's peak, 0 where that is unknown.
    """

    step: int
    epoch: int
    loss: float
    nll_per_token: float
    perplexity: float
    learning_rate: float
    gradient_norm: float
    target_tokens: int
    target_tokens_per_second: float
    duration_s: float
    padding_share: float
    memory_bytes: int
    skipped: bool = False
    model_flops_utilization: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ValidationMetrics:
    """One validation: losses over all validation pairs, BLEU and chrF (0 to 100) of greedy translations of the first
    ones. `bleu_signature` is sacreBLEU's, with the tokenizer; empty in records of earlier releases."""

    step: int
    epoch: int
    loss: float
    nll_per_token: float
    perplexity: float
    bleu: float
    chrf: float
    translated_pairs: int
    duration_s: float
    best: bool
    bleu_signature: str = ""


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """The run changed state."""

    state: RunState
    attempt: int
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """A remark for a person; `code` is a stable UPPER_SNAKE_CASE name."""

    level: EventLevel
    code: str
    message: str


Payload = StepMetrics | ValidationMetrics | StateChange | RunEvent | DecayPlan


@dataclass(frozen=True, kw_only=True)
class Record:
    """A numbered record: sequences rise by exactly one from 1; `time_ns` is UTC since 1970."""

    sequence: int
    time_ns: int
    payload: Payload


_KINDS: Final[Mapping[str, type[Payload]]] = {
    "step": StepMetrics,
    "validation": ValidationMetrics,
    "state_change": StateChange,
    "event": RunEvent,
    "decay_plan": DecayPlan,
}


def payload_to_dict(payload: Payload) -> tuple[str, dict[str, Any]]:
    """Return (kind, JSON types). Floats survive a JSON round trip to the last bit; NaN and infinities need json's
    default."""
    kind = next(name for name, cls in _KINDS.items() if type(payload) is cls)
    return kind, dict(vars(payload))  # payloads are flat


def payload_from_dict(kind: str, values: Mapping[str, Any]) -> Payload:
    """Return the payload that `payload_to_dict` wrote."""
    match kind:
        case "state_change":
            return StateChange(**{**values, "state": RunState(values["state"])})
        case "event":
            return RunEvent(**{**values, "level": EventLevel(values["level"])})
        case "decay_plan":
            return decay_plan_from_dict(values)
        case _:
            return _KINDS[kind](**values)


def decay_plan_from_dict(values: Mapping[str, Any]) -> DecayPlan:
    """Return the plan of its fields as JSON types."""
    return DecayPlan(**{**values, "reason": DecayReason(values["reason"])})
