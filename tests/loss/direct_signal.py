"""The primitive again, written from its definition on full float64 logits: what every backend is held to.

Shape legend: T tokens, N counted tokens, D hidden width, V vocabulary, C candidates per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from torch import Tensor

from gyrocompass.loss import _tiles
from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._question import LogitRule, Logits
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, TokenLogProbs

ANSWERERS = ("reference", *BACKENDS)
"""Whatever can be asked for by name."""


def dtype_of(answerer: str) -> torch.dtype:
    """The widest dtype that a backend takes: where it is asked for small differences."""
    return torch.float64 if answerer in ("reference", "chunked") else torch.float32


def skip_if_refused(answerer: str, h_TD: Tensor, w_VD: Tensor) -> None:
    """Skip where the machine, or the backend, does not take these dtypes."""
    if answerer != "reference":
        refusal = BACKENDS[answerer].refusal(Logits(h_TD, w_VD, None, None, None, LogitRule()))
        if refusal is not None:
            pytest.skip(refusal)


@dataclass
class Case:
    """One call of the primitive."""

    h_TD: Tensor
    w_VD: Tensor
    target_T: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    candidate_TC: Tensor | None = None
    want: tuple[str, ...] = ("entropy", "mean_logit", "sum_sq", "rank")
    inputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = [tensor for tensor in (self.h_TD, self.w_VD, self.bias_V) if tensor is not None]
        for tensor in self.inputs:
            tensor.requires_grad_()

    def run(self, backend: str) -> TokenLogProbs:
        skip_if_refused(backend, self.h_TD, self.w_VD)
        return token_logprobs(
            self.h_TD,
            self.w_VD,
            self.target_T,
            bias_V=self.bias_V,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            temperature=self.temperature,
            want=self.want,
            candidate_TC=self.candidate_TC,
            backend=backend,
        )

    def direct(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Every output in float64, and the float64 copies of the inputs they depend on."""
        copies = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
        logits_TV = (copies[0] @ copies[1].T) * self.logit_scale
        outside_V = torch.zeros(len(self.w_VD), dtype=torch.bool)
        if self.bias_V is not None:
            outside_V = self.bias_V.detach() == -torch.inf
            logits_TV = logits_TV + torch.where(outside_V, 0.0, copies[2]) * self.logit_scale
        if self.softcap is not None:
            logits_TV = torch.tanh(logits_TV / self.softcap) * self.softcap
        return direct_outputs(
            logits_TV / self.temperature, outside_V, self.target_T, self.candidate_TC
        ), copies


def direct_outputs(
    logits_TV: Tensor, outside_V: Tensor, target_T: Tensor, candidate_TC: Tensor | None
) -> dict[str, Tensor]:
    """The definitions, token by token sums over the vocabulary that is left."""
    inside_TW = logits_TV[:, ~outside_V]
    lse_T = torch.logsumexp(inside_TW, 1)
    p_TW = torch.softmax(inside_TW, 1)
    log_p_TV = torch.where(outside_V, -torch.inf, logits_TV - lse_T[:, None])
    counted_T = target_T != IGNORE_INDEX
    own_T1 = target_T.clamp(min=0)[:, None]
    outputs = {
        "logprob_T": log_p_TV.gather(1, own_T1)[:, 0],
        "lse_T": lse_T,
        "entropy_T": -(p_TW * torch.log_softmax(inside_TW, 1)).sum(1),
        "mean_logit_T": inside_TW.mean(1),
        "sum_sq_T": (p_TW**2).sum(1),
        "rank_T": (log_p_TV > log_p_TV.gather(1, own_T1)).sum(1),
    }
    if candidate_TC is not None:
        picked_TC = log_p_TV.gather(1, candidate_TC.clamp(min=0))
        outputs["candidate_TC"] = torch.where(candidate_TC == IGNORE_INDEX, 0.0, picked_TC)
    return {
        name: torch.where(counted_T if value.dim() == 1 else counted_T[:, None], value, 0)
        for name, value in outputs.items()
    }


@contextmanager
def tile_sizes(tokens: int, elements: int) -> Iterator[None]:
    """Cut tiles to a size, so that small cases have several."""
    with mock.patch.multiple(_tiles, TILE_TOKENS=tokens, TILE_ELEMENTS=elements):
        yield


def make_batch(n_tokens: int, vocabulary: int, seed: int, *, ignored_share: float = 0.3) -> Batch:
    """A random packed batch: documents of a few tokens, some positions not counted, weights that differ."""
    generator = torch.Generator().manual_seed(seed)
    token_T = torch.randint(vocabulary, (n_tokens,), generator=generator)
    target_T = torch.randint(vocabulary, (n_tokens,), generator=generator)
    starts_T = torch.rand(n_tokens, generator=generator) < 0.2
    document_T = starts_T.long().cumsum(0)
    weight_T = 0.5 + torch.rand(n_tokens, generator=generator)
    ignored_T = torch.rand(n_tokens, generator=generator) < ignored_share
    return Batch(
        token_T=token_T,
        target_T=target_T.masked_fill(ignored_T, IGNORE_INDEX),
        position_T=torch.arange(n_tokens),
        segment_T=document_T,
        document_T=document_T,
        slice_T=document_T % 3,
        source_T=document_T % 2,
        weight_T=weight_T.masked_fill(ignored_T, 0.0),
        byte_T=torch.ones(n_tokens, dtype=torch.int64),
        unit_T=document_T,
        length=max(n_tokens, 1),
    )
