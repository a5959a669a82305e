"""Supports (top-k, top-p), top lists, draws, and the gradient that comes along with the answer.

Shape legend: T tokens, D hidden width, V vocabulary, C candidates per token, K tokens of a top list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from direct_signal import tile_sizes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss import _chunked, _support
from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._question import Gradients, LogitRule, Logits, Sums
from gyrocompass.loss._support import support_floor
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX, TokenLogProbs

NAMES = [*BACKENDS, "reference"]
FLOATS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"f64": 1e-10, "f32": 2e-5, "bf16": 2e-4}
GRADIENT_TOLERANCE = {"f64": 1e-9, "f32": 1e-4, "bf16": 2e-2}


class Case(NamedTuple):
    """A call's tensors and rule."""

    h_TD: Tensor
    w_VD: Tensor
    bias_V: Tensor | None
    target_T: Tensor
    candidate_TC: Tensor | None
    rule: LogitRule

    @property
    def leaves(self) -> list[Tensor]:
        return [part for part in (self.h_TD, self.w_VD, self.bias_V) if part is not None]

    def fresh(self, dtype: torch.dtype | None = None) -> Case:
        """With leaves of its own."""
        parts = (
            None if part is None else part.detach().to(dtype or part.dtype).clone().requires_grad_()
            for part in self[:3]
        )
        return Case(*parts, *self[3:])  # type: ignore[arg-type]

    def answer(self, backend: str = "auto", **options: Any) -> TokenLogProbs:
        return token_logprobs(
            self.h_TD,
            self.w_VD,
            self.target_T,
            bias_V=self.bias_V,
            candidate_TC=self.candidate_TC,
            softcap=self.rule.softcap,
            logit_scale=self.rule.logit_scale,
            temperature=self.rule.temperature,
            backend=backend,
            **options,
        )

    def logits(self) -> Tensor:
        """[T, V], -inf where the bias is."""
        z_TV = self.h_TD @ self.w_VD.T
        outside_V = torch.zeros(len(self.w_VD), dtype=torch.bool)
        if self.bias_V is not None:
            outside_V = self.bias_V == -torch.inf
            z_TV = z_TV + torch.where(outside_V, 0.0, self.bias_V)
        z_TV = z_TV * self.rule.logit_scale
        if self.rule.softcap is not None:
            z_TV = self.rule.softcap * torch.tanh(z_TV / self.rule.softcap)
        return torch.where(outside_V, -torch.inf, z_TV / self.rule.temperature)


