"""Each objective against its formula on full float64 logits, in value and gradient.

Shape legend: T tokens, D hidden width, V vocabulary, C candidates per token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from direct_signal import ANSWERERS, make_batch, skip_if_refused, tile_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.likelihood import (
    confidence_penalty,
    dft,
    excess_nll,
    focal,
    label_smoothing,
    log1mexp,
    nll,
    unlikelihood,
    unlikelihood_candidates,
    z_loss,
)
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.reduce import normalise
from gyrocompass.loss.registry import OBJECTIVES
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, TokenLogProbs

Formula = Callable[[Tensor, Batch], Tensor]
"""(logits [T, V], batch) -> value [T], meaningful where a token counts."""

N_TOKENS, WIDTH, VOCABULARY = 12, 4, 7


def head(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N_TOKENS, WIDTH), (VOCABULARY, WIDTH))
    h_TD, w_VD = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return h_TD.requires_grad_(), w_VD.requires_grad_()


def assert_is(entry: dict[str, dict[str, object]], formula: Formula, backend: str, seed: int) -> None:
    """The terms of a YAML entry are the formula's: each value, and the gradients of their weighted sum."""
    (name,) = entry
    composite = parse_objectives([entry])
    batch = make_batch(N_TOKENS, VOCABULARY, seed)
    h_TD, w_VD = head(seed)
    with tile_sizes(5, 12):
        log_probs = token_logprobs(
            h_TD,
            w_VD,
            batch.target_T,
            want=composite.wants,
            candidate_TC=composite.candidates(batch),
            backend=backend,
        )
        value_T, weight_T = composite(log_probs, batch)[name]
        gradients = torch.autograd.grad((value_T * weight_T).sum(), (h_TD, w_VD))
    assert torch.equal(weight_T, batch.weight_T)
    counted_T = batch.weight_T > 0
    expected_T = formula(h_TD @ w_VD.T, batch)
    torch.testing.assert_close(value_T[counted_T], expected_T[counted_T], rtol=1e-10, atol=1e-10)
    total = (expected_T * batch.weight_T)[counted_T].sum()
    for actual, wanted in zip(gradients, torch.autograd.grad(total, (h_TD, w_VD)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def cross_entropy(logits_TV: Tensor, batch: Batch, **options: float) -> Tensor:
    return F.cross_entropy(logits_TV, batch.target_T, reduction="none", **options)  # type: ignore[arg-type]


def smoothed(logits_TV: Tensor, batch: Batch) -> Tensor:
    return cross_entropy(logits_TV, batch, label_smoothing=0.15)


def squared_normaliser(logits_TV: Tensor, batch: Batch) -> Tensor:
    return 0.01 * logits_TV.exp().sum(1).log() ** 2


def negative_entropy(logits_TV: Tensor, batch: Batch) -> Tensor:
    p_TV = logits_TV.softmax(1)
    return 0.3 * (p_TV * p_TV.log()).sum(1)


def focused(gamma: float) -> Formula:
    def formula(logits_TV: Tensor, batch: Batch) -> Tensor:
        p_T = logits_TV.softmax(1).gather(1, batch.target_T.clamp(min=0)[:, None])[:, 0]
        return -((1 - p_T) ** gamma) * p_T.log()

    return formula


def scaled_by_probability(logits_TV: Tensor, batch: Batch) -> Tensor:
    nll_T = cross_entropy(logits_TV, batch)
    return (-nll_T).exp().detach() * nll_T


def candidates_by_hand(batch: Batch, position: int, window: int, tokens: tuple[int, ...]) -> set[int]:
    """The set of the definition, by a plain loop."""
    found = set(tokens)
    for earlier in range(max(0, position - window + 1), position + 1):
        if batch.segment_T[earlier] == batch.segment_T[position]:
            found.add(int(batch.token_T[earlier]))
    return found - {int(batch.target_T[position])}


def unlikely(window: int, tokens: tuple[int, ...]) -> Formula:
    def formula(logits_TV: Tensor, batch: Batch) -> Tensor:
        p_TV = logits_TV.softmax(1)
        values = []
        for position in range(len(p_TV)):
            candidates = sorted(candidates_by_hand(batch, position, window, tokens))
            values.append(-(1 - p_TV[position, candidates]).log().sum())
        return torch.stack(values)

    return formula


CASES: dict[str, tuple[dict[str, dict[str, object]], Formula]] = {
    "nll": ({"nll": {}}, cross_entropy),
    "label_smoothing": ({"label_smoothing": {"epsilon": 0.15}}, smoothed),
    "z_loss": ({"z_loss": {"coefficient": 0.01}}, squared_normaliser),
    "confidence_penalty": ({"confidence_penalty": {"coefficient": 0.3}}, negative_entropy),
    "focal": ({"focal": {"gamma": 2.0}}, focused(2.0)),
    "focal_root": ({"focal": {"gamma": 0.5}}, focused(0.5)),
    "dft": ({"dft": {}}, scaled_by_probability),
    "focal_zero": ({"focal": {"gamma": 0.0}}, cross_entropy),
    "unlikelihood_repeated": ({"unlikelihood": {"window": 3}}, unlikely(3, ())),
    "unlikelihood_listed": ({"unlikelihood": {"window": 0, "tokens": [1, 4]}}, unlikely(0, (1, 4))),
    "unlikelihood_both": ({"unlikelihood": {"window": 20, "tokens": [1, 4, 4]}}, unlikely(20, (1, 4))),
}


@pytest.mark.parametrize("backend", ["reference", "chunked"])  # those that take float64
@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**20))
def test_objective_is_its_formula(name: str, backend: str, seed: int) -> None:
    assert_is(*CASES[name], backend, seed)


