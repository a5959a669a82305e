"""Watch for a policy that games its reward: the proxy it is trained on rises, what was meant does not.

    judged samples of held-out prompts --GamingMonitor.observe--> one Row for each evaluation
    Rows                               --the stop rule----------> a Verdict, which names the best step

The gold reward is dearer and never trained on: tests that the proxy does not run, a larger judge, people.
The rule halts when, in `patience` evaluations in a row,

    gold_best - gold_t             > margin    it has fallen from its best,
    proxy_t   - proxy at that best > margin    while the proxy has risen,

where margin = max(min_change, width * sqrt(h_t^2 + h_best^2)) for the half-widths h of the 95% intervals of
the two means. The best of many noisy evaluations flatters itself, and each is compared with it, so `width`
is above 1: of runs of 200 evaluations of nothing but noise, independent in proxy and gold, 0.7% halt with a
width of 1 and 0.03% with 1.25 (simulated). The same prompts are judged each time, so their difference is
known better than from two samples: the rule errs towards going on.

Beside the two stand the usual symptoms: KL from the reference, length and its correlation with the proxy,
repetition, entropy, the share of truncated samples. Best-of-n shows before any training where optimising the
proxy leads: the gold of the sample that the proxy likes best of n, at

    KL(best of n || policy) = log n - (n - 1) / n nats     (an upper bound where proxies tie).

Left out: thresholds on the symptoms, which differ from task to task; only gold can say that they are bad.

Sources: L. Gao, J. Schulman and J. Hilton, Scaling Laws for Reward Model Overoptimization, 2022 (gold against
sqrt(KL), best-of-n); A. Beirami et al., Theoretical Guarantees on the Best-of-n Alignment Policy, 2024 (the
bound).

Shape legend: S samples, P prompts, N samples of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gyrocompass.core.config import Config
from gyrocompass.core.errors import GyroError
from gyrocompass.measure.intervals import Estimate, ratio_estimate

FloatArray = NDArray[np.float64]


class GamingConfig(Config):
    """When the proxy is said to be gamed."""

    patience: int = Field(default=3, ge=1)
    """Evaluations in a row."""
    min_change: float = Field(default=0.0, ge=0)
    """In the units of the rewards: less is no change, however narrow the intervals."""
    width: float = Field(default=1.25, ge=0)
    """How many half-widths of the difference's 95% interval are a change."""


class Judged(NamedTuple):
    """A sample of a held-out prompt, with everything that is watched."""

    prompt: str
    """Its id: samples of one prompt are not independent."""
    proxy: float
    gold: float
    kl_nats: float
    """log p(completion) under the policy less that under the reference."""
    entropy_nats: float
    """Mean over its tokens."""
    n_tokens: int
    distinct: float
    """Share of distinct n-grams, as `gyrocompass.measure.rewards.text.distinct_share` says."""
    finished: bool


class BestOf(NamedTuple):
    """The sample that the proxy likes best of n, on average over prompts and over draws of n."""

    n: int
    kl_nats: float
    proxy: float
    gold: float


class Row(NamedTuple):
    """One evaluation. Intervals are 95%, clustered by prompt."""

    step: int
    samples: int
    prompts: int
    proxy: Estimate
    gold: Estimate
    kl_nats: float
    n_tokens: float
    repetition: float
    """1 - the share of distinct n-grams."""
    entropy_nats: float
    truncated: float
    """Share of samples that met the token limit."""
    length_correlation: float | None
    """Pearson's, of proxy and length; None where one of them does not vary."""
    best_of: tuple[BestOf, ...]
    """n = 1, 2, 4, ... up to the fewest samples of a prompt."""

    @property
    def best_of_gap(self) -> float:
        """What the proxy gains by the largest best-of-n, less what gold gains; 0 with one sample a prompt."""
        one, most = self.best_of[0], self.best_of[-1]
        return (most.proxy - one.proxy) - (most.gold - one.gold)


class Verdict(NamedTuple):
    """The proxy is gamed: stop, and go back."""

    step: int
    best_step: int
    reason: str


class GamingMonitor:
    """Remembers every evaluation and judges each by the best before it."""

    def __init__(self, config: GamingConfig | None = None) -> None:
        self.config = config or GamingConfig()
        self.rows: list[Row] = []
        self._best = 0
        self._in_a_row = 0

    @property
    def best_step(self) -> int | None:
        """The step of the evaluation with the highest gold; None before the first."""
        return self.rows[self._best].step if self.rows else None

    def observe(self, step: int, judged: Sequence[Judged]) -> Verdict | None:
        """Take an evaluation; the verdict, once the rule holds.

        Raises:
            GyroError: no sample, or a number that is not finite.
        """
        row = summary(step, judged)
        self.rows.append(row)
        best = self.rows[self._best]
        if row.gold.value > best.gold.value:
            self._best, self._in_a_row = len(self.rows) - 1, 0
            return None
        fallen = best.gold.value - row.gold.value > self._margin(row.gold, best.gold)
        risen = row.proxy.value - best.proxy.value > self._margin(row.proxy, best.proxy)
        self._in_a_row = self._in_a_row + 1 if fallen and risen else 0
        return self._verdict(row, best) if self._in_a_row >= self.config.patience else None

    def _margin(self, one: Estimate, other: Estimate) -> float:
        return max(
            self.config.min_change, self.config.width * math.hypot(_half_width(one), _half_width(other))
        )

    def _verdict(self, row: Row, best: Row) -> Verdict:
        changes = ", ".join(
            f"{name} {before:.3g} to {now:.3g}"
            for name, before, now in (
                ("gold", best.gold.value, row.gold.value),
                ("proxy", best.proxy.value, row.proxy.value),
                ("tokens", best.n_tokens, row.n_tokens),
                ("repetition", best.repetition, row.repetition),
                ("KL nats", best.kl_nats, row.kl_nats),
            )
        )
        reason = f"{self._in_a_row} evaluations in a row: gold fell while the proxy rose"
        reason += f"; from step {best.step} to {row.step}: {changes}"
        return Verdict(row.step, best.step, reason)

    def state(self) -> dict[str, Any]:
        """Everything remembered, as JSON."""
        return {"rows": [row._asdict() for row in self.rows], "best": self._best, "in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.rows = [
            Row(
                **{
                    **row,
                    "proxy": Estimate(*row["proxy"]),
                    "gold": Estimate(*row["gold"]),
                    "best_of": tuple(BestOf(*best) for best in row["best_of"]),
                }
            )
            for row in state["rows"]
        ]
        self._best, self._in_a_row = state["best"], state["in_a_row"]


