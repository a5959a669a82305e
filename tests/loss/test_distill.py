"""Distillation against full distributions, against TRL, and a teacher that is known by its likeliest tokens.

Shape legend: T positions, D hidden width, V vocabulary, K tokens known of the teacher.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from direct_signal import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.divergence import Head, divergence
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.objective import Composite, parse_objectives
from gyrocompass.loss.reduce import normalise
from gyrocompass.loss.signal import Batch, TokenLogProbs
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.score import log_probs

N_TOKENS, WIDTH, VOCABULARY, KNOWN = 14, 4, 8, 3
KINDS = ["forward_kl", "reverse_kl", "jsd", "total_variation"]


def heads(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The student's hidden states and head, and the teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N_TOKENS, WIDTH), (VOCABULARY, WIDTH), (N_TOKENS, VOCABULARY))
    h_TD, w_VD, z_TV = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return h_TD.requires_grad_(), w_VD.requires_grad_(), 2 * z_TV


def formula(kind: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The definition on probabilities."""
    mixture = (1 - beta) * p + beta * q
    terms = {
        "forward_kl": q * (q / p).log(),
        "reverse_kl": p * (p / q).log(),
        "jsd": beta * q * (q / mixture).log() + (1 - beta) * p * (p / mixture).log(),
        "total_variation": (p - q).abs() / 2,
    }
    return terms[kind].sum(dim=-1)


def with_teacher(batch: Batch, z_TV: Tensor, known: int = KNOWN, dtype: torch.dtype = torch.float32) -> Batch:
    """The batch with the teacher's likeliest tokens as columns, in float32 as from disk or wider."""
    logprob_TK, token_TK = z_TV.log_softmax(1).topk(known, dim=1)
    columns: dict[str, Tensor] = {}
    for k in range(known):
        columns[f"teacher_token/{k}"] = token_TK[:, k].to(dtype)
        columns[f"teacher_logprob/{k}"] = logprob_TK[:, k].to(dtype)
    uncounted_T = batch.weight_T == 0
    return dataclasses.replace(
        batch, columns={name: x.masked_fill(uncounted_T, torch.nan) for name, x in columns.items()}
    )


def answer(composite: Composite, batch: Batch, h_TD: Tensor, w_VD: Tensor, z_TV: Tensor) -> TokenLogProbs:
    """What `model.score.log_probs` gives: the primitive's answer, and divergences where the batch counts."""
    found = token_logprobs(h_TD, w_VD, batch.target_T, want=(), candidate_TC=composite.candidates(batch))
    columns = [
        divergence(
            Head(h_TD, w_VD, temperature=temperature),
            Head(z_TV, torch.eye(VOCABULARY, dtype=torch.float64), temperature=temperature),
            kind,
            beta=beta,
            mask_T=batch.weight_T > 0,
        )
        for kind, beta, temperature in composite.divergences
    ]
    return found._replace(divergence_TK=torch.stack(columns, dim=1) if columns else None)


def assert_is(entry: Any, batch: Batch, wanted_T: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    composite = parse_objectives([entry])
    ((value_T, weight_T),) = composite(answer(composite, batch, *parts), batch).values()
    counted_T = batch.weight_T > 0
    assert torch.equal(weight_T, batch.weight_T) and not value_T[~counted_T].any()
    torch.testing.assert_close(value_T[counted_T], wanted_T[counted_T], rtol=1e-9, atol=1e-11)
    total = (wanted_T * weight_T)[counted_T].sum()
    gradients = torch.autograd.grad((value_T * weight_T).sum(), parts[:2])
    for ours, theirs in zip(gradients, torch.autograd.grad(total, parts[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), beta=st.sampled_from([0.2, 0.5]), tau=st.sampled_from([1.0, 2.5]))
def test_live_teacher_is_its_formula(kind: str, seed: int, beta: float, tau: float) -> None:
    h_TD, w_VD, z_TV = parts = heads(seed)
    p, q = (h_TD @ w_VD.T / tau).softmax(1), (z_TV / tau).softmax(1)
    entry = {"distillation": {"kind": kind, "beta": beta, "temperature": tau}}
    assert_is(entry, make_batch(N_TOKENS, VOCABULARY, seed), tau**2 * formula(kind, p, q, beta), parts)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), beta=st.sampled_from([0.2, 0.5]), known=st.integers(1, VOCABULARY - 1))
