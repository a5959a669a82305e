"""Samples that another policy drew: ratios to it, corrections for it, masks, and what to report of it.

Three policies meet in a step of reinforcement learning on text, and each log-probability here is of one:

    pi      the learner now: `TokenLogProbs.logprob_T`, with gradient
    mu      the sampler: whoever drew the tokens, as recorded then in the column `rollout_logprob`
    old     what a ratio pi / old is taken to: mu (`old: rollout`) or the learner's weights at the start of
            the step (`old: current`)

A window is read once, by one optimizer step, so at `old: current` old is pi itself with its gradient stopped:
the ratio is 1 and its gradient that of log pi. mu differs from it by staleness (samples drawn some steps
before) and by arithmetic (another engine, another dtype). `old: rollout` takes the ratio to mu, which covers
both; with `old: current` a `Correction` multiplies by a bounded pi / mu instead, its gradient stopped.
With both, mu would be corrected for twice, which is refused.

mu is recorded at the temperature that the learner is scored at, and over the same tokens: where a sampler
cuts to a top-p or top-k support and records log-probabilities renormalised there, every pi / mu is too small
by the factor of the mass that it kept. Sample from the whole distribution.

A token that does not count has the log-ratio 0 everywhere.

Shape legend: T positions.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.loss.sequences import Sequences
from gyrocompass.loss.signal import Batch, TokenLogProbs

Old = Literal["rollout", "current"]
"""What a ratio is taken to: the sampler as recorded, or the learner itself at the start of the step."""

NEAR = 0.1
"""A ratio within 1 +- this is one that sampler and learner agree on."""


class Clip(Config):
    """Where a ratio stops to matter: above 1 + high where A > 0, below 1 - low where A < 0."""

    low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    high: NonNegativeFloat = 0.2
    """Above `low` it is the clip-higher of DAPO (0.2 and 0.28 there)."""
    dual: PositiveFloat | None = None
    """The largest ratio that counts for a negative advantage, where PPO has no bound (3 is usual)."""

    @model_validator(mode="after")
    def _dual_is_the_outer_bound(self) -> Clip:
        if self.dual is not None and self.dual <= 1 + self.high:
            raise ValueError(f"dual is {self.dual}; it must be above 1 + high, {1 + self.high}")
        return self


class Correction(Config):
    """A bounded importance weight w = pi / mu, its gradient stopped."""

    level: Literal["token", "sequence"] = "token"
    """Of each token, or the product over the counted tokens of its sequence."""
    beyond: Literal["truncate", "mask"] = "truncate"
    """What happens outside of low .. high: w is set to the bound that it passes, or to 0."""
    low: NonNegativeFloat = 0.0
    high: PositiveFloat = 2.0

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Correction:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}; it must be below high, {self.high}")
        return self


class Samples(Config):
    """Which samples count, and how much, in an objective of reinforcement learning.

    What is said of whole sequences (a correction's level, the limit) costs a separable objective its shortcut
    of computing gradients in the forward pass.
    """

    correction: Correction | None = None
    """Multiplies each term by pi / mu; with `old: current` only."""
    off_policy_limit: PositiveFloat | None = None
    """A sequence whose mean of log mu - log pi is above it counts nothing where its advantage is negative."""
    skip_truncated: bool = False
    """Sequences that were cut off (label `truncated`) have no weight, so no part in any mean either."""


def log_ratio(log_probs: TokenLogProbs, batch: Batch, old: Old) -> Tensor:
    """log pi - log old of each token, [T], with the gradient of log pi; 0 where a token does not count.

    Raises:
        BadInput: `rollout_logprob` is read and missing.
    """
    current_T = log_probs.logprob_T
    counted_T = batch.weight_T > 0
    old_T = current_T.detach() if old == "current" else batch.column("rollout_logprob", counted_T)
    return (current_T - old_T.to(current_T.dtype)).masked_fill(~counted_T, 0.0)


def ratio(log_ratio_T: Tensor) -> Tensor:
    """exp of a log-ratio, [T].

    A ratio that would overflow counts as the largest power of e that is safely finite: an infinite one would
    make the gradient of a clipped term, which is 0, a NaN.
    """
    return log_ratio_T.clamp(max=math.log(torch.finfo(log_ratio_T.dtype).max) - 8).exp()


def complete(batch: Batch, *, skip_truncated: bool) -> Batch:
    """The batch, with no weight at sequences that were cut off if these are skipped: then nothing reads them.

    Raises:
        BadInput: `truncated` is read and missing.
    """
    if not skip_truncated:
        return batch
    truncated_T = batch.column("truncated", batch.weight_T > 0)
    return replace(batch, weight_T=batch.weight_T.masked_fill(truncated_T > 0, 0.0))


def stopped_factor(log_probs: TokenLogProbs, batch: Batch, samples: Samples, advantage_T: Tensor) -> Tensor:
    """What `samples` multiplies each term by, [T], without gradient: the correction, and 0 off policy.

        w = exp(log pi - log mu), of the token or summed over its sequence, truncated or masked
        off policy: A < 0 and mean_t(log mu - log pi) > off_policy_limit

    Args:
        log_probs: pi.
        batch: with `rollout_logprob`, if the samples are corrected or limited.
        samples: what is asked for.
        advantage_T: A.

    Source: truncated, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; the off-policy mask, DeepSeek-V3.2, arXiv:2512.02556, equation 9.
    """
    factor_T = torch.ones_like(log_probs.logprob_T)
    if samples.correction is None and samples.off_policy_limit is None:
        return factor_T
    gap_T, sequences = log_ratio(log_probs, batch, "rollout").detach(), Sequences(batch)
    if samples.correction is not None:
        factor_T = correction_weight(gap_T, sequences, samples.correction)
    if samples.off_policy_limit is not None:
        drift_T = sequences.spread(sequences.mean(-gap_T))
        factor_T = factor_T.masked_fill((advantage_T < 0) & (drift_T > samples.off_policy_limit), 0.0)
    return factor_T


def correction_weight(gap_T: Tensor, sequences: Sequences, correction: Correction) -> Tensor:
    """The bounded pi / mu of each token, [T].

    Args:
        gap_T: log pi - log mu.
        sequences: of the batch.
        correction: level and bounds.
    """
    if correction.level == "sequence":
        gap_T = sequences.spread(sequences.sum(gap_T))
    weight_T = gap_T.detach().exp()
    if correction.beyond == "truncate":
        return weight_T.clamp(correction.low, correction.high)
    return weight_T.masked_fill((weight_T < correction.low) | (weight_T > correction.high), 0.0)


def refuse_double_correction(old: Old, samples: Samples) -> None:
    """Raise BadInput where both the ratio and the correction are to the sampler."""
    if old == "rollout" and samples.correction is not None:
        raise BadInput(
            "the ratio is to the sampler already, and samples.correction would correct for it again",
            fix="old: current, or no correction",
        )


# --- what to report ---


@dataclass(frozen=True)
class ImportanceSums:
    """How far sampler and learner are apart on some tokens: sums and one largest, so parts add up."""

    count: int = 0
    gap: float = 0.0
    """Sum of log pi - log mu."""
    largest_gap: float = 0.0
    """The largest absolute one."""
    outside: int = 0
    """How many w = pi / mu are outside 1 +- `NEAR`."""
    weight: float = 0.0
    """Sum of w."""
    square_weight: float = 0.0
    kl: float = 0.0
    """Sum of w - 1 - log w, whose mean estimates KL(mu || pi)."""
    clipped: int = 0
    """How many tokens the clip stops the gradient of."""

    def __add__(self, other: ImportanceSums) -> ImportanceSums:
        sums = [mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)]
        sums[2] = max(self.largest_gap, other.largest_gap)
        return ImportanceSums(*sums)

    def report(self) -> dict[str, float]:
        """The numbers of these tokens, with their count; only the count where there are none.

        effective_tokens is (sum w)^2 / sum w^2: as many tokens of the learner's own would know as much.
        """
        if not self.count:
            return {"count": 0}
        return {
            "count": self.count,
            "mean_gap_nats": self.gap / self.count,
            "largest_gap_nats": self.largest_gap,
            "outside_share": self.outside / self.count,
            "effective_tokens": self.weight**2 / self.square_weight if self.square_weight else 0.0,
            "kl_nats": self.kl / self.count,
            "clip_share": self.clipped / self.count,
        }


def importance_sums(
    log_probs: TokenLogProbs, batch: Batch, *, clip: Clip | None = None, skip_truncated: bool = False
) -> ImportanceSums:
    """Compare the learner's log-probabilities with the sampler's, for the report; no loss.

    Args:
        log_probs: pi.
        batch: with `rollout_logprob`, and `advantage` if there is a clip.
        clip: whose share is reported, of ratios to the sampler; None for none.
        skip_truncated: as in the objective.

    Raises:
        BadInput: a column is missing.

    >>> sums = ImportanceSums(count=2, weight=4.0, square_weight=10.0) + ImportanceSums()
    >>> sums.report()["effective_tokens"]
    1.6
    """
    batch = complete(batch, skip_truncated=skip_truncated)
    at_T = batch.weight_T > 0
    gap_N = log_ratio(log_probs, batch, "rollout").detach().double()[at_T]
    if not len(gap_N):
        return ImportanceSums()
    weight_N = gap_N.exp()
    advantage_N = None if clip is None else batch.column("advantage", at_T)[at_T]
    return ImportanceSums(
        count=len(gap_N),
        gap=float(gap_N.sum()),
        largest_gap=float(gap_N.abs().max()),
        outside=int(((weight_N - 1).abs() > NEAR).sum()),
        weight=float(weight_N.sum()),
        square_weight=float(weight_N.square().sum()),
        kl=float((weight_N - 1 - gap_N).sum()),
        clipped=0
        if clip is None or advantage_N is None
        else int(is_clipped(weight_N, advantage_N, clip).sum()),
    )


def is_clipped(ratio_T: Tensor, advantage_T: Tensor, clip: Clip) -> Tensor:
    """bool: where the clipped surrogate's gradient is stopped."""
    above_T = (advantage_T > 0) & (ratio_T > 1 + clip.high)
    below_T = (advantage_T < 0) & (ratio_T < 1 - clip.low)
    far_T = (advantage_T < 0) & (ratio_T > (math.inf if clip.dual is None else clip.dual))
    return above_T | below_T | far_T
