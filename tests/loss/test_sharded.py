"""A head cut over ranks gives the numbers and the gradients of the whole head, on every rank.

Starting processes is what takes time, so each test starts its ranks once, and they go through all cases; an
assertion that fails on a rank fails the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from direct_signal import tile_sizes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss import _support
from gyrocompass.loss.divergence import KINDS, Head, TopK, divergence
from gyrocompass.loss.logprob import WANTS, token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX, TokenLogProbs
from processes import run_together

V, D, R, T, C = 29, 6, 3, 17, 5
"""29 tokens: 15 and 14 on two ranks; 8, 8, 8 and 5 on four."""


class Given(NamedTuple):
    """A call's tensors, whole."""

    h_TD: Tensor
    w_VD: Tensor
    bias_V: Tensor | None
    a_TR: Tensor | None
    b_VR: Tensor | None
    target_T: Tensor
    candidate_TC: Tensor | None
    seed_T: Tensor | None


def make(dtype: torch.dtype = torch.float64, *, n_tokens: int = T, seed: int = 0) -> Given:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(V, shape, generator=generator)

    target_T, candidate_TC = tokens(n_tokens), tokens(n_tokens, C)
    target_T[2::5], candidate_TC[::3, 1] = IGNORE_INDEX, IGNORE_INDEX
    return Given(
        normal(n_tokens, D),
        normal(V, D),
        normal(V),
        normal(n_tokens, R),
        normal(V, R),
        target_T,
        candidate_TC,
        tokens(n_tokens),
    )


def padded(given: Given, allowed: slice) -> Given:
    """Only some tokens of the vocabulary are there; targets among them."""
    assert given.bias_V is not None and given.candidate_TC is not None
    outside_V = torch.ones(V, dtype=torch.bool)
    outside_V[allowed] = False
    n_allowed = allowed.stop - allowed.start
    target_T = torch.where(given.target_T < 0, given.target_T, given.target_T % n_allowed + allowed.start)
    return given._replace(bias_V=given.bias_V.masked_fill(outside_V, -torch.inf), target_T=target_T)


def cases() -> dict[str, tuple[Given, dict[str, Any]]]:
    whole = make()
    everything: dict[str, Any] = {"n_top": 4, "want": WANTS}
    inside = everything | {"n_top": 1}  # of a longer list, the ids beyond the support are any
    return {
        "everything": (whole, everything),
        "rule": (whole, everything | {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.4}),
        "nothing but the target": (
            whole._replace(bias_V=None, a_TR=None, b_VR=None, candidate_TC=None, seed_T=None),
            {"want": []},
        ),
        "all targets on one rank": (whole._replace(target_T=whole.target_T.clamp(max=3)), everything),
        "all targets on the last rank": (whole._replace(target_T=torch.full((T,), V - 1)), everything),
        "parts without any token": (padded(whole, slice(2, 7)), everything),
        "the first part has none": (padded(whole, slice(24, V)), everything),
        "targets outside": (padded(whole, slice(2, 7))._replace(target_T=whole.target_T), everything),
        "nothing counted": (whole._replace(target_T=torch.full((T,), IGNORE_INDEX)), everything),
        "no tokens": (make(n_tokens=0), everything),
        "a top list longer than a part": (whole, {"n_top": 20, "want": []}),
        "the same in float32": (make(torch.float32), {"n_top": 20, "want": []}),
        "invariant": (whole, everything | {"invariant": True}),
        "huge logits": (whole._replace(h_TD=whole.h_TD * 1e4, bias_V=None), everything),
        "float32": (make(torch.float32), everything),
        "bf16": (make(torch.bfloat16), everything),
        "bf16 invariant": (make(torch.bfloat16), everything | {"invariant": True}),
        "top-k": (whole, inside | {"top_k": 3}),
        "top-k over more than a part": (whole, inside | {"top_k": 20}),
        "top-k of all": (whole, inside | {"top_k": V + 5}),
        "top-p": (whole, inside | {"top_p": 0.7}),
        "a wide nucleus": (whole._replace(h_TD=whole.h_TD * 1e-2), inside | {"top_p": 0.95}),
        "top-k and top-p": (whole, inside | {"top_k": 7, "top_p": 0.6, "temperature": 0.8}),
        "top-p of parts without any token": (padded(whole, slice(2, 7)), inside | {"top_p": 0.8}),
        "top-k, invariant": (whole, inside | {"top_k": 5, "top_p": 0.9, "invariant": True}),
        "top-k of no tokens": (make(n_tokens=0), inside | {"top_k": 4}),
    }


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-4}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def answer(given: Given, options: dict[str, Any]) -> TokenLogProbs:
    return token_logprobs(
        given.h_TD,
        given.w_VD,
        given.target_T,
        bias_V=given.bias_V,
        low_rank=None if given.a_TR is None or given.b_VR is None else (given.a_TR, given.b_VR),
        candidate_TC=given.candidate_TC,
        seed_T=given.seed_T,
        **options,
    )


