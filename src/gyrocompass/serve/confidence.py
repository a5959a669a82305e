"""How probable it is that an answer is right: a signal of its tokens, through a calibrator.

    sequence     exp(sum log p)          mean token   exp(mean log p)
    least token  exp(min log p)          entropy      exp(-mean entropy)

These are the signals of `gyro eval` at the level of answers, computed alike (`measure.tasks.run`), so a
calibrator that was fitted there means the same here. Its 95% interval is that of the accuracy of held-out
answers with about this confidence: of the bar of the reliability diagram that it falls into.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gyrocompass.core.artifact import read_artifact
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.measure.calibrate import Beside, Calibrator, load_calibrator
from gyrocompass.measure.conformal import Guarantee, load_guarantee
from gyrocompass.serve.answer import Answered, Confidence
from gyrocompass.serve.policy import Policy

SIGNALS = ("sequence", "mean token", "least token", "entropy")


class Calibrated(NamedTuple):
    """A calibrator as the server applies it."""

    id: str
    """Of the artifact."""
    signal: str
    calibrator: Calibrator
    bars: tuple[tuple[float, float, float], ...]
    """Of the calibrated diagram, rising: the greatest confidence, and the accuracy's interval."""
    guarantee: Guarantee | None
    """What was promised with it."""

    def of(self, answered: Answered, slice_name: str) -> Confidence | None:
        """The confidence in an answer; None where its tokens do not say."""
        raw = signal_of(answered, self.signal)
        return None if raw is None else self.of_raw(raw, slice_name, len(answered.tokens))

    def of_raw(self, raw: float, slice_name: str, n_tokens: int) -> Confidence:
        """The confidence for a signal."""
        beside = Beside(slices=[slice_name], positions=[0], features={"length": [math.log1p(n_tokens)]})
        probability = float(self.calibrator.apply([raw], beside)[0])
        for most, low, high in self.bars:
            if probability <= most:
                return Confidence(probability, low, high, self.id)
        if self.bars:
            return Confidence(probability, *self.bars[-1][1:], self.id)
        return Confidence(probability, None, None, self.id)


def signal_of(answered: Answered, signal: str) -> float | None:
    """A signal, from 0 to 1; None where the engine does not tell what it is made of."""
    logprobs = [token.logprob for token in answered.tokens if not math.isnan(token.logprob)]
    if not logprobs:
        return None
    if signal == "entropy":
        entropies = [token.entropy for token in answered.tokens]
        if None in entropies:
            return None
        return math.exp(-float(np.mean([value for value in entropies if value is not None])))
    whole = {"sequence": sum(logprobs), "mean token": float(np.mean(logprobs)), "least token": min(logprobs)}
    return min(1.0, math.exp(whole[signal]))


def open_calibrated(folder: Path, level: str, signal: str | None = None) -> Calibrated:
    """Read a calibrator from an artifact of `gyro calibrate`.

    Args:
        folder: the artifact's.
        level: of what it says how right it is: "answer" or "choice".
        signal: which; None: of those that there are, the one with the least log loss.

    Raises:
        BadInput: it is no such artifact, or has none for this level and signal.
    """
    identity = read_artifact(folder, kind="calibration", verify=False).manifest.id
    entries = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    fitted = [
        entry
        for entry in entries
        if entry["level"] == level
        and "method" in entry
        and "after" in entry
        and (signal == entry["signal"] or (signal is None and _is_ours(level, entry["signal"])))
    ]
    if not fitted:
        there = ", ".join(f"{entry['level']} {entry['signal']}" for entry in entries if "method" in entry)
        wanted = level if signal is None else f"{level} {signal}"
        raise BadInput(
            f"no calibrator for {wanted}; there is one for: {there or 'nothing'}",
            where=folder,
            fix="calibrate on tasks with more answers, right ones and wrong ones",
        )
    best = min(fitted, key=_log_loss)
    name = f"{level}-{best['signal']}".replace(" ", "_").replace("(", "").replace(")", "")
    promise = folder / f"guarantee-{name}.json"
    return Calibrated(
        identity,
        best["signal"],
        load_calibrator(folder / f"calibrator-{name}.json"),
        tuple((bar["high"], bar["accuracy_low"], bar["accuracy_high"]) for bar in best["after"]["bins"]),
        load_guarantee(promise) if promise.is_file() else None,
    )


def _is_ours(level: str, signal: str) -> bool:
    """Whether a server has the signal of an answer that it has just written."""
    return level != "answer" or signal in SIGNALS


def _log_loss(entry: Mapping[str, Any]) -> float:
    return float(entry["after"]["slices"]["total"]["log_loss"])


def calibrated_for(policy: Policy, store: Store) -> Calibrated | None:
    """The calibrator that a policy names, checked against what it promises.

    Raises:
        BadInput: there is none, or it promises less.
    """
    if policy.calibrator is None:
        return None
    found = open_calibrated(artifact_folder(policy.calibrator, store), "answer", policy.signal)
    if policy.promise is None:
        return found
    made = found.guarantee
    wanted = f"at most {policy.promise.risk:.3g} wrong with {policy.promise.confidence:.3g} confidence"
    if made is None or made.risk > policy.promise.risk or made.confidence < policy.promise.confidence:
        has = "nothing" if made is None else f"{made.risk:.3g} with {made.confidence:.3g} confidence"
        raise BadInput(
            f"the policy promises {wanted}; its calibration promises {has}",
            where=policy.calibrator,
            fix=f"gyro calibrate MODEL ... --set stages.calibration.risk={policy.promise.risk:g}",
        )
    return found


def artifact_folder(name: str, store: Store) -> Path:
    """The folder of an artifact that is named by its path or its id.

    Raises:
        BadInput: there is none.
    """
    path = Path(name)
    return path if path.is_dir() else store.open(name).path
