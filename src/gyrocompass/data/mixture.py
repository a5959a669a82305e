"""The sampler: which pieces are read when, in what mixture of slices, from a position that can be saved.

    TokenDataset --Sampler--> Packed, Packed, ...      one window (all micro-batches of one step) at a time

Each slice has its own endless order of bundles (a piece, or the pieces of a unit that is read together): one
permutation after the other. The next bundle comes from the slice that has had the least for its share, the
smallest drawn_tokens / weight (stride scheduling, Waldspurger and Weihl 1995), so that the drawn mixture is
never further from the weights than a bundle. Without given weights a slice weighs its own tokens; then all
slices reach the end of their permutations together and an epoch holds each piece exactly once. With given
weights an epoch is as many tokens, of whatever slices.

A temperature T turns shares p into shares in proportion to p^(1/T) (Devlin et al. 2019 with 1/T = 0.7): above
1 smaller slices are read more often than their size says. A cap says how often a slice may be repeated; what
it takes from a slice goes to the others by their weights, and where all are capped the last epoch ends
sooner. `planned` says the shares that come of it, `drawn_tokens` what was drawn.

Bundles are drawn in blocks, packed block by block, and the rows of a block are shuffled: packing sorts by
length, and a step should not hold long documents alone. Under a curriculum by difficulty a block is a window.

Where slice weights move (`curriculum.py`), the next bundle comes from the slice that is furthest behind what
it should have had of the tokens drawn so far.

All of it is a function of dataset, config and the number of rows given: the state is a few integers, the
windows are the same whatever rank or micro-batch reads them, and a restored sampler goes on with the same
rows.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from gyrocompass.core.config import Config, canonical_json
from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.data.curriculum import CurriculumConfig, difficulty, rising, wanted_tokens
from gyrocompass.data.pack import Int64Array, Packed, assemble, bundle, cut, pack
from gyrocompass.data.tokens import TokenDataset

PLANNED = "mixture.json"
"""The file of a model artifact with what `Sampler.planned` said."""
BLOCK_ROWS = 256
"""Rows packed together, at least; enough for best-fit to fill them."""


class SamplerConfig(Config):
    """What decides the order of the data.

    Args:
        length: tokens in a row.
        rows_per_step: rows in a window.
        slice_weights: the share of input tokens that each slice gets, up to a common factor; 0 leaves a slice
            out. Every slice of the data is named. None: each slice by its size.
        temperature: flattens the shares above 1, sharpens them below.
        most_repeats: how often a slice is read at most in the run; None: as its weight says. It needs
            weights that do not move.
        curriculum: an order other than chance, or weights that move.
        epochs: how often the data is read; None: without end.
        tokens: without epochs, how many input tokens are going to be read; only `most_repeats` asks for it.
        seed: of the permutations.
    """

    length: PositiveInt
    rows_per_step: PositiveInt
    slice_weights: dict[str, NonNegativeFloat] | None = None
    temperature: PositiveFloat = 1.0
    most_repeats: PositiveFloat | None = None
    curriculum: CurriculumConfig | None = None
    epochs: PositiveInt | None = 1
    tokens: PositiveInt | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _caps_are_of_something(self) -> SamplerConfig:
        if self.most_repeats is not None and self.epochs is None and self.tokens is None:
            raise ValueError("most_repeats needs epochs or tokens: how long a run is decides what repeats")
        if self.most_repeats is not None and self.curriculum is not None and self.curriculum.slices:
            raise ValueError(
                "most_repeats goes with weights that stay as they are: leave curriculum.slices out"
            )
        return self


@dataclass(frozen=True)
class _Drawn:
    """How far each slice's order has been read when a block begins."""

    block: int
    bundles_S: tuple[int, ...]
    tokens_S: tuple[int, ...]


