"""The drop-in is torch's own function, for every combination of its arguments, in value and gradient."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gyrocompass
from gyrocompass.core.errors import BadInput
from gyrocompass.loss.drop_in import linear_cross_entropy

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def random_case(
    seed: int,
    *,
    rows: int | None,
    inner: tuple[int, ...],
    soft: bool,
    biased: bool,
    weighted: bool,
    ignore_index: int | None,
    dtype: torch.dtype,
    classes: int = 7,
    width: int = 5,
) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """What takes a gradient, the target, and the other arguments."""
    torch.manual_seed(seed)
    batch = () if rows is None else (rows,)
    given = [torch.randn(*batch, width, dtype=dtype), torch.randn(classes, *inner, width, dtype=dtype)]
    if biased:
        given.append(torch.randn(classes, *inner, dtype=dtype))
    if soft:
        target = torch.rand(*batch, classes, *inner, dtype=dtype)
    else:
        target = torch.randint(classes, (*batch, *inner))
        target[torch.rand(target.shape) < 0.3] = -100 if ignore_index is None else ignore_index
    others: dict[str, Any] = {"weight": torch.rand(classes, dtype=dtype) + 0.1} if weighted else {}
    if ignore_index is not None and not soft:
        others["ignore_index"] = ignore_index
    return given, target, others


def loss_and_gradients(function: Any, given: list[Tensor], target: Tensor, **others: Any) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    if target.is_floating_point():
        target = target.detach().clone().requires_grad_()
    bias = {"linear_bias": leaves[2]} if len(leaves) > 2 else {}
    loss = function(leaves[0], leaves[1], target, **bias, **others)
    torch.manual_seed(1)
    wanted = leaves + ([target] if target.is_floating_point() else [])
    grads = torch.autograd.grad(loss, wanted, torch.randn(loss.shape, dtype=loss.dtype))
    return [loss.detach(), *grads]


shapes = st.one_of(
    st.tuples(st.none(), st.just(())),
    st.tuples(st.integers(0, 6), st.sampled_from([(), (3,), (2, 3), (1,)])),
)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=shapes,
    soft=st.booleans(),
    biased=st.booleans(),
    weighted=st.booleans(),
    ignore_index=st.sampled_from([None, -100, 2, -1]),
    smoothing=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_values_and_gradients_are_torchs(
    seed: int,
    shape: tuple[int | None, tuple[int, ...]],
    soft: bool,
    biased: bool,
    weighted: bool,
    ignore_index: int | None,
    smoothing: float,
    reduction: str,
    dtype: torch.dtype,
) -> None:
    given, target, others = random_case(
        seed,
        rows=shape[0],
        inner=shape[1],
        soft=soft,
        biased=biased,
        weighted=weighted,
        ignore_index=ignore_index,
        dtype=dtype,
    )
    others |= {"reduction": reduction, "label_smoothing": smoothing}
    mine = loss_and_gradients(linear_cross_entropy, given, target, **others)
    theirs = loss_and_gradients(F.linear_cross_entropy, given, target, **others)
    if theirs[0].isnan().any():  # a mean over nothing
        assert all((tensor == 0).all() for tensor in mine)
        return
    for ours, its in zip(mine, theirs, strict=True):
        assert ours.dtype == its.dtype
        torch.testing.assert_close(ours, its, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_signature_is_torchs() -> None:
    mine, theirs = inspect.signature(linear_cross_entropy), inspect.signature(F.linear_cross_entropy)
    assert [(p.name, p.kind, p.default) for p in mine.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 4])
def test_the_mean_over_nothing_is_a_differentiable_zero(rows: int, smoothing: float, weighted: bool) -> None:
    h, w = torch.randn(rows, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    target = torch.full((rows,), -100)
    others = {"weight": torch.ones(5)} if weighted else {}
    loss = linear_cross_entropy(h, w, target, label_smoothing=smoothing, **others)
    assert F.linear_cross_entropy(h, w, target, label_smoothing=smoothing, **others).isnan()
    assert loss == 0
    for gradient in torch.autograd.grad(loss, [h, w]):
        assert (gradient == 0).all()


def test_class_weights_that_are_all_zero_mean_nothing() -> None:
    loss = linear_cross_entropy(
        torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, 2]), weight=torch.zeros(5)
    )
    assert loss == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_an_ignored_row_touches_nothing_whatever_it_holds(weighted: bool) -> None:
    h = torch.randn(3, 4)
    h[1] = torch.nan
    h.requires_grad_()
    w = torch.randn(6, 4, requires_grad=True)
    others = {"weight": torch.rand(6)} if weighted else {}
    loss = linear_cross_entropy(h, w, torch.tensor([1, -100, 5]), label_smoothing=0.2, **others)
    dh, dw = torch.autograd.grad(loss, [h, w])
    assert loss.isfinite() and dh.isfinite().all() and dw.isfinite().all() and (dh[1] == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_bias_of_minus_infinity_is_a_smaller_vocabulary(smoothing: float, weighted: bool) -> None:
    torch.manual_seed(0)
    h, w, bias = torch.randn(4, 3).double(), torch.randn(6, 3).double(), torch.randn(6).double()
    target, weight = torch.tensor([0, 1, 3, -100]), torch.rand(6).double()
    bias[4:] = -torch.inf
    others = {"weight": weight} if weighted else {}
    fewer = {"weight": weight[:4]} if weighted else {}
    mine = linear_cross_entropy(h, w, target, linear_bias=bias, label_smoothing=smoothing, **others)
    small = F.linear_cross_entropy(h, w[:4], target, linear_bias=bias[:4], label_smoothing=smoothing, **fewer)
    torch.testing.assert_close(mine, small, rtol=1e-11, atol=1e-11)


def test_bf16_inputs_give_a_float32_loss_nearer_to_the_truth() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(32, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    target, weight = torch.randint(64, (32,)), torch.rand(64)
    others = {"reduction": "none", "label_smoothing": 0.1}
    truth = F.linear_cross_entropy(h.double(), w.double(), target, weight=weight.double(), **others)
    mine = linear_cross_entropy(h, w, target, weight=weight, **others)
    theirs = F.linear_cross_entropy(h, w, target, weight=weight.bfloat16(), **others)
    assert mine.dtype == torch.float32 and theirs.dtype == torch.bfloat16
    assert (mine - truth).abs().max() < 1e-4 < 1e-2 < (theirs - truth).abs().max()


def test_a_vocabulary_of_several_blocks_under_class_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gyrocompass.loss.drop_in._BLOCK", 3)
    given, target, others = random_case(
        5, rows=6, inner=(), soft=False, biased=True, weighted=True, ignore_index=None, dtype=torch.float64
    )
    others["label_smoothing"] = 0.4
    mine = loss_and_gradients(linear_cross_entropy, given, target, **others)
    theirs = loss_and_gradients(F.linear_cross_entropy, given, target, **others)
    for ours, its in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, its)


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("weighted", [False, True])
def test_no_logits_are_held(weighted: bool) -> None:
    rows, classes = 8192, 4096
    h, w = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    others = {"weight": torch.rand(classes)} if weighted else {}
    with Largest() as seen:
        target = torch.randint(classes, (rows,))
        linear_cross_entropy(h, w, target, label_smoothing=0.1, **others).backward()
    assert classes * 8 <= seen.elements <= rows * classes // 2


def test_options_change_nothing() -> None:
    given, target, others = random_case(
        7, rows=6, inner=(), soft=False, biased=True, weighted=True, ignore_index=None, dtype=torch.float32
    )
    options = LinearCrossEntropyOptions()
    with_options = loss_and_gradients(linear_cross_entropy, given, target, options=options, **others)
    without = loss_and_gradients(linear_cross_entropy, given, target, **others)
    theirs = loss_and_gradients(F.linear_cross_entropy, given, target, options=options, **others)
    for mine, plain, its in zip(with_options, without, theirs, strict=True):
        assert (mine == plain).all()
        torch.testing.assert_close(mine, its, rtol=2e-5, atol=2e-5)


H, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "others", "message"),
    [
        ((torch.zeros(2, 3, 4), W, Y), {}, r"input \[2, 3, 4\] and linear_weight \[5, 4\]"),
        ((H, torch.zeros(5, 3), Y), {}, r"do not fit"),
        ((H, torch.zeros(4), Y), {}, r"do not fit"),
        ((H[0], torch.zeros(5, 2, 4), Y[:2]), {}, r"needs an input of \[N, D\]"),
        ((H, W, Y[:2]), {}, r"target is \[2\], not \[3\] class indices or \[3, 5\] probabilities"),
        ((H, W, Y.int()), {}, r"class indices are torch.int64"),
        ((H, W, Y.float()), {}, r"class indices are torch.int64"),
        ((H, W, torch.zeros(3, 5).long()), {}, r"probabilities are floating point"),
        ((H, W, Y + 5), {}, r"target 5 is outside the vocabulary of 5 tokens"),
        ((H, W, Y), {"linear_bias": torch.zeros(4)}, r"linear_bias is \[4\], not \[5\]"),
        ((H, W, Y), {"weight": torch.zeros(4)}, r"weight is \[4\], not \[5\]"),
        ((H, W, Y), {"weight": torch.ones(5, requires_grad=True)}, r"class weights are constants"),
        ((H, W, Y), {"reduction": "meen"}, r"unknown reduction 'meen'; did you mean mean"),
        ((H, W, Y), {"label_smoothing": 1.5}, r"label_smoothing is 1.5"),
        ((H, W, torch.zeros(3, 5)), {"ignore_index": -100}, r"ignore_index has no meaning"),
    ],
)
def test_bad_input_is_named(given: tuple[Tensor, ...], others: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        linear_cross_entropy(*given, **others)


def test_exports_are_lazy() -> None:
    assert gyrocompass.loss.linear_cross_entropy is linear_cross_entropy
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gyrocompass.nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gyrocompass.loss.nothing
    code = """if True:
        import sys, gyrocompass
        assert "gyrocompass.loss" not in sys.modules
        assert gyrocompass.loss and "torch" not in sys.modules
        assert callable(gyrocompass.loss.linear_cross_entropy) and "torch" in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)
