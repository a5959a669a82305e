"""Scheduled sampling for transformers: some inputs are the model's own tokens, the targets stay gold.

    pass 1   without gradient, on the gold inputs: at each counted position t a token is drawn from
             p(. | x_<=t), which is the model's own guess at input t + 1
    mix      input t + 1 becomes that token with probability epsilon(step)
    pass 2   the training pass, on the mixed inputs with gold targets: whatever the objective is

Replaced are only tokens that the model is trained to say: never what is context (a prompt), the first token
of a document or of a piece of one, or padding. Gradients do not flow through the draw.

Pass 1 also has the teacher-forced log-probabilities, which belong beside the loss in every report: the NLL of
pass 2 is one under the model's own inputs, and no NLL of a text.

A draw depends on the seed, the step, the document, the position in its piece and the tokens there, and on
nothing else, so that the mixed inputs of a window are the same however it is split. Pass 1 runs in evaluation
mode, without dropout: it takes nothing from the random state, and so resume and splitting stay exact.

Left out: more than two passes (a replaced token is drawn in the gold context, as Mihaylova and Martins do),
mixing embeddings by their probabilities, and draws other than from the model's distribution itself.

Shape legend: T positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gyrocompass.core.config import Config
from gyrocompass.loss.objective import Schedule, Weight
from gyrocompass.loss.signal import Batch
from gyrocompass.model.score import evaluating, log_probs


class ScheduledSamplingConfig(Config):
    """How much of what a model reads is its own, step by step.

        scheduled_sampling: {epsilon: {linear: {from: 0.0, to: 0.25, steps: 1000}}}

    Bengio et al. count the other way: theirs is the share that stays gold.
    """

    epsilon: Weight = Field(default=0.1)
    """The probability that an input is replaced: a number, or a schedule over optimizer steps."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _is_a_probability(self) -> ScheduledSamplingConfig:
        ramp = None if not isinstance(self.epsilon, Schedule) else self.epsilon.linear or self.epsilon.cosine
        ends = (self.epsilon,) if ramp is None else (ramp.start, ramp.to)
        if not all(isinstance(end, float) and 0.0 <= end <= 1.0 for end in ends):
            raise ValueError("epsilon is a probability: from 0 to 1")
        return self

    def probability(self, step: int) -> float:
        """epsilon at an optimizer step, counted from 0."""
        return self.epsilon.at(step) if isinstance(self.epsilon, Schedule) else self.epsilon


class Mixed(NamedTuple):
    """A batch for the training pass, and what pass 1 saw."""

    batch: Batch
    """The given one with its own tokens in the place of some inputs; all else is as it was."""
    replaced_T: Tensor
    """bool: where the input is a drawn token (which may happen to be the gold one)."""
    teacher_forced_T: Tensor | None
    """log p(target) under gold inputs, in nats, 0 where not counted; None where epsilon is 0 and the training
    pass has it itself."""


def scheduled_sampling(model: nn.Module, batch: Batch, config: ScheduledSamplingConfig, step: int) -> Mixed:
    """Replace some inputs of a micro-batch by tokens that the model draws.

        x'_{t+1} = y_t ~ p(. | x_<=t)  if u < epsilon(step) and w_t > 0,  else x_{t+1}

    Args:
        model: as for `log_probs`; it is left in the mode that it was in, without gradients of this pass.
        batch: a micro-batch of the step's window, on the model's device.
        config: with which probability.
        step: the optimizer step, counted from 0.

    Returns:
        `Mixed`.

    Source: Bengio et al. 2015, arXiv:1506.03099; Mihaylova and Martins 2019, arXiv:1906.07651 (two passes).
    """
    epsilon = config.probability(step)
    if epsilon == 0.0:
        return Mixed(batch, torch.zeros_like(batch.token_T, dtype=torch.bool), None)
    key_T = _keys(batch, config.seed, step)
    with evaluating(model), torch.no_grad():
        answer = log_probs(model, batch, want=(), seed_T=_mixed(key_T ^ _DRAW))
    assert answer.drawn_T is not None, "a seed was given"
    replaced_T = torch.zeros_like(batch.token_T, dtype=torch.bool)
    replaced_T[1:] = (_follows(batch) & (_uniform(key_T ^ _COIN) < epsilon))[:-1]
    drawn_T = torch.cat([batch.token_T[:1], answer.drawn_T[:-1]])
    token_T = torch.where(replaced_T, drawn_T, batch.token_T)
    return Mixed(replace(batch, token_T=token_T), replaced_T, answer.logprob_T)


def _follows(batch: Batch) -> Tensor:
    """bool [T]: whether the next position reads what this one is trained to predict."""
    counted_T = batch.weight_T > 0
    follows_T = torch.zeros_like(counted_T)
    follows_T[:-1] = (batch.segment_T[1:] == batch.segment_T[:-1]) & (
        batch.position_T[1:] == batch.position_T[:-1] + 1
    )
    return follows_T & counted_T


# --- draws that belong to a place ---

_DRAW, _COIN = 0x5DEECE66D, 0x2545F4914F6CDD1D
"""What tells the two draws of a place apart."""


def _keys(batch: Batch, seed: int, step: int) -> Tensor:
    """int64 [T]: a number for each place. The tokens tell the pieces of one document apart."""
    key_T = torch.full_like(batch.token_T, seed)
    for part in (step, batch.document_T, batch.position_T, batch.token_T, batch.target_T):
        key_T = _mixed(key_T) + part
    return _mixed(key_T)


def _uniform(key_T: Tensor) -> Tensor:
    """float64 in [0, 1), from the upper bits of a mixed key."""
    return ((_mixed(key_T) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) on int64, whose products wrap around."""
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _FACTORS[0]
    x = (x ^ _shifted(x, 27)) * _FACTORS[1]
    return x ^ _shifted(x, 31)


_STEP, *_FACTORS = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in, as for unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