def test_every_objective_per_token_has_a_case() -> None:
    own = {name for name, one in OBJECTIVES.items() if one.function.__module__ == nll.__module__}
    tested_below = {"sequence_nll", "excess_nll"}
    assert {name for entry, _ in CASES.values() for name in entry} == own - tested_below


def test_excess_nll_is_nll_less_that_of_the_reference() -> None:
    batch = make_batch(N_TOKENS, VOCABULARY, 3)
    batch = dataclasses.replace(batch, columns={"reference_logprob": torch.linspace(-3, 0, N_TOKENS)})
    log_probs = token_logprobs(*head(3), batch.target_T, want=())
    found, plain = excess_nll(log_probs, batch), nll(log_probs, batch)
    counted_T = batch.weight_T > 0
    expected_T = plain.value + torch.linspace(-3, 0, N_TOKENS).masked_fill(~counted_T, 0.0)
    torch.testing.assert_close(found.value, expected_T)
    assert torch.equal(found.weight, plain.weight)


@pytest.mark.parametrize("length_normalised", [False, True])
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**20), cut=st.integers(0, 6))
def test_sequence_nll_is_its_formula_however_it_is_split(
    length_normalised: bool, seed: int, cut: int
) -> None:
    batch = make_batch(N_TOKENS, VOCABULARY, seed)
    composite = parse_objectives([{"sequence_nll": {"length_normalised": length_normalised}}])
    h_TD, w_VD = head(seed)
    nll_T = cross_entropy(h_TD @ w_VD.T, batch)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for segment in batch.segment_T.unique():
        own_T = (batch.segment_T == segment) & (batch.weight_T > 0)
        if own_T.any():
            w_N, largest = batch.weight_T[own_T].double(), float(batch.weight_T[own_T].max())
            total = total + (w_N * nll_T[own_T]).sum() * (largest / w_N.sum() if length_normalised else 1.0)
            weights += largest
    begin = int((batch.segment_T >= cut).nonzero()[0]) if (batch.segment_T >= cut).any() else N_TOKENS
    parts = [rows_of(batch, slice(0, begin)), rows_of(batch, slice(begin, N_TOKENS))]
    normaliser = normalise(composite, parts)
    loss = torch.zeros((), dtype=torch.float64)
    for part, own in zip(parts, (slice(0, begin), slice(begin, N_TOKENS)), strict=True):
        log_probs = token_logprobs(h_TD[own], w_VD, part.target_T, want=())
        loss = loss + normaliser.loss(composite(log_probs, part), part).loss
    if not weights:
        assert loss.item() == 0
        return
    torch.testing.assert_close(loss, total / weights, rtol=1e-6, atol=0)
    gradients = (torch.autograd.grad(value, (h_TD, w_VD)) for value in (loss, total / weights))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def rows_of(batch: Batch, own: slice) -> Batch:
    fields = {field.name for field in dataclasses.fields(batch)} - {"length", "columns"}
    changed = {name: getattr(batch, name)[own] for name in fields}
    return dataclasses.replace(batch, length=max(own.stop - own.start, 1), **changed)


