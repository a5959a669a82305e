"""Divergences between two heads: equal to the formulas on full float64 log-probabilities, flat in memory.

Shape legend: T tokens, D hidden width, V vocabulary, K tokens known of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from direct_signal import tile_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunked_memory import Largest
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss import _two_heads
from gyrocompass.loss.divergence import KINDS, Head, Kind, TopK, divergence

VALUE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-4}
"""In bf16 the tiles' logits are made of two rounded products: each is exact to 2^-18 of itself."""
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def tensors_of(head: Head) -> list[Tensor]:
    parts = (head.h_TD, head.w_VD, head.bias_V, *(head.low_rank or ()))
    return [part for part in parts if part is not None]


def each(head: Head, change: Callable[[Tensor], Tensor]) -> Head:
    low_rank = None if head.low_rank is None else (change(head.low_rank[0]), change(head.low_rank[1]))
    bias_V = None if head.bias_V is None else change(head.bias_V)
    return head._replace(h_TD=change(head.h_TD), w_VD=change(head.w_VD), bias_V=bias_V, low_rank=low_rank)


def full_log_probs(head: Head) -> Tensor:
    """log softmax of full logits, [T, V]; -inf where the bias is."""
    y_TV = head.h_TD @ head.w_VD.T
    if head.low_rank is not None:
        y_TV = y_TV + head.low_rank[0] @ head.low_rank[1].T
    outside_V = torch.zeros(len(head.w_VD), dtype=torch.bool)
    if head.bias_V is not None:
        outside_V = head.bias_V.detach() == -torch.inf
        y_TV = y_TV + torch.where(outside_V, 0.0, head.bias_V)
    y_TV = y_TV * head.logit_scale
    if head.softcap is not None:
        y_TV = head.softcap * torch.tanh(y_TV / head.softcap)
    return (y_TV / head.temperature).masked_fill(outside_V, -torch.inf).log_softmax(dim=1)


def by_formula(log_p: Tensor, log_q: Tensor, kind: Kind, beta: float) -> Tensor:
    """The definitions; an outcome with probability 0 is worth 0 times whatever it is multiplied with."""
    p, q = log_p.exp(), log_q.exp()

    def relative(weight: Tensor, log_weight: Tensor, log_other: Tensor) -> Tensor:
        inside = weight > 0
        gap = torch.where(inside, log_weight, 0.0) - torch.where(inside, log_other, 0.0)
        return torch.where(inside, weight * gap, 0.0).sum(dim=1)

    if kind == "total_variation":
        return (p - q).abs().sum(dim=1) / 2
    if kind == "forward_kl":
        return relative(q, log_q, log_p)
    if kind == "reverse_kl":
        return relative(p, log_p, log_q)
    mixture = (1 - beta) * p + beta * q
    log_mixture = torch.where(mixture > 0, mixture, 1.0).log()
    return beta * relative(q, log_q, log_mixture) + (1 - beta) * relative(p, log_p, log_mixture)


