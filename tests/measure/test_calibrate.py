"""Calibrators: they undo what distorted a confidence, and never see what they are judged on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.calibrate import (
    ALL,
    METHODS,
    Beside,
    HistogramCalibrator,
    IsotonicCalibrator,
    TemperatureCalibrator,
    cross_fitted,
    fit,
    folds_of,
    load_calibrator,
    logits,
    save_calibrator,
)
from gyrocompass.measure.calibration_metrics import calibration_error, log_loss


def distorted(n: int, seed: int, temperature: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences that are `temperature` times too far from one half, on the scale of logits."""
    generator = np.random.default_rng(seed)
    truth = expit(generator.normal(0.7, 1.0, n))
    return expit(logits(truth) * temperature), (generator.random(n) < truth).astype(float)


def beside(n: int, seed: int = 0) -> Beside:
    generator = np.random.default_rng(seed)
    return Beside(
        slices=[["code", "prose"][k] for k in generator.integers(0, 2, n)],
        positions=generator.integers(0, 100, n).tolist(),
        features={"length": generator.normal(5, 2, n).tolist()},
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_mends_overconfidence(method: str) -> None:
    confidence, correct = distorted(4000, 0)
    new_confidence, new_correct = distorted(4000, 1)
    calibrator = fit(method, confidence, correct, beside(4000))
    found = calibrator.apply(new_confidence, beside(4000, 1))
    assert ((found >= 0) & (found <= 1)).all()
    before, after = calibration_error(new_confidence, new_correct), calibration_error(found, new_correct)
    assert before.debiased > 0.1 and after.debiased < 0.02


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_calibrator_survives_its_file(method: str, tmp_path: Path) -> None:
    confidence, correct = distorted(500, 0)
    calibrator = fit(method, confidence, correct, beside(500))
    save_calibrator(calibrator, tmp_path / "calibrator.json")
    again = load_calibrator(tmp_path / "calibrator.json")
    assert again == calibrator
    np.testing.assert_array_equal(
        again.apply(confidence, beside(500)), calibrator.apply(confidence, beside(500))
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["temperature", "platt", "beta", "isotonic", "histogram"]))
def test_more_confidence_never_means_less_probability(seed: int, method: str) -> None:
    confidence, correct = distorted(300, seed)
    if method == "histogram":
        return  # its bins are free to fall
    found = fit(method, confidence, correct).apply(np.sort(confidence))
    assert (np.diff(found) >= -1e-12).all()


def test_the_temperature_is_that_of_the_distortion() -> None:
    calibrator = fit("temperature", *distorted(20000, 2))
    assert isinstance(calibrator, TemperatureCalibrator)
    assert calibrator.temperatures[ALL] == pytest.approx(3.0, rel=0.05)


def test_each_slice_has_its_temperature_and_a_small_one_that_of_all() -> None:
    one, two = distorted(5000, 3, 3.0), distorted(5000, 4, 0.5)
    few = distorted(10, 5)
    confidence = np.concatenate([one[0], two[0], few[0]])
    correct = np.concatenate([one[1], two[1], few[1]])
    slices = ["one"] * 5000 + ["two"] * 5000 + ["few"] * 10
    calibrator = fit("temperature_by_slice", confidence, correct, Beside(slices=slices))
    assert isinstance(calibrator, TemperatureCalibrator)
    assert calibrator.temperatures["one"] == pytest.approx(3, rel=0.1)
    assert calibrator.temperatures["two"] == pytest.approx(0.5, rel=0.1)
    assert "few" not in calibrator.temperatures
    known = calibrator.apply([0.9], Beside(slices=["few"]))
    assert known == calibrator.apply([0.9], Beside(slices=["never seen"]))