def test_the_gradient_of_dft_is_that_of_the_probability() -> None:
    """Each weighted token's probability, not its logarithm, is what rises."""
    batch = make_batch(N_TOKENS, VOCABULARY, seed=9)
    h_TD, w_VD = head(9)
    value_T, weight_T = dft(token_logprobs(h_TD, w_VD, batch.target_T, want=()), batch)
    p_T = (h_TD @ w_VD.T).softmax(1).gather(1, batch.target_T.clamp(min=0)[:, None])[:, 0]
    gradients = (
        torch.autograd.grad((x * weight_T).sum(), (h_TD, w_VD), retain_graph=True) for x in (value_T, -p_T)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("backend", ANSWERERS)
def test_golden_loss_is_torch_cross_entropy(backend: str, epsilon: float) -> None:
    """Value and gradient of the reduced loss, in float32, with ignored positions."""
    generator = torch.Generator().manual_seed(1)
    h_TD = torch.randn(33, 16, generator=generator, requires_grad=True)
    w_VD = torch.randn(50, 16, generator=generator, requires_grad=True)
    skip_if_refused(backend, h_TD, w_VD)
    batch = make_batch(33, 50, seed=1)
    batch.weight_T.copy_(batch.weight_T > 0)
    composite = parse_objectives(["nll" if epsilon == 0 else {"label_smoothing": {"epsilon": epsilon}}])
    log_probs = token_logprobs(h_TD, w_VD, batch.target_T, want=composite.wants, backend=backend)
    loss = normalise(composite, [batch]).loss(composite(log_probs, batch), batch).loss
    golden = F.cross_entropy(h_TD @ w_VD.T, batch.target_T, label_smoothing=epsilon)
    torch.testing.assert_close(loss, golden, rtol=1e-6, atol=1e-6)
    gradients = zip(
        torch.autograd.grad(loss, (h_TD, w_VD)), torch.autograd.grad(golden, (h_TD, w_VD)), strict=True
    )
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_reported_nll_is_not_touched_by_other_terms() -> None:
    batch = make_batch(N_TOKENS, VOCABULARY, seed=3)
    entries = ["nll", {"z_loss": {"coefficient": 1.0}}, {"label_smoothing": {"epsilon": 0.5}}, {"focal": {}}]
    composite = parse_objectives(entries)
    log_probs = token_logprobs(*head(3), batch.target_T, want=composite.wants)
    report = normalise(composite, [batch]).loss(composite(log_probs, batch), batch).report
    counted_T = batch.weight_T > 0
    expected = (cross_entropy(head(3)[0] @ head(3)[1].T, batch) * batch.weight_T)[counted_T].sum()
    assert report["nll"].value_sum == pytest.approx(float(expected.detach()), rel=1e-12)
    assert report["nll"].entries == int(counted_T.sum())
    assert report["nll"].weight_sum == pytest.approx(float(batch.weight_T.double().sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_is_accurate_at_both_ends(dtype: torch.dtype) -> None:
    x = torch.tensor(
        [-1e-6, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -40.0, -700.0], dtype=dtype, requires_grad=True
    )
    exact = [math.log(-math.expm1(value)) if value > -30 else -math.exp(value) for value in x.tolist()]
    value = log1mexp(x)
    torch.testing.assert_close(
        value, torch.tensor(exact, dtype=dtype), rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0
    )
    (gradient,) = torch.autograd.grad(value.sum(), x)
    slope = torch.tensor([-1 / math.expm1(-point) for point in x.tolist()], dtype=dtype)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=0)


def certain(logprob: float) -> tuple[TokenLogProbs, Batch, Tensor]:
    """One counted token, its target and its one candidate (token 0) at a log-probability."""
    batch = make_batch(1, 5, seed=0, ignored_share=0.0)
    batch.token_T.zero_(), batch.target_T.fill_(1)
    logprob_T = torch.tensor([logprob], requires_grad=True)
    return TokenLogProbs(logprob_T, logprob_T, candidate_TC=logprob_T[:, None]), batch, logprob_T


@pytest.mark.parametrize("objective", [focal, unlikelihood])
@pytest.mark.parametrize("logprob", [0.0, -1e-9, -1e-3, -80.0])
def test_certainty_gives_finite_values_and_gradients(
    objective: Callable[..., object], logprob: float
) -> None:
    log_probs, batch, logprob_T = certain(logprob)
    options = {"gamma": 0.5} if objective is focal else {"window": 1}
    value_T, _ = objective(log_probs, batch, **options)  # type: ignore[misc]
    (gradient_T,) = torch.autograd.grad(value_T.sum(), logprob_T)
    assert value_T.isfinite().all() and gradient_T.isfinite().all()


def test_an_impossible_candidate_costs_nothing() -> None:
    log_probs, batch, logprob_T = certain(-math.inf)
    value_T, _ = unlikelihood(log_probs, batch, window=1)
    assert value_T.item() == 0 and torch.autograd.grad(value_T.sum(), logprob_T)[0].item() == 0


@settings(deadline=None, max_examples=40)
@given(
    n_tokens=st.integers(0, 15),
    window=st.integers(0, 20),
    tokens=st.lists(st.integers(0, 6), max_size=3).map(tuple),
    seed=st.integers(0, 2**20),
)
def test_unlikelihood_candidates_are_the_set(
    n_tokens: int, window: int, tokens: tuple[int, ...], seed: int
) -> None:
    batch = make_batch(n_tokens, VOCABULARY, seed)
    if window == 0 and not tokens:
        with pytest.raises(BadInput, match="no candidates"):
            unlikelihood_candidates(batch, window=window, tokens=tokens)
        return
    candidate_TC = unlikelihood_candidates(batch, window=window, tokens=tokens)
    for position, row in enumerate(candidate_TC.tolist()):
        listed = [token for token in row if token != IGNORE_INDEX]
        expected = (
            candidates_by_hand(batch, position, window, tokens) if batch.weight_T[position] > 0 else set()
        )
        assert sorted(listed) == sorted(expected)


def test_plain_calls_need_no_registry() -> None:
    batch = make_batch(N_TOKENS, VOCABULARY, seed=5)
    log_probs = token_logprobs(*head(5), batch.target_T)
    for terms in (
        nll(log_probs, batch),
        label_smoothing(log_probs, batch),
        z_loss(log_probs, batch),
        confidence_penalty(log_probs, batch, coefficient=0.1),
        focal(log_probs, batch),
    ):
        assert terms.value.shape == terms.weight.shape == (N_TOKENS,)
