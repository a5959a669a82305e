"""From sequences to the groups that are read together: the passages of a question, the answers to a prompt.

A group is the sequences of one unit, which the packing keeps in one micro-batch. A window that reads a unit
twice, because an epoch turns within it, has two groups of it.

Shape legend: S sequences, G groups, N entries that belong to groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gyrocompass.loss.sequences import Sequences


@dataclass(frozen=True)
class Groups:
    """The groups of a batch, in order of their units."""

    sequences: Sequences

    @cached_property
    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Each group's unit and nth reading [G, 2], and each sequence's group [S]."""
        document_S = self.sequences.at_last(self.sequences.batch.document_T)
        key_S2 = torch.stack([self.sequences.unit_S, _nth(document_S)], dim=1)
        key_G2, group_S = torch.unique(key_S2, dim=0, return_inverse=True)
        return key_G2, group_S

    @property
    def group_S(self) -> Tensor:
        """int64: the group of each sequence."""
        return self._numbers[1]

    def __len__(self) -> int:
        return len(self._numbers[0])

    @cached_property
    def size_G(self) -> Tensor:
        """int64: how many sequences each has."""
        return torch.bincount(self.group_S, minlength=len(self))

    @cached_property
    def weight_G(self) -> Tensor:
        """The weight of each: the largest of its sequences' weights."""
        weight_S = self.sequences.weight_S
        return weight_S.new_zeros(len(self)).scatter_reduce(0, self.group_S, weight_S, "amax")

    def sum(self, values_S: Tensor) -> Tensor:
        """Sums over the sequences of each, [G]."""
        return values_S.new_zeros(len(self)).index_add(0, self.group_S, values_S)

    def logsumexp(self, values_S: Tensor) -> Tensor:
        """log sum exp over the sequences of each, [G]."""
        return logsumexp_by(values_S, self.group_S, len(self))

    def log_softmax(self, values_S: Tensor) -> Tensor:
        """Each value less the logsumexp of its group, [S]: log-probabilities that sum to 1 in each group."""
        return values_S - self.logsumexp(values_S).index_select(0, self.group_S)


def logsumexp_by(values_N: Tensor, group_N: Tensor, groups: int) -> Tensor:
    """log sum exp of the finite values of each group, [groups]; every group has one.

    >>> logsumexp_by(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0, 1, 0]), 2).tolist()
    [0.6931471824645996, 2.0]
    """
    low_G = values_N.new_full((groups,), -torch.inf)
    top_G = low_G.scatter_reduce(0, group_N, values_N.detach(), "amax")
    raised_N = (values_N - top_G.index_select(0, group_N)).exp()
    return values_N.new_zeros(groups).index_add(0, group_N, raised_N).log() + top_G


def _nth(key_S: Tensor) -> Tensor:
    """How many equal keys stand before each, [S].

    >>> _nth(torch.tensor([7, 5, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order_S = key_S.argsort(stable=True)
    _, count = torch.unique_consecutive(key_S[order_S], return_counts=True)
    begin_S = (count.cumsum(0) - count).repeat_interleave(count)
    place_S = torch.arange(len(key_S), device=key_S.device)
    return torch.empty_like(order_S).scatter(0, order_S, place_S - begin_S)
