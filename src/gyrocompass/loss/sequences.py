"""From tokens to sequences and pairs: sums over segments, and the two sides of each pair.

A segment is one packed sequence: an answer with its prompt. `Sequences` numbers those of a batch from 0 and
adds up what their counted tokens have; `Pairs` finds the chosen and the rejected one of each unit, which the
packing keeps in one micro-batch. Everything is a sum over tokens of one micro-batch, so none of it depends on
how a window is split.

Shape legend: T positions, S sequences (segments with a counted token), P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.signal import Batch


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch that have something to count, in order."""

    batch: Batch

    @cached_property
    def counted_T(self) -> Tensor:
        """bool: where a token counts."""
        return self.batch.weight_T > 0

    @cached_property
    def _segments(self) -> tuple[Tensor, Tensor]:
        """The segment numbers [S] that have a counted token, and each position's sequence (-1: none)."""
        segment_T = self.batch.segment_T
        own_S = torch.unique(segment_T[self.counted_T & (segment_T >= 0)])
        if not len(own_S):
            return own_S, torch.full_like(segment_T, -1)
        place_T = torch.searchsorted(own_S, segment_T).clamp(max=len(own_S) - 1)
        return own_S, torch.where(own_S[place_T] == segment_T, place_T, -1)

    @property
    def sequence_T(self) -> Tensor:
        """int64: the sequence that each position is of, its prompt included; -1 where it is of none."""
        return self._segments[1]

    def __len__(self) -> int:
        return len(self._segments[0])

    def sum(self, values_T: Tensor) -> Tensor:
        """Sums over the counted tokens of each sequence, [S]."""
        return self._add(values_T.masked_fill(~self.counted_T, 0.0), self.counted_T)

    @cached_property
    def length_S(self) -> Tensor:
        """How many tokens of each count, float32."""
        return self.sum(torch.ones_like(self.batch.weight_T))

    def mean(self, values_T: Tensor) -> Tensor:
        """Means over the counted tokens of each sequence, [S]."""
        return self.sum(values_T) / self.length_S.to(values_T.dtype)

    @cached_property
    def last_S(self) -> Tensor:
        """int64: the last position of each: what has read all of it."""
        place_T = torch.arange(len(self.sequence_T), device=self.sequence_T.device)
        own_T = self.sequence_T >= 0
        last_S = place_T.new_zeros(len(self))
        return last_S.scatter_reduce(0, self.sequence_T[own_T], place_T[own_T], "amax", include_self=False)

    def at_last(self, values_T: Tensor) -> Tensor:
        """What stands at the last position of each, [S]."""
        return values_T.index_select(0, self.last_S)

    def label(self, name: str) -> Tensor:
        """A number that the whole of each sequence has, [S].

        Raises:
            BadInput: there is no such label, or a sequence without it.
        """
        return self.at_last(self.batch.column(name, self.sequence_T >= 0))

    @cached_property
    def unit_S(self) -> Tensor:
        """The unit that each is of."""
        return self.at_last(self.batch.unit_T)

    @cached_property
    def weight_S(self) -> Tensor:
        """The weight of each: the largest of its tokens."""
        zero_S = self.batch.weight_T.new_zeros(len(self))
        own_T = self.sequence_T >= 0
        return zero_S.scatter_reduce(0, self.sequence_T[own_T], self.batch.weight_T[own_T], "amax")

    def spread(self, values_S: Tensor) -> Tensor:
        """A value per sequence at each of its positions, 0 elsewhere, [T]."""
        if not len(self):
            return values_S.new_zeros(len(self.sequence_T))
        spread_T = values_S.index_select(0, self.sequence_T.clamp(min=0))
        return spread_T.masked_fill(self.sequence_T < 0, 0.0)

    def _add(self, values_T: Tensor, where_T: Tensor) -> Tensor:
        zero_S = values_T.new_zeros(len(self))
        return zero_S.index_add(0, self.sequence_T[where_T], values_T[where_T])


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch, in order of their units: units with one chosen and one rejected sequence.

    A record's label `side` is 1 for the chosen answer and 0 for the rejected one.
    """

    sequences: Sequences

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Which sequences are chosen and rejected, pair by pair: int64 [P] each."""
        sequences = self.sequences
        side_S = sequences.label("side")
        chosen_P, rejected_P = ((side_S == side).nonzero().squeeze(1) for side in (1.0, 0.0))
        chosen_P = chosen_P[sequences.unit_S[chosen_P].argsort(stable=True)]
        rejected_P = rejected_P[sequences.unit_S[rejected_P].argsort(stable=True)]
        units = (sequences.unit_S[chosen_P], sequences.unit_S[rejected_P])
        if len(chosen_P) + len(rejected_P) != len(side_S) or not torch.equal(*units):
            raise BadInput(
                f"{len(side_S)} sequences are not pairs of a chosen and a rejected one",
                fix="give preference records: prompt, chosen, rejected",
            )
        return chosen_P, rejected_P

    def sides(self, values_S: Tensor) -> tuple[Tensor, Tensor]:
        """A value per sequence as those of the chosen and of the rejected ones, [P] each."""
        chosen_P, rejected_P = self._places
        return values_S.index_select(0, chosen_P), values_S.index_select(0, rejected_P)

    @cached_property
    def weight_P(self) -> Tensor:
        """The weight of each pair: that of its chosen side."""
        return self.sides(self.sequences.weight_S)[0]