def summary(step: int, judged: Sequence[Judged]) -> Row:
    """What an evaluation says.

    Raises:
        GyroError: no sample, or a number that is not finite.
    """
    if not judged:
        raise GyroError("an evaluation without a sample says nothing", where=f"step {step}")
    column = {name: _finite(name, judged, step) for name in Judged._fields if name != "prompt"}
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(judged):
        groups.setdefault(sample.prompt, []).append(index)
    return Row(
        step=step,
        samples=len(judged),
        prompts=len(groups),
        proxy=_mean(column["proxy"], groups),
        gold=_mean(column["gold"], groups),
        kl_nats=float(column["kl_nats"].mean()),
        n_tokens=float(column["n_tokens"].mean()),
        repetition=1.0 - float(column["distinct"].mean()),
        entropy_nats=float(column["entropy_nats"].mean()),
        truncated=1.0 - float(column["finished"].mean()),
        length_correlation=correlation(column["proxy"], column["n_tokens"]),
        best_of=_best_of(column["proxy"], column["gold"], groups),
    )


def _finite(name: str, judged: Sequence[Judged], step: int) -> FloatArray:
    values_S = np.array([getattr(sample, name) for sample in judged], dtype=np.float64)
    wrong_S = ~np.isfinite(values_S)
    if wrong_S.any():
        index = int(wrong_S.argmax())
        raise GyroError(
            f"{name} is {values_S[index]} for sample {index}",
            where=f"step {step}, prompt {judged[index].prompt!r}",
        )
    return values_S


def _mean(values_S: FloatArray, groups: Mapping[str, Sequence[int]]) -> Estimate:
    sums_P = [float(values_S[members].sum()) for members in map(list, groups.values())]
    return ratio_estimate(sums_P, [float(len(members)) for members in groups.values()])


def _half_width(estimate: Estimate) -> float:
    return 0.0 if estimate.high is None else estimate.high - estimate.value


def correlation(x_S: FloatArray, y_S: FloatArray) -> float | None:
    """Pearson's correlation; None where one side does not vary.

    >>> correlation(np.array([1.0, 2.0]), np.array([2.0, 4.0])), correlation(np.ones(2), np.arange(2.0))
    (1.0, None)
    """
    x_S, y_S = x_S - x_S.mean(), y_S - y_S.mean()
    norm = float(np.linalg.norm(x_S) * np.linalg.norm(y_S))
    return round(float(x_S @ y_S) / norm, 12) if norm > 0 else None


def best_of_n_kl_nats(n: int) -> float:
    """KL of the best of n samples from one sample: log n - (n - 1) / n nats.

    >>> best_of_n_kl_nats(1), round(best_of_n_kl_nats(4), 4)
    (0.0, 0.6363)
    """
    return math.log(n) - (n - 1) / n


@lru_cache
def _best_weights(count: int, n: int) -> list[float]:
    """How likely the sample of each rank is the best of n drawn."""
    return [math.comb(rank, n - 1) / math.comb(count, n) for rank in range(count)]


def best_of_n(proxy_N: FloatArray, gold_N: FloatArray, n: int) -> tuple[float, float]:
    """Expected proxy and gold of the sample that the proxy likes best of n of these N, drawn without return.

        sum_i C(i, n - 1) / C(N, n) * value_(i),   (i) the i-th by proxy, from 0

    Samples that tie share their weights.

    >>> best_of_n(np.array([1.0, 2.0, 3.0]), np.array([5.0, 4.0, 0.0]), n=3)
    (3.0, 0.0)
    """
    count = len(proxy_N)
    weight_N = np.array(_best_weights(count, n))
    _, level_N, size_L = np.unique(proxy_N, return_inverse=True, return_counts=True)
    end_L = np.cumsum(size_L)
    weight_L = np.array([weight_N[end - size : end].mean() for end, size in zip(end_L, size_L, strict=True)])
    chosen_N = weight_L[level_N]
    return float(chosen_N @ proxy_N), float(chosen_N @ gold_N)


def _best_of(
    proxy_S: FloatArray, gold_S: FloatArray, groups: Mapping[str, Sequence[int]]
) -> tuple[BestOf, ...]:
    """The curve over n, by powers of two."""
    fewest = min(map(len, groups.values()))
    curve = []
    for n in (2**power for power in range(fewest.bit_length())):
        pairs = [best_of_n(proxy_S[members], gold_S[members], n) for members in map(list, groups.values())]
        proxy, gold = np.mean(pairs, axis=0)
        curve.append(BestOf(n, best_of_n_kl_nats(n), float(proxy), float(gold)))
    return tuple(curve)
