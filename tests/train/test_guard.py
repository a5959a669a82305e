"""The guard: what trips it, what does not, and what it remembers."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.train.guard import Guard, GuardConfig, Mean


def flat(guard: Guard, steps: int, nats: float = 3.0, tokens: int = 1000) -> None:
    for step in range(steps):
        wobble = 0.02 * math.sin(step)
        assert (
            guard.judge({"total": Mean(nats + wobble, tokens), "code": Mean(nats + wobble, tokens)}, 1.0)
            is None
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_trips_at_once_and_names_the_slice(bad: float) -> None:
    verdict = Guard(GuardConfig()).judge({"total": Mean(3.0, 10), "code": Mean(bad, 10)}, 1.0)
    assert verdict is not None and verdict.slice == "code" and "not finite" in str(verdict)


def test_a_gradient_that_is_not_finite_trips() -> None:
    verdict = Guard(GuardConfig()).judge({"total": Mean(3.0, 10)}, math.inf)
    assert verdict is not None and "gradient" in str(verdict)


def test_a_spike_in_one_slice_trips_though_the_total_hides_it() -> None:
    guard = Guard(GuardConfig())
    flat(guard, 20)
    verdict = guard.judge({"total": Mean(3.05, 1000), "code": Mean(9.0, 1000)}, 1.0)
    assert verdict is not None and verdict.slice == "code" and verdict.z is not None and verdict.z > 10


def test_no_judgement_before_there_is_a_history() -> None:
    guard = Guard(GuardConfig(min_history_steps=10))
    flat(guard, 9)
    assert guard.judge({"total": Mean(9.0, 1000)}, 1.0) is None


def test_a_thin_slice_may_be_wild() -> None:
    guard = Guard(GuardConfig())
    flat(guard, 20)
    assert guard.judge({"total": Mean(3.0, 1000), "code": Mean(5.0, 1)}, 1.0) is None


def test_what_trips_does_not_enter_the_history() -> None:
    guard = Guard(GuardConfig())
    flat(guard, 20)
    before = guard.state()
    assert guard.judge({"total": Mean(30.0, 1000)}, 1.0) is not None
    assert guard.state() == before


def test_without_a_threshold_only_what_is_not_finite_trips() -> None:
    guard = Guard(GuardConfig(spike_z=None))
    flat(guard, 20)
    assert guard.judge({"total": Mean(1e6, 1000)}, 1.0) is None
    assert guard.judge({"total": Mean(math.nan, 1000)}, 1.0) is not None


@given(falls=st.lists(st.floats(0.0, 0.5), min_size=20, max_size=80))
@settings(deadline=None, max_examples=50)
def test_a_falling_loss_never_trips(falls: list[float]) -> None:
    guard = Guard(GuardConfig())
    nats = 60.0
    for fall in falls:
        nats -= fall
        assert guard.judge({"total": Mean(nats, 100)}, 1.0) is None


@given(values=st.lists(st.floats(1.0, 5.0), min_size=1, max_size=60), after=st.floats(1.0, 50.0))
@settings(deadline=None, max_examples=50)
def test_a_restored_guard_judges_alike(values: list[float], after: float) -> None:
    guard = Guard(GuardConfig(history_steps=20))
    for value in values:
        guard.judge({"total": Mean(value, 100)}, 1.0)
    restored = Guard(GuardConfig(history_steps=20))
    restored.restore(json.loads(json.dumps(guard.state())))
    assert restored.judge({"total": Mean(after, 100)}, 1.0) == guard.judge({"total": Mean(after, 100)}, 1.0)