def test_a_feature_that_decides_the_temperature_is_found() -> None:
    generator = np.random.default_rng(6)
    length = generator.normal(0, 1, 20000)
    truth = expit(generator.normal(0, 1.5, 20000))
    confidence = expit(logits(truth) * np.exp(0.5 * length))
    correct = generator.random(20000) < truth
    calibrator = fit("adaptive", confidence, correct, Beside(features={"length": length.tolist()}))
    found = calibrator.apply(confidence, Beside(features={"length": length.tolist()}))
    plain = fit("temperature", confidence, correct).apply(confidence)
    assert log_loss(found, correct) < log_loss(plain, correct) - 0.005
    np.testing.assert_allclose(found, truth, atol=0.1)


def test_scikit_learn_fits_the_same_isotonic_function() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    confidence, correct = distorted(700, 7)
    confidence = confidence.round(2)
    ours = fit("isotonic", confidence, correct)
    theirs = isotonic.IsotonicRegression(out_of_bounds="clip").fit(confidence, correct)
    at = np.linspace(0, 1, 301)
    np.testing.assert_allclose(ours.apply(at), theirs.predict(at), atol=1e-9)


def test_scikit_learn_fits_the_same_line() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    confidence, correct = distorted(20000, 8)
    ours = fit("platt", confidence, correct)
    theirs = linear.LogisticRegression(C=1e6).fit(logits(confidence)[:, None], correct)
    assert ours.kind == "platt"
    assert ours.slope == pytest.approx(theirs.coef_[0, 0], rel=2e-3)
    assert ours.offset == pytest.approx(theirs.intercept_[0], abs=2e-3)


def test_an_isotonic_function_is_the_least_squares_one() -> None:
    calibrator = fit("isotonic", [0.1, 0.2, 0.3, 0.4, 0.5], [1, 0, 0, 1, 1])
    assert isinstance(calibrator, IsotonicCalibrator)
    np.testing.assert_allclose(calibrator.apply([0.1, 0.3, 0.4, 0.9]), [1 / 3, 1 / 3, 1, 1])


def test_a_histogram_says_the_accuracy_of_each_bin() -> None:
    confidence, correct = distorted(900, 9)
    calibrator = fit("histogram", confidence, correct)
    assert isinstance(calibrator, HistogramCalibrator)
    found = calibrator.apply(confidence)
    for value in set(found.tolist()):
        assert correct[found == value].mean() == pytest.approx(value)


def test_cross_fitted_probabilities_have_not_seen_their_group() -> None:
    confidence, correct = distorted(400, 10)
    groups = [f"g{n // 4}" for n in range(400)]
    found = cross_fitted("isotonic", confidence, correct, groups)
    fold = folds_of(groups, 5)
    for k in range(5):
        expected = fit("isotonic", confidence[fold != k], correct[fold != k]).apply(confidence[fold == k])
        np.testing.assert_array_equal(found[fold == k], expected)
    assert all(len({fold[n] for n in range(400) if groups[n] == g}) == 1 for g in set(groups))
    seen = fit("isotonic", confidence, correct).apply(confidence)
    assert log_loss(np.clip(found, 0.01, 0.99), correct) > log_loss(np.clip(seen, 0.01, 0.99), correct)


def test_few_right_answers_do_not_make_certainty() -> None:
    found = fit("platt", [0.9, 0.8, 0.2], [1, 1, 0]).apply([0.9, 0.2])
    assert found[0] < 0.99 and found[1] > 0.01


def test_bad_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="all 2 answers are right"):
        fit("platt", [0.5, 0.6], [1, 1])
    with pytest.raises(BadInput, match="reads slices, one for each of 2 answers, and has none"):
        fit("temperature_by_slice", [0.5, 0.6], [1, 0])
    with pytest.raises(BadInput, match="reads features"):
        fit("adaptive", [0.5, 0.6], [1, 0])
    with pytest.raises(BadInput, match="2 groups cannot be dealt out to 5 folds"):
        cross_fitted("platt", [0.5, 0.6], [1, 0], ["a", "b"])
    with pytest.raises(BadInput, match="no calibrator"):
        load_calibrator(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"kind": "crystal ball"}')
    with pytest.raises(BadInput, match="no calibrator"):
        load_calibrator(tmp_path / "x.json")