@st.composite
def heads(draw: st.DrawFn, n_tokens: int, outside_V: Tensor, generator: torch.Generator) -> Head:
    """A head with any features over a vocabulary of which some tokens are taken out."""
    vocabulary, width = len(outside_V), draw(st.integers(1, 6))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bias_V = normal(vocabulary).masked_fill(outside_V, -torch.inf) if outside_V.any() else None
    if bias_V is None and draw(st.booleans()):
        bias_V = normal(vocabulary)
    rank = draw(st.sampled_from([0, 0, 2]))
    return Head(
        normal(n_tokens, width),
        normal(vocabulary, width),
        bias_V,
        (normal(n_tokens, rank), normal(vocabulary, rank)) if rank else None,
        draw(st.sampled_from([None, 3.0])),
        draw(st.sampled_from([1.0, 0.6])),
        draw(st.sampled_from([1.0, 1.7])),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Head, Head, dict[str, Any], torch.Generator]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n_tokens, vocabulary = draw(st.integers(0, 9)), draw(st.integers(1, 14))
    outside_V = torch.rand(vocabulary, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    outside_V[draw(st.integers(0, vocabulary - 1))] = False
    student = draw(heads(n_tokens, outside_V, generator))
    teacher = draw(heads(n_tokens, outside_V, generator))
    mask_T = torch.rand(n_tokens, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    rest = {
        "kind": draw(st.sampled_from(KINDS)),
        "beta": draw(st.sampled_from([0.5, 0.1, 0.9])),
        "mask_T": mask_T if draw(st.booleans()) else None,
    }
    return student, teacher, rest, generator


def expected_of(student: Head, teacher: Head, kind: Kind, beta: float, mask_T: Tensor | None) -> Tensor:
    found_T = by_formula(full_log_probs(student), full_log_probs(teacher), kind, beta)
    return found_T if mask_T is None else torch.where(mask_T, found_T, 0.0)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE)
@pytest.mark.parametrize("live", [False, True])
@settings(deadline=None, max_examples=60)
@given(case=cases(), tiles=st.tuples(st.integers(1, 10), st.integers(1, 60)), piece=st.integers(1, 60))
def test_values_and_gradients(
    dtype: torch.dtype, live: bool, case: Any, tiles: tuple[int, int], piece: int
) -> None:
    student, teacher, rest, generator = case
    student = each(student, lambda part: part.to(dtype).requires_grad_())
    teacher = each(teacher, lambda part: part.to(dtype).requires_grad_(live))
    exact = [each(head, lambda part: part.detach().double().requires_grad_()) for head in (student, teacher)]
    expected_T = expected_of(*exact, **rest)
    inputs, copies = tensors_of(student), tensors_of(exact[0])
    if live:
        inputs, copies = inputs + tensors_of(teacher), copies + tensors_of(exact[1])
    weight_T = torch.randn(expected_T.shape, generator=generator, dtype=torch.float64)
    with tile_sizes(*tiles), mock.patch.object(_two_heads, "PIECE_ELEMENTS", piece):
        actual_T = divergence(student, teacher, **rest)
        gradients = torch.autograd.grad((actual_T * weight_T).sum(), inputs)
    assert actual_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(actual_T, expected_T, VALUE_TOLERANCE[dtype])
    for actual, wanted in zip(
        gradients, torch.autograd.grad((expected_T * weight_T).sum(), copies), strict=True
    ):
        assert_close(actual, wanted, GRADIENT_TOLERANCE[dtype])


def pair(n_tokens: int = 6, vocabulary: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Head, Head]:
    generator = torch.Generator().manual_seed(n_tokens + vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = Head(normal(n_tokens, 4), normal(vocabulary, 4), normal(vocabulary))
    return student, Head(normal(n_tokens, 7), normal(vocabulary, 7), softcap=5.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_heads_do_not_diverge(kind: Kind, dtype: torch.dtype) -> None:
    student, _ = pair(dtype=dtype)
    student.h_TD.requires_grad_()
    found_T = divergence(student, each(student, lambda part: part.detach().clone()), kind)
    assert not found_T.any()
    (gradient,) = torch.autograd.grad(found_T.sum(), student.h_TD)
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_heads_that_nearly_agree_have_correct_digits(kind: Kind) -> None:
    student, _ = pair(50, 300, torch.float32)
    noise_TD = torch.randn(student.h_TD.shape, generator=torch.Generator().manual_seed(0))
    teacher = student._replace(h_TD=student.h_TD + 1e-3 * noise_TD)
    found_T = divergence(student, teacher, kind).double()
    exact = [each(head, torch.Tensor.double) for head in (student, teacher)]
    expected_T = expected_of(*exact, kind, 0.5, None)
    assert float(expected_T.max()) < 1e-4
    assert float(((found_T - expected_T) / expected_T).abs().max()) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_never_negative_by_rounding(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, noise = (torch.randn(20000, 3, generator=generator) for _ in range(2))
    eye = torch.eye(3)
    for size in (1e-7, 1e-6):
        found = divergence(Head(3 * logits, eye), Head(3 * logits + size * noise, eye), kind, beta=0.3)
        assert (found >= 0).all()


def test_bounds_and_symmetries() -> None:
    student, teacher = pair(40)
    far = student._replace(h_TD=100 * student.h_TD), teacher._replace(h_TD=100 * teacher.h_TD)
    for one, other in ((student, teacher), far):
        variation_T = divergence(one, other, "total_variation")
        jsd_T = divergence(one, other, "jsd")
        kl_T = divergence(one, other, "forward_kl")
        assert ((variation_T >= 0) & (variation_T <= 1 + 1e-12)).all()
        assert ((jsd_T >= 0) & (jsd_T <= math.log(2) + 1e-12)).all()
        assert (2 * variation_T.square() <= kl_T + 1e-12).all()  # Pinsker
        torch.testing.assert_close(jsd_T, divergence(other, one, "jsd"))
        torch.testing.assert_close(kl_T, divergence(other, one, "reverse_kl"))
    assert float(divergence(*far, "total_variation").max()) > 0.99


def test_the_limits_of_jsd_are_the_kl_divergences() -> None:
    heads, beta = pair(), 1e-6
    forward_T = divergence(*heads, "jsd", beta=beta) / beta
    reverse_T = divergence(*heads, "jsd", beta=1 - beta) / beta
    torch.testing.assert_close(forward_T, divergence(*heads, "forward_kl"), rtol=1e-3, atol=0)
    torch.testing.assert_close(reverse_T, divergence(*heads, "reverse_kl"), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_equal_to_trl(kind: Kind, beta: float) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    student, teacher = pair()
    logits = [full_log_probs(head)[None] for head in (student, teacher)]
    wanted = trainer.generalized_jsd_loss(*logits, beta=beta, temperature=1.3, reduction="sum")
    eye_VV = torch.eye(11, dtype=torch.float64)
    hot = [Head(log_p[0], eye_VV, temperature=1.3) for log_p in logits]
    torch.testing.assert_close(divergence(*hot, kind, beta=beta or 0.5).sum(), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_only_one_head_has(kind: Kind) -> None:
    student, teacher = pair()
    assert student.bias_V is not None
    student.bias_V[3] = -torch.inf
    for infinite_kind, heads in (("forward_kl", (student, teacher)), ("reverse_kl", (teacher, student))):
        for part in tensors_of(heads[0]):
            part.requires_grad_()
        found_T = divergence(*heads, kind)
        if kind == infinite_kind:
            assert found_T.isposinf().all()
        else:
            expected_T = expected_of(*heads, kind, 0.5, None)
            torch.testing.assert_close(found_T, expected_T)
            inputs = tensors_of(heads[0])
            for actual, wanted in zip(
                torch.autograd.grad(found_T.sum(), inputs),
                torch.autograd.grad(expected_T.sum(), inputs),
                strict=True,
            ):
                torch.testing.assert_close(actual, wanted.nan_to_num())


def test_masked_positions_cost_nothing_and_are_not_read() -> None:
    student, teacher = pair()
    mask_T = torch.tensor([True, False, True, False, False, True])
    expected_T = divergence(student, teacher)
    for head in (student, teacher):
        head.h_TD[~mask_T] = torch.nan
    student.h_TD.requires_grad_()
    found_T = divergence(student, teacher, mask_T=mask_T)
    torch.testing.assert_close(found_T, expected_T * mask_T)
    (gradient,) = torch.autograd.grad(found_T.sum(), student.h_TD)
    assert not gradient[~mask_T].any() and gradient[mask_T].all()


# --- a teacher's k likeliest tokens ---


def coarse(log_p_TV: Tensor, token_TK: Tensor) -> Tensor:
    """Log-probabilities of the tokens, then of all others."""
    rest_TV = log_p_TV.scatter(1, token_TK, -torch.inf)
    return torch.cat([log_p_TV.gather(1, token_TK), rest_TV.logsumexp(dim=1, keepdim=True)], dim=1)


def known_of(teacher: Head, k: int) -> TopK:
    top = full_log_probs(teacher).detach().topk(k, dim=1)
    return TopK(top.indices, top.values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_k_is_the_divergence_of_coarse_distributions(kind: Kind, k: int, dtype: torch.dtype) -> None:
    student, teacher = pair()
    low_rank = student.h_TD[:, :2].clone(), student.w_VD[:, 2:].clone()
    student = student._replace(low_rank=low_rank, softcap=4.0, logit_scale=0.8, temperature=1.3)
    student = each(student, lambda part: part.requires_grad_())
    weight_T = torch.arange(1.0, 7.0, dtype=torch.float64)
    known, mask_T = known_of(teacher, k), torch.tensor([True, True, False, True, False, True])
    log_p, log_q = (coarse(full_log_probs(head), known.token_TK) for head in (student, teacher))
    expected_T = torch.where(mask_T, by_formula(log_p, log_q, kind, 0.3), 0.0)
    copy = each(student, lambda part: part.detach().to(dtype).requires_grad_())
    known = known._replace(token_TK=known.token_TK.where(mask_T[:, None], -100))  # not looked at
    found_T = divergence(
        copy, known._replace(logprob_TK=known.logprob_TK.to(dtype)), kind, beta=0.3, mask_T=mask_T
    )
    assert found_T.dtype == dtype
    assert_close(found_T, expected_T, VALUE_TOLERANCE[dtype])
    gradients = torch.autograd.grad((weight_T * found_T).sum(), tensors_of(copy))
    wanted = torch.autograd.grad((weight_T * expected_T).sum(), tensors_of(student))
    for actual, exact in zip(gradients, wanted, strict=True):  # a tail is 1 less a sum: fewer digits
        assert_close(actual, exact, 10 * GRADIENT_TOLERANCE[dtype])
    assert (found_T <= divergence(student, teacher, kind, beta=0.3) + 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("student_tail", "teacher_tail"), [("none", "none"), ("none", "all"), ("all", "none")]
)
def test_tails_of_nothing_and_of_everything(kind: Kind, student_tail: str, teacher_tail: str) -> None:
    """Tails of mass 0 and 1 have finite values and gradients, in float32."""
    height = 200.0 if student_tail == "none" else -200.0
    h_TD = torch.tensor([[height, 0.0]]).requires_grad_()
    w_VD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]).requires_grad_()
    known_TK = torch.tensor([[0.0]]) if teacher_tail == "none" else torch.tensor([[-100.0]])
    found_T = divergence(Head(h_TD, w_VD), TopK(torch.tensor([[0]]), known_TK), kind)
    gradients = torch.autograd.grad(found_T.sum(), [h_TD, w_VD])
    assert found_T.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    agree = student_tail == teacher_tail
    assert float(found_T.detach()) < 1e-5 if agree else float(found_T.detach()) > 0.3


# --- memory, second derivatives, bad input ---

N_TOKENS, WIDTH, VOCABULARY, TILE_ELEMENTS = 96, 8, 512, 1024


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_larger_than_a_tile_or_an_input(kind: Kind) -> None:
    student, teacher = (
        Head(torch.randn(N_TOKENS, width), torch.randn(VOCABULARY, width), softcap=5.0)
        for width in (WIDTH, WIDTH // 2)
    )
    for part in (*tensors_of(student), *tensors_of(teacher)):
        part.requires_grad_()
    with tile_sizes(32, TILE_ELEMENTS), Largest() as seen:
        divergence(student, teacher, kind).sum().backward()
    assert seen.elements <= max(VOCABULARY * WIDTH, TILE_ELEMENTS), seen.operation
    assert student.w_VD.grad is not None and teacher.w_VD.grad is not None


def test_a_second_derivative_is_refused() -> None:
    student, teacher = pair()
    student.h_TD.requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(student, teacher).sum(), student.h_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="a first derivative only"):
        gradient.sum().backward()


def wrong_calls() -> dict[str, Callable[[Head, Head], Any]]:
    good = TopK(torch.tensor([[1, 2]] * 6), torch.tensor([[-1.0, -2.0]] * 6))
    return {
        "unknown divergence 'kl'": lambda s, t: divergence(s, t, "kl"),  # type: ignore[arg-type]
        "beta is 1": lambda s, t: divergence(s, t, "jsd", beta=1),
        "the student's vocabulary is empty": lambda s, t: divergence(Head(s.h_TD, s.w_VD[:0]), t),
        "the student has 6 positions, the teacher 5": lambda s, t: divergence(s, t._replace(h_TD=t.h_TD[:5])),
        "the student has 11 tokens of vocabulary, the teacher 10": (
            lambda s, t: divergence(s, t._replace(w_VD=t.w_VD[:10]))
        ),
        r"the teacher's h_TD \[6, 4\]": lambda s, t: divergence(s, t._replace(h_TD=s.h_TD)),
        r"the student's bias_V is \[4\]": lambda s, t: divergence(s._replace(bias_V=s.h_TD[0]), t),
        r"the teacher's low_rank\[1\]": lambda s, t: divergence(s, t._replace(low_rank=(t.h_TD, s.w_VD))),
        "the teacher's temperature is 0": lambda s, t: divergence(s, t._replace(temperature=0.0)),
        "the student's softcap is nan": lambda s, t: divergence(s._replace(softcap=math.nan), t),
        r"mask_T is \[6\] of torch.int64": lambda s, t: divergence(s, t, mask_T=torch.ones(6).long()),
        "different devices": lambda s, t: divergence(s, each(t, lambda part: part.to("meta"))),
        r"token_TK is \[5, 2\]": lambda s, _: divergence(s, TopK(*(part[:5] for part in good))),
        r"and logprob_TK \[6, 1\]": lambda s, _: divergence(s, TopK(good[0], good[1][:, :1])),
        "logprob_TK is .* not of a floating": lambda s, _: divergence(s, TopK(good.token_TK, good.token_TK)),
        "token 11 is outside": lambda s, _: divergence(s, good._replace(token_TK=good.token_TK + 9)),
        "token -1 is outside": lambda s, _: divergence(s, good._replace(token_TK=good.token_TK - 2)),
        "token 1 stands in its row twice": (
            lambda s, _: divergence(s, good._replace(token_TK=torch.ones_like(good.token_TK)))
        ),
        "sum to more than 1": lambda s, _: divergence(s, good._replace(logprob_TK=good.logprob_TK + 1)),
    }  # fmt: skip


@pytest.mark.parametrize("message", wrong_calls())
def test_bad_input(message: str) -> None:
    with pytest.raises(BadInput, match=message):
        wrong_calls()[message](*pair())