def test_top_k_with_tail_is_its_formula(kind: str, seed: int, beta: float, known: int) -> None:
    h_TD, w_VD, z_TV = parts = heads(seed)
    batch = with_teacher(make_batch(N_TOKENS, VOCABULARY, seed), z_TV, known, torch.float64)
    token_TK = z_TV.topk(known, dim=1).indices

    def outcomes(logits_TV: Tensor) -> Tensor:
        known_TK = logits_TV.softmax(1).gather(1, token_TK)
        return torch.cat([known_TK, 1 - known_TK.sum(1, keepdim=True)], dim=1)

    wanted_T = formula(kind, outcomes(h_TD @ w_VD.T), outcomes(z_TV), beta)
    assert_is({"distillation_top_k": {"kind": kind, "beta": beta}}, batch, wanted_T, parts)


@pytest.mark.parametrize(("kind", "trl_beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_live_teacher_is_that_of_trl(kind: str, trl_beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    h_TD, w_VD, z_TV = heads(5)
    batch, tau = make_batch(N_TOKENS, VOCABULARY, 5), 2.0
    entry = {"distillation": {"kind": kind, "beta": trl_beta or 0.5, "temperature": tau}}
    if kind == "reverse_kl":
        entry["distillation"]["beta"] = 0.5
    composite = parse_objectives([entry])
    batch.weight_T.copy_(batch.weight_T > 0)
    terms = composite(answer(composite, batch, h_TD, w_VD, z_TV), batch)
    loss = normalise(composite, [batch]).loss(terms, batch).loss
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        (h_TD @ w_VD.T)[None], z_TV[None], batch.target_T[None], beta=trl_beta, temperature=tau
    )
    torch.testing.assert_close(loss, tau**2 * theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_nothing_from_itself(kind: str) -> None:
    h_TD, w_VD, _ = heads(7)
    logits_TV = (h_TD @ w_VD.T).detach()
    batch = with_teacher(make_batch(N_TOKENS, VOCABULARY, 7), logits_TV)
    composite = parse_objectives([{"distillation": {"kind": kind}}, {"distillation_top_k": {"kind": kind}}])
    terms = composite(answer(composite, batch, h_TD, w_VD, logits_TV), batch)
    for value_T, weight_T in terms.values():
        assert value_T.abs().max() < 1e-6
        if kind != "total_variation":  # whose slope at 0 has two sides
            gradients = torch.autograd.grad((value_T * weight_T).sum(), (h_TD, w_VD), retain_graph=True)
            assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), kind=st.sampled_from(KINDS))
def test_outcomes_put_together_are_never_further_apart(seed: int, kind: str) -> None:
    parts = heads(seed)
    batch = with_teacher(make_batch(N_TOKENS, VOCABULARY, seed), parts[2])
    composite = parse_objectives([{"distillation": {"kind": kind}}, {"distillation_top_k": {"kind": kind}}])
    whole, coarse = composite(answer(composite, batch, *parts), batch).values()
    assert (coarse.value <= whole.value + 1e-6).all()


