"""Law 1 in the trainer's own pass, for objectives about pairs, answers and whole windows.

Loss and gradients of a window are the same however its rows are split over micro-batches, and whichever order
they come in; with dropout too, where the split changes nothing that is random.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import ARCHITECTURE, VOCABULARY

from gyrocompass.data.pack import Packed, assemble, bundle, cut, pack
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.scalar_head import attach_scalar_head
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.optim import MainParameters
from gyrocompass.train.source import Window
from gyrocompass.train.window import window_gradients

LENGTH = 24
OBJECTIVES: dict[str, list[Any]] = {
    "pairs": [{"dpo": {}}, {"chosen_nll": {"weight": 0.3}}],
    "pairs without a reference": ["simpo", "orpo"],
    "reward": [{"reward_pairs": {"centring": 0.1}}],
    "answers": [{"kto": {}}],
    "policy": [{"clipped_surrogate": {}}, {"reference_kl": {"weight": 0.1}}, {"value_loss": {"weight": 0.5}}],
    "sequence policy": [{"sequence_surrogate": {}}],
    "quantile of the window": [{"high_entropy_surrogate": {"share": 0.4}}],
    "sorted over the window": ["aot"],
    "whole window and tokens": [{"bco_unpaired": {}}, {"nll": {"weight": 0.1}}],
}


def pairs(count: int, seed: int) -> TokenDataset:
    """Pairs of unequal answers with every column and label that the objectives above read."""
    random = np.random.default_rng(seed)

    def row(number: int, side: int) -> TokenRow:
        size = int(random.integers(4, 12))
        columns = {
            name: random.normal(-1.5, 0.5, size)
            for name in ("reference_logprob", "rollout_logprob", "advantage", "value", "return")
        }
        return TokenRow(
            f"{number}#{side}",
            "pairs",
            "made",
            random.integers(0, VOCABULARY, size).tolist(),
            [1] * size,
            [0.0, 0.0, *[1.0] * (size - 2)],
            unit=f"unit-{number}",
            columns=columns,
            labels={"side": side, "desirable": side, "truncated": 0.0},
        )

    return TokenDataset.of(row(number, side) for number in range(count) for side in (1, 0))


def window_of(data: TokenDataset, order: np.random.Generator | None = None) -> Window:
    pieces = cut(data, LENGTH)
    bundles = bundle(data, pieces, LENGTH)
    rows = pack(np.add.reduceat(pieces.length_P, bundles[:-1]), LENGTH)
    if order is not None:
        rows = [rows[number] for number in order.permutation(len(rows))]
    laid = [[piece for b in row for piece in range(bundles[b], bundles[b + 1])] for row in rows]
    packed: Packed = assemble(data, pieces, laid, LENGTH)
    return Window(packed, data)


def passed(
    objective: list[Any], window: Window, rows: int, *, dropout: float = 0.0, by: str = "token"
) -> tuple[float, dict[str, torch.Tensor], dict[str, int]]:
    """Loss, gradients and what was counted."""
    model = new_causal_lm(ARCHITECTURE | {"attention_dropout": dropout}, seed=3).to(torch.float64)
    attach_scalar_head(model)
    torch.manual_seed(0)
    main = MainParameters(model.train())
    config = TrainConfig.model_validate(
        {"steps": 1, "sequence_length": LENGTH, "rows_per_micro_batch": rows, "objective": objective}
        | {"precision": "float64", "reduction": {"by": by}}
    )
    done = window_gradients(model, main, parse_objectives(objective), window, config)
    gradients = {name: p.grad.clone() for name, p in main.trained.items() if p.grad is not None}
    entries = {name: int(sums[2]) for name, sums in done.record._objectives.items()}
    return done.loss, gradients, entries


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-10, abs=1e-12)
    assert one[1].keys() == other[1].keys() and one[2] == other[2]
    for name, gradient in one[1].items():
        scale = float(other[1][name].norm()) + 1e-9
        assert float((gradient - other[1][name]).norm()) <= 1e-10 * scale + 1e-13, name


@pytest.mark.parametrize("family", OBJECTIVES)
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**20), count=st.integers(2, 7), rows=st.integers(1, 3))
def test_micro_batches_and_order_change_nothing(family: str, seed: int, count: int, rows: int) -> None:
    data = pairs(count, seed)
    whole = passed(OBJECTIVES[family], window_of(data), 1000)
    assert whole[1], "nothing has a gradient"
    order = np.random.default_rng(seed)
    assert_same(passed(OBJECTIVES[family], window_of(data, order), rows), whole)


def test_the_second_pass_has_the_dropout_of_the_first() -> None:
    """The gradient of a whole window by differences: of the loss that the same random state gives."""
    window = window_of(pairs(4, 1))
    loss, gradients, _ = passed(["aot"], window, 1, dropout=0.3)
    again, same, _ = passed(["aot"], window, 1, dropout=0.3)
    assert loss == again
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name])
    one_batch, _, _ = passed(["aot"], window, 1000, dropout=0.3)
    assert loss != one_batch, "the dropout of one batch is another, or there is none"


def test_a_window_that_counts_nothing_moves_nothing() -> None:
    data = pairs(3, 0)
    silent = data.with_column("advantage", np.zeros(data.n_tokens, np.float32))
    loss, gradients, _ = passed([{"clipped_surrogate": {}}], window_of(silent), 1)
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())