def make(
    n_tokens: int = 13,
    width: int = 6,
    vocabulary: int = 20,
    *,
    dtype: str = "f64",
    seed: int = 0,
    rule: LogitRule = LogitRule(),  # noqa: B008
    ignored: float = 0.2,
    bias: bool = True,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(FLOATS[dtype])

    def tokens(*shape: int) -> Tensor:
        skipped = torch.rand(shape, generator=generator) < ignored
        return torch.randint(vocabulary, shape, generator=generator).masked_fill(skipped, IGNORE_INDEX)

    h_TD, w_VD = normal(n_tokens, width), normal(vocabulary, width)
    bias_V = normal(vocabulary) if bias else None
    return Case(h_TD, w_VD, bias_V, tokens(n_tokens), tokens(n_tokens, 3), rule).fresh()


def support_of(z_TV: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, float]:
    """Which logits are in, from sorted rows, one by one; and how near the nearest decision was."""
    inside_TV = torch.zeros_like(z_TV, dtype=torch.bool)
    nearest = math.inf
    for row, z_V in enumerate(z_TV.tolist()):
        order = sorted((token for token in range(len(z_V)) if z_V[token] > -math.inf), key=lambda t: -z_V[t])
        order = order[:top_k]
        largest = z_V[order[0]]
        mass = [math.exp(z_V[token] - largest) for token in order]
        reached, n_in = 0.0, 0
        while n_in < len(order) and (n_in == 0 or reached < (2.0 if top_p in (None, 1.0) else top_p)):
            reached += mass[n_in] / sum(mass)
            n_in += 1
            if n_in < len(order) and top_p is not None:
                nearest = min(nearest, abs(reached - top_p))
        last = z_V[order[n_in - 1]]
        others = [z for z in z_V if z != last]
        nearest = min([nearest, *(abs(z - last) for z in others)])
        inside_TV[row] = torch.tensor([z >= last for z in z_V])
    return inside_TV, nearest


def direct(case: Case, top_k: int | None, top_p: float | None, n_top: int) -> dict[str, Tensor]:
    """Every output of the renormalised distribution, in the case's own dtype; 0 where not counted."""
    z_TV = case.logits()
    inside_TV, _ = support_of(z_TV.detach(), top_k, top_p)
    in_z_TV = z_TV.masked_fill(~inside_TV, -torch.inf)
    log_p_TV = in_z_TV.log_softmax(1)
    p_TV, finite_log_p_TV = log_p_TV.exp(), log_p_TV.masked_fill(~inside_TV, 0.0)
    counted_T, own_T1 = case.target_T != IGNORE_INDEX, case.target_T.clamp(min=0)[:, None]
    outputs = {
        "logprob_T": log_p_TV.gather(1, own_T1)[:, 0],
        "lse_T": in_z_TV.logsumexp(1),
        "entropy_T": -(p_TV * finite_log_p_TV).sum(1),
        "mean_logit_T": z_TV.masked_fill(~inside_TV, 0.0).sum(1) / inside_TV.sum(1),
        "sum_sq_T": (p_TV**2).sum(1),
        "rank_T": (in_z_TV > z_TV.gather(1, own_T1)).sum(1),
    }
    if n_top:
        outputs["top_TK"] = log_p_TV.topk(n_top, dim=1).values
    if case.candidate_TC is not None:
        picked_TC = log_p_TV.gather(1, case.candidate_TC.clamp(min=0))
        outputs["candidate_TC"] = torch.where(case.candidate_TC == IGNORE_INDEX, 0.0, picked_TC)
    return {
        name: torch.where(counted_T.view(-1, *[1] * (value.dim() - 1)), value, 0)
        for name, value in outputs.items()
    }


def mixture(outputs: dict[str, Tensor | None]) -> Tensor:
    """A scalar of all outputs, each number with a weight of its own; -inf has none."""
    total = []
    for name in sorted(outputs):
        field = outputs[name]
        if field is not None and field.is_floating_point():
            weight = torch.cos(torch.arange(field.numel(), dtype=field.dtype) + len(name))
            total.append((torch.where(field.isfinite(), field, 0.0) * weight.view(field.shape)).sum())
    return torch.stack(total).sum()


def assert_close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    found, wanted = found.detach().double(), wanted.detach().double()
    assert found.shape == wanted.shape, what
    finite = wanted.isfinite()
    assert torch.equal(found[~finite], wanted[~finite]), what
    if finite.any():
        scale = max(1.0, float(wanted[finite].abs().max()))
        error = float((found - wanted)[finite].abs().max())
        assert error <= tolerance * scale, (what, error)


def skip_if_refused(backend: str, case: Case) -> None:
    if backend == "reference":
        return
    logits = Logits(case.h_TD, case.w_VD, case.bias_V, None, None, case.rule)
    refusal = BACKENDS[backend].refusal(logits)
    if refusal is not None:
        pytest.skip(refusal)


# --- supports ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", NAMES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_support_is_the_sorted_one_renormalised(backend: str, dtype: str, data: st.DataObject) -> None:
    draw = data.draw
    vocabulary = draw(st.sampled_from([1, 2, 7, 40, 130]))
    rule = LogitRule(draw(st.sampled_from([None, 3.0])), 1.0, draw(st.sampled_from([1.0, 0.6, 2.0])))
    case = make(9, 5, vocabulary, dtype=dtype, seed=draw(st.integers(0, 2**31)), rule=rule)
    assert case.bias_V is not None
    skip_if_refused(backend, case)
    with torch.no_grad():
        outside_V = torch.arange(vocabulary) % draw(st.sampled_from([2, 5, 1000])) == 1
        case.bias_V.masked_fill_(outside_V, -torch.inf)
    top_k = draw(st.sampled_from([None, 1, 2, 5, vocabulary, vocabulary + 3]))
    top_p = draw(st.sampled_from([None, 1e-6, 0.3, 0.9, 0.999, 1.0]))
    n_top = draw(st.integers(0, min(4, vocabulary)))
    exact = case.fresh(torch.float64)
    _, nearest = support_of(exact.logits().detach(), top_k, top_p)
    assume(nearest > (1e-9 if dtype == "f64" else 2e-3))
    few, elements = draw(st.sampled_from([1, 3, 1024])), draw(st.sampled_from([1, 100, 1 << 23]))
    with mock.patch.multiple(_support, FEW=few, BLOCK_ELEMENTS=elements), small_tiles(draw(st.booleans())):
        found = case.answer(backend, top_k=top_k, top_p=top_p, n_top=n_top)
        wanted = direct(exact, top_k, top_p, n_top)
        for name, value in wanted.items():
            tolerance = 0.0 if name == "rank_T" else TOLERANCE[dtype]
            assert_close(getattr(found, name), value, tolerance, name)
        gradients = torch.autograd.grad(mixture(found._asdict()), case.leaves, allow_unused=True)
    expected = torch.autograd.grad(mixture(dict(wanted)), exact.leaves)
    for one, other, name in zip(gradients, expected, ("h", "w", "bias"), strict=True):
        assert one is not None
        assert_close(one, other, GRADIENT_TOLERANCE[dtype], f"gradient of {name}")


@contextmanager
def small_tiles(small: bool) -> Iterator[None]:
    if not small:
        yield
        return
    with tile_sizes(4, 24):
        yield


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("top_k", "top_p", "n_in"),
    [(1, None, 1), (2, None, 2), (3, None, 5), (6, None, 7), (4, 0.99, 5), (4, 0.9, 2)],
)
def test_what_equals_the_last_one_inside_is_in(
    backend: str, top_k: int, top_p: float | None, n_in: int
) -> None:
    z_V = torch.tensor([0.0, 3.0, 2.0, 2.0, 5.0, 2.0, 1.0, 1.0])
    case = Case(torch.ones(8, 1), z_V[:, None], None, torch.arange(8), None, LogitRule()).fresh()
    skip_if_refused(backend, case)
    answer = case.answer(backend, top_k=top_k, top_p=top_p, want=["rank"])
    inside_T = answer.logprob_T.isfinite()
    assert inside_T.tolist() == (z_V >= z_V.sort(descending=True).values[n_in - 1]).tolist()
    assert int(inside_T.sum()) == n_in
    torch.testing.assert_close(answer.logprob_T.exp()[inside_T].sum(), torch.tensor(1.0))
    n_above_T = (z_V > z_V[:, None]).sum(1)
    assert answer.rank_T is not None and torch.equal(answer.rank_T, n_above_T.clamp(max=n_in))


