"""Whether what comes in now is still like what came before: detectors with a stated false-alarm rate.

    value --rank among all before it--> p, uniform as long as nothing changes --bets--> evidence --> alarm

The p-value of a value is its rank among the values so far, ties broken at random: while the order of values
says nothing (they are exchangeable) p-values are independent and uniform, whatever the values' distribution
(Vovk, Gammerman and Shafer 2005). A bet is a function with mean 1 over a uniform p,

    low    k p^(k-1)                values have become small
    high   k (1-p)^(k-1)            ... great
    wide   k q^(k-1), q = 2 min(p, 1-p)     ... extreme, either way

for k in `STRENGTHS`. Evidence for a change at some time is gathered for each bet as
R_n = (1 + R_(n-1)) b(p_n) (Shiryaev and Roberts), and averaged over all bets. Without a change its mean
after n values is n, so an alarm at R >= A comes on average not before A values (Shin, Ramdas and Rinaldo,
e-detectors, 2022): the false-alarm rate is at most 1 in A. After an alarm a detector begins anew, with what
it has seen since as its past.

Left out: changes that come so slowly that ranks follow them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

STRENGTHS = (0.25, 0.5, 0.75)
_KINDS: tuple[Callable[[float], float], ...] = (
    lambda p: p,
    lambda p: 1 - p,
    lambda p: 2 * min(p, 1 - p),
)
_LEAST_P = 1e-9
_MOST_KEPT = 20_000
LEAST_BASELINE = 50
"""Values before which nothing is said: ranks among fewer say little."""


class Detector:
    """Watches one number.

    Args:
        run_length: A: at most one false alarm in so many values, on average.
        seed: breaks ties.
    """

    def __init__(self, run_length: float, seed: int = 0) -> None:
        self.run_length = run_length
        self._draw = np.random.default_rng(seed)
        self._seen: list[float] = []
        self._evidence = [0.0] * (len(STRENGTHS) * len(_KINDS))

    @property
    def evidence(self) -> float:
        """R, to be compared with `run_length`."""
        return sum(self._evidence) / len(self._evidence)

    def learn(self, values: Iterable[float]) -> None:
        """Values from before: a baseline."""
        self._seen = sorted([*self._seen, *values])

    def add(self, value: float) -> bool:
        """One more value; whether this is an alarm."""
        below = bisect.bisect_left(self._seen, value)
        equal = bisect.bisect_right(self._seen, value) - below
        p = (below + (equal + 1) * self._draw.random()) / (len(self._seen) + 1)
        self._seen.insert(below, value)
        if len(self._seen) > _MOST_KEPT:
            self._seen.pop(int(self._draw.integers(len(self._seen))))
        if len(self._seen) <= LEAST_BASELINE:
            return False
        bets = [k * max(kind(p), _LEAST_P) ** (k - 1) for kind in _KINDS for k in STRENGTHS]
        self._evidence = [(1 + had) * bet for had, bet in zip(self._evidence, bets, strict=True)]
        if self.evidence < self.run_length:
            return False
        self._evidence = [0.0] * len(self._evidence)
        self._seen = [value]
        return True


class Alarm(NamedTuple):
    """Something changed."""

    quantity: str
    at: float
    """Of the event, seconds since 1970."""
    before: float
    now: float
    """Means: of the baseline, and of the last events up to the alarm."""


class Watched(NamedTuple):
    """What became of one quantity."""

    quantity: str
    values: int
    evidence: float
    threshold: float
    alarms: tuple[Alarm, ...]


QUANTITIES: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "surprisal": lambda event: None if event["mean_logprob"] is None else -event["mean_logprob"],
    "entropy": lambda event: event["mean_entropy"],
    "confidence": lambda event: event["confidence"],
    "length": lambda event: float(event["prompt_characters"]),
}
_RECENT = 30


def watch(
    events: Sequence[Mapping[str, Any]],
    *,
    run_length: float = 10_000,
    baseline: int = 500,
    known: Mapping[str, Sequence[float]] | None = None,
) -> list[Watched]:
    """Look for changes in the events of a server.

    Args:
        events: with the keys of `QUANTITIES`, `slice` and `at`, the oldest first.
        run_length: events, on average at least, between two false alarms of all quantities together.
        baseline: so many events at the beginning are what the others are compared with.
        known: values of a quantity from elsewhere, such as nats per token of a training ledger, which are
            then its baseline.

    The mix of slices is watched as the rarity of each event's slice, -log of its share of the baseline.
    """
    given = dict(known or {})
    shares = _shares([str(event["slice"]) for event in events[:baseline]])
    rarest = -math.log(0.5 / (min(baseline, len(events)) + 1))

    def rarity(event: Mapping[str, Any]) -> float:
        return shares.get(str(event["slice"]), rarest)

    quantities: dict[str, Callable[[Mapping[str, Any]], float | None]] = {**QUANTITIES, "slices": rarity}
    found = []
    for number, (name, read) in enumerate(quantities.items()):
        detector = Detector(run_length * len(quantities), number)
        past = [float(value) for value in given.get(name, ())]
        detector.learn(past)
        pairs = [(event["at"], value) for event in events if (value := read(event)) is not None]
        start = 0 if past else min(baseline, len(pairs))
        detector.learn(value for _, value in pairs[:start])
        before = float(np.mean(past or [value for _, value in pairs[:start]] or [math.nan]))
        alarms = []
        recent: list[float] = []
        for at, value in pairs[start:]:
            recent = [*recent[-_RECENT + 1 :], value]
            if detector.add(value):
                alarms.append(Alarm(name, at, before, float(np.mean(recent))))
        found.append(Watched(name, len(pairs), detector.evidence, detector.run_length, tuple(alarms)))
    return found


def _shares(slices: Sequence[str]) -> dict[str, float]:
    counts: dict[str, int] = {}
    for name in slices:
        counts[name] = counts.get(name, 0) + 1
    return {name: -math.log(count / len(slices)) for name, count in counts.items()}