def mixture(signal: TokenLogProbs) -> Tensor:
    """A scalar of all outputs, with a weight of its own for each number; -inf has none."""
    parts = []
    for index, field in enumerate(signal):
        if field is not None and field.is_floating_point():
            weight = torch.cos(torch.arange(field.numel(), dtype=field.dtype) + index).view(field.shape)
            parts.append((torch.where(field.isfinite(), field, 0.0) * weight).sum())
    return torch.stack(parts).sum()


def leaves_of(given: Given) -> Given:
    floats = (
        part.detach().clone().requires_grad_() if part is not None and part.is_floating_point() else part
        for part in given
    )
    return Given(*floats)  # type: ignore[arg-type]


def cut(given: Given, mesh: DeviceMesh) -> Given:
    """The head's tensors sharded along the vocabulary."""

    def sharded(part: Tensor | None) -> Tensor | None:
        return None if part is None else distribute_tensor(part, mesh, [Shard(0)])

    return given._replace(
        w_VD=sharded(given.w_VD),  # type: ignore[arg-type]
        bias_V=sharded(given.bias_V),
        b_VR=sharded(given.b_VR),
    )


def check_case(name: str, given: Given, options: dict[str, Any], mesh: DeviceMesh) -> None:
    """All outputs and gradients, whole and cut."""
    dtype = given.h_TD.dtype
    one, parts = leaves_of(given), leaves_of(cut(given, mesh))
    wanted, found = answer(one, options), answer(parts, options)
    for field, value in wanted._asdict().items():
        ours = getattr(found, field)
        assert (ours is None) == (value is None), (name, field)
        if value is not None and field in ("rank_T", "drawn_T", "top_token_TK"):
            assert torch.equal(ours, value), (name, field, ours, value)
        elif value is not None:
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                ours, value, rtol=tolerance, atol=tolerance, msg=lambda m, f=field: f"{name} {f}: {m}"
            )
    mixture(wanted).backward()
    mixture(found).backward()
    for field, whole in one._asdict().items():
        part = getattr(parts, field)
        if whole is None or not whole.is_floating_point():
            continue
        gradient = part.grad
        if isinstance(part, DTensor):
            assert isinstance(gradient, DTensor) and gradient.placements == (Shard(0),), (name, field)
            gradient = gradient.full_tensor()
        scale = max(1.0, float(whole.grad.double().abs().max())) if whole.numel() else 1.0
        assert gradient.dtype == dtype and gradient.shape == whole.shape, (name, field)
        torch.testing.assert_close(
            gradient,
            whole.grad,
            rtol=GRADIENT_TOLERANCE[dtype],
            atol=GRADIENT_TOLERANCE[dtype] * scale,
            msg=lambda m, f=field: f"{name} gradient of {f}: {m}",
        )
    assert_same_on_all_ranks(name, *(value for value in found if value is not None), parts.h_TD.grad)


