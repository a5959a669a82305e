"""Samples and their rewards as a dataset: rows of tokens with the columns that policy objectives read.

    Prompt, Answer --answer_row--> TokenRow      rollout_logprob, value; reward, truncated
    TokenDataset   --with_advantages--> advantage, and with a value head return

Left out: where the answers come from (`rollout.py`), and the formulas of advantages (`loss/advantages.py`).

Shape legend: S samples of a window, N tokens of its dataset, K of those the written ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from gyrocompass.core.config import Config
from gyrocompass.core.errors import GyroError
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.advantages import (
    generalised_advantages,
    group_advantages,
    leave_one_out,
    token_rewards,
)
from gyrocompass.measure.reward import Sample
from gyrocompass.model.columns import FloatArray
from gyrocompass.model.sampler import Sampled

Annotate = Callable[[TokenDataset], FloatArray]
"""A number for each token of a dataset, [N]: a reference's log-probabilities, a value head's values."""


class Prompt(NamedTuple):
    """What a sample goes on from, and what its reward is measured against."""

    id: str
    slice: str
    source: str
    text: str
    ids: tuple[int, ...]
    reference: Mapping[str, Any]
    """Fields of the record that rewards read: an answer, tests, a schema."""


class AdvantageConfig(Config):
    """How much better than expected a sample was.

    group: its reward less its group's mean (GRPO; `scale: group` divides by the group's deviation, as first
    published, and weighs hard and easy groups up). leave_one_out: less the mean of the others (RLOO). gae:
    token by token, by the value head (PPO). With `beta` above 0 the distance from the reference is taken off
    the reward: of the whole sample, or with gae of each token.
    """

    kind: Literal["group", "leave_one_out", "gae"] = "group"
    scale: Literal["none", "group", "batch"] = "none"
    beta: float = Field(default=0.0, ge=0)
    gamma: float = Field(default=1.0, ge=0, le=1)
    lambda_: float = Field(default=0.95, ge=0, le=1, alias="lambda")


class Answer(NamedTuple):
    """A sample with its reward, as JSON between ranks and in checkpoints."""

    prompt: int
    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    weights_step: int | None
    """The optimizer steps that the weights had taken which drew it; None: its engine does not say."""
    reward: float
    parts: dict[str, float]
    values: list[float]
    """What the value head said when it was sampled; empty without one."""


def as_sample(prompt: Prompt, sampled: Sampled, decode: Callable[[Sequence[int]], str]) -> Sample:
    """What was written after a prompt, as rewards take it."""
    return Sample(
        prompt=prompt.text,
        completion=decode(sampled.token_ids),
        reference=prompt.reference,
        n_tokens=len(sampled.token_ids),
        finished=sampled.finished,
        prompt_ids=prompt.ids,
        token_ids=sampled.token_ids,
    )


def sample_row(name: str, prompt: Prompt, token_ids: Sequence[int], **more: Any) -> TokenRow:
    """A prompt and what was written after it as a row of tokens, of which the written ones count."""
    n_prompt, n_written = len(prompt.ids), len(token_ids)
    return TokenRow(
        name,
        prompt.slice,
        prompt.source,
        [*prompt.ids, *token_ids],
        [0] * (n_prompt + n_written),
        [0.0] * n_prompt + [1.0] * n_written,
        unit=name,
        **more,
    )


def answer_row(name: str, prompt: Prompt, answer: Answer) -> TokenRow:
    """An answer with what its sampler and the value head said of each token, and its reward."""
    before = [float("nan")] * len(prompt.ids)
    return sample_row(
        name,
        prompt,
        answer.token_ids,
        columns={"rollout_logprob": [*before, *answer.logprobs]}
        | ({"value": [*before, *answer.values]} if answer.values else {}),
        labels={"reward": answer.reward, "truncated": float(not answer.finished)},
    )


def with_advantages(
    dataset: TokenDataset,
    answers: Sequence[Answer],
    samples_per_prompt: int,
    config: AdvantageConfig,
    reference: Annotate | None,
) -> TokenDataset:
    """The dataset of a window with the columns that depend on all of its samples.

    Args:
        dataset: a row per answer.
        answers: those of a prompt follow each other.
        samples_per_prompt: how many those are.
        config: which advantage.
        reference: its log-probabilities become a column; None: there is none.

    Raises:
        GyroError: a column that is read is not finite.
    """
    if reference is not None:
        dataset = dataset.with_column("reference_logprob", reference(dataset))
    reward_S = torch.tensor([answer.reward for answer in answers], dtype=torch.float64)
    said_N = np.flatnonzero(dataset.weight_N > 0)
    sequence_K = torch.from_numpy(np.searchsorted(dataset.offset_D, said_N, side="right") - 1)
    logprob_K = _column(dataset, "rollout_logprob", said_N)
    reference_K = logprob_K if reference is None else _column(dataset, "reference_logprob", said_N)
    if config.kind == "gae":
        reward_K = token_rewards(reward_S, sequence_K, logprob_K, reference_K, beta=config.beta)
        value_K = _column(dataset, "value", said_N)
        advantage_K, return_K = generalised_advantages(
            reward_K, value_K, sequence_K, gamma=config.gamma, lambda_=config.lambda_
        )
        dataset = dataset.with_column("return", _laid(dataset, said_N, return_K))
    else:
        distance_S = torch.zeros_like(reward_S).index_add(0, sequence_K, logprob_K - reference_K)
        group_S = groups(len(answers), samples_per_prompt)
        advantage_S = _group_advantages(reward_S - config.beta * distance_S, group_S, config)
        advantage_K = advantage_S[sequence_K]
    return dataset.with_column("advantage", _laid(dataset, said_N, advantage_K))


def groups(n_samples: int, samples_per_prompt: int) -> torch.Tensor:
    """The number of each sample's prompt among those of the window, [S]."""
    return torch.arange(n_samples) // samples_per_prompt


def _group_advantages(reward_S: torch.Tensor, group_S: torch.Tensor, config: AdvantageConfig) -> torch.Tensor:
    if config.kind == "leave_one_out":
        return leave_one_out(reward_S, group_S)
    return group_advantages(reward_S, group_S, scale=config.scale)


def _column(dataset: TokenDataset, name: str, at_K: NDArray[np.int64]) -> torch.Tensor:
    values_K = dataset.columns[name][at_K]
    if not np.isfinite(values_K).all():
        where = int(np.flatnonzero(~np.isfinite(values_K))[0])
        raise GyroError(
            f"the column {name} of a rollout is not finite",
            where=f"token {where} of {dataset.document_ids[0]} and what was sampled with it",
            fix="look at the weights: a NaN in them, or an overflow in a 16-bit dtype",
        )
    return torch.from_numpy(values_K.astype(np.float64))


def _laid(dataset: TokenDataset, at_K: NDArray[np.int64], values_K: torch.Tensor) -> FloatArray:
    values_N = np.full(dataset.n_tokens, np.nan, np.float32)
    values_N[at_K] = values_K.numpy()
    return values_N
