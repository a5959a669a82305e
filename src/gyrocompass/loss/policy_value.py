"""The loss of a value head: what it expects of each state against what came of it.

Shape legend: T positions.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat

from gyrocompass.loss.importance import complete
from gyrocompass.loss.registry import objective
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs


@objective(wants=("scalar",), separable=True)
def value_loss(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    clip: PositiveFloat | None = 0.2,
    skip_truncated: bool = False,
) -> Terms:
    """Teaches a value head what a state returned: half the squared error, with PPO's clip.

        value_t = 1/2 max((V_t - R_t)^2, (v_t + clip(V_t - v_t, -c, c) - R_t)^2)

    The clip stops the gradient where V has moved more than c from the old value v, unless it moved away
    from R. The factor 1/2 is that of common code; the paper has none.

    Args:
        log_probs: with scalar_T, V: what the head says where token t is about to be chosen.
        batch: with `return`, R, and `value`, v, if there is a clip.
        clip: c, in the unit of the return; None: no clip.
        skip_truncated: sequences that were cut off have no weight.

    Returns:
        Terms [T] in the unit of the return, squared.

    Raises:
        BadInput: a column that is read is missing.

    Source: Schulman et al. 2017, arXiv:1707.06347; the clip, Engstrom et al. 2020, arXiv:2005.12729.
    """
    assert log_probs.scalar_T is not None
    batch = complete(batch, skip_truncated=skip_truncated)
    counted_T = batch.weight_T > 0
    scalar_T = log_probs.scalar_T.masked_fill(~counted_T, 0.0)
    return_T = batch.column("return", counted_T).to(scalar_T.dtype)
    error_T = (scalar_T - return_T).square()
    if clip is not None:
        value_T = batch.column("value", counted_T).to(scalar_T.dtype)
        near_T = value_T + (scalar_T - value_T).clamp(-clip, clip)
        error_T = torch.maximum(error_T, (near_T - return_T).square())
    return Terms(error_T / 2, batch.weight_T)