def near_ties(backend: str, dtype: str, n_tokens: int = 40) -> Case:
    """Logits that are equal on paper and computed differently: rows of w are one row's numbers, permuted."""
    generator = torch.Generator().manual_seed(3)
    row_D = torch.randn(33, generator=generator, dtype=torch.float64)
    w_VD = torch.stack([row_D[torch.randperm(33, generator=generator)] for _ in range(50)]).to(FLOATS[dtype])
    h_TD = torch.full((n_tokens, 33), 0.7).to(FLOATS[dtype]) * torch.linspace(0.5, 2, n_tokens)[:, None]
    target_T = torch.arange(n_tokens) % 50
    case = Case(h_TD.to(FLOATS[dtype]), w_VD, torch.zeros(50), target_T, None, LogitRule()).fresh()
    skip_if_refused(backend, case)
    return case


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    "options", [{"top_k": 20}, {"top_p": 0.4}, {"top_k": 50}, {"top_p": 0.999999}], ids=str
)
@pytest.mark.parametrize("backend", [*BACKENDS, "surprised"])
def test_rounding_moves_no_token_across_the_edge(backend: str, options: dict[str, Any], dtype: str) -> None:
    """Every token is as likely as the others, so all are in, in both passes: gradients of the logits add up
    to 0 in each row. The surprised one meets a gradient that it did not expect, from other tiles."""
    name = "chunked" if backend == "surprised" else backend
    case = near_ties(name, dtype)
    expect = (lambda signal: signal.lse_T.sum() * 2) if backend == "surprised" else None
    with tile_sizes(16, 1000), mock.patch.object(_support, "BLOCK_ELEMENTS", 350):
        answer = case.answer(name, want=["entropy", "mean_logit"], expect=expect, **options)
        assert answer.entropy_T is not None
        torch.testing.assert_close(answer.entropy_T, torch.full((40,), math.log(50)), rtol=1e-3, atol=1e-3)
        assert answer.logprob_T.isfinite().all()
        answer.logprob_T.sum().backward()
    assert case.bias_V is not None and case.bias_V.grad is not None
    p_V = torch.full((50,), 1 / 50)
    wanted_V = torch.bincount(case.target_T, minlength=50) - 40 * p_V
    torch.testing.assert_close(case.bias_V.grad, wanted_V, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("top_k", "top_p"), [(20, 1.0), (99, 1.0), (0, 0.999999), (25, 0.999999)])
