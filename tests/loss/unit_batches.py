"""Texts of units packed into batches, and a model whose hidden states depend on a text alone.

Shape legend: T positions, N predictions of a text, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.objective import Composite, parse_objectives
from gyrocompass.loss.reduce import normalise
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, TokenLogProbs

VOCABULARY, WIDTH, LONGEST = 9, 5, 16


@dataclass
class Text:
    """A document: `tokens[prompt:]` is what counts."""

    tokens: list[int]
    prompt: int
    unit: int
    document: int
    labels: dict[str, float] = field(default_factory=dict)
    columns: dict[str, list[float]] = field(default_factory=dict)
    """By prediction: one number fewer than there are tokens."""
    weight: float = 1.0

    @property
    def counted(self) -> range:
        """The predictions that count; number n is of `tokens[n + 1]`."""
        return range(self.prompt - 1, len(self.tokens) - 1)


def batch_of(texts: Sequence[Text], padding: int = 0, columns_of: Sequence[Text] = ()) -> Batch:
    """The texts in one row, in their order, and padding; with the columns of others too, as a dataset has."""
    parts: dict[str, list[float]] = {}
    for text in columns_of:
        parts |= {f"column {name}": [] for name in (*text.labels, *text.columns)}

    def add(name: str, values: Sequence[float]) -> None:
        parts.setdefault(name, []).extend(values)

    for segment, text in enumerate(texts):
        n = len(text.tokens) - 1
        weights = [text.weight if place in text.counted else 0.0 for place in range(n)]
        add("token", text.tokens[:-1])
        add("target", [t if w else IGNORE_INDEX for t, w in zip(text.tokens[1:], weights, strict=True)])
        add("position", range(n))
        add("segment", [segment] * n), add("document", [text.document] * n), add("unit", [text.unit] * n)
        add("weight", weights)
        for name, value in text.labels.items():
            add(f"column {name}", [value] * n)
        for name, values in text.columns.items():
            add(f"column {name}", values)
    fillers = {"target": IGNORE_INDEX, "segment": -1, "document": -1, "unit": -1, "weight": 0.0, "token": 0}
    for name in ("token", "target", "position", "segment", "document", "unit", "weight"):
        filler = range(padding) if name == "position" else [fillers[name]] * padding
        add(name, filler)
    size = len(parts["token"])
    integer = {
        f"{name}_T": torch.tensor(parts[name], dtype=torch.int64) for name in parts if " " not in name
    } | {"weight_T": torch.tensor(parts["weight"], dtype=torch.float32)}
    columns = {
        name.removeprefix("column "): torch.tensor([*values, *[np.nan] * (size - len(values))])
        for name, values in parts.items()
        if name.startswith("column ")
    }
    zero_T = torch.zeros(size, dtype=torch.int64)
    return Batch(
        **integer, slice_T=zero_T, source_T=zero_T, byte_T=zero_T, length=max(size, 1), columns=columns
    )


class Model:
    """h = E[token] + P[position], a head of words and one of a scalar, all float64."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((VOCABULARY, WIDTH), (LONGEST, WIDTH), (VOCABULARY, WIDTH), (WIDTH,))
        self.e_VD, self.p_LD, self.w_VD, self.r_D = self.parameters = [
            torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
        ]

    def hidden(self, text: Text) -> Tensor:
        """[N, D]."""
        return self.e_VD[text.tokens[:-1]] + self.p_LD[: len(text.tokens) - 1]

    def logprobs(self, text: Text) -> list[Tensor]:
        """log p of each counted token, from full logits."""
        log_p_NV = (self.hidden(text) @ self.w_VD.T).log_softmax(1)
        return [log_p_NV[place, text.tokens[place + 1]] for place in text.counted]

    def answer(self, composite: Composite, batch: Batch) -> TokenLogProbs:
        """What an objective is given."""
        h_TD = self.e_VD[batch.token_T] + self.p_LD[batch.position_T]
        answer = token_logprobs(
            h_TD,
            self.w_VD,
            batch.target_T,
            want=[name for name in composite.wants if name not in ("hidden", "scalar")],
            candidate_TC=composite.candidates(batch),
        )
        return answer._replace(hidden_TD=h_TD, scalar_T=h_TD @ self.r_D)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of each parameter; zeros where the loss does not depend on it."""
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]


Reference = Callable[[Model, list[Text]], list[Tensor]]
"""The values of the formula, in the objective's order."""


def assert_is(entry: Any, texts: list[Text], reference: Reference, seed: int, weights: list[float]) -> None:
    """The terms of a YAML entry are the formula's, in value and in the gradient of their weighted sum."""
    composite, model = parse_objectives([entry]), Model(seed)
    ((value, weight),) = composite(
        model.answer(composite, batch := batch_of(texts, padding=2)), batch
    ).values()
    wanted = torch.stack(reference(model, texts))
    torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(weight, torch.tensor(weights, dtype=weight.dtype))
    total = (wanted * torch.tensor(weights)).sum()
    for ours, theirs in zip(model.gradients((value * weight).sum()), model.gradients(total), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def assert_partition(entry: Any, texts: list[Text], seed: int) -> None:
    """Law 1: units in other orders and other micro-batches, with padding, give the same loss and gradient."""
    composite, model = parse_objectives([entry]), Model(seed)
    random = np.random.default_rng(seed)
    units = sorted({text.unit for text in texts})

    def results(micro_batches: list[list[int]], padding: int) -> list[Tensor]:
        batches = [
            batch_of([t for u in part for t in texts if t.unit == u], padding, texts)
            for part in micro_batches
        ]
        normaliser = normalise(composite, batches)
        shares = [normaliser.loss(composite(model.answer(composite, b), b), b).loss for b in batches]
        loss = torch.stack(shares).sum()
        return [loss.detach(), *model.gradients(loss)]

    shuffled = random.permutation(units).tolist()
    cut = int(random.integers(0, len(units) + 1))
    expected = results([units], 0)
    for ours, theirs in zip(results([shuffled[:cut], shuffled[cut:], []], 3), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def refuses(entry: Any, texts: list[Text], match: str) -> None:
    """The objective refuses such data, in words."""
    composite = parse_objectives([entry])
    with pytest.raises(Exception, match=match):
        normalise(composite, [batch_of(texts)])
