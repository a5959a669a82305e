"""Invariant mode: a row's bits are its own, whatever rows are beside it and however they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from direct_signal import tile_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.loss import _invariant, _ops
from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._question import LogitRule, Logits
from gyrocompass.loss._support import support_floor
from gyrocompass.loss.logprob import WANTS, token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "top list": {"n_top": 9},
    "support": {"top_k": 40, "top_p": 0.9},
    "rule": {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3},
}
LARGE_V = 140_001
"""A block of 64 rows of this is more than a support's logits side by side otherwise are."""


class Rows(NamedTuple):
    """What belongs to a position."""

    h_TD: Tensor
    a_TR: Tensor
    target_T: Tensor
    candidate_TC: Tensor
    seed_T: Tensor
    """Of the draw, and of the gradient that comes to the position."""

    def take(self, index: Tensor) -> Rows:
        return Rows(*(part[index] for part in self))


class Head(NamedTuple):
    w_VD: Tensor
    bias_V: Tensor
    b_VR: Tensor


def make(n_tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Rows, Head]:
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(vocabulary, shape, generator=generator)

    target_T, candidate_TC = tokens(n_tokens), tokens(n_tokens, 11)
    candidate_TC[:, 1], candidate_TC[:, 2] = candidate_TC[:, 0], target_T  # equal picks add up in an order
    target_T[::9] = IGNORE_INDEX
    bias_V = normal(vocabulary)
    bias_V[::7] = -torch.inf
    rows = Rows(
        normal(n_tokens, width),
        normal(n_tokens, 3),
        target_T,
        candidate_TC,
        torch.randint(2**60, (n_tokens,), generator=generator),
    )
    return rows, Head(normal(vocabulary, width) / width**0.5, bias_V, normal(vocabulary, 3))


def answers(rows: Rows, head: Head, backend: str, **options: Any) -> dict[str, Tensor]:
    """Every output, and the gradients by position of a mixture of all of them."""
    h_TD, a_TR = rows.h_TD.clone().requires_grad_(), rows.a_TR.clone().requires_grad_()
    signal = token_logprobs(
        h_TD,
        head.w_VD,
        rows.target_T,
        bias_V=head.bias_V,
        low_rank=(a_TR, head.b_VR),
        candidate_TC=rows.candidate_TC,
        seed_T=rows.seed_T,
        want=WANTS,
        backend=backend,
        invariant=True,
        **options,
    )
    fields = {name: field for name, field in signal._asdict().items() if field is not None}
    differentiable = {name: field for name, field in fields.items() if field.requires_grad}
    gradients = []
    for number, field in enumerate(differentiable.values()):
        share_T = torch.cos((rows.seed_T % 1000).to(field.dtype) + number)
        wide = share_T.view(-1, *[1] * (field.dim() - 1)) * torch.linspace(0.5, 1.5, field[0].numel())
        gradients.append(wide.to(field.dtype).view(field.shape))
    dh_TD, da_TR = torch.autograd.grad(list(differentiable.values()), [h_TD, a_TR], gradients)
    return {name: field.detach() for name, field in fields.items()} | {"dh": dh_TD, "da": da_TR}


def assert_same_bits(part: dict[str, Tensor], whole: dict[str, Tensor], index: Tensor) -> None:
    for name, found in part.items():
        wanted = whole[name][index]
        same = torch.equal(found, wanted) or bool(((found == wanted) | found.isnan() & wanted.isnan()).all())
        assert same, (name, int((found != wanted).sum()), found.numel())


def arrangements(n_tokens: int) -> Iterator[Tensor]:
    """Some rows alone, split in batches, in other orders, beside themselves."""
    every = torch.arange(n_tokens)
    yield every[5:6]
    yield every[7:9]
    yield every[3 : n_tokens - 20]
    yield torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))
    yield every.flip(0)[::2]
    yield torch.cat([every[1:2].expand(3), every[40:]])


def skip_if_refused(backend: str, rows: Rows, head: Head) -> None:
    logits = Logits(rows.h_TD, head.w_VD, head.bias_V, rows.a_TR, head.b_VR, LogitRule())
    refusal = BACKENDS[backend].refusal(logits)
    if refusal is not None:
        pytest.skip(refusal)


