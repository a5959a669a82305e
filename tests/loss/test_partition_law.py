"""Law 1: how tokens are split over micro-batches, ranks, rows and tiles changes neither loss nor gradient.

Shape legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from direct_signal import make_batch, tile_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.objective import Composite, parse_objectives
from gyrocompass.loss.reduce import Gather, Normaliser, Reduction, Tally, normalise, one_process
from gyrocompass.loss.registry import OBJECTIVES, objective
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, Terms, TokenLogProbs
from processes import run_together

WIDTH, VOCABULARY = 4, 9
ENTRIES: list[Any] = [
    "nll",
    {"z_loss": {"coefficient": 0.1, "weight": {"linear": {"from": 0.0, "to": 1.0, "steps": 4}}}},
    {"label_smoothing": {"epsilon": 0.2, "weight": 0.5}},
    {"confidence_penalty": {"coefficient": 0.1}},
    {"unlikelihood": {"window": 0, "tokens": [1, 2], "weight": 0.3}},
]
COMPOSITE = parse_objectives(ENTRIES)
STEP = 2
REDUCTIONS = [
    Reduction(by="token"),
    Reduction(by="sequence"),
    Reduction(by="slice"),
    Reduction(by="constant", constant=7.0),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def take(batch: Batch, index_T: Tensor) -> Batch:
    """The positions of an index, in its order; -1 is padding."""

    def taken(value_T: Tensor, filler: int) -> Tensor:
        return torch.cat([value_T, value_T.new_full((1,), filler)])[index_T]

    fillers = {"target_T": IGNORE_INDEX, "weight_T": 0, "byte_T": 0, "token_T": 0, "position_T": 0}
    fields = {field.name for field in dataclasses.fields(batch)} - {"length", "columns"}
    changed = {name: taken(getattr(batch, name), fillers.get(name, -1)) for name in fields}
    return dataclasses.replace(batch, length=max(len(index_T), 1), **changed)


class Model:
    """Hidden states by position of the whole window, and a head."""

    def __init__(self, n_tokens: int, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.h_TD = torch.randn(n_tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        self.w_VD = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        self.h_TD.requires_grad_(), self.w_VD.requires_grad_()

    def backward(self, composite: Composite, normaliser: Normaliser, window: Batch, index_T: Tensor) -> float:
        """One micro-batch: its share of the loss, its gradients added to .grad."""
        batch = take(window, index_T)
        h_TD = torch.cat([self.h_TD, self.h_TD.new_zeros(1, WIDTH)])[index_T]
        log_probs = token_logprobs(
            h_TD, self.w_VD, batch.target_T, want=composite.wants, candidate_TC=composite.candidates(batch)
        )
        loss = normaliser.loss(composite(log_probs, batch), batch).loss
        loss.backward()
        return loss.item()

    def results(self, loss: float) -> list[Tensor]:
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in (self.h_TD, self.w_VD)]
        return [torch.tensor(loss, dtype=torch.float64), *gradients]


def rank_results(
    window: Batch,
    split: Sequence[Tensor],
    reduction: Reduction,
    gather: Gather,
    seed: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """What one rank adds: loss share and gradients of its micro-batches."""
    composite, model = COMPOSITE, Model(len(window.token_T), seed, dtype)
    micro_batches = [take(window, index_T) for index_T in split]
    weights = composite.weights(STEP)
    normaliser = normalise(composite, micro_batches, weights, reduction=reduction, gather=gather)
    return model.results(sum(model.backward(composite, normaliser, window, index_T) for index_T in split))


def over_ranks(
    window: Batch, ranks: Sequence[Sequence[Tensor]], reduction: Reduction, seed: int, dtype: torch.dtype
) -> list[Tensor]:
    """Ranks one after another: what each gives to `gather` is written down first, then given to all."""
    composite = COMPOSITE
    given_to_gather: list[list[Tensor]] = []
    for split in ranks:
        mine: list[Tensor] = []

        def write_down(values: Tensor, mine: list[Tensor] = mine) -> Tensor:
            mine.append(values)
            return values

        micro_batches = [take(window, index_T) for index_T in split]
        normalise(composite, micro_batches, reduction=reduction, gather=write_down)
        given_to_gather.append(mine)
    results = []
    for split in ranks:
        calls = iter(zip(*given_to_gather, strict=True))
        results.append(
            rank_results(
                window, split, reduction, lambda values, calls=calls: torch.cat(next(calls)), seed, dtype
            )
        )
    return [torch.stack(parts).sum(0) for parts in zip(*results, strict=True)]


def whole(window: Batch, reduction: Reduction, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """One micro-batch, one rank."""
    return rank_results(window, [torch.arange(len(window.token_T))], reduction, one_process, seed, dtype)


def assert_same(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        scale = max(float(theirs.abs().max()) if theirs.numel() else 0.0, 1e-3)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: reduction.by)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_partition(reduction: Reduction, dtype: torch.dtype, data: st.DataObject) -> None:
    n_tokens, seed = data.draw(st.integers(0, 24)), data.draw(st.integers(0, 2**20))
    ignored_share = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    window = make_batch(n_tokens, VOCABULARY, seed, ignored_share=ignored_share)
    expected = whole(window, reduction, seed, dtype)
    order = data.draw(st.permutations([*range(n_tokens), *[-1] * data.draw(st.integers(0, 4))]))
    n_ranks = data.draw(st.integers(1, 3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=5)))
    parts = [
        torch.tensor(order[a:b], dtype=torch.int64)
        for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)
    ]
    owner = [data.draw(st.integers(0, n_ranks - 1)) for _ in parts]
    ranks = [
        [part for part, rank in zip(parts, owner, strict=True) if rank == mine] for mine in range(n_ranks)
    ]
    with tile_sizes(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 80))):
        assert_same(over_ranks(window, ranks, reduction, seed, dtype), expected, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: reduction.by)
def test_reduction_is_its_formula(reduction: Reduction) -> None:
    """The loss of `nll` against plain sums over tokens, documents and slices."""
    window = make_batch(40, VOCABULARY, seed=8)
    composite, model = parse_objectives(["nll"]), Model(40, 8, torch.float64)
    log_probs = token_logprobs(model.h_TD, model.w_VD, window.target_T)
    loss = normalise(composite, [window], reduction=reduction).loss(composite(log_probs, window), window).loss
    weight_T = window.weight_T.double()
    weighted_T = -log_probs.logprob_T * weight_T
    group_T = {"sequence": window.document_T, "slice": window.slice_T}.get(reduction.by, torch.zeros(40))
    means = [
        weighted_T[group_T == group].sum() / weight_T[group_T == group].sum()
        for group in group_T.unique()
        if weight_T[group_T == group].sum() > 0
    ]
    expected = weighted_T.sum() / 7.0 if reduction.by == "constant" else torch.stack(means).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: reduction.by)
@pytest.mark.parametrize("n_tokens", [0, 5])
def test_an_empty_window_gives_a_differentiable_zero(reduction: Reduction, n_tokens: int) -> None:
    window = make_batch(n_tokens, VOCABULARY, seed=0, ignored_share=1.1)
    loss, *gradients = whole(window, reduction, 0, torch.float32)
    assert loss.item() == 0 and not any(gradient.any() for gradient in gradients)


def test_reports_add_up_and_weights_follow_the_schedule() -> None:
    window = make_batch(30, VOCABULARY, seed=4)
    composite, model = parse_objectives(ENTRIES), Model(30, 4, torch.float64)

    def reduced(step: int, *parts: Tensor) -> tuple[float, dict[str, np.ndarray]]:
        batches = [take(window, index_T) for index_T in parts]
        normaliser = normalise(composite, batches, composite.weights(step))
        loss, sums = 0.0, {name: np.zeros(3) for name in composite.names}
        for batch, index_T in zip(batches, parts, strict=True):
            candidate_TC = composite.candidates(batch)
            log_probs = token_logprobs(
                model.h_TD[index_T],
                model.w_VD,
                batch.target_T,
                want=composite.wants,
                candidate_TC=candidate_TC,
            )
            share, report = normaliser.loss(composite(log_probs, batch), batch)
            loss += share.item()
            sums = {name: sums[name] + np.array(report[name]) for name in sums}
        return loss, sums

    loss, sums = reduced(STEP, torch.arange(30))
    _, split_sums = reduced(STEP, torch.arange(11), torch.arange(11, 30))
    for name, total in sums.items():
        np.testing.assert_allclose(split_sums[name], total, rtol=1e-12)
        assert Tally(*total).entries == int((window.weight_T > 0).sum())
    by_hand = sum(composite.weights(STEP)[name] * total[0] / total[1] for name, total in sums.items())
    assert loss == pytest.approx(by_hand, rel=1e-12)
    first_loss, _ = reduced(0, torch.arange(30))
    z_mean = sums["z_loss"][0] / sums["z_loss"][1]
    assert loss - first_loss == pytest.approx(0.5 * z_mean, rel=1e-9)


def test_a_weight_that_depends_on_the_model_is_an_error() -> None:
    def unsure_only(log_probs: TokenLogProbs, batch: Batch) -> Terms:
        return Terms(-log_probs.logprob_T, batch.weight_T * (log_probs.logprob_T < -1))

    objective()(unsure_only)
    try:
        composite, window, model = (
            parse_objectives(["unsure_only"]),
            make_batch(9, VOCABULARY, 0),
            Model(9, 0, torch.float32),
        )
        log_probs = token_logprobs(model.h_TD, model.w_VD, window.target_T)
        with pytest.raises(BadInput, match="weight of the objective unsure_only depends on the model"):
            normalise(composite, [window]).loss(composite(log_probs, window), window)
    finally:
        del OBJECTIVES["unsure_only"]


def test_terms_that_are_not_per_token() -> None:
    """Pairs of neighbours: reduced by their own weights, refused by document or slice."""

    def neighbours(log_probs: TokenLogProbs, batch: Batch) -> Terms:
        pairs = batch.weight_T.view(-1, 2).prod(1)
        return Terms(log_probs.logprob_T.view(-1, 2).sum(1), pairs)

    objective()(neighbours)
    try:
        composite, window, model = (
            parse_objectives(["neighbours"]),
            make_batch(8, VOCABULARY, 0),
            Model(8, 0, torch.float64),
        )
        terms = composite(token_logprobs(model.h_TD, model.w_VD, window.target_T), window)
        loss = normalise(composite, [window]).loss(terms, window).loss
        value, weight = terms["neighbours"]
        torch.testing.assert_close(loss, (value * weight).sum() / weight.sum(), rtol=1e-6, atol=0)
        with pytest.raises(BadInput, match="4 entries for 8 tokens cannot be reduced by sequence"):
            normalise(composite, [window], reduction=Reduction(by="sequence"))
    finally:
        del OBJECTIVES["neighbours"]


@pytest.mark.parametrize(
    "data", [{"by": "constant"}, {"by": "token", "constant": 3}, {"by": "constant", "constant": 0}]
)
def test_constant_belongs_to_constant(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="constant"):
        parse(Reduction, data)


def gather_ragged(values: Tensor) -> Tensor:
    """A real gather: lengths first, then values padded to the longest."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(lengths, torch.tensor([len(values)]))
    longest = max(int(length) for length in lengths)
    padded = [torch.zeros(longest, dtype=values.dtype) for _ in lengths]
    torch.distributed.all_gather(padded, torch.nn.functional.pad(values, (0, longest - len(values))))
    return torch.cat([part[: int(length)] for part, length in zip(padded, lengths, strict=True)])


