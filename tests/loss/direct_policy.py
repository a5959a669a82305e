"""Rollouts and the formulas of reinforcement learning on them, one token after the other in float64.

Shape legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from direct_signal import make_batch
from torch import Tensor

from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.objective import Composite
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, TokenLogProbs

WIDTH, VOCABULARY = 4, 7
COLUMNS = ("advantage", "rollout_logprob", "reference_logprob", "return", "value", "truncated")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model:
    """A learner with a value head: hidden states of each position, and two heads."""

    def __init__(self, n_tokens: int, seed: int) -> None:
        self.h_TD, self.w_VD = randn(n_tokens, WIDTH, seed=seed), randn(VOCABULARY, WIDTH, seed=seed + 1)
        self.value_D = randn(WIDTH, seed=seed + 2)
        for parameter in self.parameters:
            parameter.requires_grad_()

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.h_TD, self.w_VD, self.value_D

    def answer(self, composite: Composite, batch: Batch, index_T: Tensor | None = None) -> TokenLogProbs:
        """Ours, of the positions of an index (-1: padding)."""
        index_T = torch.arange(len(self.h_TD)) if index_T is None else index_T
        h_TD = torch.cat([self.h_TD, self.h_TD.new_zeros(1, WIDTH)])[index_T]
        wants = [want for want in composite.wants if want != "scalar"]
        answer = token_logprobs(h_TD, self.w_VD, batch.target_T, want=wants)
        return answer._replace(scalar_T=h_TD @ self.value_D if "scalar" in composite.wants else None)

    def logprob_T(self, batch: Batch) -> Tensor:
        log_p_TV = torch.log_softmax(self.h_TD @ self.w_VD.T, 1)
        return log_p_TV.gather(1, batch.target_T.clamp(min=0)[:, None])[:, 0]


def rollouts(n_tokens: int, seed: int, *, ignored_share: float = 0.3, spread: float = 0.4) -> Batch:
    """A batch with every column; a quarter of the answers truncated, log-probabilities near the learner's."""
    batch = make_batch(n_tokens, VOCABULARY, seed, ignored_share=ignored_share)
    own_T = Model(n_tokens, seed).logprob_T(batch).detach()
    noise = randn(6, n_tokens + 1, seed=seed + 9)
    advantage_T = noise[0, batch.document_T] + noise[5, :n_tokens] / 4
    noise = noise[:, :n_tokens]
    columns = {
        "advantage": advantage_T,
        "rollout_logprob": own_T + spread * noise[1],
        "reference_logprob": own_T + noise[2],
        "return": noise[3],
        "value": noise[4] / 4,
        "truncated": (batch.document_T % 4 == 3).double(),
    }
    outside_T = batch.target_T == IGNORE_INDEX
    tokenwise = {"rollout_logprob", "reference_logprob", "return", "value"}
    return dataclasses.replace(
        batch,
        columns={
            name: column.masked_fill(outside_T, math.nan) if name in tokenwise else column
            for name, column in columns.items()
        },
    )


def taken(batch: Batch, index_T: Tensor) -> Batch:
    """The positions of an index, in its order; -1 is padding."""
    fillers = {"target_T": IGNORE_INDEX, "weight_T": 0, "byte_T": 0, "token_T": 0, "position_T": 0}

    def rows(values_T: Tensor, filler: float) -> Tensor:
        return torch.cat([values_T, values_T.new_full((1,), filler)])[index_T]

    names = {field.name for field in dataclasses.fields(batch)} - {"length", "columns"}
    changed: dict[str, Any] = {name: rows(getattr(batch, name), fillers.get(name, -1)) for name in names}
    columns = {name: rows(column, math.nan) for name, column in batch.columns.items()}
    return dataclasses.replace(batch, length=max(len(index_T), 1), columns=columns, **changed)


@dataclasses.dataclass
class Rollout:
    """What a formula reads at a token: log pi with its gradient, and plain numbers."""

    log_pi: Tensor
    entropy: float
    scalar: Tensor
    answer: list[Rollout]
    """All counted tokens of its answer, itself included."""
    window: list[Rollout]
    advantage: float
    log_mu: float
    log_ref: float
    returned: float
    old_value: float

    @property
    def ratio(self) -> Tensor:
        return (self.log_pi - self.log_mu).exp()

    @property
    def gaps(self) -> list[Tensor]:
        """log pi - log mu over its answer."""
        return [token.log_pi - token.log_mu for token in self.answer]


Formula = Callable[[Rollout], Tensor]


