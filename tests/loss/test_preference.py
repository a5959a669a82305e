"""Each objective of pairs against its published formula, written again over single answers in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from direct_answers import Answer, Window, assert_law_1, assert_terms, assert_two_passes, make_window, split
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.loss import preference, reference_free
from gyrocompass.loss.margin import pair_loss
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.registry import OBJECTIVES
from gyrocompass.loss.signal import Batch

Formula = Callable[[Answer, Answer], Tensor]
"""(chosen, rejected) -> the term of the pair."""

BETA = 0.7
seeds = st.integers(0, 2**20)


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.logaddexp(torch.zeros_like(x), -x)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


# --- formulas of margins: u is beta times the difference of log-ratios ---


def conservative(u: Tensor) -> Tensor:
    return -0.9 * log_sigmoid(u) - 0.1 * log_sigmoid(-u)


def exo(u: Tensor) -> Tensor:
    p, q = sigmoid(u), 1 - sigmoid(u)
    return p * (p / 0.9).log() + q * (q / 0.1).log()


def discopop(u: Tensor) -> Tensor:
    mix = sigmoid(u / 0.5)
    return -(1 - mix) * log_sigmoid(u) + mix * (-u).exp()


MARGIN_LOSSES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "sigmoid": ({}, lambda u: -log_sigmoid(u)),
    "conservative": ({"label_smoothing": 0.1}, conservative),
    "hinge": ({"loss": "hinge"}, lambda u: (1 - u).clamp(min=0)),
    "ipo": ({"loss": "ipo"}, lambda u: (u / BETA - 1 / (2 * BETA)) ** 2),
    "robust": (
        {"loss": "robust", "label_smoothing": 0.1},
        lambda u: (-0.9 * log_sigmoid(u) + 0.1 * log_sigmoid(-u)) / 0.8,
    ),
    "exo": ({"loss": "exo", "label_smoothing": 0.1}, exo),
    "discopop": ({"loss": "discopop", "discopop_tau": 0.5}, discopop),
}


def of_ratios(h: Callable[[Tensor], Tensor]) -> Formula:
    return lambda chosen, rejected: h(BETA * (chosen.ratio - rejected.ratio))


def of_ratios_per_token(h: Callable[[Tensor], Tensor]) -> Formula:
    def formula(chosen: Answer, rejected: Answer) -> Tensor:
        per_token = [a.ratio / len(a.logprob_N) for a in (chosen, rejected)]
        return h(BETA * (per_token[0] - per_token[1]))

    return formula


def desensitised(chosen: Answer, rejected: Answer) -> Tensor:
    """LD-DPO's likelihood: pi(y_{<= shared}) pi(y_{> shared})^alpha, for policy and reference."""
    shared = min(len(chosen.logprob_N), len(rejected.logprob_N))
    margin = torch.zeros((), dtype=torch.float64)
    for answer, sign in ((chosen, 1), (rejected, -1)):
        for logprob_N in (answer.logprob_N, -answer.reference_N):
            margin = margin + sign * (logprob_N[:shared].sum() + 0.3 * logprob_N[shared:].sum())
    return -log_sigmoid(BETA * margin)


def f_formula(slope: Callable[[Tensor], Tensor]) -> Formula:
    """f-DPO with f' as a function of u = pi / pi_ref."""

    def formula(chosen: Answer, rejected: Answer) -> Tensor:
        return -log_sigmoid(BETA * (slope(chosen.ratio.exp()) - slope(rejected.ratio.exp())))

    return formula


def weighted_by_policy(chosen: Answer, rejected: Answer) -> Tensor:
    weight = 1.0
    for answer in (chosen, rejected):
        relative_N = answer.logprob_N.exp() / (answer.p_NV**2).sum(1)
        weight *= float(relative_N.detach().prod()) ** (1 / len(relative_N))
    return -weight * log_sigmoid(BETA * (chosen.ratio - rejected.ratio))


# --- formulas of sides ---


def nca(chosen: Answer, rejected: Answer) -> Tensor:
    r_c, r_r = BETA * chosen.ratio, BETA * rejected.ratio
    return -log_sigmoid(r_c) - 0.5 * (log_sigmoid(-r_c) + log_sigmoid(-r_r))


def bco(chosen: Answer, rejected: Answer) -> Tensor:
    return -(sigmoid(BETA * chosen.ratio) * sigmoid(-BETA * rejected.ratio)).log()


def sppo(chosen: Answer, rejected: Answer) -> Tensor:
    eta = 1 / BETA  # the paper's: log-ratio against eta (P(win) - 1/2)
    return (chosen.ratio - eta * (1 - 0.5)) ** 2 + (rejected.ratio - eta * (0 - 0.5)) ** 2