def work_of_a_rank(rank: int, folder: str) -> None:
    """Rank 0 has three micro-batches of unequal size, rank 1 one; gradients are summed over ranks."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "store"), 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    window = make_batch(24, VOCABULARY, seed=6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    split = [order[:2], order[2:5], order[5:11]] if rank == 0 else [order[11:]]
    for reduction in REDUCTIONS:
        results = rank_results(window, split, reduction, gather_ragged, 6, torch.float64)
        for index, tensor in enumerate(results):
            torch.distributed.all_reduce(tensor)
            np.save(Path(folder) / f"{rank}-{reduction.by}-{index}.npy", tensor.numpy())
    torch.distributed.barrier()  # a rank that leaves while the other still talks to it may abort
    torch.distributed.destroy_process_group()


def test_two_gloo_ranks(tmp_path: Path) -> None:
    ranks = [(work_of_a_rank, rank, str(tmp_path)) for rank in range(2)]
    assert run_together(ranks) == [0, 0]
    window = make_batch(24, VOCABULARY, seed=6)
    for reduction in REDUCTIONS:
        expected = whole(window, reduction, 6, torch.float64)
        for rank in range(2):
            actual = [
                torch.from_numpy(np.load(tmp_path / f"{rank}-{reduction.by}-{i}.npy")) for i in range(3)
            ]
            assert_same(actual, expected, torch.float64)
