"""What a teacher says of a dataset, kept in it: its likeliest tokens at each counted position.

    model, dataset --with_teacher--> dataset with the columns teacher_token/0.., teacher_logprob/0..

A student then learns from them with `distillation_top_k`, without the teacher in memory. A position costs
2 k numbers, of 4 bytes each. Log-probabilities are those of the whole distribution, so that what the
k tokens leave to all others is known too.

Shape legend: T tokens of a batch, N tokens of a dataset, K counted tokens of a batch, k tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.head import find_head
from gyrocompass.model.score import batches_of, evaluating, log_probs, precision


def with_teacher(
    dataset: TokenDataset,
    teacher: nn.Module,
    *,
    k: int,
    length: int,
    rows: int = 8,
    autocast: bool = False,
    on_tokens: Callable[[int], Any] | None = None,
) -> TokenDataset:
    """The dataset with a teacher's k likeliest tokens at each counted position.

    Args:
        dataset: what the student will read.
        teacher: as for `log_probs`, over the student's vocabulary.
        k: how many tokens; the more, the less is left to the tail.
        length: as in the student's training, so that both see the same context; see `score`'s rule.
        rows: rows in a batch.
        autocast: as for `score_dataset`.
        on_tokens: called with the number of counted tokens after each batch.

    Returns:
        The dataset with 2 k columns more, NaN where a token is not counted.

    Raises:
        BadInput: the teacher's vocabulary has not that many tokens.
    """
    vocabulary = len(find_head(teacher).w_VD)
    if not 0 < k < vocabulary:
        raise BadInput(f"k is {k}; it must be above 0 and below the {vocabulary} tokens of the vocabulary")
    token_kN, logprob_kN = (np.full((k, dataset.n_tokens), np.nan, np.float32) for _ in range(2))
    device = next(teacher.parameters()).device
    with evaluating(teacher), torch.no_grad(), precision(device, autocast):
        for batch, index_T in batches_of(dataset, length, rows, device=device):
            answer = log_probs(teacher, batch, want=(), n_top=k)
            assert answer.top_TK is not None and answer.top_token_TK is not None, "both were asked for"
            counted_T = batch.weight_T > 0
            index_K = index_T[counted_T.cpu().numpy()]
            token_kN[:, index_K] = answer.top_token_TK[counted_T].T.cpu().numpy()
            logprob_kN[:, index_K] = answer.top_TK[counted_T].T.cpu().numpy()
            if on_tokens is not None:
                on_tokens(len(index_K))
    for nth in range(k):
        dataset = dataset.with_column(f"teacher_token/{nth}", token_kN[nth])
        dataset = dataset.with_column(f"teacher_logprob/{nth}", logprob_kN[nth])
    return dataset