@pytest.mark.parametrize("few", [4, 1024])
def test_where_nothing_is_out_no_logit_is_near_the_edge(top_k: int, top_p: float, few: int) -> None:
    """The smallest logit, computed anew, may come out smaller."""
    case = make(6, dtype="f32")
    assert case.bias_V is not None
    with torch.no_grad():
        case.h_TD.mul_(0.01)
        case.bias_V.mul_(0.01)[3:9] = -torch.inf
        logits = Logits(case.h_TD, case.w_VD, case.bias_V, None, None, LogitRule())
        with mock.patch.object(_support, "FEW", few):
            floor_T = support_floor(logits, top_k, top_p)
    assert (floor_T == torch.finfo(torch.float32).min).all()


def test_a_large_vocabulary_sorts_the_rows_whose_nucleus_is_large() -> None:
    """Nearly flat rows beside peaked ones: FEW of the largest logits are not enough for some."""
    case = make(6, 4, 5000, bias=False, ignored=0.0)
    with torch.no_grad():
        case.h_TD[::2] *= 0.01
    exact = case.fresh()
    sorted_rows = []

    def cutting(z_RK: Tensor, *rest: Any, is_all: bool) -> Any:
        if is_all:
            sorted_rows.append(len(z_RK))
        return cut(z_RK, *rest, is_all=is_all)

    cut = _support._cut
    with mock.patch.object(_support, "_cut", cutting):
        found = case.answer("chunked", top_p=0.7)
    assert sorted_rows == [3]
    for name, value in direct(exact, None, 0.7, 0).items():
        assert_close(getattr(found, name), value, 1e-9, name)


def test_nothing_counted_and_no_tokens() -> None:
    for case in (make(5, ignored=1.1), make(0)):
        answer = case.answer("chunked", top_p=0.5, top_k=3, n_top=2)
        assert not any(field.any() for field in answer if field is not None)
        answer.logprob_T.sum().backward()
        assert not any(leaf.grad.any() for leaf in case.leaves)  # type: ignore[union-attr]


# --- top lists ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_top", [1, 3, 20])
@pytest.mark.parametrize("backend", NAMES)
def test_top_lists(backend: str, n_top: int, dtype: str) -> None:
    case = make(dtype=dtype)
    assert case.bias_V is not None
    skip_if_refused(backend, case)
    with torch.no_grad():
        case.bias_V[3:9] = -torch.inf
    exact = case.fresh(torch.float64)
    with tile_sizes(4, 24):
        found = case.answer(backend, n_top=n_top)
    wanted = direct(exact, None, None, n_top)
    assert found.top_TK is not None and found.top_token_TK is not None
    assert_close(found.top_TK, wanted["top_TK"], TOLERANCE[dtype], "top list")
    log_p_TV = exact.logits().log_softmax(1)
    counted_T, there_TK = case.target_T != IGNORE_INDEX, found.top_TK.isfinite()
    named_TK = log_p_TV.gather(1, found.top_token_TK)[counted_T]
    assert_close(named_TK[there_TK[counted_T]], wanted["top_TK"][counted_T][there_TK[counted_T]], 2e-3, "ids")
    finite = {"top_TK": wanted["top_TK"], "entropy_T": wanted["entropy_T"]}
    ours = {"top_TK": found.top_TK, "entropy_T": found.entropy_T}
    gradients = torch.autograd.grad(mixture(ours), case.leaves)
    for one, other in zip(gradients, torch.autograd.grad(mixture(dict(finite)), exact.leaves), strict=True):
        assert_close(one, other, GRADIENT_TOLERANCE[dtype], "gradient of a top list")


def test_a_list_longer_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(BadInput, match="n_top is 21; the vocabulary has 20"):
        make().answer(n_top=21)


