"""Edge cases of the primitive, each on every backend: defined, tested, boring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from direct_signal import ANSWERERS, Case, dtype_of, skip_if_refused, tile_sizes
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX

pytestmark = pytest.mark.parametrize("backend", ANSWERERS)


WIDEST = torch.float64


@pytest.fixture(autouse=True)
def _widest(backend: str) -> None:
    """The dtype of `normal`: float64 where the backend takes it."""
    global WIDEST
    WIDEST = dtype_of(backend)
    skip_if_refused(backend, torch.zeros(1, 1, dtype=WIDEST), torch.zeros(1, 1, dtype=WIDEST))


def normal(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype or WIDEST)


def assert_as_defined(case: Case, backend: str, tolerance: float | None = None) -> None:
    """Every output, and the gradients of the finite ones' sum, as in float64."""
    tolerance = tolerance or {torch.float64: 1e-10, torch.float32: 2e-5}[WIDEST]
    expected, copies = case.direct()
    answer = case.run(backend)._asdict()
    for name, value in answer.items():
        if value is not None:
            torch.testing.assert_close(
                value.double(), expected[name].double(), rtol=tolerance, atol=tolerance
            )
    floats = [name for name, value in answer.items() if value is not None and value.is_floating_point()]

    def total(outputs: dict[str, Tensor]) -> Tensor:
        return torch.stack([outputs[name][outputs[name].isfinite()].sum() for name in floats]).sum()

    actual_gradients = torch.autograd.grad(total(answer), case.inputs)
    for actual, wanted in zip(actual_gradients, torch.autograd.grad(total(expected), copies), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("n_tokens", "ignored"), [(0, False), (4, True), (1, False), (1, True)])
def test_few_or_no_tokens(backend: str, n_tokens: int, ignored: bool) -> None:
    target_T = torch.full((n_tokens,), IGNORE_INDEX) if ignored else torch.arange(n_tokens)
    candidate_TC = torch.zeros(n_tokens, 2, dtype=torch.int64)
    case = Case(normal(n_tokens, 3), normal(5, 3), target_T, normal(5), candidate_TC=candidate_TC)
    assert_as_defined(case, backend)
    if ignored:
        answer = case.run(backend)
        assert not any(field.any() for field in answer if field is not None)
        gradients = torch.autograd.grad(answer.logprob_T.sum(), case.inputs)
        assert not any(gradient.any() for gradient in gradients)


def test_one_token_of_vocabulary_is_certain(backend: str) -> None:
    case = Case(normal(3, 2), normal(1, 2), torch.zeros(3, dtype=torch.int64))
    assert_as_defined(case, backend)
    assert not case.run(backend).logprob_T.any()


def test_padded_vocabulary_has_probability_zero_and_no_gradient(backend: str) -> None:
    bias_V = normal(9)
    bias_V[[0, 5, 6, 7, 8]] = -torch.inf
    candidate_TC = torch.tensor([[0, 1], [2, 2], [8, 4], [3, 1]])
    case = Case(
        normal(4, 3), normal(9, 3), torch.tensor([1, 2, 3, 4]), bias_V, 2.0, candidate_TC=candidate_TC
    )
    with tile_sizes(2, 6):
        assert_as_defined(case, backend)
        answer = case.run(backend)
    assert answer.candidate_TC is not None and answer.candidate_TC[0, 0] == -torch.inf
    assert answer.entropy_T is not None
    dw_VD, dbias_V = torch.autograd.grad((answer.logprob_T + answer.entropy_T).sum(), (case.w_VD, bias_V))
    assert not dw_VD[[0, 5, 6, 7, 8]].any() and not dbias_V[[0, 5, 6, 7, 8]].any()
    assert dw_VD[[1, 2, 3, 4]].all()


