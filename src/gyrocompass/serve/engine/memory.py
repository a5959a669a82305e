"""Keys and values: of the sequences that decode, of one that is being read, of prompts that may come again.

    Scratch   one prompt while it is read, chunk by chunk
    Rows      all sequences that decode: [rows, heads, positions, width] per layer, a row each, no gap
    Prefixes  blocks of prompts read before, by what they say and what stands before them

Rows are kept without gaps: where a sequence ends, the last row moves into its place. A step then reads
`[:rows, :, :longest]`, a view, and copies nothing; on a CPU, gathering blocks through a table at each step
costs more than the attention over them. Blocks are for what is shared: a prompt whose beginning was read
before copies it instead of computing it.

Each of these is what `transformers` takes for a cache: `update` per layer, `get_seq_length`.

Shape legend: B rows, H heads, L positions, K layers, D width of a head.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
"""Tokens in a block of a prefix."""
_GROWTH = 128
"""Positions are made room for in steps of so many."""

Layer = tuple[Tensor, Tensor]
"""Keys and values."""


class Scratch:
    """One sequence's keys and values while its prompt is read."""

    def __init__(self, length: int) -> None:
        self.layers: list[Layer] = []
        self.done = 0
        self._length = length

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take a chunk's, of shape [1, H, L, D]; give all so far."""
        if layer == len(self.layers):
            self.layers.append((self._empty(key), self._empty(value)))
        end = self.done + key.shape[2]
        seen = []
        for own, new in zip(self.layers[layer], (key, value), strict=True):
            own[:, :, self.done : end] = new
            seen.append(own[:, :, :end])
        return seen[0], seen[1]

    def get_seq_length(self, *_: Any) -> int:
        """What `transformers` asks; positions are given beside."""
        return 0

    def put(self, blocks: Sequence[Sequence[Layer]]) -> None:
        """Begin with blocks that were read before."""
        for block in blocks:
            for number, (key, value) in enumerate(block):
                self.update(key, value, number)
            self.done += BLOCK

    def block(self, number: int) -> list[Layer]:
        """A copy of one block."""
        part = slice(number * BLOCK, (number + 1) * BLOCK)
        return [(key[:, :, part].clone(), value[:, :, part].clone()) for key, value in self.layers]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(like.shape[0], like.shape[1], self._length, like.shape[3])


class Rows:
    """The keys and values of all sequences that decode; row r belongs to the r-th of them."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.lengths: list[int] = []
        """Positions that each row holds."""

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, scratch: Scratch) -> None:
        """A sequence whose prompt is read gets the next row."""
        row = len(self.lengths)
        self._make_room(row + 1, scratch.done + 1, scratch.layers)
        for own, new in zip(self.layers, scratch.layers, strict=True):
            for mine, theirs in zip(own, new, strict=True):
                mine[row, :, : scratch.done] = theirs[0, :, : scratch.done]
        self.lengths.append(scratch.done)

    def remove(self, row: int) -> None:
        """The last row takes this one's place."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for own in self.layers:
                for mine in own:
                    mine[row, :, :length] = mine[last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()

    def positions(self) -> int:
        """That are set aside."""
        return self.layers[0][0].shape[0] * self.layers[0][0].shape[2] if self.layers else 0

    def begin(self) -> Tensor:
        """Every row is about to take one more token: where, [B]."""
        self._make_room(len(self.lengths), max(self.lengths) + 1, self.layers)
        device = self.layers[0][0].device
        self._place_B = torch.tensor(self.lengths, device=device)
        self._row_B = torch.arange(len(self.lengths), device=device)
        self._longest = max(self.lengths) + 1
        return self._place_B

    def end(self) -> None:
        """They have."""
        self.lengths = [length + 1 for length in self.lengths]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take one token of each row, [B, H, 1, D]; give all positions in use."""
        seen = []
        for own, new in zip(self.layers[layer], (key, value), strict=True):
            own[self._row_B, :, self._place_B] = new[:, :, 0]
            seen.append(own[: len(self.lengths), :, : self._longest])
        return seen[0], seen[1]

    def get_seq_length(self, *_: Any) -> int:
        """What `transformers` asks; positions are given beside."""
        return 0

    def _make_room(self, rows: int, positions: int, like: Sequence[Layer]) -> None:
        """Room for so many; what is held stays."""
        held = self.layers[0][0].shape if self.layers else torch.Size((0, 0, 0, 0))
        if rows <= held[0] and positions <= held[2]:
            return
        new_rows = max(rows, held[0] if rows <= held[0] else 2 * held[0])
        new_positions = max(-(-positions // _GROWTH) * _GROWTH, held[2])
        if self.lengths and positions > held[2]:
            new_positions = max(new_positions, held[2] + held[2] // 2)
        layers = []
        for number, given in enumerate(like):
            fresh = tuple(x.new_zeros(new_rows, x.shape[1], new_positions, x.shape[3]) for x in given)
            if self.lengths:
                for mine, old in zip(fresh, self.layers[number], strict=True):
                    mine[: held[0], :, : held[2]] = old
            layers.append((fresh[0], fresh[1]))
        self.layers = layers


class Found(NamedTuple):
    """The beginning of a prompt that was read before."""

    blocks: list[list[Layer]]

    @property
    def tokens(self) -> int:
        """How many tokens it saves."""
        return len(self.blocks) * BLOCK


class Prefixes:
    """Blocks of prompts, the least recently used forgotten first.

    A block's name is a hash of its tokens and of the name of the block before it: equal names mean equal
    tokens from the prompt's start, and so equal keys and values.

    Args:
        most_tokens: that are kept.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens // BLOCK
        self._blocks: OrderedDict[bytes, list[Layer]] = OrderedDict()
        self.hits, self.asked = 0, 0
        """Tokens."""

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, ids: Sequence[int]) -> Found:
        """The longest beginning that is known, leaving at least one token to read."""
        blocks = []
        for name in _names(ids[: len(ids) - 1]):
            if name not in self._blocks:
                break
            self._blocks.move_to_end(name)
            blocks.append(self._blocks[name])
        self.asked += len(ids)
        self.hits += len(blocks) * BLOCK
        return Found(blocks)

    def keep(self, ids: Sequence[int], scratch: Scratch) -> None:
        """Remember the whole blocks of a prompt that was read."""
        for number, name in enumerate(_names(ids)):
            if name in self._blocks:
                self._blocks.move_to_end(name)
            elif self._most:
                self._blocks[name] = scratch.block(number)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)


def _names(ids: Sequence[int]) -> list[bytes]:
    """Of the whole blocks, first to last."""
    found, before = [], b""
    for start, end in pairwise(range(0, len(ids) + 1, BLOCK)):
        before = hashlib.sha256(before + np.array(ids[start:end], np.int64).tobytes()).digest()
        found.append(before)
    return found