# --- draws ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", NAMES)
def test_every_backend_and_tiling_draws_the_same(backend: str, dtype: str) -> None:
    case = make(60, 6, 50, dtype=dtype, ignored=0.1)
    skip_if_refused(backend, case)
    seed_T = torch.randint(-(2**62), 2**62, (60,), generator=torch.Generator().manual_seed(0))
    wanted_T = case.answer("reference", seed_T=seed_T).drawn_T
    for size in ((2048, 1 << 22), (7, 60), (1, 1)):
        with tile_sizes(*size):
            drawn_T = case.answer(backend, seed_T=seed_T).drawn_T
        assert drawn_T is not None and wanted_T is not None and torch.equal(drawn_T, wanted_T)
    part = case._replace(h_TD=case.h_TD[9:30], target_T=case.target_T[9:30], candidate_TC=None)
    drawn_T = part.answer(backend, seed_T=seed_T[9:30]).drawn_T
    assert drawn_T is not None and torch.equal(drawn_T, wanted_T[9:30])


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7}, {"temperature": 2.0}], ids=str
)
def test_draws_follow_the_distribution(backend: str, options: dict[str, Any]) -> None:
    n_draws = 6000
    rule = LogitRule(temperature=options.get("temperature", 1.0))
    case = make(1, 4, 12, dtype="f32", seed=5, ignored=0.0, rule=rule)
    skip_if_refused(backend, case)
    assert case.bias_V is not None
    with torch.no_grad():
        case.bias_V[4] = -torch.inf
        many = case._replace(
            h_TD=case.h_TD.expand(n_draws, -1),
            target_T=case.target_T.expand(n_draws),
            candidate_TC=None,
        )
        support = {name: value for name, value in options.items() if name != "temperature"}
        drawn_T = many.answer(backend, seed_T=torch.arange(n_draws), want=[], **support).drawn_T
    assert drawn_T is not None
    z_TV = case.fresh(torch.float64).logits().detach()
    inside_TV, _ = support_of(z_TV, support.get("top_k"), support.get("top_p"))
    p_V = z_TV.masked_fill(~inside_TV, -torch.inf).softmax(1)[0]
    counts_V = torch.bincount(drawn_T, minlength=12)
    assert not counts_V[~inside_TV[0]].any()
    kept_V = p_V * n_draws >= 5
    statistic = chisquare(counts_V[kept_V], p_V[kept_V] / p_V[kept_V].sum() * counts_V[kept_V].sum())
    assert statistic.pvalue > 1e-3


# --- the gradient that comes along ---


def objective(signal: TokenLogProbs) -> Tensor:
    """Separable, and of all outputs that have a gradient."""
    assert signal.entropy_T is not None and signal.sum_sq_T is not None and signal.mean_logit_T is not None
    nll_T = -torch.where(signal.logprob_T.isfinite(), signal.logprob_T, 0.0)
    focal_T = (1 - signal.logprob_T.exp()) ** 2 * nll_T
    rest_T = 0.1 * signal.lse_T**2 - 0.3 * signal.entropy_T + signal.sum_sq_T - 0.2 * signal.mean_logit_T
    return (focal_T + rest_T).sum() / 7


def unlikelihood(signal: TokenLogProbs) -> Tensor:
    assert signal.candidate_TC is not None
    p_TC = torch.where(signal.candidate_TC < 0, signal.candidate_TC.exp(), 0.0)
    return -torch.log1p(-p_TC.clamp(max=0.999)).sum()


def ignores_most(signal: TokenLogProbs) -> Tensor:
    return -torch.where(signal.logprob_T.isfinite(), signal.logprob_T, 0.0).sum()


def constant(signal: TokenLogProbs) -> Tensor:
    return signal.logprob_T.new_zeros(()) + 3.0


def sequences(signal: TokenLogProbs) -> Tensor:
    """Not separable: of sums over rows."""
    return torch.nn.functional.softplus(signal.logprob_T[::2].sum() - signal.logprob_T[1::2].sum())


Loss = Callable[[TokenLogProbs], Tensor]
SEPARABLE: list[Loss] = [objective, unlikelihood, ignores_most]


