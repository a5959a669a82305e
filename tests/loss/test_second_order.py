"""Second derivatives by tiles: equal to autograd's through full logits, flat in memory, the third refused.

Shape legend: T tokens, D hidden width, V vocabulary, R rank of a low-rank addition, C candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from direct_signal import tile_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunked_memory import Largest
from torch import Tensor

from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._ops import _N_FIELDS, Call, Inputs, Settings, _forward, _second
from gyrocompass.loss._question import Gradients, Needs
from gyrocompass.loss._second import second
from gyrocompass.loss.logprob import WANTS, token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX, TokenLogProbs


class Head(NamedTuple):
    """Tensors that are differentiated, in the order of the operators."""

    h_TD: Tensor
    w_VD: Tensor
    bias_V: Tensor | None = None
    a_TR: Tensor | None = None
    b_VR: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Head:
        return Head(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]

    @property
    def given(self) -> list[Tensor]:
        return [part for part in self if part is not None]


def answer_of(head: Head, backend: str, **rest: Any) -> TokenLogProbs:
    h_TD, w_VD, bias_V, a_TR, b_VR = head
    low_rank = None if a_TR is None or b_VR is None else (a_TR, b_VR)
    return token_logprobs(h_TD, w_VD, bias_V=bias_V, low_rank=low_rank, backend=backend, **rest)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Head, dict[str, Any], torch.Generator]:
    """A head with any features, and the rest of a call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def tokens(*shape: int) -> Tensor:
        ignored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
        return torch.randint(vocabulary, shape, generator=generator).masked_fill(ignored, IGNORE_INDEX)

    n_tokens, width, vocabulary = draw(st.integers(0, 6)), draw(st.integers(1, 4)), draw(st.integers(3, 12))
    bias_V = None
    if draw(st.booleans()):
        bias_V = normal(vocabulary)
        outside_V = torch.rand(vocabulary, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
        outside_V[: draw(st.integers(1, 3))] = False
        bias_V = bias_V.masked_fill(outside_V, -torch.inf)
    rank = draw(st.sampled_from([0, 1, 3]))
    head = Head(normal(n_tokens, width), normal(vocabulary, width), bias_V)
    if rank:
        head = head._replace(a_TR=normal(n_tokens, rank), b_VR=normal(vocabulary, rank))
    rest = {
        "target_T": tokens(n_tokens),
        "candidate_TC": tokens(n_tokens, draw(st.integers(0, 3))) if draw(st.booleans()) else None,
        "softcap": draw(st.sampled_from([None, 2.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.6])),
        "temperature": draw(st.sampled_from([1.0, 1.7])),
        "want": sorted(draw(st.sets(st.sampled_from(WANTS)))),
        "n_top": draw(st.sampled_from([0, 0, 1])),
        "top_k": draw(st.sampled_from([None, None, 2])),
        "top_p": draw(st.sampled_from([None, None, 0.7])),
    }
    return head, rest, generator


def second_of(
    head: Head, backend: str, rest: dict[str, Any], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Derivatives of <u, gradients of sum g . output> by the inputs and by g, for u and g that are drawn."""
    fields = {
        name: field
        for name, field in answer_of(head, backend, **rest)._asdict().items()
        if field is not None and field.is_floating_point()
    }

    def normal_like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    weights = [normal_like(field).requires_grad_() for field in fields.values()]
    total = torch.stack([
        torch.where(field.isfinite(), field * weight, 0.0).sum()
        for field, weight in zip(fields.values(), weights, strict=True)
    ]).sum()  # fmt: skip
    gradients = torch.autograd.grad(total, head.given, create_graph=True)
    along = [normal_like(gradient) for gradient in gradients]
    slope = torch.stack([(u * dx).sum() for u, dx in zip(along, gradients, strict=True)]).sum()
    found = torch.autograd.grad(slope, [*head.given, *weights], materialize_grads=True)
    return list(found[: len(head.given)]), list(found[len(head.given) :])


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for own, wanted in zip(actual, expected, strict=True):
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(own.double(), wanted.double(), rtol=0.0, atol=tolerance * scale)


@settings(deadline=None, max_examples=150)
@given(case=cases(), tiles=st.tuples(st.integers(1, 7), st.integers(1, 40)))
def test_equal_to_autograd_through_full_logits(case: Any, tiles: tuple[int, int]) -> None:
    head, rest, generator = case
    head = head.each(lambda part: part.requires_grad_())
    state = generator.get_state()
    expected = second_of(head, "reference", rest, generator)
    with tile_sizes(*tiles):
        actual = second_of(head, "chunked", rest, generator.set_state(state))
    for own, wanted in zip(actual, expected, strict=True):
        assert_same(own, wanted, 1e-10)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_frozen_parts_take_no_part(needs: tuple[bool, bool], case: Any) -> None:
    head, rest, _ = case
    if head.a_TR is None:
        needs_part = [head.h_TD if needs[0] else head.w_VD]
    else:
        needs_part = [head.h_TD, head.a_TR] if needs[0] else [head.w_VD, head.b_VR]
    for part in needs_part:
        part.requires_grad_()
    answers = []
    for backend in ("chunked", "reference"):
        gradients = torch.autograd.grad(
            answer_of(head, backend, **rest).lse_T.square().sum(), needs_part, create_graph=True
        )
        total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        answers.append(torch.autograd.grad(total, needs_part, materialize_grads=True))
    assert_same(list(answers[0]), list(answers[1]), 1e-10)


SETTINGS = Settings(3.0, 1.0, 1.2, IGNORE_INDEX, ",".join(WANTS), 0, 0, 1.0, "chunked", False, "", 0)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of the norm of the error over the norm; narrow gradients are rounded twice."""


def whole_case(dtype: torch.dtype, seed: int) -> tuple[Head, dict[str, Any], torch.Generator]:
    """Everything at once, large enough for a native backend's inner blocks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = Head(normal(40, 32), normal(130, 32) / 6, normal(130), normal(40, 4), normal(130, 4) / 2)
    target_T = torch.randint(130, (40,), generator=generator)
    target_T[::5] = IGNORE_INDEX
    candidate_TC = torch.randint(130, (40, 3), generator=generator)
    rest = {"target_T": target_T, "candidate_TC": candidate_TC, "softcap": 4.0, "temperature": 1.3}
    return head.each(lambda part: part.to(dtype)), rest, generator


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_and_dtype(backend: str, dtype: torch.dtype) -> None:
    head, rest, generator = whole_case(dtype, 3)
    logits = Call(Inputs(*head, rest["target_T"], None, None), SETTINGS).question.logits
    refusal = BACKENDS[backend].refusal(logits)
    if refusal is not None:
        pytest.skip(refusal)
    state = generator.get_state()
    actual = second_of(head.each(lambda part: part.requires_grad_()), backend, rest, generator)
    exact = head.each(lambda part: part.detach().double().requires_grad_())
    expected = second_of(exact, "reference", rest, generator.set_state(state))
    for own, wanted in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert float((own.double() - wanted).norm()) <= TOLERANCE[dtype] * float(wanted.norm())


def test_dtypes_that_differ() -> None:
    """One float64 input makes the arithmetic float64; each gradient comes in its input's own dtype."""
    head, rest, generator = whole_case(torch.float32, 4)
    assert head.bias_V is not None and head.a_TR is not None
    head = head._replace(bias_V=head.bias_V.double(), h_TD=head.h_TD.bfloat16(), a_TR=head.a_TR.half())
    state = generator.get_state()
    found, _ = second_of(head.each(lambda part: part.requires_grad_()), "chunked", rest, generator)
    exact = head.each(lambda part: part.detach().double().requires_grad_())
    expected, _ = second_of(exact, "reference", rest, generator.set_state(state))
    assert [part.dtype for part in found] == [part.dtype for part in head.given]
    for own, wanted in zip(found, expected, strict=True):
        assert float((own.double() - wanted).norm()) <= 2e-2 * float(wanted.norm())


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradgradcheck(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    target_T = torch.tensor([3, IGNORE_INDEX, 0, 6])
    candidate_TC = torch.tensor([[1, 1], [2, 3], [0, IGNORE_INDEX], [5, 6]])

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        fields = answer_of(
            Head(*tensors), "chunked", target_T=target_T, candidate_TC=candidate_TC, softcap=softcap, n_top=2
        )
        return tuple(field for field in fields if field is not None and field.is_floating_point())

    shapes = ((4, 3), (7, 3), (7,), (4, 2), (7, 2))
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    with tile_sizes(2, 6):
        assert torch.autograd.gradgradcheck(outputs, [tensor.requires_grad_() for tensor in inputs])


def nonlinear_loss(*tensors: Tensor, backend: str = "chunked") -> Tensor:
    """A loss whose own second derivative matters too."""
    answer = answer_of(
        Head(*tensors), backend, target_T=torch.tensor([1, IGNORE_INDEX, 4, 0]), want=["entropy"], softcap=2.0
    )
    assert answer.entropy_T is not None
    focal_T = (1 - answer.logprob_T.exp()).square() * answer.logprob_T
    return answer.entropy_T.square().sum() + answer.lse_T.square().sum() - focal_T.sum()


@pytest.mark.parametrize("product", [torch.autograd.functional.hvp, torch.autograd.functional.vhp])
def test_hessian_vector_products(product: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, along = (
        tuple(
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((4, 3), (6, 3), (6,), (4, 2), (6, 2))
        )
        for _ in range(2)
    )
    loss, found = product(nonlinear_loss, inputs, along)
    wanted_loss, wanted = product(lambda *given: nonlinear_loss(*given, backend="reference"), inputs, along)
    assert_same([loss, *found], [wanted_loss, *wanted], 1e-10)


def test_a_third_derivative_is_refused() -> None:
    h_TD = torch.randn(4, 3, requires_grad=True)
    w_VD = torch.randn(6, 3)
    (first,) = torch.autograd.grad(nonlinear_loss(h_TD, w_VD), h_TD, create_graph=True)
    (again,) = torch.autograd.grad(first.sum(), h_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="only backend='reference' has a third"):
        again.sum().backward()


@pytest.mark.parametrize("rows", [slice(1, 2), slice(1, 5)])
def test_the_operator_keeps_its_promises(rows: slice) -> None:
    """Schema, fake and aliasing, by torch's own check; with one row, views look whole."""
    head, rest, _ = whole_case(torch.float32, 7)
    head = head._replace(h_TD=head.h_TD[rows], a_TR=head.a_TR[rows])  # type: ignore[index]
    tensors = (*head, rest["target_T"][rows], rest["candidate_TC"][rows])
    plain = SETTINGS._replace(n_top=2)
    fields, saved = _parted(_forward(*tensors, None, *plain))
    gradients = [
        torch.ones_like(field) if field.is_floating_point() else field.new_empty(0) for field in fields
    ]
    needs, along = [True] * 4, [torch.ones_like(part) for part in head.given]
    torch.library.opcheck(_second, (along, gradients, saved, needs, *tensors, *plain))


def _parted(answer: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The fields, and what the pass back reads."""
    fields = answer[:_N_FIELDS]
    named = TokenLogProbs(*fields)
    assert named.entropy_T is not None and named.sum_sq_T is not None and named.top_token_TK is not None
    return fields, [named.entropy_T, named.sum_sq_T, named.top_token_TK, *answer[len(fields) :]]


N_TOKENS, WIDTH, VOCABULARY, TILE_ELEMENTS = 96, 8, 512, 1024


def largest_of_second(backend: str) -> Largest:
    head = Head(torch.randn(N_TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY))
    rest = {"target_T": torch.randint(VOCABULARY, (N_TOKENS,)), "softcap": 5.0}
    head = head.each(lambda part: part.requires_grad_())
    with tile_sizes(32, TILE_ELEMENTS), Largest() as seen:
        second_of(head, backend, rest, torch.Generator().manual_seed(0))
    return seen


def test_no_tensor_is_larger_than_a_tile_or_an_input() -> None:
    seen = largest_of_second("chunked")
    assert seen.elements <= max(N_TOKENS * 2 * WIDTH, VOCABULARY * WIDTH, TILE_ELEMENTS), seen.operation
    assert largest_of_second("reference").elements >= N_TOKENS * VOCABULARY


class Ranks:
    """Sums over two threads, each with a part of the vocabulary."""

    def __init__(self) -> None:
        self.barrier, self.shares = threading.Barrier(2, timeout=60), {}

    def total(self, rank: int) -> Callable[[Tensor], Tensor]:
        def total(share: Tensor) -> Tensor:
            self.shares[rank] = share
            self.barrier.wait()
            both = self.shares[0] + self.shares[1]
            self.barrier.wait()
            return both

        return total


def direction(call: Call, along: Head) -> Gradients:
    u_h, u_w, u_bias, u_a, u_b = along
    return Gradients(call.rows(u_h), u_w, u_bias, None if u_a is None else call.rows(u_a), u_b)


def part_of(head: Head, rows: slice) -> Head:
    """The head's rows of a part of the vocabulary."""
    return head._replace(**{name: getattr(head, name)[rows] for name in ("w_VD", "bias_V", "b_VR")})


def test_a_vocabulary_cut_in_two() -> None:
    head, rest, generator = whole_case(torch.float64, 5)

    def normal_like(part: Tensor) -> Tensor:
        return torch.randn(part.shape, generator=generator, dtype=torch.float64)

    call = Call(Inputs(*head, rest["target_T"], rest["candidate_TC"], None), SETTINGS)
    answer, scale = call.run()
    drawn = (f"{name}_T" for name in ("logprob", "lse", "entropy", "mean_logit", "sum_sq"))
    weights = {name: normal_like(getattr(answer, name)) for name in (*drawn, "candidate_TC")}
    gradient, along = TokenLogProbs(**weights), head.each(normal_like)
    needs = Needs(h=True, w=True, bias=True, low_rank=True)
    whole = second(call.question, scale, gradient, direction(call, along), needs)
    ranks, found = Ranks(), {}

    def run(rank: int) -> None:
        rows = (slice(0, 50), slice(50, 130))[rank]
        _, w_VD, bias_V, _, b_VR = part_of(head, rows)
        logits = call.question.logits._replace(w_VD=w_VD, bias_V=bias_V, b_VR=b_VR)
        question = call.question._replace(logits=logits, first_token=rows.start)
        u = direction(call, part_of(along, rows))
        found[rank] = second(question, scale, gradient, u, needs, ranks.total(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1):
        for name in weights:
            assert_same([getattr(found[rank].tangents, name)], [getattr(whole.tangents, name)], 1e-10)
        own, wanted = found[rank].gradients, whole.gradients
        assert_same([own.dh_ND, own.da_NR], [wanted.dh_ND, wanted.da_NR], 1e-10)
    for name in ("dw_VD", "dbias_V", "db_VR"):
        joined = torch.cat([getattr(found[rank].gradients, name) for rank in (0, 1)])
        assert_same([joined], [getattr(whole.gradients, name)], 1e-10)
