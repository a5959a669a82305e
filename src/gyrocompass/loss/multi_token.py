"""Multi-token prediction: each position also predicts the tokens after the next one.

    nll          -log p(y_t)                       the head of words
    multi_token  -sum_k log p_k(y_{t+k}),  k >= 1  future heads, an addition to nll

The heads are the model's (`gyrocompass.model.future_heads`); here is which token each is to predict, and the
loss. Left out: heads that read each other's tokens (DeepSeek-V3), and decoding with them.

Shape legend: T positions, K future heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyrocompass.loss.registry import objective
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, Terms, TokenLogProbs


def later_target(batch: Batch, steps: int) -> Tensor:
    """The target that stands `steps` positions on in the same segment, int64 [T].

    `IGNORE_INDEX` where there is none, where it does not count, and where the position itself does not.
    """
    later_T = torch.full_like(batch.target_T, IGNORE_INDEX)
    if steps < len(later_T):
        same_T = batch.segment_T[steps:] == batch.segment_T[: len(later_T) - steps]
        counts_T = batch.weight_T[: len(later_T) - steps] > 0
        later_T[: len(later_T) - steps] = batch.target_T[steps:].masked_fill(
            ~(same_T & counts_T), IGNORE_INDEX
        )
    return later_T


@objective(wants=("future",))
def multi_token(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Negative log-likelihood of the tokens after the next, each by a head of its own; an addition to `nll`.

        value_t = -sum_{k=1..K} log p_k(y_{t+k} | x_<=t)

    The sum with `nll` is the published loss; a factor such as 0.3 / K is the entry's `weight`. A token that
    is in another segment, or does not count, adds 0. The term has the weight of the position's own target.

    Args:
        log_probs: with future_TK.
        batch: weights are its own.

    Returns:
        Terms [T] in nats.

    Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2.
    """
    assert log_probs.future_TK is not None
    return Terms(-log_probs.future_TK.sum(dim=1), batch.weight_T)