def assert_same_on_all_ranks(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(others, tensor.detach().contiguous())
        assert all(torch.equal(other, others[0]) for other in others), name


def check_divergences(mesh: DeviceMesh) -> None:
    """Of every kind, with a teacher that learns too and with one of which the likeliest tokens are known."""

    def head(given: Given, **rule: float) -> Head:
        assert given.a_TR is not None and given.b_VR is not None
        return Head(given.h_TD, given.w_VD, given.bias_V, (given.a_TR, given.b_VR), **rule)

    mask_T, outside = torch.arange(T) % 4 != 1, slice(9, 13)
    for kind in KINDS:
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
            found, leaves = [], []
            for place in (lambda given: given, lambda given: cut(given, mesh)):
                student = leaves_of(place(padded(make(dtype), outside)))
                teacher = leaves_of(place(padded(make(dtype, seed=1), outside)))
                two = head(student, softcap=3.0), head(teacher, temperature=0.7)
                found_T = divergence(*two, kind, beta=0.3, mask_T=mask_T)
                (found_T * torch.cos(torch.arange(T))).sum().backward()
                found.append(found_T)
                leaves.append([part.grad for given in (student, teacher) for part in given[:5]])
            gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in leaves[1]]
            torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(gradients, leaves[0], rtol=tolerance, atol=10 * tolerance)
            assert_same_on_all_ranks(kind, found[1], gradients[0], gradients[5])
        token_TK = torch.stack(
            [torch.randperm(V, generator=torch.Generator().manual_seed(t))[:4] for t in range(T)]
        )
        top = TopK(token_TK, torch.full((T, 4), 0.2, dtype=torch.float64).log())
        torch.testing.assert_close(
            divergence(head(cut(make(), mesh)), top, kind), divergence(head(make()), top, kind)
        )
    whole, parts = make(), cut(make(), mesh)
    mistakes = {
        "not cut over the same ranks": (head(parts), head(whole)),
        "one is a DTensor": (head(parts._replace(bias_V=whole.bias_V)), head(parts)),
        "only the head may be cut": (head(parts), head(parts)._replace(h_TD=parts.w_VD)),
    }
    for message, two in mistakes.items():
        with pytest.raises(BadInput, match=message):
            divergence(*two)
        dist.barrier()


def check_frozen(mesh: DeviceMesh) -> None:
    """Only some gradients are wanted."""
    given = make()
    for wanted in ({"h_TD"}, {"w_VD"}, {"b_VR"}, {"bias_V", "a_TR"}):
        found = []
        for tensors in (given, cut(given, mesh)):
            leaves = Given(*(
                part.detach().requires_grad_(name in wanted) if part is not None else None
                for name, part in tensors._asdict().items()
            ))  # type: ignore[arg-type]  # fmt: skip
            mixture(answer(leaves, {"want": WANTS})).backward()
            gradients = [getattr(leaves, name).grad for name in sorted(wanted)]
            found.append([g.full_tensor() if isinstance(g, DTensor) else g for g in gradients])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def check_expected(mesh: DeviceMesh) -> None:
    """An expected loss is allowed, and takes two passes."""
    one, parts = leaves_of(make()), leaves_of(cut(make(), mesh))

    def loss(signal: TokenLogProbs) -> Tensor:
        return mixture(signal)

    loss(answer(one, {})).backward()
    loss(answer(parts, {"expect": loss})).backward()
    torch.testing.assert_close(parts.h_TD.grad, one.h_TD.grad, rtol=1e-10, atol=1e-10)


def check_compiled(mesh: DeviceMesh) -> None:
    one, parts = leaves_of(make()), leaves_of(cut(make(), mesh))

    def loss(given: Given) -> Tensor:
        return mixture(answer(given, {"want": ["entropy"]}))

    loss(one).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(parts).backward()
    torch.testing.assert_close(parts.h_TD.grad, one.h_TD.grad, rtol=1e-10, atol=1e-10)
    gradient = parts.w_VD.grad
    assert isinstance(gradient, DTensor)
    torch.testing.assert_close(gradient.full_tensor(), one.w_VD.grad, rtol=1e-10, atol=1e-10)


