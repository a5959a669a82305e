"""Windows of whole answers, generated, and read again by plain loops over full float64 logits.

Shape legend: T tokens, D hidden width, V vocabulary, N counted tokens of one answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.objective import Composite, parse_objectives
from gyrocompass.loss.reduce import Normaliser, normalise
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, TokenLogProbs

WIDTH, VOCABULARY = 4, 7

Labels = Callable[[int, int], dict[str, float]]
"""(unit, side) -> the labels of that answer."""


class Answer(NamedTuple):
    """One sequence as the formulas of papers see it."""

    logprob_N: Tensor
    reference_N: Tensor
    p_NV: Tensor
    scalar_T: Tensor
    """The scalar head at each position of the sequence, prompt included."""
    weight: float
    label: dict[str, float]

    @property
    def ratio(self) -> Tensor:
        return (self.logprob_N - self.reference_N).sum()


class Window(NamedTuple):
    """Answers packed into one batch, and the hidden states and heads that score them."""

    batch: Batch
    h_TD: Tensor
    w_VD: Tensor
    scalar_D: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.h_TD, self.w_VD, self.scalar_D]

    def log_probs(self, composite: Composite, index_T: Tensor | None = None) -> TokenLogProbs:
        """What the model answers, for the whole window or for the positions of an index (-1 is padding)."""
        batch = self.batch if index_T is None else take(self.batch, index_T)
        h_TD = self.h_TD if index_T is None else _taken(self.h_TD, index_T, 0.0)
        answer = token_logprobs(h_TD, self.w_VD, batch.target_T, want=composite.wants - {"scalar"})
        return answer._replace(scalar_T=h_TD @ self.scalar_D)

    def answers(self) -> dict[tuple[int, int], Answer]:
        """By unit and side, from the definition: every segment by itself, every position in a loop."""
        found: dict[tuple[int, int], Answer] = {}
        batch = self.batch
        log_p_TV = torch.log_softmax(self.h_TD @ self.w_VD.T, dim=1)
        for segment in range(int(batch.segment_T.max()) + 1):
            own = [t for t in range(len(batch.token_T)) if batch.segment_T[t] == segment]
            counted = [t for t in own if batch.weight_T[t] > 0]
            label = {name: float(column[own[-1]]) for name, column in batch.columns.items()}
            found[int(batch.unit_T[own[0]]), int(label["side"])] = Answer(
                logprob_N=torch.stack([log_p_TV[t, batch.target_T[t]] for t in counted]),
                reference_N=batch.columns["reference_logprob"][counted],
                p_NV=log_p_TV[counted].exp(),
                scalar_T=torch.stack([self.h_TD[t] @ self.scalar_D for t in own]),
                weight=float(batch.weight_T[counted[0]]),
                label=label,
            )
        return found


def make_window(
    n_units: int,
    seed: int,
    *,
    sides: Sequence[int] = (1, 0),
    labels: Labels = lambda unit, side: {},
    weighted: bool = True,
    length: int | None = None,
) -> Window:
    """Units of answers: prompts that do not count, holes in the answers, weights by unit, padding at the end.

    Args:
        n_units: how many; each has one sequence for each of `sides`, in an order of its own.
        seed: of everything.
        sides: the labels `side` of a unit.
        labels: further labels of a sequence.
        weighted: whether units weigh differently.
        length: of every answer, without holes; else each has its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows: list[tuple[int, int, float, int, bool]] = []  # unit, side, weight, segment, counted
    segment = 0
    for unit in range(n_units):
        weight = 0.5 + float(torch.rand((), generator=generator)) if weighted else 1.0
        for place in torch.randperm(len(sides), generator=generator).tolist():
            rows += [(unit, sides[place], weight, segment, False)] * number(1, 2)
            n_tokens = length or number(1, 5)
            for token in range(n_tokens):
                counted = length is not None or token == n_tokens // 2 or number(0, 4) > 0
                rows.append((unit, sides[place], weight, segment, counted))
            segment += 1
    return _window(rows, labels, generator)


