"""Knowledge distillation: a student's next-token distribution is pulled to a teacher's, token by token.

With p the student's distribution at a counted position, q the teacher's, and a divergence of
`gyrocompass.loss.divergence`,

    distillation        value_t = tau^2 * divergence(p^(1/tau), q^(1/tau))    a teacher asked live
    distillation_top_k  value_t = divergence on k + 1 outcomes                its k likeliest tokens, as data

On-policy distillation is the same objective on other data: `distillation: {kind: reverse_kl}` on rollouts,
the student's own samples (a mixture of rollouts and of texts is GKD's lambda). Its gradient is that of the
divergence at each position of the sample; how the sample came to be gets none, as in GKD. The other reading,
reverse KL as a reward per token, log q(y_t) - log p(y_t) of the sampled token alone, is a policy objective
with that advantage. `distillation_top_k` serves texts that do not change, since its columns belong to them.

A teacher is compared token by token, so both have one tokenizer. Left out: teachers of another vocabulary,
hidden states and attention maps as targets, and sequence-level distillation, which is `nll` on what the
teacher wrote.

Shape legend: T positions, K tokens known of the teacher.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss._two_heads import Measure
from gyrocompass.loss.divergence import divergence_on_top
from gyrocompass.loss.registry import objective
from gyrocompass.loss.signal import (
    COLUMN_SOURCES,
    IGNORE_INDEX,
    Batch,
    Divergence,
    Kind,
    Terms,
    TokenLogProbs,
)

Mixed = Annotated[float, Field(gt=0.0, lt=1.0)]


def _asked(*, kind: Kind, beta: float, temperature: float) -> Divergence:
    return Divergence(kind, beta, temperature)


@objective(divergence=_asked)  # separable, but alone it would pay for a gradient of logprob_T that is none
def distillation(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    kind: Kind = "forward_kl",
    beta: Mixed = 0.5,
    temperature: PositiveFloat = 1.0,
) -> Terms:
    """A divergence from a live teacher over the whole vocabulary.

        forward_kl = sum_v q log(q / p)        M = (1 - beta) p + beta q
        reverse_kl = sum_v p log(p / q)        jsd = beta KL(q || M) + (1 - beta) KL(p || M)
        total_variation = 1/2 sum_v |p - q|    value_t = temperature^2 * that of the logits / temperature

    The factor temperature^2 keeps the gradient's size as the temperature grows (Hinton); at 1, the default,
    the value is the divergence itself. Trainers that leave the factor out have 1 / temperature^2 of it.

    Args:
        log_probs: with the divergence in divergence_TK[:, 0].
        batch: weights are its own.
        kind: forward KL covers what the teacher does, reverse KL seeks what it does most.
        beta: the teacher's share of M in `jsd`, which alone reads it.
        temperature: of both distributions.

    Returns:
        Terms [T] in nats.

    Source: Hinton et al. 2015, arXiv:1503.02531; Agarwal et al. 2024, arXiv:2306.13649 (GKD), equation 1.
    """
    assert log_probs.divergence_TK is not None
    return Terms(temperature**2 * log_probs.divergence_TK[:, 0], batch.weight_T)


def teacher_tokens(batch: Batch, *, kind: Kind = "forward_kl", beta: float = 0.5) -> Tensor:
    """The teacher's likeliest tokens where a position counts, from the columns `teacher_token/0`, `/1`, ...

    Columns are float32, which holds every integer up to 2^24: token ids pass through unchanged.

    Returns:
        int64 [T, K]; `IGNORE_INDEX` where a position does not count.

    Raises:
        BadInput: there are no such columns, a number is missing, is no token id, or stands twice at a
            position.
    """
    counted_T = batch.weight_T > 0
    named_TK = _columns(batch, "teacher_token", counted_T)
    token_TK = named_TK.long()
    ordered_TK = token_TK.sort(dim=1).values
    twice_T = (ordered_TK[:, 1:] == ordered_TK[:, :-1]).any(dim=1)
    for what, wrong_T in {
        "is no token id": ((named_TK != token_TK) | (named_TK < 0)).any(dim=1),
        "stands there twice": twice_T,
    }.items():
        if (wrong_T & counted_T).any():
            place = int((wrong_T & counted_T).nonzero()[0])
            raise BadInput(
                f"of the teacher's tokens {named_TK[place].tolist()} one {what}",
                where=f"document number {int(batch.document_T[place])}",
            )
    return token_TK.masked_fill(~counted_T[:, None], IGNORE_INDEX)


@objective(candidates=teacher_tokens, separable=True)
def distillation_top_k(
    log_probs: TokenLogProbs, batch: Batch, *, kind: Kind = "forward_kl", beta: Mixed = 0.5
) -> Terms:
    """A divergence from a teacher of which the k likeliest tokens stand in the data, with a tail.

        outcomes: the k tokens, and all others together:  q_tail = 1 - sum_k q_k,  p_tail = 1 - sum_k p_k

    It is never above the divergence over the whole vocabulary, and equal to it where p and q have the same
    shape within the tail. With the tail it is a divergence, zero only where the student has the teacher's
    probabilities; renormalising the k tokens instead would be blind to how much the student gives to others.

    Args:
        log_probs: with the candidates of `teacher_tokens`.
        batch: has the columns teacher_token/0 ... and teacher_logprob/0 ..., a log-probability under the
            teacher's whole distribution at temperature 1 for each token; weights are its own.
        kind: as for `distillation`.
        beta: as for `distillation`.

    Returns:
        Terms [T] in nats.

    Raises:
        BadInput: columns are missing, not as many of one kind as of the other, or hold probabilities that
            sum to more than 1.

    Source: Agarwal et al. 2024, arXiv:2306.13649, equation 1, on these outcomes.
    """
    assert log_probs.candidate_TC is not None
    counted_T = batch.weight_T > 0
    log_q_TK = _columns(batch, "teacher_logprob", counted_T)
    if log_q_TK.shape != log_probs.candidate_TC.shape:
        raise BadInput(
            f"there are {log_probs.candidate_TC.shape[1]} columns teacher_token/..., "
            f"and {log_q_TK.shape[1]} columns teacher_logprob/..."
        )
    over_T = counted_T & (log_q_TK.double().logsumexp(dim=1) > math.log1p(_OVER))
    if over_T.any():
        document = int(batch.document_T[over_T.nonzero()[0]])
        raise BadInput(
            "the teacher's probabilities at a position sum to more than 1",
            where=f"document number {document}",
            fix="keep them as log-probabilities of the whole distribution, in nats",
        )
    dtype = torch.promote_types(log_q_TK.dtype, log_probs.candidate_TC.dtype)
    log_p_TK = log_probs.candidate_TC.to(dtype)
    value_T = divergence_on_top(log_p_TK, log_q_TK.to(dtype), Measure(kind, beta))
    return Terms(value_T.masked_fill(~counted_T, 0.0), batch.weight_T)


_OVER = 1e-2
"""How far above 1 probabilities may sum: they may have been kept in few bits."""


def _columns(batch: Batch, name: str, counted_T: Tensor) -> Tensor:
    """The columns name/0, name/1, ... side by side, [T, K]; 0 where a position does not count."""
    numbered: list[Tensor] = []
    while f"{name}/{len(numbered)}" in batch.columns:
        numbered.append(batch.column(f"{name}/{len(numbered)}", counted_T))
    if not numbered:
        raise BadInput(f"the data has no column '{name}/0'", fix=COLUMN_SOURCES["teacher_token/0"])
    return torch.stack(numbered, dim=1)