def check_mistakes(mesh: DeviceMesh) -> None:
    """All ranks refuse alike, so none is left waiting."""
    given, parts = make(), cut(make(), mesh)
    assert given.bias_V is not None and given.b_VR is not None
    copies, by_width = (distribute_tensor(given.w_VD, mesh, [place]) for place in (Replicate(), Shard(1)))
    few = distribute_tensor(given.w_VD[:1], mesh, [Shard(0)])
    bad_w_VD = given.w_VD.clone()
    bad_w_VD[V - 1, 2] = torch.nan
    outside_T = given.target_T.clone()
    outside_T[4] = V
    only_w: dict[str, Any] = {"bias_V": None, "a_TR": None, "b_VR": None}
    mistakes: list[tuple[str, Given, dict[str, Any]]] = [
        ("sharded along the vocabulary", parts._replace(w_VD=copies), {}),
        ("sharded along the vocabulary", parts._replace(w_VD=by_width), {}),
        ("ranks without any", parts._replace(w_VD=few, **only_w), {}),
        ("bias_V is placed", parts._replace(bias_V=distribute_tensor(given.bias_V, mesh, [Replicate()])), {}),
        (r"low_rank\S+ is placed", parts._replace(b_VR=distribute_tensor(given.b_VR, mesh, [Shard(1)])), {}),
        ("one is a DTensor", parts._replace(bias_V=given.bias_V), {}),
        ("one is a DTensor", given._replace(bias_V=parts.bias_V), {}),
        ("only the head", parts._replace(h_TD=distribute_tensor(given.h_TD, mesh, [Replicate()])), {}),
        ("top_k is 0", parts, {"top_k": 0}),
        ("top_p is 2", parts, {"top_p": 2.0}),
        ("n_top is 30; the vocabulary has 29", parts, {"n_top": 30}),
        ("reference", parts, {"backend": "reference"}),
        ("target 29 is outside the vocabulary of 29", parts._replace(target_T=outside_T), {}),
        (
            "NaN or an infinity|head weight: nan",
            parts._replace(w_VD=distribute_tensor(bad_w_VD, mesh, [Shard(0)])),
            {"check_finite": True},
        ),
    ]  # fmt: skip
    for message, wrong, options in mistakes:
        with pytest.raises(BadInput, match=message):
            answer(wrong, options)
        dist.barrier()


@contextmanager
def group_of(rank: int, ranks: int, folder: str) -> Iterator[DeviceMesh]:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=240))
    yield DeviceMesh("cpu", list(range(ranks)))
    dist.barrier()  # a rank that leaves while the other still talks to it may abort
    dist.destroy_process_group()


def values_of_a_rank(rank: int, ranks: int, folder: str) -> None:
    with group_of(rank, ranks, folder) as mesh:
        for name, (given, options) in cases().items():
            check_case(name, given, options, mesh)
        check_divergences(mesh)
        with tile_sizes(4, 30):
            check_divergences(mesh)
            check_case("small tiles", *cases()["everything"], mesh)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(_support, "FEW", 4)
            for name in ("a wide nucleus", "top-k and top-p", "top-k over more than a part"):
                check_case(f"{name}, all asked for", *cases()[name], mesh)


def the_rest_of_a_rank(rank: int, ranks: int, folder: str) -> None:
    with group_of(rank, ranks, folder) as mesh:
        check_frozen(mesh)
        check_expected(mesh)
        check_mistakes(mesh)
        check_compiled(mesh)


def on_ranks(ranks: int, work: Callable[..., None], folder: Path) -> None:
    assert run_together([(work, rank, ranks, str(folder)) for rank in range(ranks)]) == [0] * ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_has_the_numbers_and_gradients_of_the_whole(ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, values_of_a_rank, tmp_path)


def test_frozen_parts_expected_losses_mistakes_and_compiled_calls(tmp_path: Path) -> None:
    on_ranks(2, the_rest_of_a_rank, tmp_path)


def test_one_rank_alone(tmp_path: Path) -> None:
    values_of_a_rank(0, 1, str(tmp_path))
