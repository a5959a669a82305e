from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.serve.answer import Confidence
from gyrocompass.serve.decisions import answer_of, labels_of, prompt_of
from gyrocompass.serve.wire import Choice, Level, Option, Predicate, Score

PREDICATE = Predicate(type="predicate", instructions="It is wet.", name="wet")


def choice(count: int) -> Choice:
    return Choice(type="choice", instructions="Which?", choices=[Option(value=f"v{n}") for n in range(count)])


def score(count: int) -> Score:
    return Score(type="score", instructions="How?", levels=[Level(label=f"l{n}") for n in range(count)])


@given(st.lists(st.floats(-50, 0), min_size=2, max_size=10), st.floats(0.01, 0.99))
def test_probabilities_sum_to_one_calibrated_or_not(logprobs: list[float], sure: float) -> None:
    count = len(logprobs)
    for calibrate in (None, lambda p: Confidence(sure, None, None, "c")):
        answer, confidence = answer_of(choice(count), logprobs, calibrate)
        shares = [one["probability"] for one in answer["probabilities"]]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and all(0 <= share <= 1 for share in shares)
        best = int(answer["choice"][1:])
        assert logprobs[best] == pytest.approx(max(logprobs))
        assert answer["confidence"] == pytest.approx(shares[best])
        assert (confidence is None) == (calibrate is None)
        if calibrate is not None:
            assert answer["confidence"] == pytest.approx(sure, abs=1e-6)
        told, _ = answer_of(score(count), logprobs, calibrate)
        expected = sum(place * share for place, share in enumerate(shares))
        assert told["score"] == pytest.approx(expected, abs=1e-5)
        assert [one["value"] for one in told["probabilities"]] == list(range(count))


def test_a_predicate_is_the_probability_of_yes() -> None:
    answer, _ = answer_of(PREDICATE, [math.log(0.2), math.log(0.6)], None)
    assert answer == {"type": "predicate", "name": "wet", "probability": 0.25}
    # The calibrator is about the likelier one: here no, at 0.75.
    answer, _ = answer_of(
        PREDICATE, [math.log(0.2), math.log(0.6)], lambda p: Confidence(p - 0.05, None, None, "c")
    )
    assert answer["probability"] == pytest.approx(0.3)
    assert answer_of(PREDICATE, [-math.inf, -math.inf], None)[0] == {"type": "refusal", "name": "wet"}


def test_labels_stay_different_however_many() -> None:
    for count in (2, 26, 27, 255):
        labels = labels_of(choice(count))
        assert len(set(labels)) == count and len({len(label) for label in labels}) == 1
    text = prompt_of("It rains.", choice(3))
    assert text.startswith("It rains.") and "B. v1" in text and text.endswith("Answer:")