def test_a_target_outside_the_vocabulary_has_minus_infinity_and_harms_nobody(backend: str) -> None:
    bias_V = torch.zeros(6, dtype=WIDEST)
    bias_V[5] = -torch.inf
    target_T = torch.tensor([1, 5, 2])
    case = Case(normal(3, 2), normal(6, 2), target_T, bias_V)
    assert_as_defined(case, backend)
    answer = case.run(backend)
    assert answer.logprob_T[1] == -torch.inf and answer.logprob_T[[0, 2]].isfinite().all()
    gradients = torch.autograd.grad(answer.logprob_T.sum(), case.inputs, retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert answer.rank_T is not None and answer.rank_T[1] == 5


@pytest.mark.parametrize("kind", ["target", "candidate"])
@pytest.mark.parametrize("value", [7, -1, 2**40])
def test_a_token_outside_the_range_is_named_with_its_position(backend: str, kind: str, value: int) -> None:
    target_T, candidate_TC = torch.tensor([0, IGNORE_INDEX, 6, 1]), torch.zeros(4, 2, dtype=torch.int64)
    (target_T if kind == "target" else candidate_TC[:, 1])[3] = value
    where = "position 3 " if kind == "target" else r"position \(3, 1\) "
    with pytest.raises(
        BadInput, match=rf"{kind} {value} is outside the vocabulary of 7 tokens\n  where: {where}"
    ):
        token_logprobs(normal(4, 2), normal(7, 2), target_T, candidate_TC=candidate_TC, backend=backend)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    h_TD, w_VD, target_T = normal(4, 2), normal(7, 2), torch.zeros(4, dtype=torch.int64)
    refused = [
        ({"h_TD": normal(4, 3)}, r"h_TD \[4, 3\] and w_VD \[7, 2\] do not fit"),
        ({"h_TD": normal(2, 2, 2)}, r"h_TD \[2, 2, 2\] .* do not fit"),
        ({"h_TD": target_T[:, None], "w_VD": normal(7, 1)}, r"h_TD is \[4, 1\] of torch.int64"),
        ({"w_VD": normal(0, 2)}, "empty"),
        ({"target_T": target_T[:3]}, r"target_T is \[3\] of torch.int64, not \[4\]"),
        ({"target_T": target_T.int()}, r"target_T is \[4\] of torch.int32"),
        ({"bias_V": normal(6)}, r"bias_V is \[6\]"),
        ({"bias_V": torch.full((7,), -torch.inf)}, r"bias_V \[7\] is -inf throughout"),
        ({"candidate_TC": target_T}, r"candidate_TC is \[4\] of torch.int64, not \[4, C\]"),
        ({"candidate_TC": target_T[0]}, r"candidate_TC is \[\]"),
        ({"seed_T": target_T[:1]}, r"seed_T is \[1\]"),
        ({"low_rank": (normal(4, 3), None)}, r"low_rank is \(Tensor, NoneType\)"),
        ({"low_rank": (normal(4, 3),)}, r"low_rank is \(Tensor\)"),
        ({"low_rank": normal(2, 4, 3)}, "low_rank is Tensor"),
        ({"low_rank": (normal(4, 3)[0, 0], normal(7, 3))}, r"low_rank\[0\] is \[\]"),
        ({"low_rank": (normal(4, 3), normal(7, 2))}, r"low_rank\[1\] is \[7, 2\] of .*, not \[7, 3\]"),
        ({"target_T": target_T.to("meta")}, r"devices: h_TD \[4, 2\] on cpu, .*, target_T \[4\] on meta"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"logit_scale": float("nan")}, "logit_scale is nan"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"n_top": 1.5}, "n_top is 1.5"),
        ({"want": ["entropi"]}, "did you mean entropy"),
        ({"backend": "chunkd"}, "did you mean chunked"),
    ]
    for change, message in refused:
        arguments = {"h_TD": h_TD, "w_VD": w_VD, "target_T": target_T, "backend": backend} | change
        with pytest.raises(BadInput, match=message):
            token_logprobs(**arguments)  # type: ignore[arg-type]


def test_other_ignore_index(backend: str) -> None:
    h_TD, w_VD = normal(3, 2), normal(5, 2)
    ours = token_logprobs(h_TD, w_VD, torch.tensor([1, 0, 2]), ignore_index=0, backend=backend)
    usual = token_logprobs(h_TD, w_VD, torch.tensor([1, IGNORE_INDEX, 2]), backend=backend)
    for mine, theirs in zip(ours, usual, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)  # type: ignore[arg-type]


def test_non_contiguous_inputs(backend: str) -> None:
    h_TD, w_VD = normal(3, 2, 8)[:, 0, ::2], normal(4, 9).T
    assert_as_defined(Case(h_TD, w_VD, torch.tensor([8, 0, 3])), backend)


@pytest.mark.parametrize("frozen", ["head", "backbone", "both"])
def test_frozen_sides_cost_no_gradient_and_change_none(backend: str, frozen: str) -> None:
    h_TD, w_VD, target_T = normal(4, 3), normal(6, 3), torch.tensor([5, 0, IGNORE_INDEX, 2])
    whole = Case(h_TD.clone(), w_VD.clone(), target_T)
    dh_TD, dw_VD = torch.autograd.grad(whole.run(backend).logprob_T.sum(), whole.inputs)
    h_TD.requires_grad_(frozen == "head")
    w_VD.requires_grad_(frozen == "backbone")
    logprob_T = token_logprobs(h_TD, w_VD, target_T, backend=backend).logprob_T
    assert logprob_T.requires_grad == (frozen != "both")
    if frozen == "head":
        assert torch.equal(torch.autograd.grad(logprob_T.sum(), h_TD)[0], dh_TD)
    if frozen == "backbone":
        assert torch.equal(torch.autograd.grad(logprob_T.sum(), w_VD)[0], dw_VD)


