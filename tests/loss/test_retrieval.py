"""Retrieval-augmented likelihood against plain sums over passages.

Shape legend: T positions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit_batches import VOCABULARY, Model, Text, assert_is, assert_partition, batch_of, refuses

from gyrocompass.loss.objective import parse_objectives


def questions(seed: int, *, passages: int | None = None) -> list[Text]:
    """One to three questions, each with passages of unequal length and one answer."""
    random = np.random.default_rng(seed)
    texts = []
    for unit in range(int(random.integers(1, 4))):
        answer = random.integers(VOCABULARY, size=random.integers(1, 5)).tolist()
        weight = float(random.choice([0.5, 1.0, 2.0]))
        for _ in range(passages or int(random.integers(1, 5))):
            context = random.integers(VOCABULARY, size=random.integers(1, 6)).tolist()
            n = len(context) + len(answer) - 1
            label = {"retriever_logprob": round(float(random.normal()), 3)}
            column = {"reference_logprob": np.round(-random.exponential(size=n), 3).tolist()}
            texts.append(Text([*context, *answer], len(context), unit, len(texts), label, column, weight))
    return texts


def by_unit(texts: list[Text]) -> list[list[Text]]:
    return [[t for t in texts if t.unit == unit] for unit in sorted({t.unit for t in texts})]


def prior(passages: list[Text]) -> Tensor:
    scores = torch.tensor([t.labels["retriever_logprob"] for t in passages], dtype=torch.float32).double()
    return scores.softmax(0)


def rag_sequence(model: Model, texts: list[Text]) -> list[Tensor]:
    values = []
    for passages in by_unit(texts):
        likelihoods = [torch.stack(model.logprobs(text)).exp().prod() for text in passages]
        values.append(-sum(p * q for p, q in zip(prior(passages), likelihoods, strict=True)).log())  # type: ignore[union-attr]
    return values


def rag_token(model: Model, texts: list[Text]) -> list[Tensor]:
    values = []
    for passages in by_unit(texts):
        by_token = zip(*(model.logprobs(text) for text in passages), strict=True)
        values += [-(prior(passages) * torch.stack(lps).exp()).sum().log() for lps in by_token]
    return values


def replug_lsr(model: Model, texts: list[Text]) -> list[Tensor]:
    values = []
    for passages in by_unit(texts):
        scores = torch.stack([model.hidden(text)[text.prompt - 1] @ model.r_D for text in passages])
        sums = [
            torch.tensor(text.columns["reference_logprob"]).double()[list(text.counted)].sum()
            for text in passages
        ]
        p, q = (scores / 0.7).softmax(0), (torch.stack(sums) / 2.0).softmax(0)
        values.append((p * (p / q).log()).sum())
    return values


LSR = {"replug_lsr": {"temperature": 0.7, "lm_temperature": 2.0}}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_formula_10_rag_sequence_and_rag_token(seed: int) -> None:
    """ANCHORS 10: the sum over tokens is inside the logarithm for one, and outside for the other."""
    texts = questions(seed)
    of_unit = [passages[0].weight for passages in by_unit(texts)]
    of_token = [passages[0].weight for passages in by_unit(texts) for _ in passages[0].counted]
    assert_is("rag_sequence", texts, rag_sequence, seed, of_unit)
    assert_is("rag_token", texts, rag_token, seed, of_token)
    assert_is(LSR, texts, replug_lsr, seed, of_unit)


def test_formula_10_they_differ() -> None:
    texts = questions(4, passages=3)
    model = Model(0)
    whole, by_token = (sum(v.item() for v in f(model, texts)) for f in (rag_sequence, rag_token))
    assert not math.isclose(whole, by_token, rel_tol=1e-3)


@pytest.mark.parametrize("entry", ["rag_sequence", "rag_token", LSR], ids=str)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_partition(entry: Any, seed: int) -> None:
    assert_partition(entry, questions(seed), seed)


@pytest.mark.parametrize("name", ["rag_sequence", "rag_token"])
def test_one_passage_is_nll(name: str) -> None:
    texts, model = questions(3, passages=1), Model(3)
    batch = batch_of(texts)
    sums = {}
    for objective in (name, "nll"):
        composite = parse_objectives([objective])
        ((value, weight),) = composite(model.answer(composite, batch), batch).values()
        sums[objective] = (value * weight).sum()
    torch.testing.assert_close(sums[name], sums["nll"])


def test_one_passage_teaches_the_retriever_nothing() -> None:
    texts, model = questions(5, passages=1), Model(5)
    composite = parse_objectives(["replug_lsr"])
    ((value, _),) = composite(model.answer(composite, batch := batch_of(texts)), batch).values()
    assert not value.any() and not any(g.any() for g in model.gradients(value.sum()))


def test_the_retriever_learns_from_the_language_model() -> None:
    """The gradient raises the score of the passage that helped more."""
    texts = [
        Text([1, 2], 1, 0, 0, columns={"reference_logprob": [-0.1]}),
        Text([3, 2], 1, 0, 1, columns={"reference_logprob": [-3.0]}),
    ]
    composite, model = (
        parse_objectives([{"replug_lsr": {"temperature": 1.0, "lm_temperature": 1.0}}]),
        Model(0),
    )
    answer = model.answer(composite, batch := batch_of(texts))
    scalar_T = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    ((value, _),) = composite(answer._replace(scalar_T=scalar_T), batch).values()
    helped, other = torch.autograd.grad(value.sum(), scalar_T)[0].tolist()
    assert helped < 0 < other


@pytest.mark.parametrize("name", ["rag_sequence", "rag_token", "replug_lsr"])
def test_passages_with_different_answers_are_refused(name: str) -> None:
    for other in ([4, 3], [4, 3, 5], [4, 2, 2]):
        texts = [
            Text(
                tokens,
                1,
                7,
                document,
                {"retriever_logprob": 0.0},
                {"reference_logprob": [0.0] * (len(tokens) - 1)},
            )
            for document, tokens in enumerate(([4, 3, 2], other))
        ]
        refuses(name, texts, "the passages of unit number 7 do not have the same answer")


def test_missing_numbers_are_refused() -> None:
    refuses("rag_token", [Text([1, 2], 1, 0, 0)], "no column 'retriever_logprob'")
    refuses("replug_lsr", [Text([1, 2], 1, 0, 0)], "no column 'reference_logprob'")