class Sampler:
    """Windows of packed rows, in an order that depends on nothing but dataset, config and position.

    Iterating gives windows of `rows_per_step` rows; the last one may be shorter.

    Args:
        dataset: the tokens.
        config: see `SamplerConfig`.

    Raises:
        BadInput: nothing in the dataset is counted, or slice weights do not fit the dataset's slices.
    """

    def __init__(self, dataset: TokenDataset, config: SamplerConfig) -> None:
        self.dataset = dataset
        self.config = config
        self.pieces = cut(dataset, config.length)
        if self.pieces.n_pieces == 0:
            raise BadInput("the dataset has no token that counts", fix="check its sources and its masks")
        self.bundles = bundle(dataset, self.pieces, config.length)
        self._length_B = np.add.reduceat(self.pieces.length_P, self.bundles[:-1])
        slice_B = dataset.slice_D[self.pieces.document_P[self.bundles[:-1]]]
        n_slices = len(dataset.slice_names)
        self._bundles_by_slice = [np.flatnonzero(slice_B == index) for index in range(n_slices)]
        self._tokens_S = np.bincount(slice_B, self._length_B, n_slices).astype(np.int64)
        given_S = _slice_weights(config.slice_weights, dataset.slice_names, self._tokens_S)
        self._weight_S = _tempered(given_S, config.temperature)
        self._set_curriculum()
        self.tokens_per_epoch = int(self._tokens_S[self._weight_S + self._end_S > 0].sum())
        self._total_tokens = None if config.epochs is None else config.epochs * self.tokens_per_epoch
        if config.most_repeats is not None:
            self._cap(config.most_repeats, self._total_tokens or config.tokens or 0)
        self._orders: dict[int, tuple[int, Int64Array]] = {}
        self._begin(_Drawn(0, (0,) * n_slices, (0,) * n_slices), 0)

    def _cap(self, most_repeats: float, wanted: int) -> None:
        """Lower the weights of slices that would be repeated too often."""
        planned_S = _capped(self._weight_S, most_repeats * self._tokens_S.astype(np.float64), wanted)
        self._weight_S = self._end_S = planned_S
        left = int(planned_S.sum())
        if self._total_tokens is not None:
            self._total_tokens = max(left, 1)
        elif left < wanted - 1:
            raise BadInput(
                f"a run of {wanted} tokens repeats every slice more than {most_repeats:g} times",
                fix=f"take fewer steps (there are {left} tokens), or more repeats",
            )

    def _set_curriculum(self) -> None:
        """What the curriculum says of this dataset: difficulties, block size, and the weights at its end."""
        curriculum, rows = self.config.curriculum, self.config.rows_per_step
        self._hard_B = None
        if curriculum is not None and curriculum.by is not None:
            self._hard_B = difficulty(curriculum.by, self.dataset, self.pieces, self.bundles)
        self._block_tokens = (max(BLOCK_ROWS, rows) if self._hard_B is None else rows) * self.config.length
        self._ramp_tokens, self._end_S = 0, self._weight_S
        if curriculum is not None and curriculum.slices is not None:
            self._ramp_tokens = curriculum.slices.steps * rows * self.config.length
            given_S = _slice_weights(curriculum.slices.to, self.dataset.slice_names, self._tokens_S)
            self._end_S = _tempered(given_S, self.config.temperature)

    def __iter__(self) -> Iterator[Packed]:
        return self

    def __next__(self) -> Packed:
        rows = self.next_rows()
        if not rows:
            raise StopIteration
        return assemble(self.dataset, self.pieces, rows, self.config.length)

    def next_rows(self) -> list[list[int]]:
        """The next window as the pieces in each of its rows; none at the end."""
        rows: list[list[int]] = []
        while len(rows) < self.config.rows_per_step:
            if self._row == len(self._rows):
                if self._is_over(self._after):
                    break
                self._begin(self._after, 0)
            taken = self._rows[self._row : self._row + self.config.rows_per_step - len(rows)]
            rows += taken
            self._row += len(taken)
        return rows

    def windows(self) -> int | None:
        """How many windows there are from the start to the end; None without an end.

        Every block is drawn and packed to know it: about two seconds for a million pieces.
        """
        if self.config.epochs is None:
            return None
        counter = Sampler(self.dataset, self.config)
        rows = len(counter._rows)
        while not counter._is_over(counter._after):
            counter._begin(counter._after, 0)
            rows += len(counter._rows)
        return -(-rows // self.config.rows_per_step)

    def planned(self) -> dict[str, float]:
        """The share of input tokens that each slice is to get; under weights that move, at the start."""
        share_S = self._weight_S / self._weight_S.sum()
        return dict(zip(self.dataset.slice_names, share_S.tolist(), strict=True))

    def drawn_tokens(self) -> dict[str, int]:
        """Input tokens drawn so far by slice, the whole of the current block included."""
        return dict(zip(self.dataset.slice_names, self._after.tokens_S, strict=True))

    def state(self) -> dict[str, Any]:
        """The position, as JSON; its size does not grow with the data."""
        return {
            "fingerprint": self._fingerprint(),
            "block": self._before.block,
            "bundles": list(self._before.bundles_S),
            "tokens": list(self._before.tokens_S),
            "row": self._row,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            BadInput: the state is of another dataset or another config.
        """
        if state["fingerprint"] != self._fingerprint():
            raise BadInput(
                "the saved data position belongs to other data or another sampler config",
                fix="resume with the tokens and the sampler config it was saved with",
            )
        self._begin(_Drawn(state["block"], tuple(state["bundles"]), tuple(state["tokens"])), state["row"])

    def _begin(self, drawn: _Drawn, row: int) -> None:
        """Draw and pack the block that begins at `drawn`, and stand before its given row."""
        drawn_B, self._after = self._draw(drawn)
        rows = pack(self._length_B[drawn_B], self.config.length)
        order = np.random.default_rng([self.config.seed, drawn.block, 1]).permutation(len(rows))
        self._rows = [
            [piece for index in rows[place] for piece in self._pieces_of(int(drawn_B[index]))]
            for place in order
        ]
        self._before, self._row = drawn, row

    def _pieces_of(self, drawn: int) -> range:
        """The pieces of a bundle."""
        return range(int(self.bundles[drawn]), int(self.bundles[drawn + 1]))

    def _draw(self, drawn: _Drawn) -> tuple[Int64Array, _Drawn]:
        """The bundles of the block that begins at `drawn`, and where the next one begins."""
        bundles, tokens = list(drawn.bundles_S), list(drawn.tokens_S)
        next_slice = self._fixed_shares(tokens) if not self._ramp_tokens else self._moving_shares(tokens)
        left = self._block_tokens
        if self._total_tokens is not None:
            left = min(left, self._total_tokens - sum(tokens))
        block: list[int] = []
        while left > 0:
            s = next(next_slice)
            number = self._bundle(s, bundles[s])
            size = int(self._length_B[number])
            block.append(number)
            bundles[s] += 1
            tokens[s] += size
            left -= size
        return np.array(block, np.int64), _Drawn(drawn.block + 1, tuple(bundles), tuple(tokens))

    def _fixed_shares(self, tokens: list[int]) -> Iterator[int]:
        """The slice that has had the least for its weight, again and again; `tokens` changes meanwhile."""
        weights: list[float] = self._weight_S.tolist()
        queue = [(tokens[s] / weights[s], s) for s in range(len(weights)) if weights[s] > 0]
        heapq.heapify(queue)
        while True:
            s = queue[0][1]
            yield s
            heapq.heapreplace(queue, (tokens[s] / weights[s], s))

    def _moving_shares(self, tokens: list[int]) -> Iterator[int]:
        """The slice that is furthest behind what it should have of one token more."""
        start_S, end_S = (weight_S / weight_S.sum() for weight_S in (self._weight_S, self._end_S))
        while True:
            wanted_S = wanted_tokens(start_S, end_S, self._ramp_tokens, sum(tokens) + 1)
            yield int(np.argmax(wanted_S - tokens))

    def _bundle(self, s: int, nth: int) -> int:
        """The nth bundle of a slice's endless order."""
        own = self._bundles_by_slice[s]
        epoch, place = divmod(nth, len(own))
        if self._orders.get(s, (-1,))[0] != epoch:
            random, curriculum = (
                np.random.default_rng([self.config.seed, s, epoch, 2]),
                self.config.curriculum,
            )
            if curriculum is not None and self._hard_B is not None and epoch < curriculum.epochs:
                order = rising(own, self._hard_B, curriculum.parts, random)
            else:
                order = random.permutation(own)
            self._orders[s] = (epoch, order)
        return int(self._orders[s][1][place])

    def _is_over(self, drawn: _Drawn) -> bool:
        return self._total_tokens is not None and sum(drawn.tokens_S) >= self._total_tokens

    def _fingerprint(self) -> str:
        """A hash of all that the order depends on."""
        digest = hashlib.sha256(canonical_json(self.config).encode())
        digest.update(canonical_json([self.dataset.slice_names, self.dataset.document_ids]).encode())
        for column in (*self.pieces, self.bundles):
            digest.update(column.tobytes())
        return digest.hexdigest()[:16]


def _slice_weights(
    given: Mapping[str, float] | None, names: tuple[str, ...], tokens_S: Int64Array
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One weight per slice; a slice without a piece weighs nothing."""
    if given is None:
        return tokens_S.astype(np.float64)
    for name in given:
        if name not in names:
            raise BadInput(f"slice_weights: the data has no slice {name}{did_you_mean(name, names)}")
    missing = [name for name in names if name not in given]
    if missing:
        raise BadInput(
            f"slice_weights names no weight for {', '.join(missing)}", fix="give one; 0 leaves a slice out"
        )
    empty = [name for name, tokens in zip(names, tokens_S, strict=True) if given[name] > 0 and tokens == 0]
    if empty:
        raise BadInput(f"slice_weights: nothing in {', '.join(empty)} counts", fix="give it the weight 0")
    weight_S = np.array([given[name] for name in names], np.float64)
    if not weight_S.any():
        raise BadInput("slice_weights are all 0", fix="give at least one slice a weight above 0")
    return weight_S


def _tempered(
    weight_S: np.ndarray[Any, np.dtype[np.float64]], temperature: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Weights in proportion to share^(1/T); a slice without weight keeps none."""
    if temperature == 1.0:
        return weight_S
    largest = weight_S.max()
    return np.where(weight_S > 0, (weight_S / largest) ** (1.0 / temperature), 0.0)


def _capped(
    weight_S: np.ndarray[Any, np.dtype[np.float64]],
    cap_S: np.ndarray[Any, np.dtype[np.float64]],
    total: float,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Tokens of each slice: the total by weight, none above its cap; what is over goes to the others.

    >>> _capped(np.array([3.0, 1.0, 1.0]), np.array([30.0, 100.0, 100.0]), 100.0).tolist()
    [30.0, 35.0, 35.0]
    """
    capped_S = np.zeros(len(weight_S), np.bool_)
    while True:
        rest = total - cap_S[capped_S].sum()
        free = weight_S[~capped_S].sum()
        tokens_S = np.where(capped_S, cap_S, rest * weight_S / free if free > 0 else 0.0)
        over_S = ~capped_S & (tokens_S > cap_S)
        if not over_S.any():
            return tokens_S
        capped_S |= over_S
