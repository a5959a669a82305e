"""Curricula: easy bundles first, shares that move, and a position that stays a few integers."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import token_datasets

from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.data.curriculum import CurriculumConfig
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.tokens import TokenDataset, TokenRow

CURRICULA: list[dict[str, Any]] = [{"by": "length", "parts": 3}, {"by": "reference_loss", "epochs": 2}]
datasets = token_datasets().filter(lambda dataset: dataset.n_targets > 0)


def referenced(dataset: TokenDataset) -> TokenDataset:
    values_N = -np.random.default_rng(0).random(dataset.n_tokens)
    return dataset.with_column("reference_logprob", values_N.astype(np.float32))


def sized(name: str, slice_name: str, n_inputs: int, reference: float | None = None) -> TokenRow:
    n = n_inputs + 1
    columns = {} if reference is None else {"reference_logprob": [reference] * n}
    return TokenRow(name, slice_name, "s", list(range(n)), [1] * n, [1.0] * n, columns=columns)


def sampler(dataset: TokenDataset, curriculum: dict[str, Any], **keys: Any) -> Sampler:
    plain = {"length": 10, "rows_per_step": 2, "curriculum": curriculum}
    return Sampler(dataset, SamplerConfig.model_validate(plain | keys))


@settings(deadline=None, max_examples=20)
@given(datasets, st.sampled_from(CURRICULA), st.integers(1, 30), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_still_holds_each_piece_once_and_a_restored_position_goes_on(
    dataset: TokenDataset, curriculum: dict[str, Any], length: int, epochs: int, steps: int
) -> None:
    dataset = referenced(dataset)
    one, other = (sampler(dataset, curriculum, length=length, epochs=epochs) for _ in range(2))
    windows = list(one)
    targets = Counter(int(t) for window in windows for t in window.target_T[window.weight_T > 0])
    assert targets == {int(t): epochs for t in dataset.id_N[dataset.weight_N > 0]}
    assert other.windows() == len(windows)
    for _ in range(steps):
        next(other, None)
    state = json.loads(json.dumps(other.state()))
    resumed = sampler(dataset, curriculum, length=length, epochs=epochs)
    resumed.restore(state)
    for expected, got in zip(windows[min(steps, len(windows)) :], resumed, strict=True):
        np.testing.assert_array_equal(expected.document_T, got.document_T)


@pytest.mark.parametrize("by", ["length", "reference_loss"])
def test_the_first_epoch_rises_in_parts_and_the_next_does_not(by: str) -> None:
    """Forty documents of four levels, as many as there are parts."""
    sizes = [6 + (k // 10 if by == "length" else k % 4) for k in range(40)]
    rows = [sized(f"d{k}", "a", size, -k) for k, size in enumerate(sizes)]
    dataset = TokenDataset.of([rows[k] for k in np.random.default_rng(3).permutation(40)])
    orders = []
    for seed in (0, 1):
        one, names = sampler(dataset, {"by": by, "parts": 4}, epochs=2, seed=seed), []
        drawn = one._draw(one._before)
        while len(names) < 80:
            names += [int(dataset.document_ids[one.pieces.document_P[b]][1:]) for b in drawn[0]]
            drawn = one._draw(drawn[1])
        orders.append(names)
        levels = [name // 10 for name in names]
        assert levels[:40] == sorted(levels[:40]) and levels[40:] != sorted(levels[40:])
    assert orders[0][:10] != orders[1][:10]  # shuffled within the easiest part


def test_a_window_holds_what_is_of_its_turn() -> None:
    """Blocks are windows: no row of the hardest part is read before the last windows."""
    rows = [sized(f"d{k}", "a", 10, -k) for k in range(40)]
    windows = list(sampler(TokenDataset.of(rows), {"by": "reference_loss", "parts": 20}))
    for nth, window in enumerate(windows):
        assert set(window.document_T) == {2 * nth, 2 * nth + 1}


def test_every_piece_of_a_long_document_is_as_hard_as_the_whole() -> None:
    dataset = TokenDataset.of([sized("long", "a", 25), *(sized(f"d{k}", "a", 10) for k in range(4))])
    windows = list(sampler(dataset, {"by": "length", "parts": 5}, rows_per_step=1))
    assert [dataset.document_ids[int(window.document_T[0])] for window in windows][-3:] == ["long"] * 3


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 10), min_size=6, max_size=20), st.integers(1, 30), st.integers(0, 3))
def test_shares_move_from_one_mixture_to_the_other(sizes: list[int], steps: int, seed: int) -> None:
    dataset = TokenDataset.of([sized(f"d{k}", "abc"[k % 3], size) for k, size in enumerate(sizes)])
    ramp = {"to": {"a": 0.0, "b": 1.0, "c": 3.0}, "steps": steps}
    start, end = {"a": 1.0, "b": 1.0, "c": 0.0}, np.array([0.0, 0.25, 0.75])
    one = sampler(dataset, {"slices": ramp}, slice_weights=start, epochs=None, seed=seed)
    tokens, drawn = steps * 2 * 10, one._before
    while sum(drawn.tokens_S) < 4 * tokens:
        drawn = one._draw(drawn)[1]
        n = sum(drawn.tokens_S)
        share_N = np.minimum(1.0, (np.arange(n) + 0.5) / tokens)[:, None]
        wanted_S = ((1 - share_N) * np.array([0.5, 0.5, 0.0]) + share_N * end).sum(0)
        assert np.abs(np.array(drawn.tokens_S) - wanted_S).max() <= 20  # two bundles


def test_shares_that_move_start_from_sizes_where_no_weights_are_given() -> None:
    dataset = TokenDataset.of([*(sized(f"a{k}", "a", 10) for k in range(30)), sized("b", "b", 10)])
    one = sampler(dataset, {"slices": {"to": {"a": 0, "b": 1}, "steps": 1000}}, epochs=1)
    assert sum(window.rows for window in one) == 31  # an epoch is as many tokens as there are
    assert one.drawn_tokens()["b"] < 50


def test_a_reference_that_is_missing_is_named() -> None:
    plain = TokenDataset.of([sized("d", "a", 5)])
    with pytest.raises(BadInput, match="no column reference_logprob"):
        sampler(plain, {"by": "reference_loss"})
    mixed = TokenDataset.of([sized("d", "a", 5, -1.0), sized("e", "a", 3)])
    with pytest.raises(BadInput, match=r"3 counted tokens[\s\S]*document e"):
        sampler(mixed, {"by": "reference_loss"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "by difficulty"),
        ({"by": "lenght"}, r"unknown choice 'lenght'; did you mean length\?"),
        ({"by": "length", "parts": 0}, "greater than 0"),
        ({"slices": {"to": {"a": 1.0}}}, "the key steps is missing"),
        ({"slices": {"to": {"a": -1.0}, "steps": 3}}, "greater than or equal to 0"),
    ],
)
def test_a_mistake_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(CurriculumConfig, data)


def test_the_mixture_at_the_end_names_every_slice() -> None:
    dataset = TokenDataset.of([sized("d", "a", 5), sized("e", "b", 5)])
    with pytest.raises(BadInput, match="no weight for b"):
        sampler(dataset, {"slices": {"to": {"a": 1.0}, "steps": 3}})