class Counts:
    """How often a backend's ways are taken, by the engine (not by one another)."""

    def __init__(self, backend: str) -> None:
        self.engine = BACKENDS[backend]
        self.n = {"sums": 0, "gradients": 0, "fused": 0}
        self.inside = False

    def watched(self, name: str) -> Callable[..., Any]:
        way = getattr(self.engine, name)

        def watch(*args: Any, **named: Any) -> Any:
            outermost, self.inside = not self.inside, True
            self.n[name] += outermost
            try:
                return way(*args, **named)
            finally:
                self.inside = not outermost

        return watch


@contextmanager
def counted(backend: str, *, blocks: int = 1 << 24) -> Iterator[Counts]:
    """The backend prefers to take the gradient along, in blocks of so many logits, and is counted."""
    counts = Counts(backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chunked, "KEPT_ELEMENTS", blocks)
        patch.setattr(counts.engine, "prefers_fused", lambda *_: True, raising=False)
        for name in counts.n:
            patch.setattr(counts.engine, name, counts.watched(name), raising=False)
        yield counts


def gradients_of(loss: Tensor, case: Case) -> list[Tensor]:
    found = torch.autograd.grad(loss, case.leaves, allow_unused=True, retain_graph=True)
    return [leaf.new_zeros(leaf.shape) if part is None else part
            for part, leaf in zip(found, case.leaves, strict=True)]  # fmt: skip