def apo_zero(chosen: Answer, rejected: Answer) -> Tensor:
    return -sigmoid(BETA * chosen.ratio) + sigmoid(BETA * rejected.ratio) + 1


def apo_down(chosen: Answer, rejected: Answer) -> Tensor:
    return sigmoid(BETA * chosen.ratio) - sigmoid(BETA * (chosen.ratio - rejected.ratio)) + 1


# --- formulas without a reference ---


def cpo(chosen: Answer, rejected: Answer) -> Tensor:
    return -log_sigmoid(BETA * (chosen.logprob_N.sum() - rejected.logprob_N.sum()))


def simpo(chosen: Answer, rejected: Answer) -> Tensor:
    return -log_sigmoid(BETA * chosen.logprob_N.mean() - BETA * rejected.logprob_N.mean() - 0.4)


def alphapo(chosen: Answer, rejected: Answer) -> Tensor:
    def reward(answer: Answer) -> Tensor:
        likelihood = answer.logprob_N.exp().prod() ** (1 / len(answer.logprob_N))
        return BETA * (1 - likelihood**-0.3) / 0.3

    return -log_sigmoid(reward(chosen) - reward(rejected) - 0.4)


def orpo(chosen: Answer, rejected: Answer) -> Tensor:
    def odds(answer: Answer) -> Tensor:
        p = answer.logprob_N.mean().exp()
        return p / (1 - p)

    return -log_sigmoid((odds(chosen) / odds(rejected)).log())


PAIR_CASES: dict[str, tuple[dict[str, dict[str, Any]], Formula]] = {
    **{f"dpo_{n}": ({"dpo": {"beta": BETA, **o}}, of_ratios(h)) for n, (o, h) in MARGIN_LOSSES.items()},
    **{
        f"dpo_{n}_per_token": (
            {"dpo": {"beta": BETA, "length_normalised": True, **o}},
            of_ratios_per_token(h),
        )
        for n, (o, h) in MARGIN_LOSSES.items()
        if n in ("sigmoid", "ipo")
    },
    "dpo_desensitised": ({"dpo": {"beta": BETA, "ld_alpha": 0.3}}, desensitised),
    "dpo_forward_kl": ({"dpo": {"beta": BETA, "f_divergence": "forward_kl"}}, f_formula(lambda u: -1 / u)),
    "dpo_js": ({"dpo": {"beta": BETA, "f_divergence": "js"}}, f_formula(lambda u: (2 * u / (1 + u)).log())),
    "dpo_alpha": (
        {"dpo": {"beta": BETA, "f_divergence": "alpha", "f_alpha": 0.4}},
        f_formula(lambda u: (1 - u**-0.4) / 0.4),
    ),
    "wpo": ({"wpo": {"beta": BETA}}, weighted_by_policy),
    "nca": ({"nca": {"beta": BETA}}, nca),
    "bco": ({"bco": {"beta": BETA}}, bco),
    "sppo": ({"sppo": {"beta": BETA}}, sppo),
    "apo_zero": ({"apo_zero": {"beta": BETA}}, apo_zero),
    "apo_down": ({"apo_down": {"beta": BETA}}, apo_down),
    "cpo": ({"cpo": {"beta": BETA}}, cpo),
    "simpo": ({"simpo": {"beta": BETA, "gamma": 0.4}}, simpo),
    "alphapo": ({"alphapo": {"beta": BETA, "gamma": 0.4, "alpha": 0.3}}, alphapo),
    "orpo": ({"orpo": {}}, orpo),
}


def by_unit(window: Window) -> list[tuple[Answer, Answer]]:
    answers = window.answers()
    return [(answers[unit, 1], answers[unit, 0]) for unit, side in sorted(answers) if side == 1]