@pytest.mark.parametrize("shape", [(150, 64, 1000), (90, 33, 5003), (80, 128, 333)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_change_no_bit(
    backend: str, feature: str, dtype: str, shape: tuple[int, int, int]
) -> None:
    rows, head = make(*shape, DTYPES[dtype])
    skip_if_refused(backend, rows, head)
    whole = answers(rows, head, backend, **FEATURES[feature])
    for index in arrangements(shape[0]):
        part = answers(rows.take(index), head, backend, **FEATURES[feature])
        assert_same_bits(part, whole, index)


@pytest.mark.parametrize(("feature", "dtype"), [("plain", "bf16"), ("support", "f32")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_several_tiles(backend: str, feature: str, dtype: str) -> None:
    rows, head = make(70, 16, LARGE_V, DTYPES[dtype])
    skip_if_refused(backend, rows, head)
    whole = answers(rows, head, backend, **FEATURES[feature])
    for index in (torch.arange(60, 70), torch.arange(70).flip(0)):
        assert_same_bits(answers(rows.take(index), head, backend, **FEATURES[feature]), whole, index)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=150), st.sampled_from(list(FEATURES)), st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_rows_in_any_order(backend: str, index: list[int], feature: str, data: st.DataObject) -> None:
    rows, head = make(100, 24, 301, torch.float32)
    skip_if_refused(backend, rows, head)
    whole = answers(rows, head, backend, **FEATURES[feature])
    chosen = torch.tensor(index)
    assert_same_bits(answers(rows.take(chosen), head, backend, **FEATURES[feature]), whole, chosen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_supports_floor_is_the_rows_own(dtype: str) -> None:
    rows, head = make(90, 64, 1001, DTYPES[dtype])
    logits = Logits(rows.h_TD, head.w_VD, head.bias_V, None, None, LogitRule())
    whole_T = _invariant.invariant_floor(logits, 40, 0.9)
    torch.testing.assert_close(whole_T, support_floor(logits, 40, 0.9))
    for index in arrangements(90):
        part_T = _invariant.invariant_floor(logits._replace(h_ND=rows.h_TD[index]), 40, 0.9)
        assert torch.equal(part_T, whole_T[index])
    with mock.patch.object(_ops, "support_floor", side_effect=AssertionError):
        answers(rows, head, "chunked", **FEATURES["support"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_the_size_of_tiles_changes_no_bit(feature: str, dtype: str) -> None:
    rows, head = make(90, 32, 1001, DTYPES[dtype])
    whole = answers(rows, head, "chunked", **FEATURES[feature])
    for size in ((7, 400), (2048, 10_000), (16, 1 << 12)):
        with tile_sizes(*size):
            part = answers(rows, head, "chunked", **FEATURES[feature])
        assert_same_bits(part, whole, torch.arange(90))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_between_change_no_bit(backend: str) -> None:
    rows, head = make(60, 32, 500, torch.float32)
    skip_if_refused(backend, rows, head)
    whole = answers(rows, head, backend)
    masked_T = torch.arange(60) % 3 == 1
    part = answers(rows._replace(target_T=rows.target_T.masked_fill(masked_T, IGNORE_INDEX)), head, backend)
    kept = (~masked_T).nonzero().squeeze(1)
    assert_same_bits({name: field[kept] for name, field in part.items()}, whole, kept)
    assert not part["dh"][masked_T].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counted(backend: str) -> None:
    rows, head = make(5, 8, 20, torch.float32)
    skip_if_refused(backend, rows, head)
    part = answers(
        rows._replace(target_T=torch.full((5,), IGNORE_INDEX)), head, backend, **FEATURES["support"]
    )
    assert not any(field.any() for field in part.values())


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_numbers_and_all_gradients_are_those_of_the_ordinary_mode(
    backend: str, options: dict[str, Any]
) -> None:
    rows, head = make(90, 24, 301, torch.float64)
    skip_if_refused(backend, rows, head)
    found = []
    for invariant in (True, False):
        leaves = [part.clone().requires_grad_() for part in (rows.h_TD, rows.a_TR, *head)]
        h_TD, a_TR, w_VD, bias_V, b_VR = leaves
        signal = token_logprobs(
            h_TD,
            w_VD,
            rows.target_T,
            bias_V=bias_V,
            low_rank=(a_TR, b_VR),
            candidate_TC=rows.candidate_TC,
            backend=backend,
            invariant=invariant,
            **options,
        )
        fields = [field for field in signal if field is not None]
        finite = [torch.where(field.isfinite(), field, 0.0) for field in fields if field.requires_grad]
        total = torch.stack([field.square().sum() for field in finite]).sum()
        found.append([*fields, *torch.autograd.grad(total, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_ordinary_mode_is_not_invariant() -> None:
    """What these tests would see if blocks were not of one size: products of other shapes have other bits."""
    rows, head = make(70, 64, 1000, torch.float32)
    whole = answers(rows, head, "chunked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_invariant, "_filled", lambda part: part)
        with pytest.raises(AssertionError):
            for index in arrangements(70):
                assert_same_bits(answers(rows.take(index), head, "chunked"), whole, index)