@pytest.mark.parametrize("entry", [{"distillation": {"kind": "jsd"}}, "distillation_top_k"], ids=str)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**20), cut=st.integers(0, N_TOKENS))
def test_partition(entry: Any, seed: int, cut: int) -> None:
    composite = parse_objectives([entry])
    h_TD, w_VD, z_TV = heads(seed)
    window = with_teacher(make_batch(N_TOKENS, VOCABULARY, seed), z_TV)
    order = torch.randperm(N_TOKENS, generator=torch.Generator().manual_seed(seed))

    def at(index: Tensor) -> Batch:
        names = [f.name for f in dataclasses.fields(Batch) if f.name not in ("length", "columns")]
        columns = {name: column[index] for name, column in window.columns.items()}
        return Batch(
            **{n: getattr(window, n)[index] for n in names}, length=max(len(index), 1), columns=columns
        )

    def results(split: list[Tensor]) -> list[Tensor]:
        batches = [at(index) for index in split]
        normaliser = normalise(composite, batches)
        shares = [
            normaliser.loss(composite(answer(composite, b, h_TD[i], w_VD, z_TV[i]), b), b).loss
            for b, i in zip(batches, split, strict=True)
        ]
        loss = torch.stack(shares).sum()
        return [loss.detach(), *torch.autograd.grad(loss, (h_TD, w_VD))]

    whole = results([torch.arange(N_TOKENS)])
    for ours, theirs in zip(results([order[:cut], order[cut:]]), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_live_teacher_through_a_model() -> None:
    """`log_probs` asks a teacher of another width what the objective names, at its temperature."""
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.5,
    }  # fmt: skip
    student, teacher = (new_causal_lm({**config, "hidden_size": d}, seed=d).double() for d in (8, 16))
    batch = dataclasses.replace(make_batch(N_TOKENS, VOCABULARY, 2), position_T=torch.arange(N_TOKENS))
    composite = parse_objectives([{"distillation": {"kind": "reverse_kl", "temperature": 3.0}}])
    found = log_probs(student, batch, want=(), divergences=composite.divergences, teacher=teacher)
    ((value_T, _),) = composite(found, batch).values()
    z_TV, taught_TV = (m(batch.token_T[None]).logits[0] / 3.0 for m in (student, teacher))
    wanted_T = 9.0 * formula("reverse_kl", z_TV.softmax(1), taught_TV.softmax(1), 0.5)
    counted_T = batch.weight_T > 0
    torch.testing.assert_close(value_T[counted_T], wanted_T[counted_T], rtol=1e-5, atol=1e-6)
    value_T.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(BadInput, match="asks for a divergence from a teacher"):
        log_probs(student, batch, want=(), divergences=composite.divergences)


@pytest.mark.parametrize(
    ("name", "number", "match"),
    [
        ("teacher_token/1", 1.5, "is no token id"),
        ("teacher_token/1", -1.0, "is no token id"),
        ("teacher_token/1", None, "stands there twice"),
        ("teacher_token/2", torch.nan, "no finite number"),
        ("teacher_logprob/0", torch.nan, "no finite number"),
        ("teacher_logprob/0", 0.2, "sum to more than 1"),
    ],
)
def test_bad_columns_are_refused(name: str, number: float | None, match: str) -> None:
    batch = with_teacher(make_batch(N_TOKENS, VOCABULARY, 1), heads(1)[2])
    place = int((batch.weight_T > 0).nonzero()[0])
    columns = {key: column.clone() for key, column in batch.columns.items()}
    columns[name][place] = columns["teacher_token/0"][place] if number is None else number
    with pytest.raises(BadInput, match=match):
        normalise(parse_objectives(["distillation_top_k"]), [dataclasses.replace(batch, columns=columns)])


def test_missing_columns_are_refused() -> None:
    batch = with_teacher(make_batch(N_TOKENS, VOCABULARY, 1), heads(1)[2])
    composite = parse_objectives(["distillation_top_k"])
    with pytest.raises(BadInput, match="no column 'teacher_token/0'"):
        normalise(composite, [dataclasses.replace(batch, columns={})])
    fewer = {name: column for name, column in batch.columns.items() if name != "teacher_logprob/2"}
    with pytest.raises(BadInput, match=r"3 columns teacher_token/\.\.\., and 2 columns teacher_logprob"):
        normalise(composite, [dataclasses.replace(batch, columns=fewer)])
