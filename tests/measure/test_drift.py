"""False alarms no more often than stated, and shifts found soon: by simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gyrocompass.measure.drift import Detector, watch

Draw = Callable[[np.random.Generator, int], Any]


def first_alarm(baseline: Any, stream: Any, run_length: float, seed: int) -> int | None:
    detector = Detector(run_length, seed)
    detector.learn(baseline)
    return next((place for place, value in enumerate(stream) if detector.add(float(value))), None)


@pytest.mark.parametrize(
    "draw",
    [
        lambda draw, n: draw.normal(size=n),
        lambda draw, n: draw.standard_cauchy(n),
        lambda draw, n: draw.integers(0, 3, n),
        lambda draw, n: np.zeros(n),
    ],
    ids=["normal", "cauchy", "three values", "constant"],
)
def test_false_alarms_are_as_rare_as_stated(draw: Draw) -> None:
    """Of streams as long as a tenth of the run length, at most about a tenth may have an alarm."""
    alarms = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        alarms += first_alarm(draw(generator, 60), draw(generator, 100), 1000, seed) is not None
    assert alarms <= 0.1 * 400


@pytest.mark.parametrize(
    ("shifted", "delay"),
    [
        (lambda draw, n: draw.normal(1, 1, n), 60),
        (lambda draw, n: draw.normal(-1, 1, n), 60),
        (lambda draw, n: draw.normal(0, 3, n), 80),
        (lambda draw, n: np.where(draw.random(n) < 0.3, 4, draw.normal(size=n)), 80),
    ],
    ids=["higher", "lower", "wider", "mixed"],
)
def test_shifts_are_found(shifted: Draw, delay: int) -> None:
    delays = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        found = first_alarm(generator.normal(size=500), shifted(generator, 400), 10_000, seed)
        assert found is not None
        delays.append(found)
    assert np.median(delays) <= delay


def events(draw: np.random.Generator, n: int, **changes: Any) -> list[dict[str, Any]]:
    found = []
    for place in range(n):
        one = {
            "at": float(place),
            "mean_logprob": -draw.gamma(2, 0.5),
            "mean_entropy": draw.gamma(2, 0.4),
            "confidence": draw.beta(5, 2),
            "prompt_characters": int(draw.lognormal(4, 1)),
            "slice": draw.choice(["a", "b", "c"], p=[0.6, 0.35, 0.05]),
        }
        found.append(one | {name: change(draw) for name, change in changes.items()})
    return found


def test_a_server_that_goes_on_as_before_is_quiet() -> None:
    draw = np.random.default_rng(3)
    watched = watch(events(draw, 3000))
    assert [one.quantity for one in watched] == ["surprisal", "entropy", "confidence", "length", "slices"]
    assert not any(one.alarms for one in watched)


@pytest.mark.parametrize(
    ("quantity", "changes"),
    [
        ("surprisal", {"mean_logprob": lambda draw: -draw.gamma(6, 0.5)}),
        ("confidence", {"confidence": lambda draw: draw.beta(2, 5)}),
        ("slices", {"slice": lambda draw: draw.choice(["a", "c", "new"])}),
        ("length", {"prompt_characters": lambda draw: int(draw.lognormal(6, 1))}),
    ],
)
def test_what_changed_is_named(quantity: str, changes: Any) -> None:
    draw = np.random.default_rng(4)
    later = events(draw, 300, **changes)
    for event in later:
        event["at"] += 1000
    watched = watch([*events(draw, 1000), *later])
    alarmed = {one.quantity: one.alarms for one in watched if one.alarms}
    assert set(alarmed) == {quantity}
    assert 1000 <= alarmed[quantity][0].at < 1200


def test_a_ledger_can_be_the_baseline() -> None:
    draw = np.random.default_rng(5)
    (surprisal, *_) = watch(events(draw, 300), known={"surprisal": draw.gamma(2, 0.1, 400).tolist()})
    assert surprisal.alarms and surprisal.alarms[0].before == pytest.approx(0.2, abs=0.02)


def test_values_that_are_missing_are_passed_over() -> None:
    draw = np.random.default_rng(6)
    some = events(draw, 20, mean_entropy=lambda draw: None)
    assert {one.quantity: one.values for one in watch(some)}["entropy"] == 0
