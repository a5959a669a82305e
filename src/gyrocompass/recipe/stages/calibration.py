"""How far the confidences of an evaluation can be trusted, and what makes them better.

    outcomes.parquet --by level and confidence--> halves of the groups
    first half  --cross_fitted, fit--> the best method, a calibrator, candidates for thresholds
    second half --apply, measure, guarantee--> errors before and after, thresholds that carry a promise

A group is in one half alone, which one its name decides. The method is the one with the least cross-fitted
log loss on the first half; what is told of it, and what is promised, comes from the second, which it has
not seen.

Shape legend: N outcomes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from gyrocompass.core.artifact import Draft
from gyrocompass.core.errors import BadInput
from gyrocompass.measure.calibrate import (
    LEAST,
    METHODS,
    Beside,
    Calibrator,
    cross_fitted,
    fit,
    save_calibrator,
)
from gyrocompass.measure.calibration_metrics import (
    FloatArray,
    auroc,
    bins,
    brier,
    calibration_error,
    log_loss,
    risk_coverage,
)
from gyrocompass.measure.conformal import candidates, guarantee, save_guarantee
from gyrocompass.recipe.stage import Stage, Workplace
from gyrocompass.recipe.stages.evaluation import OUTCOMES, EvaluationName

CALIBRATION = "calibration.json"


class Kept(NamedTuple):
    """Outcomes of one level with one confidence."""

    level: str
    signal: str
    confidence_N: FloatArray
    correct_N: FloatArray
    slices: list[str]
    groups: list[str]
    length_N: FloatArray
    position_N: NDArray[np.int64]

    def part(self, mask_N: NDArray[np.bool_]) -> Kept:
        """Some of them."""
        places = np.flatnonzero(mask_N).tolist()
        return Kept(
            self.level,
            self.signal,
            self.confidence_N[mask_N],
            self.correct_N[mask_N],
            [self.slices[place] for place in places],
            [self.groups[place] for place in places],
            self.length_N[mask_N],
            self.position_N[mask_N],
        )

    def beside(self) -> Beside:
        """What calibrators may read."""
        return Beside(
            slices=self.slices,
            positions=self.position_N.tolist(),
            features={"length": np.log1p(self.length_N).tolist()},
        )


class CalibrationStage(Stage):
    """How far the confidences of an evaluation can be trusted, and what makes them better."""

    kind: Literal["calibration"] = "calibration"
    makes: ClassVar[str] = "calibration"
    evaluation: EvaluationName
    methods: tuple[str, ...] = (
        "temperature",
        "temperature_by_slice",
        "temperature_by_position",
        "adaptive",
        "platt",
        "beta",
        "isotonic",
        "histogram",
    )
    risk: float = Field(default=0.1, gt=0, lt=1)
    """Of the answers given without a person, at most this share may be wrong ..."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """... with this confidence, in each slice."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """See the module."""
        unknown = sorted(set(self.methods) - METHODS.keys())
        if unknown:
            raise BadInput(
                f"unknown method {unknown[0]!r}",
                where=f"stages.{workplace.name}.methods",
                fix=f"choose from {', '.join(METHODS)}",
            )
        table = pq.read_table(workplace.input("evaluation") / OUTCOMES)
        found: list[dict[str, Any]] = []
        for kept in _kinds(table):
            entry = self._judge(kept, draft.path)
            found.append(entry)
        if not found:
            raise BadInput(
                "the evaluation has no outcome to calibrate on",
                where=f"stages.{workplace.name}",
                fix="evaluate on tasks, held-out text or answers",
            )
        (draft.path / CALIBRATION).write_text(json.dumps(found, indent=1), encoding="utf-8")
        draft.counts |= {"calibrated": sum("method" in one for one in found), "outcomes": table.num_rows}

    def _judge(self, kept: Kept, folder: Path) -> dict[str, Any]:
        """One level and signal: before, after, and what can be promised; or why not."""
        entry: dict[str, Any] = {"level": kept.level, "signal": kept.signal, "outcomes": len(kept.groups)}
        entry["before"] = _measured(kept, kept.confidence_N)
        first_N = _halves(kept.groups)
        fitted_on, tested_on = kept.part(first_N), kept.part(~first_N)
        try:
            chosen = self._choose(fitted_on)
        except BadInput as error:
            return entry | {"refused": f"{error.what}; {error.fix}"}
        name = f"{kept.level}-{kept.signal}".replace(" ", "_").replace("(", "").replace(")", "")
        calibrator = fit(chosen[0]["method"], fitted_on.confidence_N, fitted_on.correct_N, fitted_on.beside())
        save_calibrator(calibrator, folder / f"calibrator-{name}.json")
        if not len(tested_on.groups):
            return entry | {
                "refused": "all outcomes are of one half of the groups; evaluate on more documents"
            }
        after_N = calibrator.apply(tested_on.confidence_N, tested_on.beside())
        entry |= {
            "method": chosen[0]["method"],
            "methods": chosen,
            "fitted_on": len(fitted_on.groups),
            "before_on_test": _measured(tested_on, tested_on.confidence_N),
            "after": _measured(tested_on, after_N),
        }
        if kept.level != "token":
            entry["guarantee"] = self._promise(fitted_on, tested_on, calibrator, after_N, folder, name)
        return entry

    def _choose(self, kept: Kept) -> list[dict[str, Any]]:
        """The methods with their cross-fitted scores, the best first."""
        if len(kept.groups) < LEAST:
            raise BadInput(
                f"{len(kept.groups)} outcomes to fit on are too few", fix=f"give at least {2 * LEAST} in all"
            )
        folds = min(5, len(set(kept.groups)))
        rows: list[dict[str, Any]] = []
        for method in self.methods:
            try:
                p_N = cross_fitted(
                    method, kept.confidence_N, kept.correct_N, kept.groups, kept.beside(), folds
                )
            except BadInput as error:
                if method == self.methods[-1] and not rows:
                    raise
                rows.append({"method": method, "refused": error.what})
                continue
            inner_N = np.clip(p_N, 1e-3, 1 - 1e-3)  # one certain mistake must not decide alone
            error_ = calibration_error(p_N, kept.correct_N, kept.groups)
            rows.append(
                {
                    "method": method,
                    "log_loss": log_loss(inner_N, kept.correct_N),
                    "debiased_ece": error_.debiased,
                }
            )
        rows.sort(key=lambda row: row.get("log_loss", np.inf))
        if "log_loss" not in rows[0]:
            raise BadInput(str(rows[0]["refused"]), fix="give more answers, right ones and wrong ones")
        return rows

    def _promise(
        self,
        fitted_on: Kept,
        tested_on: Kept,
        calibrator: Calibrator,
        after_N: FloatArray,
        folder: Path,
        name: str,
    ) -> dict[str, Any]:
        p_N = calibrator.apply(fitted_on.confidence_N, fitted_on.beside())
        slices = np.asarray(fitted_on.slices)
        tried = {
            part: candidates(p_N[slices == part] if (slices == part).any() else p_N)
            for part in set(tested_on.slices)
        }
        try:
            found = guarantee(
                after_N,
                tested_on.correct_N,
                tested_on.slices,
                tested_on.groups,
                tried,
                self.risk,
                self.confidence,
            )
        except BadInput as error:
            return {"refused": f"{error.what}; {error.fix}"}
        save_guarantee(found, folder / f"guarantee-{name}.json")
        return found.model_dump(mode="json")


def _kinds(table: pa.Table) -> Iterator[Kept]:
    """The outcomes by level and signal, in a fixed order."""
    rows = table.to_pydict()
    kinds = sorted(set(zip(rows["level"], rows["signal"], strict=True)))
    for level, signal in kinds:
        own = [
            place
            for place, pair in enumerate(zip(rows["level"], rows["signal"], strict=True))
            if pair == (level, signal)
        ]
        yield Kept(
            level,
            signal,
            np.array([rows["confidence"][place] for place in own], np.float64),
            np.array([rows["correct"][place] for place in own], np.float64),
            [rows["slice"][place] for place in own],
            [rows["group"][place] for place in own],
            np.array([rows["length"][place] for place in own], np.float64),
            np.array([rows["position"][place] for place in own], np.int64),
        )


def _halves(groups: Sequence[str]) -> NDArray[np.bool_]:
    """Which outcomes are of the first half of the groups, [N]; a group's half is its place by hash."""
    names = sorted(set(groups), key=lambda group: hashlib.sha256(f"half {group}".encode()).digest())
    first = set(names[: (len(names) + 1) // 2])
    return np.array([group in first for group in groups], np.bool_)


def _measured(kept: Kept, confidence_N: FloatArray) -> dict[str, Any]:
    """Errors and scores of confidences, of all and by slice, and what the diagrams draw."""
    slices = np.asarray(kept.slices)
    names = sorted(set(kept.slices))
    by_slice = {}
    for name in [*(names if len(names) > 1 else []), "total"]:
        own = np.flatnonzero((slices == name) | (name == "total"))
        confidence, correct = confidence_N[own], kept.correct_N[own]
        error = calibration_error(confidence, correct, [kept.groups[place] for place in own.tolist()])
        curve = risk_coverage(confidence, correct)
        by_slice[name] = {
            **error._asdict(),
            "accuracy": float(correct.mean()),
            "confidence": float(confidence.mean()),
            "brier": brier(confidence, correct)._asdict(),
            "log_loss": log_loss(np.clip(confidence, 1e-6, 1 - 1e-6), correct),
            "auroc": auroc(confidence, correct),
            "aurc": curve.area,
            "excess_aurc": curve.excess_area,
            "groups": len({kept.groups[place] for place in own.tolist()}),
        }
    curve = risk_coverage(confidence_N, kept.correct_N)
    step = max(1, len(curve.coverage_K) // 200)
    return {
        "slices": by_slice,
        "bins": [bar._asdict() for bar in bins(confidence_N, kept.correct_N, kind="mass")],
        "curve": [
            [float(c), float(r)] for c, r in zip(curve.coverage_K[::step], curve.risk_K[::step], strict=True)
        ],
    }
