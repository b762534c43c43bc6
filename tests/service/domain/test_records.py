"""Records survive JSON to the last bit; states go only where they may."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.records import (
    EventLevel,
    RunEvent,
    RunState,
    StateChange,
    StepMetrics,
    ValidationMetrics,
    payload_from_dict,
    payload_to_dict,
)

numbers = st.floats(allow_nan=False)


def numbered(cls, *integers, **others):
    """Build the dataclass with integers where they are named and floats elsewhere."""
    fields = dict.fromkeys(cls.__dataclass_fields__, numbers)
    return st.builds(cls, **fields | {name: st.integers(0, 2**53) for name in integers} | others)


payloads = st.one_of(
    numbered(StepMetrics, "step", "epoch", "target_tokens", "memory_bytes"),
    numbered(ValidationMetrics, "step", "epoch", "translated_pairs", best=st.booleans()),
    st.builds(StateChange, state=st.sampled_from(RunState), attempt=st.integers(0, 99), message=st.text()),
    st.builds(RunEvent, level=st.sampled_from(EventLevel), code=st.text(), message=st.text()),
)


@given(payloads)
def test_a_payload_survives_json(payload):
    kind, values = payload_to_dict(payload)
    assert payload_from_dict(kind, json.loads(json.dumps(values))) == payload


def test_a_loss_that_is_not_a_number_survives_too():
    values = dict.fromkeys(StepMetrics.__dataclass_fields__, 0) | {"loss": math.nan, "gradient_norm": math.inf}
    kind, stored = payload_to_dict(StepMetrics(**values))
    again = payload_from_dict(kind, json.loads(json.dumps(stored)))
    assert math.isnan(again.loss)
    assert again.gradient_norm == math.inf


def test_the_road_of_a_run():
    road = [RunState.QUEUED, RunState.STARTING, RunState.RUNNING, RunState.EXPORTING, RunState.SUCCEEDED]
    assert all(a.may_become(b) for a, b in itertools.pairwise(road))
    for state in road[:-1]:
        assert state.may_become(RunState.FAILED)
        assert state.may_become(RunState.CANCELLED)


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED])
def test_the_end_is_the_end(state):
    assert state.is_terminal
    assert not any(state.may_become(other) for other in RunState)


def test_no_state_is_left_out():
    assert not RunState.QUEUED.may_become(RunState.RUNNING)
    assert not RunState.RUNNING.may_become(RunState.SUCCEEDED)
    assert RunState.STARTING.may_become(RunState.STARTING)