@pytest.mark.parametrize("name", PAIR_CASES)
@settings(deadline=None, max_examples=8)
@given(seed=seeds, n_units=st.integers(1, 5))
def test_a_pair_is_its_formula(name: str, seed: int, n_units: int) -> None:
    entry, formula = PAIR_CASES[name]
    window = make_window(n_units, seed)
    expected = [(formula(chosen, rejected), chosen.weight) for chosen, rejected in by_unit(window)]
    assert_terms(entry, window, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("paired", [True, False])
@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_aot_is_its_formula(paired: bool, smoothing: float, seed: int) -> None:
    """Quantiles by sorted lists; the gradient goes to whoever stands at the quantile."""
    window = make_window(5, seed, weighted=False)
    pairs = by_unit(window)
    if paired:
        upper = [c.logprob_N.sum() - r.logprob_N.sum() for c, r in pairs]
        lower = [c.reference_N.sum() - r.reference_N.sum() for c, r in pairs]
    else:
        upper, lower = [c.ratio for c, _ in pairs], [r.ratio for _, r in pairs]
    margins = [BETA * (u - v) for u, v in zip(sorted(upper), sorted(lower), strict=True)]
    expected = [(-(1 - smoothing) * log_sigmoid(m) - smoothing * log_sigmoid(-m), 1.0) for m in margins]
    assert_terms({"aot": {"beta": BETA, "paired": paired, "label_smoothing": smoothing}}, window, expected)


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("gold", ["mean", "sum"])
@settings(deadline=None, max_examples=8)
@given(seed=seeds)
def test_tpo_is_its_formula(gold: str, length_normalised: bool, seed: int) -> None:
    window = make_window(4, seed, sides=(1, 0, 2))
    answers, expected = window.answers(), []
    for unit in range(4):
        chosen, rejected, golden = (answers[unit, side] for side in (1, 0, 2))
        scores = [a.logprob_N.mean() if length_normalised else a.logprob_N.sum() for a in (chosen, rejected)]
        imitated = golden.logprob_N.mean() if gold == "mean" else golden.logprob_N.sum()
        value = -log_sigmoid(BETA * (scores[0] - scores[1]) - 0.2) - 0.6 * imitated
        expected.append((value, chosen.weight))
    entry = {"beta": BETA, "gamma": 0.2, "alpha": 0.6, "length_normalised": length_normalised, "gold": gold}
    assert_terms({"tpo": entry}, window, expected)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_chosen_nll_reads_chosen_answers_alone(seed: int) -> None:
    window = make_window(4, seed)
    composite = parse_objectives(["chosen_nll", {"chosen_nll": {"by": "sequence", "name": "mean"}}])
    terms = composite(window.log_probs(composite), window.batch)
    pairs = by_unit(window)
    for name, expected in (
        ("chosen_nll", sum(c.weight * -c.logprob_N.sum() for c, _ in pairs)),
        ("mean", sum(c.weight * -c.logprob_N.mean() for c, _ in pairs)),
    ):
        torch.testing.assert_close((terms[name].value * terms[name].weight).sum(), expected)
    n_tokens = sum(len(c.logprob_N) for c, _ in pairs)
    assert [int((terms[name].weight > 0).sum()) for name in ("chosen_nll", "mean")] == [n_tokens, 4]


def test_every_objective_has_a_case() -> None:
    modules = {preference.__name__, reference_free.__name__}
    here = {name for name, known in OBJECTIVES.items() if known.function.__module__ in modules}
    cases = {name for entry, _ in PAIR_CASES.values() for name in entry}
    assert cases | {"aot", "tpo", "chosen_nll"} == here


# --- formulas that people get wrong ---


def test_formula_6_numerator_reference_and_length_share_one_mask() -> None:
    """What does not count changes nothing: not the log-prob, not the reference, not the length."""
    window = make_window(3, seed=5)
    entry = {"dpo": {"length_normalised": True}}
    composite = parse_objectives([entry])
    value_P = composite(window.log_probs(composite), window.batch)["dpo"].value
    uncounted_T = window.batch.weight_T == 0
    assert (uncounted_T & (window.batch.segment_T >= 0)).any()
    reference_T = window.batch.columns["reference_logprob"].masked_fill(uncounted_T, -50.0)
    columns = {**window.batch.columns, "reference_logprob": reference_T}
    changed = window._replace(batch=dataclasses.replace(window.batch, columns=columns))
    again_P = composite(changed.log_probs(composite), changed.batch)["dpo"].value
    assert torch.equal(value_P, again_P)
    lengths = {len(a.logprob_N) for a in window.answers().values()}
    assert len(lengths) > 1  # so that another mask in the length would have shown
    assert_terms(
        {"dpo": {"beta": BETA, "length_normalised": True}},
        window,
        [(of_ratios_per_token(lambda u: -log_sigmoid(u))(c, r), c.weight) for c, r in by_unit(window)],
    )


def test_formula_6_only_aot_needs_the_whole_window() -> None:
    pairs = {name for entry, _ in PAIR_CASES.values() for name in entry} | {"tpo", "chosen_nll"}
    assert OBJECTIVES["aot"].whole_window
    assert not any(OBJECTIVES[name].whole_window for name in pairs)


def test_formula_6_aot_of_halves_is_not_aot_of_the_window() -> None:
    window = make_window(6, seed=1, weighted=False)
    composite = parse_objectives(["aot"])
    with pytest.raises(AssertionError):
        assert_law_1(["aot"], window, split(window.batch, seed=1, parts=2))
    assert composite.whole_window  # which is why a split window takes two passes


# --- law 1 ---


def named(entry: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    ((key, options),) = entry.items()
    return {key: {**options, "name": name}}


@settings(deadline=None, max_examples=6)
@given(seed=seeds, parts=st.integers(1, 4))
def test_the_split_changes_nothing(seed: int, parts: int) -> None:
    entries: list[Any] = [named(entry, name) for name, (entry, _) in PAIR_CASES.items()]
    entries += ["chosen_nll", {"chosen_nll": {"by": "sequence", "name": "by_sequence"}}]
    window = make_window(6, seed)
    assert_law_1(entries, window, split(window.batch, seed, parts))


@settings(deadline=None, max_examples=10)
@given(seed=seeds, parts=st.integers(1, 3))
def test_the_split_of_triples_changes_nothing(seed: int, parts: int) -> None:
    window = make_window(5, seed, sides=(2, 1, 0))
    assert_law_1(["tpo"], window, split(window.batch, seed, parts))


@settings(deadline=None, max_examples=10)
@given(seed=seeds, parts=st.integers(1, 3))
def test_the_split_does_not_change_aot(seed: int, parts: int) -> None:
    window = make_window(6, seed, weighted=False)
    entries = ["aot", {"aot": {"paired": False, "name": "unpaired"}}]
    assert_two_passes(entries, window, split(window.batch, seed, parts))


# --- limits ---

AT_THE_REFERENCE = {
    "dpo": math.log(2),
    "nca": 2 * math.log(2),
    "bco": 2 * math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "aot": math.log(2),
}


def at_the_reference(window: Window) -> Window:
    composite = parse_objectives(["nll"])
    reference_T = window.log_probs(composite).logprob_T.detach()
    columns = {**window.batch.columns, "reference_logprob": reference_T}
    return window._replace(batch=dataclasses.replace(window.batch, columns=columns))


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_the_first_step(name: str) -> None:
    window = at_the_reference(make_window(4, seed=2, weighted=False))
    composite = parse_objectives([name])
    value_P = composite(window.log_probs(composite), window.batch)[name].value
    torch.testing.assert_close(value_P, torch.full_like(value_P, AT_THE_REFERENCE[name]))


@pytest.mark.parametrize("f_divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_every_divergence_starts_with_the_gradient_of_dpo(f_divergence: str) -> None:
    """f''(1) = 1 for each of these (1/2 for js), so they differ only after the first step."""
    window = at_the_reference(make_window(3, seed=4))
    entries = [{"dpo": {"f_divergence": f_divergence}}, {"dpo": {"name": "plain"}}]
    composite = parse_objectives(entries)
    terms = composite(window.log_probs(composite), window.batch)
    ours, plain = (
        torch.autograd.grad(terms[n].value.sum(), window.w_VD, retain_graph=True)[0] for n in terms
    )
    torch.testing.assert_close(ours, plain * (0.5 if f_divergence == "js" else 1.0))


def equal_sides() -> Window:
    """One pair whose two answers are the same tokens after the same prompt."""
    window = make_window(1, seed=3, length=3, weighted=False)
    batch, half = (
        window.batch,
        [(window.batch.segment_T == segment).nonzero().flatten() for segment in (0, 1)],
    )
    first, second = (places[-3:] for places in half)
    target_T, reference_T = batch.target_T.clone(), batch.columns["reference_logprob"].clone()
    target_T[second], reference_T[second] = target_T[first], reference_T[first]
    h_TD = window.h_TD.detach().clone()
    h_TD[second] = h_TD[first]
    columns = {**batch.columns, "reference_logprob": reference_T}
    batch = dataclasses.replace(batch, target_T=target_T, columns=columns)
    return window._replace(batch=batch, h_TD=h_TD.requires_grad_())


MARGINS = [n for n in PAIR_CASES if n.startswith(("dpo", "wpo", "cpo", "simpo", "alphapo", "orpo"))]


@pytest.mark.parametrize("name", MARGINS)
def test_equal_sides_have_no_gradient(name: str) -> None:
    """In the parameters, which both answers share: what one side pushes, the other pulls."""
    entry, _ = PAIR_CASES[name]
    window, composite = equal_sides(), parse_objectives([entry])
    (key,) = entry
    value_P = composite(window.log_probs(composite), window.batch)[key].value
    (gradient_VD,) = torch.autograd.grad(value_P.sum(), window.w_VD)
    torch.testing.assert_close(gradient_VD, torch.zeros_like(gradient_VD), rtol=0, atol=1e-12)


def without(window: Window, unit: int) -> Window:
    """The window with one unit that does not count."""
    gone_T = window.batch.unit_T == unit
    batch = dataclasses.replace(
        window.batch,
        weight_T=window.batch.weight_T.masked_fill(gone_T, 0.0),
        target_T=window.batch.target_T.masked_fill(gone_T, -100),
    )
    return window._replace(batch=batch)


def test_masked_pairs_give_exactly_none() -> None:
    window = without(make_window(3, seed=6, weighted=False), unit=1)
    gone_T = window.batch.unit_T == 1
    composite = parse_objectives(
        [named(entry, name) for name, (entry, _) in PAIR_CASES.items()] + ["aot", "chosen_nll"]
    )
    terms = composite(window.log_probs(composite), window.batch)
    for name, (value, weight) in terms.items():
        if name != "chosen_nll":
            assert len(value) == 2, name
        (gradient_TD,) = torch.autograd.grad((value * weight).sum(), window.h_TD, retain_graph=True)
        assert not gradient_TD[gone_T].any() and gradient_TD[~gone_T].any(), name


def test_a_window_without_pairs_gives_no_terms() -> None:
    window = make_window(2, seed=0)
    for unit in range(2):
        window = without(window, unit)
    composite = parse_objectives([named(entry, name) for name, (entry, _) in PAIR_CASES.items()] + ["aot"])
    terms = composite(window.log_probs(composite), window.batch)
    assert all(len(value) == len(weight) == 0 for value, weight in terms.values())


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust", "exo", "discopop"])
@pytest.mark.parametrize("margin", [-3000.0, 3000.0])
def test_hopeless_and_certain_margins_stay_finite(loss: Any, margin: float) -> None:
    margin_P = torch.tensor([margin], requires_grad=True)
    smoothing = 0.1 if loss in ("robust", "exo") else 0.0
    value_P = pair_loss(margin_P, loss, beta=0.5, label_smoothing=smoothing)
    (gradient_P,) = torch.autograd.grad(value_P.sum(), margin_P)
    assert value_P.isfinite().all() and gradient_P.isfinite().all()


def test_simpo_is_the_limit_of_alphapo() -> None:
    window = make_window(3, seed=8)
    options = {"beta": 2.0, "gamma": 0.5}
    entries = [{"simpo": options}] + [
        {"alphapo": {**options, "alpha": alpha, "name": str(alpha)}} for alpha in (0.0, 1e-7)
    ]
    composite = parse_objectives(entries)
    first, *others = composite(window.log_probs(composite), window.batch).values()
    for other in others:
        torch.testing.assert_close(other.value, first.value, rtol=1e-5, atol=0)


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, "hinge has no label_smoothing"),
        ({"loss": "exo"}, "exo needs label_smoothing"),
        ({"length_normalised": True, "f_divergence": "js"}, "length_normalised is not defined for js"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    window, composite = make_window(2, seed=0), parse_objectives([{"dpo": options}])
    with pytest.raises(BadInput, match=message):
        composite(window.log_probs(composite), window.batch)


@pytest.mark.parametrize("options", [{"beta": 0}, {"label_smoothing": 0.5}, {"loss": "sigmod"}])
def test_options_out_of_bounds(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_objectives([{"dpo": options}])


def without_column(batch: Batch, name: str) -> Batch:
    return dataclasses.replace(batch, columns={n: c for n, c in batch.columns.items() if n != name})


@pytest.mark.parametrize(
    ("column", "message"), [("reference_logprob", "score the data"), ("side", "preference records")]
)
def test_a_missing_column_says_where_it_comes_from(column: str, message: str) -> None:
    window, composite = make_window(2, seed=0), parse_objectives(["dpo"])
    with pytest.raises(BadInput, match=message):
        composite(window.log_probs(composite), without_column(window.batch, column))


def test_sides_without_a_partner() -> None:
    window, composite = make_window(2, seed=0), parse_objectives(["tpo"])
    with pytest.raises(BadInput, match="0 gold answers are not one for each of 2 pairs"):
        composite(window.log_probs(composite), window.batch)
    lonely, composite = make_window(2, seed=0, sides=(1,)), parse_objectives(["dpo"])
    with pytest.raises(BadInput, match="not pairs"):
        composite(lonely.log_probs(composite), lonely.batch)
    weighted, composite = make_window(2, seed=0), parse_objectives(["aot"])
    with pytest.raises(BadInput, match="weigh the same"):
        composite(weighted.log_probs(composite), weighted.batch)
