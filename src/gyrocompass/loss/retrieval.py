"""Retrieval-augmented likelihood: one answer, read after each of several passages.

A unit is a question with its retrieved passages: each passage d is a sequence of its own, the passage and the
question as context and the same answer y_1 ... y_n as what counts. With log p_d the retriever's and lp_dt the
model's log p(y_t | d, question, y_<t),

    rag_sequence   -log sum_d exp(log p_d + sum_t lp_dt)        one passage gave the whole answer
    rag_token      -log sum_d exp(log p_d + lp_dt), each t      every token may come from another passage
    replug_lsr     KL(p || Q),  Q_d = softmax_d(sum_t lp_dt)    a retriever that finds what helped

The two RAG losses differ (the sum over t is inside or outside the logarithm), and both are nll if there is
one passage. p_d is a distribution over the retrieved passages: scores of the label `retriever_logprob`, less
their logsumexp over the unit. That changes a log-probability over a whole corpus by a constant per unit.

The tokens of the answer are aligned by their order among the counted tokens of each sequence, so their number
and the tokens have to be the same; weights only say what counts, and how much the unit does.

Left out: the retriever and its index, gradients to `p_d` in the RAG losses, and decoding.

Shape legend: T positions, S sequences (passages), G groups (questions), A answer tokens of all questions,
N counted tokens of all passages.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.groups import Groups, logsumexp_by
from gyrocompass.loss.registry import objective
from gyrocompass.loss.sequences import Sequences
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, Terms, TokenLogProbs


@objective()
def rag_sequence(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Marginal likelihood of the whole answer, a passage being chosen once.

        value_g = -log sum_d exp(log p_d + sum_t lp_dt)

    Args:
        log_probs: any.
        batch: with the label `retriever_logprob`.

    Returns:
        Terms [G] in nats, one per question, with the largest weight of its tokens; not divided by length.

    Raises:
        BadInput: no such label, or passages of a question with different answers.

    Source: Lewis et al. 2020, arXiv:2005.11401, section 2.1.
    """
    groups = Groups(Sequences(batch))
    _answers(groups)
    log_p_S = groups.log_softmax(groups.sequences.label("retriever_logprob").to(log_probs.logprob_T.dtype))
    return Terms(-groups.logsumexp(log_p_S + groups.sequences.sum(log_probs.logprob_T)), groups.weight_G)


@objective()
def rag_token(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Marginal likelihood of each token of the answer, a passage being chosen for each.

        value_t = -log sum_d exp(log p_d + lp_dt)

    It is also the likelihood of REPLUG's ensemble, which mixes the passages' next-token distributions.

    Args:
        log_probs: any.
        batch: with the label `retriever_logprob`.

    Returns:
        Terms [A] in nats, one per token of an answer, with the largest weight that it has in a passage:
        summed over its tokens, the published loss of a question; by token, a mean like that of `nll`.

    Raises:
        BadInput: no such label, or passages of a question with different answers.

    Source: Lewis et al. 2020, arXiv:2005.11401, section 2.1; Shi et al. 2023, arXiv:2301.12652 (REPLUG).
    """
    groups = Groups(Sequences(batch))
    sequences = groups.sequences
    place_N, answer_N, n_answers = _answers(groups)
    log_p_S = groups.log_softmax(sequences.label("retriever_logprob").to(log_probs.logprob_T.dtype))
    joint_N = log_p_S[sequences.sequence_T[place_N]] + log_probs.logprob_T.index_select(0, place_N)
    weight_N = batch.weight_T[place_N]
    weight_A = weight_N.new_zeros(n_answers).scatter_reduce(0, answer_N, weight_N, "amax")
    return Terms(-logsumexp_by(joint_N, answer_N, n_answers), weight_A)


@objective(wants=("scalar",))
def replug_lsr(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    temperature: PositiveFloat = 0.1,
    lm_temperature: PositiveFloat = 0.1,
    length_normalised: bool = False,
) -> Terms:
    """Trains a retriever on what a frozen language model could use (LM-supervised retrieval).

        P_d = softmax_d(r_d / temperature)        Q_d = softmax_d(sum_t lp_dt / lm_temperature)
        value_g = KL(P || Q) = sum_d P_d (log P_d - log Q_d)

    The retriever is the model that is trained: r_d is its scalar head's number where the answer is about to
    begin, the position that has read passage and question and none of the answer. The language model is
    frozen: its lp_dt stand in the column `reference_logprob`.

    Args:
        log_probs: with scalar_T.
        batch: with the column `reference_logprob`.
        temperature: gamma of the paper.
        lm_temperature: beta of the paper.
        length_normalised: the mean over the answer's tokens in the place of the sum.

    Returns:
        Terms [G] in nats, one per question; 0 where both distributions agree, as with a single passage.

    Raises:
        BadInput: no such column, or passages of a question with different answers.

    Source: Shi et al. 2023, arXiv:2301.12652, section 4.
    """
    assert log_probs.scalar_T is not None
    groups = Groups(Sequences(batch))
    sequences = groups.sequences
    _answers(groups)
    score_S = log_probs.scalar_T.index_select(0, _first_counted(sequences))
    reference_T = batch.column("reference_logprob", sequences.counted_T).to(score_S.dtype)
    likelihood_S = sequences.sum(reference_T)
    if length_normalised:
        likelihood_S = likelihood_S / sequences.length_S.to(score_S.dtype)
    log_p_S = groups.log_softmax(score_S / temperature)
    log_q_S = groups.log_softmax(likelihood_S / lm_temperature)
    return Terms(groups.sum(log_p_S.exp() * (log_p_S - log_q_S)), groups.weight_G)


def _first_counted(sequences: Sequences) -> Tensor:
    """int64: the position of each sequence that predicts its first counted token, and has read none, [S]."""
    place_N = sequences.counted_T.nonzero().squeeze(1)
    none_S = place_N.new_full((len(sequences),), len(sequences.sequence_T))
    return none_S.scatter_reduce(0, sequences.sequence_T[place_N], place_N, "amin")


def _answers(groups: Groups) -> tuple[Tensor, Tensor, int]:
    """The counted positions [N], the answer token that each predicts [N], and how many there are, A.

    Raises:
        BadInput: passages of one question with different answers.
    """
    sequences, batch = groups.sequences, groups.sequences.batch
    place_N = (sequences.counted_T & (sequences.sequence_T >= 0)).nonzero().squeeze(1)
    sequence_N = sequences.sequence_T[place_N]
    length_S = torch.bincount(sequence_N, minlength=len(sequences))
    begin_S = length_S.cumsum(0) - length_S  # positions of a segment stand together
    nth_N = torch.arange(len(place_N), device=place_N.device) - begin_S[sequence_N]
    longest_G = length_S.new_zeros(len(groups)).scatter_reduce(0, groups.group_S, length_S, "amax")
    group_N = groups.group_S[sequence_N]
    answer_N = (longest_G.cumsum(0) - longest_G)[group_N] + nth_N
    n_answers = int(longest_G.sum())
    target_A = place_N.new_full((n_answers,), IGNORE_INDEX)
    target_A = target_A.scatter_reduce(0, answer_N, batch.target_T[place_N], "amax")
    differs_N = (target_A[answer_N] != batch.target_T[place_N]) | (length_S < longest_G[groups.group_S])[
        sequence_N
    ]
    if differs_N.any():
        unit = int(batch.unit_T[place_N[differs_N.nonzero()[0]]])
        raise BadInput(
            f"the passages of unit number {unit} do not have the same answer",
            fix="give each passage of a question as a record with the same completion, under one unit",
        )
    return place_N, answer_N, n_answers