def _window(
    rows: Sequence[tuple[int, int, float, int, bool]], labels: Labels, generator: torch.Generator
) -> Window:
    padding = 2
    unit_T, segment_T = (
        torch.tensor([row[i] for row in rows] + [-1] * padding, dtype=torch.int64) for i in (0, 3)
    )
    T = len(rows) + padding
    counted_T = torch.tensor([row[4] for row in rows] + [False] * padding)
    weight_T = torch.tensor([row[2] for row in rows] + [0.0] * padding)
    token_T, target_T = (torch.randint(VOCABULARY, (T,), generator=generator) for _ in range(2))
    reference_T = -1.5 - torch.rand(T, generator=generator, dtype=torch.float64)  # near the policy
    named = [{"side": float(row[1]), **labels(row[0], row[1])} for row in rows]
    columns = {name: [label[name] for label in named] + [math.nan] * padding for name in named[0]}
    batch = Batch(
        token_T=token_T,
        target_T=target_T.masked_fill(~counted_T, IGNORE_INDEX),
        position_T=torch.arange(T),
        segment_T=segment_T,
        document_T=segment_T,
        slice_T=segment_T.clamp(max=0),
        source_T=segment_T.clamp(max=0),
        weight_T=weight_T.masked_fill(~counted_T, 0.0),
        byte_T=torch.ones(T, dtype=torch.int64),
        unit_T=unit_T,
        length=T,
        columns={
            "reference_logprob": reference_T.masked_fill(~counted_T, math.nan),
            **{name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()},
        },
    )
    shapes = ((T, WIDTH), (VOCABULARY, WIDTH), (WIDTH,))
    leaves = (0.6 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Window(batch, *(leaf.requires_grad_() for leaf in leaves))


def _taken(value_T: Tensor, index_T: Tensor, filler: float) -> Tensor:
    return torch.cat([value_T, value_T.new_full((1, *value_T.shape[1:]), filler)])[index_T]


def take(batch: Batch, index_T: Tensor) -> Batch:
    """The positions of an index, in its order, segments numbered anew; -1 is padding."""
    fillers = {"target_T": IGNORE_INDEX, "weight_T": 0, "byte_T": 0, "token_T": 0, "position_T": 0}
    fields = {field.name for field in dataclasses.fields(batch)} - {"length", "columns"}
    changed = {name: _taken(getattr(batch, name), index_T, fillers.get(name, -1)) for name in fields}
    segments = list(dict.fromkeys(changed["segment_T"].tolist()))
    numbers = {segment: n for n, segment in enumerate(s for s in segments if s >= 0)} | {-1: -1}
    changed["segment_T"] = torch.tensor([numbers[s] for s in changed["segment_T"].tolist()])
    columns = {name: _taken(column, index_T, math.nan) for name, column in batch.columns.items()}
    return dataclasses.replace(batch, length=len(index_T), columns=columns, **changed)


def split(batch: Batch, seed: int, parts: int) -> list[Tensor]:
    """Indices of micro-batches: units go anywhere, their segments too inside one, padding between them."""
    generator = torch.Generator().manual_seed(seed)
    n_units = int(batch.unit_T.max()) + 1
    part_U = torch.randint(parts, (n_units,), generator=generator)
    found: list[Tensor] = []
    for part in range(parts):
        segments = [
            int(segment)
            for unit in (part_U == part).nonzero().flatten().tolist()
            for segment in batch.segment_T[batch.unit_T == unit].unique()
        ]
        places = [torch.tensor([-1])]
        for n in torch.randperm(len(segments), generator=generator).tolist():
            places += [(batch.segment_T == segments[n]).nonzero().flatten(), torch.tensor([-1])]
        found.append(torch.cat(places))
    return found


def assert_terms(
    entry: dict[str, dict[str, Any]], window: Window, expected: Sequence[tuple[Tensor, float]]
) -> None:
    """The terms of a YAML entry are these values and weights, and the gradients of their weighted sum."""
    (name,) = entry
    composite = parse_objectives([entry])
    value, weight = composite(window.log_probs(composite), window.batch)[name]
    assert value.dtype == torch.float64
    wanted = torch.stack([term for term, _ in expected])
    torch.testing.assert_close(weight.double(), torch.tensor([w for _, w in expected], dtype=torch.float64))
    torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-10)
    assert_gradients((value * weight).sum(), (wanted * weight).sum(), window, rtol=1e-8)


def assert_gradients(actual: Tensor, wanted: Tensor, window: Window, rtol: float) -> None:
    """Two scalars of one window have the same gradients."""
    gradients = (
        torch.autograd.grad(scalar, window.leaves, allow_unused=True, materialize_grads=True)
        for scalar in (actual, wanted)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-10)


def assert_law_1(entries: list[Any], window: Window, indices: Sequence[Tensor]) -> None:
    """The loss and its gradients are the same, the window whole or cut into these micro-batches."""
    composite = parse_objectives(entries)
    whole = normalise(composite, [window.batch])
    batches = [take(window.batch, index_T) for index_T in indices]
    pieces = normalise(composite, batches)
    loss = _loss(whole, window, composite, window.batch, None)
    shares = [_loss(pieces, window, composite, batch, i) for batch, i in zip(batches, indices, strict=True)]
    torch.testing.assert_close(torch.stack(shares).sum(), loss, rtol=1e-10, atol=1e-12)
    assert_gradients(torch.stack(shares).sum(), loss, window, rtol=1e-9)


def assert_two_passes(entries: list[Any], window: Window, indices: Sequence[Tensor]) -> None:
    """Law 1 for what judges by the whole window, as a split window is trained on: the answers of all
    micro-batches give the loss, whose slopes each micro-batch then sends through the model."""
    composite = parse_objectives(entries)
    loss = _loss(normalise(composite, [window.batch]), window, composite, window.batch, None)
    joined_T = torch.cat(list(indices))
    joined = take(window.batch, joined_T)
    parts = [window.log_probs(composite, index_T).logprob_T for index_T in indices]
    seen_T = torch.cat(parts).detach().requires_grad_()
    answer = window.log_probs(composite, joined_T)._replace(logprob_T=seen_T)
    again = normalise(composite, [joined]).loss(composite(answer, joined), joined).loss
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=1e-12)
    (slope_T,) = torch.autograd.grad(again, seen_T)
    assert_gradients((torch.cat(parts) * slope_T).sum(), loss, window, rtol=1e-9)


def _loss(
    normaliser: Normaliser, window: Window, composite: Composite, batch: Batch, index_T: Tensor | None
) -> Tensor:
    return normaliser.loss(composite(window.log_probs(composite, index_T), batch), batch).loss