def assert_all_close(found: list[Tensor], wanted: list[Tensor], dtype: str, what: str) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        narrow = {"f64": 1e-12, "f32": 2e-5, "bf16": 2e-2}[dtype]
        assert_close(one, other, narrow, what)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("support", [{}, {"top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("blocks", [1, 70, 1 << 24])
@pytest.mark.parametrize("loss", SEPARABLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_separable_loss_gets_its_gradient_along(
    backend: str, loss: Loss, blocks: int, support: dict[str, Any], dtype: str
) -> None:
    case = make(dtype=dtype, rule=LogitRule(4.0, 1.2, 0.8))
    skip_if_refused(backend, case)
    wanted = case.answer(backend, **support)
    with counted(backend, blocks=blocks) as counts:
        found = case.answer(backend, expect=loss, **support)
        ours = gradients_of(loss(found), case)
    assert counts.n == {"sums": 0, "gradients": 0, "fused": 1}
    for name, value in wanted._asdict().items():
        if value is not None:
            assert_close(getattr(found, name), value, 1e-12 if dtype == "f64" else 2e-5, name)
    assert_all_close(ours, gradients_of(loss(wanted), case), dtype, loss.__name__)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_loss_is_at_hand_too(backend: str) -> None:
    case = make(dtype="f32")
    skip_if_refused(backend, case)
    wanted = gradients_of(objective(case.answer(backend)) * 3, case)
    for scale in (3.0, -0.25, 0.0):
        with counted(backend, blocks=70) as counts:
            ours = gradients_of(objective(case.answer(backend, expect=objective)) * scale, case)
        assert counts.n["gradients"] == 0, scale
        assert_all_close(ours, [part * (scale / 3) for part in wanted], "f32", str(scale))


def test_a_scaled_loss_copies_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's is as large as the head."""
    case = make(dtype="f32")
    places: list[int] = []
    fused = _chunked.ChunkedBackend.fused

    def watched(*arguments: Any) -> tuple[Sums, Gradients]:
        sums, gradients = fused(*arguments)
        assert gradients.dw_VD is not None
        places.append(gradients.dw_VD.data_ptr())
        return sums, gradients

    monkeypatch.setattr(_chunked.ChunkedBackend, "fused", watched)
    gradients = gradients_of(objective(case.answer("chunked", expect=objective)) * 3.0, case)
    assert len(places) == 1 and places[0] in [part.data_ptr() for part in gradients]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("expect", "loss"),
    [
        (sequences, sequences),
        (objective, ignores_most),
        (ignores_most, objective),
        (constant, objective),
        (objective, lambda signal: objective(signal) + signal.lse_T[3]),
        (objective, lambda signal: unlikelihood(signal) + objective(signal)),
        (unlikelihood, sequences),
    ],
)
def test_any_other_gradient_that_comes_is_right_too(backend: str, expect: Loss, loss: Loss) -> None:
    case = make(dtype="f32")
    skip_if_refused(backend, case)
    wanted = gradients_of(loss(case.answer(backend)), case)
    with counted(backend, blocks=70) as counts:
        ours = gradients_of(loss(case.answer(backend, expect=expect)), case)
    surprised = expect is not loss or backend == "chunked"  # others may have all rows in one block
    assert counts.n == {"sums": 0, "gradients": int(surprised), "fused": 1}
    assert_all_close(ours, wanted, "f32", "unexpected")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_loss_and_no_counted_position(backend: str) -> None:
    for ignored in (0.2, 1.1):
        case = make(dtype="f32", ignored=ignored)
        skip_if_refused(backend, case)
        with counted(backend, blocks=70):
            answer = case.answer(backend, expect=constant)
            ours = gradients_of(constant(answer) + answer.logprob_T.sum() * 0, case)
            assert not any(part.any() for part in ours)
            answer = case.answer(backend, expect=objective)
            ours = gradients_of(objective(answer), case)
        assert_all_close(ours, gradients_of(objective(case.answer(backend)), case), "f32", str(ignored))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_is_kept_answers_twice(backend: str) -> None:
    """The gradients at hand are given away; whoever has them may have changed them in place."""
    case = make(dtype="f32")
    skip_if_refused(backend, case)
    with counted(backend) as counts:
        loss = objective(case.answer(backend, expect=objective))
        loss.backward(retain_graph=True)
        once = [leaf.grad.clone() for leaf in case.leaves]  # type: ignore[union-attr]
        for leaf in case.leaves:
            assert leaf.grad is not None
            leaf.grad.mul_(0.0)
        loss.backward()
    assert counts.n["gradients"] == 1
    assert_all_close([leaf.grad for leaf in case.leaves], once, "f32", "twice")  # type: ignore[misc]


@pytest.mark.parametrize(
    "frozen", [{"w_VD", "bias_V"}, {"h_TD"}, {"h_TD", "bias_V"}, {"h_TD", "w_VD"}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_heads_and_backbones(backend: str, frozen: tuple[str, ...]) -> None:
    case = make(dtype="f32")
    skip_if_refused(backend, case)
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    leaves = [leaf for leaf in case.leaves if leaf.requires_grad]
    wanted = torch.autograd.grad(objective(case.answer(backend)), leaves)
    with counted(backend, blocks=70) as counts:
        loss = objective(case.answer(backend, expect=objective))
        loss.backward()
    assert counts.n == {"sums": 0, "gradients": 0, "fused": 1}
    assert_all_close([leaf.grad for leaf in leaves], list(wanted), "f32", "frozen")  # type: ignore[misc]
    assert all(leaf.grad is None for leaf in case.leaves if not leaf.requires_grad)


def test_where_nothing_is_gained_the_ordinary_way_is_taken() -> None:
    """No gradient is wanted, the answer has a top list, or rows are to be invariant."""
    case = make(dtype="f32")
    with counted("chunked") as counts:
        with torch.no_grad():
            case.answer("chunked", expect=objective)
        case.answer("chunked", expect=objective, n_top=2)
        case.answer("chunked", expect=objective, invariant=True)
    assert counts.n["fused"] == 0


def test_an_autocast_changes_nothing() -> None:
    case = make(dtype="f32")
    wanted = gradients_of(objective(case.answer("chunked", top_p=0.9)), case)
    with counted("chunked", blocks=70) as counts, torch.autocast("cpu", torch.bfloat16):
        answer = case.answer("chunked", top_p=0.9, expect=objective)
        loss = objective(answer)
    ours = gradients_of(loss, case)
    assert counts.n["fused"] == 1
    assert_all_close(ours, wanted, "f32", "autocast")


def test_a_gradient_that_came_along_can_be_differentiated() -> None:
    """With create_graph the gradient is made anew, by operators that have a second derivative."""
    generator = torch.Generator().manual_seed(0)
    h_TD = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    w_VD = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target_T = torch.randint(7, (6,), generator=generator)

    def loss(answer: TokenLogProbs) -> Tensor:
        return -answer.logprob_T.sum()

    second = []
    for expect in (loss, None):
        answer = token_logprobs(h_TD, w_VD, target_T, backend="chunked", expect=expect)
        (dh_TD,) = torch.autograd.grad(loss(answer), h_TD, create_graph=True)
        second.append(torch.autograd.grad(dh_TD.square().sum(), (h_TD, w_VD)))
    for along, twice in zip(*second, strict=True):
        torch.testing.assert_close(along, twice, rtol=1e-10, atol=1e-10)
