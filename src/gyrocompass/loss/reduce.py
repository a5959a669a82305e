"""The only mean in the system: terms to a loss, the same however the tokens were split.

    window = all micro-batches of all ranks that one optimizer step sees

    normalise(composite, micro-batches, weights, gather) -> Normaliser     before the first forward pass
    Normaliser.loss(terms, batch)                        -> this micro-batch's share of the loss

For each objective, with value v, weight w and the weight W of a group over the whole window,

    loss = sum_groups 1/G sum_{t in group} w_t v_t / W_group

where the group is the whole window (by token; G = 1), a document (by sequence) or a slice, and G counts the
groups with any weight. By constant, loss = sum_t w_t v_t / constant. Shares add up over micro-batches and
ranks to the loss, and so do their gradients: accumulate by summing; under a data-parallel mean multiply by
the world size. A mean of means never happens, since W is known before anything is divided.

That needs weights that depend on the batch alone. They are found by evaluating the objectives on
log-probabilities of zero; a weight that turns out to differ in the real pass is an error.

Shape legend: T tokens (or pairs, or groups: one entry per term), G groups, T and G of the whole window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.loss.objective import Composite
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs

Gather = Callable[[Tensor], Tensor]
"""Concatenates a 1-D float64 tensor on the CPU, of a length of each rank's own, over ranks in rank order."""


class Reduction(Config):
    """What weighs the same in the loss: every token (times its weight), every document, or every slice.

    By sequence, a document that a window reads twice, because an epoch turns within it, is one document.
    """

    by: Literal["token", "sequence", "slice", "constant"] = "token"
    constant: PositiveFloat | None = None
    """What sums are divided by with `by: constant`, such as the tokens of a full window."""

    @model_validator(mode="after")
    def _constant_belongs_to_constant(self) -> Reduction:
        if (self.by == "constant") != (self.constant is not None):
            raise ValueError("constant is given with `by: constant`, and only then")
        return self


class Tally(NamedTuple):
    """What one objective summed to over a micro-batch: sums only, so tallies add."""

    value_sum: float
    """sum of value * weight."""
    weight_sum: float
    entries: int
    """How many had a weight above 0."""


class Reduced(NamedTuple):
    """A micro-batch's part in the step."""

    loss: Tensor
    """Its share of the loss (a scalar): shares add up over micro-batches and ranks."""
    report: dict[str, Tally]
    """By objective, whatever its weight in the composite."""


class GroupWeights(NamedTuple):
    """The window's groups with any weight, in order of their keys."""

    key_G: Tensor
    weight_G: Tensor
    """float64."""


@dataclass(frozen=True)
class Normaliser:
    """What one window's losses are divided by."""

    composite: Composite
    reduction: Reduction
    weights: Mapping[str, float]
    """Of each objective in the loss."""
    groups: dict[str, GroupWeights]

    def loss(self, terms: dict[str, Terms], batch: Batch) -> Reduced:
        """Reduce a micro-batch's terms to its share of the window's loss.

        Args:
            terms: the composite's answer for the batch.
            batch: one of the micro-batches that were given to `normalise`.

        Returns:
            `Reduced`: the share (0, still differentiable, where nothing counts) and the sums.

        Raises:
            BadInput: an objective's weight depends on the model.
        """
        known = _known_weights(self.composite, batch)
        for name, (_, weight) in terms.items():
            if not torch.equal(weight, known[name]):
                raise BadInput(
                    f"the weight of the objective {name} depends on the model's log-probabilities",
                    fix="let its weight depend on the batch alone, and multiply the rest into its value",
                )
        return Reduced(self.share(terms, batch), {name: _tally(*term) for name, term in terms.items()})

    def share(self, terms: dict[str, Terms], batch: Batch) -> Tensor:
        """The share of the loss alone, as `loss` has it."""
        shares = self.shares(terms, batch)
        return torch.stack([self.weights[name] * share for name, share in shares.items()]).sum()

    def shares(self, terms: dict[str, Terms], batch: Batch) -> dict[str, Tensor]:
        """The share of each objective by itself, whatever its weight in the loss."""
        return {
            name: (value * self._coefficients(name, weight, batch).to(value)).sum()
            for name, (value, weight) in terms.items()
        }

    def _coefficients(self, name: str, weight_T: Tensor, batch: Batch) -> Tensor:
        """What each value is multiplied by: weight / (G * the weight of its group), float64 [T]."""
        weight_T = weight_T.double()
        if self.reduction.constant is not None:
            return weight_T / self.reduction.constant
        key_G, weight_G = (field.to(weight_T.device) for field in self.groups[name])
        coefficient_T = torch.zeros_like(weight_T)
        counted_N = (weight_T > 0).nonzero().squeeze(1)
        key_N = _group_keys(self.reduction, weight_T, batch)[counted_N]
        group_N = torch.searchsorted(key_G, key_N)
        coefficient_T[counted_N] = weight_T[counted_N] / (len(key_G) * weight_G[group_N])
        return coefficient_T