def test_tied_head_gets_both_gradients(backend: str) -> None:
    token_T, target_T = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 0])
    w_VD = normal(5, 4).requires_grad_()
    copy_VD = w_VD.detach().clone().requires_grad_()
    token_logprobs(torch.tanh(w_VD[token_T]), w_VD, target_T, backend=backend).logprob_T.sum().backward()
    logits_TV = torch.tanh(copy_VD[token_T]) @ copy_VD.T
    (-torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="sum")).backward()
    assert w_VD.grad is not None and copy_VD.grad is not None
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}[WIDEST]
    torch.testing.assert_close(w_VD.grad, copy_VD.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_huge_logits(backend: str, dtype: torch.dtype) -> None:
    h_TD = torch.tensor([[1e4, 0.0], [0.0, 1e4], [-1e4, 1e4], [1e4, 1e4]], dtype=dtype)
    w_VD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.5, 0.5], [1.0, 0.0]], dtype=dtype)
    case = Case(h_TD, w_VD, torch.tensor([0, 1, 2, 3]))
    with tile_sizes(2, 4):
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert_as_defined(case, backend, tolerance)


def test_a_nan_reaches_the_loss_and_no_other_token(backend: str) -> None:
    h_TD = normal(3, 2)
    h_TD[1, 0] = torch.nan
    answer = token_logprobs(h_TD, normal(5, 2), torch.tensor([0, 1, 2]), backend=backend)
    assert answer.logprob_T.isnan().tolist() == [False, True, False]


SUPPORTS = [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.7}]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("where", ["hidden state", "head", "bias"])
def test_a_nan_is_in_every_number_that_it_has_part_in(
    backend: str, where: str, support: dict[str, Any], softcap: float | None
) -> None:
    """Of 40 tokens, so that it is neither first nor last of anything; nothing may pick another maximum."""
    h_TD, w_VD, bias_V = normal(3, 2), normal(40, 2), normal(40)
    bias_V[7] = -torch.inf
    {"hidden state": h_TD[1], "head": w_VD[20], "bias": bias_V[20:21]}[where][0] = torch.nan
    answer = token_logprobs(
        h_TD, w_VD, torch.tensor([0, 1, 39]), bias_V=bias_V, softcap=softcap, backend=backend,
        candidate_TC=torch.tensor([[2, 7]] * 3), n_top=2, **support,
    )  # fmt: skip
    wanted = [where != "hidden state" or token == 1 for token in range(3)]
    for name, field in answer._asdict().items():
        if field is not None and field.is_floating_point():
            assert field.isnan().view(3, -1).all(1).tolist() == wanted, name
            assert field.isnan().view(3, -1).any(1).tolist() == wanted, name


def test_autocast_changes_nothing(backend: str) -> None:
    """The dtypes of the inputs decide, also where h is bf16 and the master head float32."""
    h_TD, w_VD = (
        normal(6, 4, dtype=torch.bfloat16).requires_grad_(),
        normal(9, 4, dtype=torch.float32).requires_grad_(),
    )
    skip_if_refused(backend, h_TD, w_VD)
    target_T = torch.tensor([0, 8, 3, 4, IGNORE_INDEX, 1])
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            answer = token_logprobs(h_TD, w_VD, target_T, backend=backend)
        results.append([*answer[:5], *torch.autograd.grad(answer.logprob_T.sum(), (h_TD, w_VD))])
    assert all(torch.equal(plain, cast) for plain, cast in zip(*results, strict=True))
    assert [tensor.dtype for tensor in results[0][-2:]] == [torch.bfloat16, torch.float32]
    exact = (h_TD.double() @ w_VD.double().T).log_softmax(1)[torch.arange(6), target_T.clamp(min=0)]
    counted_T = target_T != IGNORE_INDEX
    torch.testing.assert_close(results[0][0][counted_T], exact[counted_T].float(), rtol=1e-5, atol=1e-5)


def test_bf16_log_probabilities_are_not_rounded_to_bf16(backend: str) -> None:
    """Logits rounded to bf16 would be off by about 1e-2 here."""
    h_TD, w_VD = normal(64, 128, dtype=torch.bfloat16), (normal(300, 128) * 0.2).bfloat16()
    case = Case(h_TD, w_VD, torch.arange(64), want=("entropy",))
    expected, _ = case.direct()
    for name, value in case.run(backend)._asdict().items():
        if name in ("logprob_T", "lse_T", "entropy_T"):
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-4)


def test_ties_do_not_count_as_above(backend: str) -> None:
    h_TD, w_VD = torch.ones(2, 4), torch.ones(6, 4)
    w_VD[2] = 2.0
    answer = token_logprobs(h_TD, w_VD, torch.tensor([2, 4]), backend=backend)
    assert answer.rank_T is not None and answer.rank_T.tolist() == [0, 1]


def test_a_second_derivative_is_exact(backend: str) -> None:
    case = Case(normal(3, 2), normal(5, 2), torch.tensor([0, 1, 2]))
    copies = case.direct()[1]
    second = []
    for h_TD, logprob_T in (
        (case.h_TD, case.run(backend).logprob_T),
        (copies[0], (copies[0] @ copies[1].T).log_softmax(dim=1)[range(3), range(3)]),
    ):
        (gradient,) = torch.autograd.grad(logprob_T.sum(), h_TD, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), h_TD)[0])
    tolerance = 1e-10 if case.h_TD.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(second[0].double(), second[1], rtol=tolerance, atol=tolerance)