def read(model: Model, batch: Batch, *, skip_truncated: bool = False) -> Iterator[tuple[int, Rollout]]:
    """Each counted token with its position, from the definitions on full logits."""
    log_p_TV = torch.log_softmax(model.h_TD @ model.w_VD.T, 1)
    window: list[Rollout] = []
    answers: dict[int, list[Rollout]] = {}
    found = []
    for t in range(len(batch.token_T)):
        if batch.weight_T[t] == 0 or (skip_truncated and batch.columns["truncated"][t] == 1):
            continue
        column = {name: float(batch.columns[name][t]) for name in COLUMNS}
        answer = answers.setdefault(int(batch.segment_T[t]), [])
        token = Rollout(
            log_pi=log_p_TV[t, batch.target_T[t]],
            entropy=-(log_p_TV[t].exp() * log_p_TV[t]).sum().item(),
            scalar=(model.h_TD[t] * model.value_D).sum(),
            answer=answer,
            window=window,
            advantage=column["advantage"],
            log_mu=column["rollout_logprob"],
            log_ref=column["reference_logprob"],
            returned=column["return"],
            old_value=column["value"],
        )
        answer.append(token)
        window.append(token)
        found.append((t, token))
    yield from found


# --- the formulas ---


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def policy_gradient(token: Rollout) -> Tensor:
    return -token.advantage * token.log_pi


def bounded(ratio: Tensor, advantage: float, low: float, high: float, dual: float = math.inf) -> Tensor:
    """The clipped surrogate by cases: up to 1 + high where it helps, from 1 - low where it hurts."""
    if advantage >= 0:
        return -advantage * (ratio if ratio < 1 + high else number(1 + high))
    return -advantage * (number(1 - low) if ratio < 1 - low else ratio if ratio < dual else number(dual))


def clipped(low: float, high: float, dual: float = math.inf) -> Formula:
    return lambda token: bounded(token.ratio, token.advantage, low, high, dual)


def of_sequence(low: float, high: float, *, tokenwise: bool = False, scaled: bool = False) -> Formula:
    def formula(token: Rollout) -> Tensor:
        length = len(token.answer)
        ratio = torch.stack(token.gaps).sum().div(length).exp()
        if tokenwise:
            ratio = ratio.detach() * token.log_pi.exp() / token.log_pi.exp().detach()
        return bounded(ratio, token.advantage, low, high) * (length if scaled else 1)

    return formula


def truncated_weight(low: float, high: float) -> Formula:
    return lambda token: policy_gradient(token) * min(max(token.ratio.item(), low), high)


def soft_gate(positive: float, negative: float) -> Formula:
    def formula(token: Rollout) -> Tensor:
        tau = positive if token.advantage > 0 else negative
        return -4 / tau / (1 + (-tau * (token.ratio - 1)).exp()) * token.advantage

    return formula


def gamma_weight(k: tuple[float, float], decay: tuple[float, float]) -> Formula:
    """(for a positive advantage, for a negative one)"""

    def formula(token: Rollout) -> Tensor:
        w = math.exp(sum(gap.item() for gap in token.gaps))
        side = int(token.advantage < 0)
        return policy_gradient(token) * w ** k[side] * math.exp(decay[side] * (1 - w))

    return formula


def corrected(level: str, beyond: str, low: float, high: float) -> Formula:
    """The policy gradient times a bounded pi / mu."""

    def formula(token: Rollout) -> Tensor:
        gaps = token.gaps if level == "sequence" else [token.log_pi - token.log_mu]
        w = math.exp(sum(gap.item() for gap in gaps))
        kept = min(max(w, low), high) if beyond == "truncate" else w * (low <= w <= high)
        return policy_gradient(token) * kept

    return formula


def on_policy_only(limit: float, formula: Formula) -> Formula:
    def limited(token: Rollout) -> Tensor:
        drift = -sum(gap.item() for gap in token.gaps) / len(token.answer)
        return formula(token) * (token.advantage >= 0 or drift <= limit)

    return limited


def undecided_only(share: float, formula: Formula) -> Formula:
    def limited(token: Rollout) -> Tensor:
        ordered = sorted(other.entropy for other in token.window)
        place = (1 - share) * (len(ordered) - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        threshold = below + (above - below) * (place - math.floor(place))
        return formula(token) * (token.entropy >= threshold - 1e-12)

    return limited


def squared_error(clip: float | None) -> Formula:
    def formula(token: Rollout) -> Tensor:
        plain = (token.scalar - token.returned) ** 2 / 2
        if clip is None:
            return plain
        near = min(max(token.scalar, number(token.old_value - clip)), number(token.old_value + clip))
        return max(plain, (near - token.returned) ** 2 / 2)

    return formula


def estimated(estimator: str, weighted: str) -> Formula:
    def formula(token: Rollout) -> Tensor:
        ratio = token.log_pi.exp() / number(token.log_ref).exp()
        value = {"k1": ratio.log(), "k2": ratio.log() ** 2 / 2, "k3": 1 / ratio - 1 + ratio.log()}[estimator]
        of_pi = {
            "no": 1.0,
            "current": token.log_pi.exp() / token.log_pi.exp().detach(),
            "rollout": token.ratio,
        }
        return value * of_pi[weighted]

    return formula