def one_process(values: Tensor) -> Tensor:
    """The gather of a run without ranks: what it is given."""
    return values


def normalise(
    composite: Composite,
    batches: Sequence[Batch],
    weights: Mapping[str, float] | None = None,
    *,
    reduction: Reduction | None = None,
    gather: Gather = one_process,
) -> Normaliser:
    """Weigh a window before its first forward pass.

    Args:
        composite: the objectives.
        batches: this rank's micro-batches of the window; may be none.
        weights: of the objectives, by name; those of the composite's first step if not given.
        reduction: by token if not given.
        gather: concatenates over ranks; called once per objective, on every rank alike.

    Returns:
        The `Normaliser` of the window.
    """
    reduction = reduction or Reduction()
    known = [_known_weights(composite, batch) for batch in batches]
    groups: dict[str, GroupWeights] = {}
    for name in composite.names:
        keys = [_group_keys(reduction, w[name], batch).cpu() for w, batch in zip(known, batches, strict=True)]
        entries = [w[name].double().cpu() for w in known]
        key_T = torch.cat([torch.empty(0, dtype=torch.int64), *keys])
        weight_T = torch.cat([torch.empty(0, dtype=torch.float64), *entries])
        mine = _sum_by_key(key_T, weight_T)
        # Keys count documents, slices: far below 2^53, so they pass through float64 unchanged.
        key_R, weight_R = (
            gather(torch.stack([mine.key_G.double(), mine.weight_G], dim=1).flatten()).view(-1, 2).T
        )
        groups[name] = _sum_by_key(key_R.long(), weight_R)
    return Normaliser(composite, reduction, composite.weights(0) if weights is None else weights, groups)


def _sum_by_key(key: Tensor, weight: Tensor) -> GroupWeights:
    """Sum weights of equal keys; keys without weight are left out."""
    key_G, group = torch.unique(key[weight > 0], return_inverse=True)
    return GroupWeights(
        key_G, torch.zeros(len(key_G), dtype=torch.float64).index_add(0, group, weight[weight > 0])
    )


def _group_keys(reduction: Reduction, weight: Tensor, batch: Batch) -> Tensor:
    """Which group each entry belongs to: int64, like the weight."""
    if reduction.by in ("token", "constant"):
        return torch.zeros_like(weight, dtype=torch.int64)
    key_T = batch.document_T if reduction.by == "sequence" else batch.slice_T
    if weight.shape != key_T.shape:
        sizes = f"{len(weight)} entries for {len(key_T)} tokens"
        raise BadInput(
            f"an objective with {sizes} cannot be reduced by {reduction.by}",
            fix="reduce by token (every entry weighs by its own weight) or by constant",
        )
    return key_T


def _known_weights(composite: Composite, batch: Batch) -> dict[str, Tensor]:
    """Each objective's weights, from log-probabilities of zero: they may depend on the batch alone."""
    zero_T = torch.zeros_like(batch.weight_T)
    candidate_TC = composite.candidates(batch)
    zeros = TokenLogProbs(
        logprob_T=zero_T,
        lse_T=zero_T,
        entropy_T=zero_T,
        mean_logit_T=zero_T,
        sum_sq_T=zero_T,
        rank_T=zero_T.long(),
        candidate_TC=None if candidate_TC is None else zero_T[:, None].expand(candidate_TC.shape),
        scalar_T=zero_T,
        divergence_TK=zero_T[:, None].expand(-1, len(composite.divergences)),
        hidden_TD=zero_T[:, None],
        future_TK=zero_T[:, None],
    )
    with torch.no_grad():
        return {name: term.weight for name, term in composite(zeros, batch).items()}


def _tally(value: Tensor, weight: Tensor) -> Tally:
    """The sums of one objective, in float64, fetched from the device at once."""
    value, weight = value.detach().double(), weight.double()
    value_sum, weight_sum, count = torch.stack(
        [(value * weight).sum(), weight.sum(), (weight > 0).sum().double()]
    ).tolist()
    return Tally(value_sum, weight_sum, int(count))
