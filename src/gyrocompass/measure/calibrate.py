"""Calibrators: from what a model says of its confidence to how often it is right.

    confidences, outcomes (held out) --fit--> Calibrator --apply--> probabilities
                                     --cross_fitted--> what it would do to answers that it has not seen

    temperature    p -> sigmoid(logit(p) / T)               one T, or one per slice or per position bucket
    adaptive       p -> sigmoid(logit(p) * exp(b + w . x))  x: features of the answer, such as its length
    platt          p -> sigmoid(a logit(p) + b)
    beta           p -> sigmoid(a log p - b log(1 - p) + c)      a, b >= 0
    isotonic       p -> the best rising step function
    histogram      p -> accuracy of its bin, bins of equal mass

Parametric ones are fitted by maximum likelihood with a little shrinkage towards changing nothing, so that a
few perfect answers do not send a slope to infinity; its strength is that of one answer (`PRIOR`), which
vanishes as data comes in. A slice or bucket with fewer than `LEAST` answers gets what fits all.

Temperature and Platt keep the order of answers; isotonic and histogram make ties and know nothing outside of
the range they saw. A calibrator is a config: JSON, hashed, checked when read.

Sources: Guo et al. 2017 (temperature); Platt 1999; Kull et al. 2017 (beta); Zadrozny and Elkan 2001, 2002
(histogram, isotonic).

Shape legend: N answers, F features, K knots.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, TypeAdapter, ValidationError
from scipy.optimize import minimize
from scipy.special import expit

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.measure.calibration_metrics import FloatArray, judged

PRIOR = 1.0
LEAST = 30
ALL = ""
"""The key of what fits all slices, or all positions."""
_EDGE = 1e-6
"""Confidences closer to 0 or 1 than this are taken to be as close; their logits are finite then."""


class Beside(NamedTuple):
    """What a calibrator may read beside the confidences; what it needs and is not given is an error."""

    slices: Sequence[str] | None = None
    positions: Sequence[int] | None = None
    features: Mapping[str, Sequence[float]] | None = None


NOTHING = Beside()


class TemperatureCalibrator(Config):
    """One temperature for all, or one for each slice or position bucket."""

    kind: Literal["temperature"] = "temperature"
    per: Literal["all", "slice", "position"] = "all"
    edges: tuple[int, ...] = ()
    """Where position buckets begin, after the first one: bucket i has edges[i-1] <= position < edges[i]."""
    temperatures: Mapping[str, float]
    """By slice or number of the bucket; `ALL` for any other."""

    def apply(self, confidence_N: ArrayLike, beside: Beside = NOTHING) -> FloatArray:
        """The probabilities."""
        logit_N = logits(confidence_N)
        names = _places(self.per, self.edges, beside, len(logit_N))
        t_N = np.array([self.temperatures.get(name, self.temperatures[ALL]) for name in names])
        return _sigmoid(logit_N / t_N)


class AdaptiveCalibrator(Config):
    """A temperature that depends on features of the answer."""

    kind: Literal["adaptive"] = "adaptive"
    weights: Mapping[str, float]
    """Of each feature, in units of its deviation."""
    bias: float
    mean: Mapping[str, float]
    deviation: Mapping[str, float]

    def apply(self, confidence_N: ArrayLike, beside: Beside = NOTHING) -> FloatArray:
        """The probabilities.

        Raises:
            BadInput: a feature is missing.
        """
        logit_N = logits(confidence_N)
        x_NF = _features(list(self.weights), self.mean, self.deviation, beside, len(logit_N))
        slope_N = self.bias + x_NF @ np.array([*self.weights.values()], np.float64)
        return _sigmoid(logit_N * np.exp(np.clip(slope_N, -5, 5)))


class PlattCalibrator(Config):
    """A line on the logits."""

    kind: Literal["platt"] = "platt"
    slope: float
    offset: float

    def apply(self, confidence_N: ArrayLike, beside: Beside = NOTHING) -> FloatArray:
        """The probabilities."""
        return _sigmoid(self.slope * logits(confidence_N) + self.offset)


class BetaCalibrator(Config):
    """What two beta distributions, of the right and of the wrong answers, make of a confidence."""

    kind: Literal["beta"] = "beta"
    a: float = Field(ge=0)
    b: float = Field(ge=0)
    c: float

    def apply(self, confidence_N: ArrayLike, beside: Beside = NOTHING) -> FloatArray:
        """The probabilities."""
        p_N = _inner(confidence_N)
        return _sigmoid(self.a * np.log(p_N) - self.b * np.log1p(-p_N) + self.c)


class IsotonicCalibrator(Config):
    """A rising step function, straight lines between its steps."""

    kind: Literal["isotonic"] = "isotonic"
    knots: tuple[float, ...]
    """Confidences, rising."""
    values: tuple[float, ...]
    """Their probabilities."""

    def apply(self, confidence_N: ArrayLike, beside: Beside = NOTHING) -> FloatArray:
        """The probabilities; constant outside of what was seen."""
        return np.interp(np.asarray(confidence_N, np.float64), self.knots, self.values)


class HistogramCalibrator(Config):
    """The accuracy of each bin."""

    kind: Literal["histogram"] = "histogram"
    edges: tuple[float, ...]
    """Between bins, rising: a bin has what is at least its lower edge."""
    values: tuple[float, ...]

    def apply(self, confidence_N: ArrayLike, beside: Beside = NOTHING) -> FloatArray:
        """The probabilities."""
        place_N = np.searchsorted(self.edges, np.asarray(confidence_N, np.float64), side="right")
        return np.array(self.values)[place_N]


Calibrator: TypeAlias = (
    TemperatureCalibrator
    | AdaptiveCalibrator
    | PlattCalibrator
    | BetaCalibrator
    | IsotonicCalibrator
    | HistogramCalibrator
)
_ADAPTER: TypeAdapter[Calibrator] = TypeAdapter(Annotated[Calibrator, Field(discriminator="kind")])

Fit: TypeAlias = Callable[[FloatArray, FloatArray, Beside], Calibrator]


# --- fitting ---


def fit(method: str, confidence_N: ArrayLike, correct_N: ArrayLike, beside: Beside = NOTHING) -> Calibrator:
    """Fit a calibrator.

    Args:
        method: a name in `METHODS`.
        confidence_N: in [0, 1], of answers that the model was not trained on.
        correct_N: 1 or 0.
        beside: slices, positions or features, where the method reads them.

    Raises:
        BadInput: all are right, or all are wrong; or what the method reads is missing.
    """
    confidence, correct = judged(confidence_N, correct_N)
    if correct.min() == correct.max():
        what = "right" if correct[0] else "wrong"
        raise BadInput(
            f"all {len(correct)} answers are {what}, so nothing says how confidence and truth go together",
            fix="give more answers, or harder and easier ones",
        )
    return METHODS[method](confidence, correct, beside)


def cross_fitted(
    method: str,
    confidence_N: ArrayLike,
    correct_N: ArrayLike,
    groups: Sequence[str],
    beside: Beside = NOTHING,
    folds: int = 5,
) -> FloatArray:
    """Probabilities from calibrators that have not seen the answer's group.

    Which fold a group is in depends on its name alone.

    Raises:
        BadInput: there are fewer groups than folds, or as `fit` says of a fold's rest.
    """
    confidence, correct = judged(confidence_N, correct_N)
    found_N = np.full(len(confidence), np.nan)
    fold_N = folds_of(groups, folds)
    for fold in range(folds):
        out = fold_N == fold
        if out.any():
            calibrator = fit(method, confidence[~out], correct[~out], _taken(beside, ~out))
            found_N[out] = calibrator.apply(confidence[out], _taken(beside, out))
    return found_N


def folds_of(groups: Sequence[str], folds: int) -> NDArray[np.int64]:
    """The fold of each answer: groups in the order of their hashes, dealt out in turn.

    Raises:
        BadInput: there are fewer groups than folds.
    """
    names = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    if len(names) < folds:
        raise BadInput(
            f"{len(names)} groups cannot be dealt out to {folds} folds",
            fix=f"give answers about at least {folds} documents",
        )
    fold = {name: number % folds for number, name in enumerate(names)}
    return np.array([fold[group] for group in groups], np.int64)


def _fit_temperature(per: Literal["all", "slice", "position"]) -> Fit:
    def fitted(confidence_N: FloatArray, correct_N: FloatArray, beside: Beside) -> Calibrator:
        logit_N = logits(confidence_N)
        edges: tuple[int, ...] = ()
        if per == "position":
            position_N = np.asarray(_needed(beside.positions, "positions", len(logit_N)))
            edges = tuple(
                int(e) for e in np.unique(np.quantile(position_N, [0.25, 0.5, 0.75]).astype(np.int64))
            )
            edges = tuple(edge for edge in edges if edge > position_N.min())
        names = np.asarray(_places(per, edges, beside, len(logit_N)))
        found = {ALL: _temperature(logit_N, correct_N)}
        for name in sorted(set(names.tolist()) - {ALL}):
            inside = names == name
            if inside.sum() >= LEAST:
                found[name] = _temperature(logit_N[inside], correct_N[inside])
        return TemperatureCalibrator(per=per, edges=edges, temperatures=found)

    return fitted


def _temperature(logit_N: FloatArray, correct_N: FloatArray) -> float:
    """T = exp(-u) with u the minimum of NLL(sigmoid(logit * exp(u))) + PRIOR u^2 / 2."""
    (u,) = _minimum(
        lambda x: (logit_N * np.exp(x[0]), (logit_N * np.exp(x[0]))[None]), correct_N, [0.0], [0.0]
    )
    return float(np.exp(-u))


def _fit_adaptive(confidence_N: FloatArray, correct_N: FloatArray, beside: Beside) -> Calibrator:
    if not beside.features:
        raise BadInput("an adaptive calibrator reads features", fix="give some, such as the answer's length")
    names = list(beside.features)
    raw = {name: np.asarray(beside.features[name], np.float64) for name in names}
    mean = {name: float(raw[name].mean()) for name in names}
    deviation = {name: float(raw[name].std()) or 1.0 for name in names}
    logit_N = logits(confidence_N)
    x_NF = np.column_stack([np.ones(len(logit_N)), _features(names, mean, deviation, beside, len(logit_N))])

    def line(w: FloatArray) -> tuple[FloatArray, FloatArray]:
        z_N = logit_N * np.exp(np.clip(x_NF @ w, -5, 5))
        return z_N, z_N * x_NF.T

    bias, *weights = _minimum(line, correct_N, [0.0] * (1 + len(names)), [0.0] * (1 + len(names)))
    return AdaptiveCalibrator(
        bias=bias, weights=dict(zip(names, weights, strict=True)), mean=mean, deviation=deviation
    )


def _fit_platt(confidence_N: FloatArray, correct_N: FloatArray, beside: Beside) -> Calibrator:
    logit_N = logits(confidence_N)
    x_PN = np.stack([logit_N, np.ones_like(logit_N)])
    slope, offset = _minimum(lambda w: (w @ x_PN, x_PN), correct_N, [1.0, 0.0], [1.0, 0.0])
    return PlattCalibrator(slope=slope, offset=offset)


def _fit_beta(confidence_N: FloatArray, correct_N: FloatArray, beside: Beside) -> Calibrator:
    p_N = _inner(confidence_N)
    x_PN = np.stack([np.log(p_N), -np.log1p(-p_N), np.ones_like(p_N)])
    limits = [(0.0, None), (0.0, None), (None, None)]
    a, b, c = _minimum(lambda w: (w @ x_PN, x_PN), correct_N, [1.0, 1.0, 0.0], [1.0, 1.0, 0.0], limits)
    return BetaCalibrator(a=max(0.0, a), b=max(0.0, b), c=c)


def _fit_isotonic(confidence_N: FloatArray, correct_N: FloatArray, beside: Beside) -> Calibrator:
    """Pool adjacent violators: neighbouring steps are joined as long as one falls."""
    values, place_N, count = np.unique(confidence_N, return_inverse=True, return_counts=True)
    right = np.bincount(place_N, correct_N)
    steps: list[list[float]] = []  # first, last, right, count
    for value, good, n in zip(values.tolist(), right.tolist(), count.tolist(), strict=True):
        steps.append([value, value, good, n])
        while len(steps) > 1 and steps[-2][2] * steps[-1][3] >= steps[-1][2] * steps[-2][3]:
            first, _, good_before, n_before = steps[-2]
            _, last, good_last, n_last = steps.pop()
            steps[-1] = [first, last, good_before + good_last, n_before + n_last]
    knots, heights = [], []
    for first, last, good, n in steps:
        for knot in dict.fromkeys((first, last)):
            knots.append(knot)
            heights.append(good / n)
    return IsotonicCalibrator(knots=tuple(knots), values=tuple(heights))


def _fit_histogram(confidence_N: FloatArray, correct_N: FloatArray, beside: Beside) -> Calibrator:
    n_bins = min(15, max(1, len(confidence_N) // LEAST))
    edges = np.unique(np.quantile(confidence_N, np.arange(1, n_bins) / n_bins))
    place_N = np.searchsorted(edges, confidence_N, side="right")
    filled = np.unique(place_N)
    kept = edges[filled[1:] - 1]  # an empty bin goes to the one before it
    place_N = np.searchsorted(kept, confidence_N, side="right")
    share = np.bincount(place_N, correct_N) / np.bincount(place_N)
    return HistogramCalibrator(edges=tuple(kept.tolist()), values=tuple(share.tolist()))


METHODS: dict[str, Fit] = {
    "temperature": _fit_temperature("all"),
    "temperature_by_slice": _fit_temperature("slice"),
    "temperature_by_position": _fit_temperature("position"),
    "adaptive": _fit_adaptive,
    "platt": _fit_platt,
    "beta": _fit_beta,
    "isotonic": _fit_isotonic,
    "histogram": _fit_histogram,
}


def _minimum(
    line: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
    correct_N: FloatArray,
    start: Sequence[float],
    centre: Sequence[float],
    limits: Sequence[tuple[float | None, float | None]] | None = None,
) -> list[float]:
    """The parameters w that minimise NLL(sigmoid(z(w))) + PRIOR / 2 |w - centre|^2.

    Args:
        line: w to z [N] and its slopes [P, N].
        correct_N: 1 or 0.
        start: where to begin.
        centre: what changes nothing.
        limits: of each parameter.
    """
    middle = np.asarray(centre, np.float64)

    def loss(w: FloatArray) -> tuple[float, FloatArray]:
        z_N, slope_PN = line(w)
        nll = float(np.logaddexp(0, z_N).sum() - correct_N @ z_N)
        away = w - middle
        return nll + PRIOR / 2 * float(away @ away), slope_PN @ (expit(z_N) - correct_N) + PRIOR * away

    found = minimize(loss, np.asarray(start, np.float64), jac=True, method="L-BFGS-B", bounds=limits)
    return [float(value) for value in found.x]


# --- files ---


def save_calibrator(calibrator: Calibrator, path: Path) -> None:
    """Write it as JSON."""
    path.write_text(calibrator.model_dump_json(indent=1), encoding="utf-8")


def load_calibrator(path: Path) -> Calibrator:
    """Read what `save_calibrator` wrote.

    Raises:
        BadInput: it is not there, or is something else.
    """
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise BadInput(f"no calibrator: {what}", where=path, fix="make one with `gyro calibrate`") from error


# --- helpers ---


def logits(confidence_N: ArrayLike) -> FloatArray:
    """log p - log(1 - p), of confidences kept a millionth away from 0 and 1."""
    p_N = _inner(confidence_N)
    found_N: FloatArray = np.log(p_N) - np.log1p(-p_N)
    return found_N


def _inner(confidence_N: ArrayLike) -> FloatArray:
    return np.clip(np.asarray(confidence_N, np.float64), _EDGE, 1 - _EDGE)


def _sigmoid(z_N: FloatArray) -> FloatArray:
    found_N: FloatArray = expit(z_N)
    return found_N


def _needed(values: Sequence[Any] | None, name: str, count: int) -> Sequence[Any]:
    if values is None or len(values) != count:
        raise BadInput(
            f"this calibrator reads {name}, one for each of {count} answers, and has "
            f"{'none' if values is None else len(values)}",
            fix=f"give {name}",
        )
    return values


def _places(per: str, edges: tuple[int, ...], beside: Beside, count: int) -> Sequence[str]:
    if per == "all":
        return [ALL] * count
    if per == "slice":
        return _needed(beside.slices, "slices", count)
    return [str(bisect_right(edges, position)) for position in _needed(beside.positions, "positions", count)]


def _features(
    names: Sequence[str],
    mean: Mapping[str, float],
    deviation: Mapping[str, float],
    beside: Beside,
    count: int,
) -> FloatArray:
    given = beside.features or {}
    columns = [
        (np.asarray(_needed(given.get(name), name, count), np.float64) - mean[name]) / deviation[name]
        for name in names
    ]
    return np.column_stack(columns) if columns else np.zeros((count, 0))


def _taken(beside: Beside, mask_N: NDArray[np.bool_]) -> Beside:
    """What is beside of some of the answers."""

    def some(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
        return None if values is None else tuple(np.asarray(values)[mask_N].tolist())

    features = None if beside.features is None else {k: some(v) or () for k, v in beside.features.items()}
    return Beside(slices=some(beside.slices), positions=some(beside.positions), features=features)
