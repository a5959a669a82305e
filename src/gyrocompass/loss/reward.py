"""Objectives of reward models: pure functions from a scalar head's numbers to terms.

    r(y) = what the scalar head says at the last position of the sequence

which has read all of it and nothing of padding or of other sequences. Pairs teach only differences between
rewards; the `centring` term keeps their level at 0.

Left out: models with one output per attribute, and calibration, which is measured after training.

Shape legend: T positions, S sequences, P pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.registry import objective
from gyrocompass.loss.sequences import Pairs, Sequences
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs


@objective(wants=("scalar",))
def reward_pairs(
    log_probs: TokenLogProbs, batch: Batch, *, margin: bool = False, centring: NonNegativeFloat = 0.0
) -> Terms:
    """Bradley-Terry: the chosen answer's reward is the higher one.

        value_p = -log sigmoid(r_c - r_r - m) + centring (r_c + r_r)^2

    Without the second term the loss does not change when all rewards are shifted.

    Args:
        log_probs: with scalar_T.
        batch: with the label `side`.
        margin: whether m is the label `margin` of the chosen side; else 0.
        centring: lambda, such as 0.01.

    Returns:
        Terms [P]; ln 2 for equal rewards without margin and centring.

    Raises:
        BadInput: a label missing, a sequence without its pair.

    Source: Ouyang et al. 2022, arXiv:2203.02155; margins, arXiv:2307.09288; centring, arXiv:2312.09244.
    """
    pairs = Pairs(Sequences(batch))
    chosen_P, rejected_P = pairs.sides(_rewards(log_probs, pairs.sequences))
    ahead_P = chosen_P - rejected_P
    if margin:
        ahead_P = ahead_P - pairs.sides(pairs.sequences.label("margin"))[0]
    level_P = (chosen_P + rejected_P).square()
    return Terms(-F.logsigmoid(ahead_P) + centring * level_P, pairs.weight_P)


@objective(wants=("scalar",))
def reward_pairs_with_ties(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    threshold: PositiveFloat = 0.5,
    centring: NonNegativeFloat = 0.0,
) -> Terms:
    """Rao-Kupper: one answer is chosen, or both are as good, which takes a difference below a threshold.

        d = r_c - r_r,  eta = threshold
        p(c better) = sigmoid(d - eta)        p(r better) = sigmoid(-d - eta)
        p(tie) = (exp(2 eta) - 1) sigmoid(d - eta) sigmoid(-d - eta)          the three sum to 1
        value_p = -log p(what the label says) + centring (r_c + r_r)^2

    Taken rather than Davidson's model, since a pair that is no tie is a Bradley-Terry pair with a margin. The
    sides of a tie may be in either order.

    Args:
        log_probs: with scalar_T.
        batch: with the labels `side` and `tie` (1 or 0, read at the chosen side).
        threshold: eta = log theta; how large a difference must be to be seen.
        centring: as in `reward_pairs`.

    Returns:
        Terms [P].

    Raises:
        BadInput: a label missing or `tie` neither 1 nor 0, a sequence without its pair.

    Source: Rao and Kupper 1967, "Ties in paired-comparison experiments"; for rewards, arXiv:2410.05328.
    """
    pairs = Pairs(Sequences(batch))
    tie_P = _checked("tie", pairs.sides(pairs.sequences.label("tie"))[0]) == 1.0
    chosen_P, rejected_P = pairs.sides(_rewards(log_probs, pairs.sequences))
    ahead_P = chosen_P - rejected_P
    log_better_P, log_worse_P = F.logsigmoid(ahead_P - threshold), F.logsigmoid(-ahead_P - threshold)
    log_room = torch.expm1(ahead_P.new_tensor(2.0 * threshold)).log()
    log_p_P = torch.where(tie_P, log_room + log_better_P + log_worse_P, log_better_P)
    return Terms(-log_p_P + centring * (chosen_P + rejected_P).square(), pairs.weight_P)


@objective(wants=("scalar",))
def reward_regression(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Pointwise regression: the reward is the answer's score.

        value_s = (r(y) - score)^2

    Args:
        log_probs: with scalar_T.
        batch: with the label `score`.

    Returns:
        Terms [S], in the square of the score's unit.

    Source: Wang et al. 2024, arXiv:2406.08673 (HelpSteer2), for one attribute.
    """
    sequences = Sequences(batch)
    error_S = _rewards(log_probs, sequences) - sequences.label("score")
    return Terms(error_S.square(), sequences.weight_S)


@objective(wants=("scalar",))
def reward_classification(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Pointwise classification: sigmoid(r) is the probability that the answer is desirable.

        value_s = -d log sigmoid(r(y)) - (1 - d) log sigmoid(-r(y))        d = desirable

    Args:
        log_probs: with scalar_T.
        batch: with the label `desirable`: 1, 0, or a probability between.

    Returns:
        Terms [S] in nats; ln 2 where the head says 0.

    Raises:
        BadInput: a label missing or outside [0, 1].

    Source: Cobbe et al. 2021, arXiv:2110.14168, for whole answers.
    """
    sequences = Sequences(batch)
    label_S = _checked("desirable", sequences.label("desirable"), between=True)
    return Terms(_cross_entropy(_rewards(log_probs, sequences), label_S), sequences.weight_S)


@objective(wants=("scalar",))
def process_reward(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Rewards of steps: sigmoid of the number at a step's end is the probability that the step is right.

        value_t = -d log sigmoid(r_t) - (1 - d) log sigmoid(-r_t)        d = step_reward_t

    A position counts where it counts in the batch and its `step_reward` is not NaN: each step weighs the same
    (or as its position does), however long it is.

    Args:
        log_probs: with scalar_T.
        batch: with the column `step_reward`: 1, 0, or a probability between, at the position that reads the
            last token of each step.

    Returns:
        Terms [T] in nats.

    Raises:
        BadInput: no such column, or a label outside [0, 1].

    Source: Lightman et al. 2023, arXiv:2305.20050; Uesato et al. 2022, arXiv:2211.14275.
    """
    assert log_probs.scalar_T is not None
    name = "step_reward"
    labelled_T = (batch.weight_T > 0) & ~batch.columns.get(name, batch.weight_T).isnan()
    label_T = _checked(name, batch.column(name, labelled_T), between=True)
    value_T = _cross_entropy(log_probs.scalar_T, label_T).masked_fill(~labelled_T, 0.0)
    return Terms(value_T, batch.weight_T.masked_fill(~labelled_T, 0.0))


def _rewards(log_probs: TokenLogProbs, sequences: Sequences) -> Tensor:
    """What the head says at the last position of each sequence, [S]."""
    assert log_probs.scalar_T is not None
    return sequences.at_last(log_probs.scalar_T)


def _cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit, label.to(logit.dtype), reduction="none")


def _checked(name: str, label: Tensor, *, between: bool = False) -> Tensor:
    """A label that is 1 or 0, or anything between them."""
    wrong = (label < 0.0) | (label > 1.0) if between else (label != 0.0) & (label != 1.0)
    if wrong.any():
        allowed = "between 0 and 1" if between else "1 or 0"
        raise BadInput(f"the label {name!r} is {float(label[wrong][0])}; it must be {allowed}")
    return label
