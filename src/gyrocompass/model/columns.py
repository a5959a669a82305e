"""What a model says of a dataset, as a number for each of its tokens: the columns that objectives read.

    model, dataset --score_tokens---> log-probability and entropy of every counted token
    model, dataset --score_logprobs-> the log-probabilities alone: a reference's column
    model, dataset --score_values---> what its scalar head says before every token: a value, a reward
    model, dataset --score_rewards--> what its scalar head says at the end of each document: a reward

Each is [N] in float32, NaN where nothing is counted, and comes without gradients from the model in evaluation
mode.

Shape legend: N tokens of a dataset, D documents, T positions of a batch, K counted tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.head import hidden_states
from gyrocompass.model.scalar_head import scalars
from gyrocompass.model.score import batches_of, evaluating, precision, scored_tokens

FloatArray = NDArray[np.float32]


class TokenColumns(NamedTuple):
    """What a model says of a dataset's tokens, [N] each; NaN where nothing is counted."""

    logprob_N: FloatArray
    entropy_N: FloatArray


def score_tokens(
    model: nn.Module,
    length: int,
    rows: int,
    dataset: TokenDataset,
    *,
    autocast: bool = False,
    on_tokens: Callable[[int], Any] | None = None,
) -> TokenColumns:
    """What a model says of a dataset's counted tokens.

    Args:
        model: as for `log_probs`.
        length: tokens in a row; see `score`'s rule about long documents.
        rows: rows in a batch.
        dataset: what to score.
        autocast: compute as bf16 autocast does in training, whatever the weights' dtype.
        on_tokens: called with the number of counted tokens after each batch.
    """
    logprob_N, entropy_N = (np.full(dataset.n_tokens, np.nan, np.float32) for _ in range(2))
    with evaluating(model):
        for part in scored_tokens(model, dataset, length, rows, autocast=autocast):
            logprob_N[part.index_K], entropy_N[part.index_K] = part.logprob_K, part.entropy_K
            if on_tokens is not None:
                on_tokens(len(part.index_K))
    return TokenColumns(logprob_N, entropy_N)


def score_logprobs(
    model: nn.Module,
    length: int,
    rows: int,
    dataset: TokenDataset,
    *,
    autocast: bool = False,
    on_tokens: Callable[[int], Any] | None = None,
) -> FloatArray:
    """The log-probabilities alone; arguments as for `score_tokens`."""
    return score_tokens(model, length, rows, dataset, autocast=autocast, on_tokens=on_tokens).logprob_N


def score_values(
    model: nn.Module, length: int, rows: int, dataset: TokenDataset, *, autocast: bool = False
) -> FloatArray:
    """What the scalar head says where each token is about to be chosen; arguments as for `score_tokens`."""
    value_N = np.full(dataset.n_tokens, np.nan, np.float32)
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), precision(device, autocast):
        for batch, index_T in batches_of(dataset, length, rows, device=device):
            value_T = scalars(model, hidden_states(model, batch)).cpu().numpy()
            value_N[index_T[index_T >= 0]] = value_T[index_T >= 0]
    return value_N


def score_rewards(
    model: nn.Module, length: int, rows: int, dataset: TokenDataset, *, autocast: bool = False
) -> NDArray[np.float64]:
    """What the scalar head says at the last position of each document, [D], where `loss.reward` reads it."""
    value_N = score_values(model, length, rows, dataset, autocast=autocast)
    return value_N[dataset.offset_D[1:] - 1].astype(np.float64)
