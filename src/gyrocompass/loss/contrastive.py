"""Objectives of comparison: which text belongs to which, and in which order a group's texts stand.

    infonce          embeddings of queries and of what answers them, each against all others of the window
    margin_ranking   the sequences of a unit, in the order of their label `relevance`: pairs with a margin
    listmle          the same order as a whole, by the Plackett-Luce model

InfoNCE is no sum over micro-batches, since every text of the window is a negative for every other: it asks
for the whole window (GradCache in `train/window.py`), and then neither splitting nor packing changes it. A
ranking is within a unit, and so needs no such thing. Its scores are length-normalised log-probabilities, so
it trains any language model; rankings of a reward model's numbers are pairwise objectives of rewards.

Left out: negatives from beyond the window (a memory bank, a momentum encoder), learned temperatures, and
losses on ranking metrics (LambdaRank).

Shape legend: T positions, D hidden width, S sequences, G groups, Q queries, C candidates: the answers of all
queries, and the hard negatives.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.groups import Groups
from gyrocompass.loss.registry import objective
from gyrocompass.loss.sequences import Sequences
from gyrocompass.loss.signal import COLUMN_SOURCES, Batch, Terms, TokenLogProbs

Power = Annotated[float, Field(ge=0.0, le=2.0)]


@objective(wants=("hidden",), whole_window=True)
def infonce(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    temperature: PositiveFloat = 0.05,
    pooling: Literal["last", "mean"] = "last",
    symmetric: bool = False,
) -> Terms:
    """Each query against all answers of the window: its own is to be the nearest.

        e_s = h_s / |h_s|        z_qc = e_q . e_c / temperature
        value_q = log sum_{c in C_q} exp(z_qc) - z_qq        symmetric: (value_q + the same for answers) / 2

    C_q holds the answers of all queries of the window and all hard negatives, without what would be a false
    negative: a text equal to q's own answer, and the answers of a query with the text of q. The other
    direction holds the queries, without those whose text, or whose answer's text, is the same; hard negatives
    are no queries. Texts are compared by their tokens, so that a passage listed for two questions is one.

    Args:
        log_probs: with hidden_TD.
        batch: a unit is a query (label `role` 0), its answer (1) and any number of hard negatives (2).
        temperature: divides the cosines.
        pooling: h_s is the hidden state at the last position of the sequence, which has read all of it but
            the final token, or the mean over its positions.
        symmetric: also answers against queries (CLIP).

    Returns:
        Terms [Q] in nats, one per query with the query's weight; ln C at the start, where all is alike.

    Raises:
        BadInput: no roles, or a unit without exactly one query and one answer.

    Source: van den Oord et al. 2018, arXiv:1807.03748; Radford et al. 2021, arXiv:2103.00020 (symmetric).
    """
    assert log_probs.hidden_TD is not None
    sequences = Sequences(batch)
    groups = Groups(sequences)
    query_Q, answer_Q, hard = _roles(groups)
    candidate_C = torch.cat([answer_Q, hard])
    e_SD = _embeddings(log_probs.hidden_TD, sequences, pooling)
    z_QC = e_SD[query_Q] @ e_SD[candidate_C].T / temperature
    own_QC = torch.eye(len(query_Q), len(candidate_C), dtype=torch.bool, device=z_QC.device)
    text_S = _fingerprints(sequences)
    same_answer_QC = text_S[answer_Q][:, None] == text_S[candidate_C]
    same_query_QQ = text_S[query_Q][:, None] == text_S[query_Q]
    false_QC = same_answer_QC | F.pad(same_query_QQ, (0, len(hard)))
    z_QC = z_QC.masked_fill(false_QC & ~own_QC, -torch.inf)
    value_Q = z_QC.logsumexp(dim=1) - z_QC.diagonal()
    if symmetric:
        z_QQ = z_QC[:, : len(query_Q)]
        value_Q = (value_Q + z_QQ.logsumexp(dim=0) - z_QQ.diagonal()) / 2
    return Terms(value_Q, sequences.weight_S[query_Q])


def _roles(groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Which sequences are queries and their answers, in one order of groups, and which hard negatives."""
    role_S, group_S = groups.sequences.label("role"), groups.group_S
    query_Q, answer_Q, hard = ((role_S == role).nonzero().squeeze(1) for role in (0.0, 1.0, 2.0))
    query_Q, answer_Q = (part[group_S[part].argsort()] for part in (query_Q, answer_Q))
    each = torch.arange(len(groups), device=group_S.device)
    known = len(query_Q) + len(answer_Q) + len(hard) == len(role_S)
    if not known or not torch.equal(group_S[query_Q], each) or not torch.equal(group_S[answer_Q], each):
        raise BadInput(
            f"{len(groups)} units have {len(query_Q)} queries, {len(answer_Q)} answers and {len(hard)} hard "
            "negatives; each needs one query and one answer",
            fix=COLUMN_SOURCES["role"],
        )
    return query_Q, answer_Q, hard


def _embeddings(hidden_TD: Tensor, sequences: Sequences, pooling: str) -> Tensor:
    """A unit vector per sequence, [S, D], float32 or float64."""
    hidden_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    if pooling == "last":
        pooled_SD = hidden_TD.index_select(0, sequences.last_S)
    else:
        own_N = (sequences.sequence_T >= 0).nonzero().squeeze(1)
        sum_SD = hidden_TD.new_zeros(len(sequences), hidden_TD.shape[1])
        pooled_SD = sum_SD.index_add(0, sequences.sequence_T[own_N], hidden_TD.index_select(0, own_N))
    return F.normalize(pooled_SD, dim=1)  # the mean has the direction of the sum


def _fingerprints(sequences: Sequences) -> Tensor:
    """A 64-bit number per sequence that texts share if their tokens are the same, [S].

    The sum over positions of a hash of (position, token): two different texts of a window have the same one
    with a chance of about 2^-64 each.
    """
    batch = sequences.batch
    mixed_T = (batch.position_T + 1) * _ODD[0] + batch.token_T * _ODD[1]
    for shift, factor in ((30, _ODD[2]), (27, _ODD[3])):
        mixed_T = (mixed_T ^ (mixed_T >> shift)) * factor
    mixed_T = mixed_T ^ (mixed_T >> 31)
    own_T = sequences.sequence_T >= 0
    zero_S = mixed_T.new_zeros(len(sequences))
    return zero_S.index_add(0, sequences.sequence_T[own_T], mixed_T[own_T])


_ODD = (-0x61C8864680B583EB, -0x3D4D51C2D82B14B1, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Odd 64-bit factors, as signed integers: products wrap around."""


@objective()
def margin_ranking(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    margin: NonNegativeFloat = 0.001,
    by_rank: bool = True,
    length_power: Power = 1.0,
    mean_over_pairs: bool = False,
) -> Terms:
    """Within each unit, a more relevant sequence is to score above a less relevant one by a margin.

        s_i = 1 / n_i^a sum_t log p(y_it)        a = length_power
        value_g = sum_{i, j: r_i > r_j} max(0, margin * d_ij - (s_i - s_j))

    d_ij is how many ranks lie between them (BRIO), or 1 (`by_rank: false`, SLiC). With margin 0 it is RRHF.

    Args:
        log_probs: any.
        batch: sequences of a unit with a label `relevance`, higher is better; equal ones are not compared.
        margin: in nats per token with length_power 1.
        by_rank: whether the margin grows with the distance in rank; the distinct relevances are the ranks.
        length_power: 0 scores by the whole log-likelihood.
        mean_over_pairs: divide by the unit's number of compared pairs, so that large units weigh no more.

    Returns:
        Terms [G], one per unit; of weight 0 where all relevances are equal.

    Raises:
        BadInput: no relevance, or a unit of one sequence.

    Source: Liu et al. 2022, arXiv:2203.16804 (BRIO); Yuan et al. 2023, arXiv:2304.05302 (RRHF);
    Zhao et al. 2023, arXiv:2305.10425 (SLiC-HF).
    """
    groups, score_S, relevance_S = _ranked(log_probs, batch, length_power)
    better, worse = _compared(groups, relevance_S).nonzero(as_tuple=True)
    distance = torch.ones_like(score_S[better])
    if by_rank:
        rank_S = _ranks(groups, relevance_S).to(score_S.dtype)
        distance = rank_S[better] - rank_S[worse]
    short = (margin * distance - (score_S[better] - score_S[worse])).clamp(min=0.0)
    group = groups.group_S[better]
    value_G = score_S.new_zeros(len(groups)).index_add(0, group, short)
    pairs_G = torch.bincount(group, minlength=len(groups))
    if mean_over_pairs:
        value_G = value_G / pairs_G.clamp(min=1)
    return Terms(value_G, groups.weight_G * (pairs_G > 0))


@objective()
def listmle(log_probs: TokenLogProbs, batch: Batch, *, length_power: Power = 1.0) -> Terms:
    """Within each unit, the likelihood of the true order: the best is drawn first, then the best of the rest.

        s_i as in `margin_ranking`
        value_g = sum_{i: some r_j < r_i} (log sum_{j: r_j <= r_i} exp(s_j) - s_i)

    Where no two relevances are equal, that is -log P(order) of Plackett-Luce. Equal ones each have the whole
    of their tie among the rest (Breslow), and the last are not ordered among themselves, so nothing depends
    on the order in which ties are read.

    Args:
        log_probs: any.
        batch: as for `margin_ranking`.
        length_power: as for `margin_ranking`.

    Returns:
        Terms [G] in nats, one per unit; of weight 0 where all relevances are equal.

    Raises:
        BadInput: no relevance, or a unit of one sequence.

    Source: Xia et al. 2008, "Listwise approach to learning to rank: theory and algorithm"; Breslow 1974.
    """
    groups, score_S, relevance_S = _ranked(log_probs, batch, length_power)
    ranked_S = _compared(groups, relevance_S).any(dim=1)
    together_SS = groups.group_S[:, None] == groups.group_S
    rest_SS = together_SS & (relevance_S[:, None] >= relevance_S)
    rest_S = score_S.expand(len(score_S), -1).masked_fill(~rest_SS, -torch.inf).logsumexp(dim=1)
    value_G = groups.sum((rest_S - score_S).masked_fill(~ranked_S, 0.0))
    return Terms(value_G, groups.weight_G * (groups.sum(ranked_S.to(score_S.dtype)) > 0))


def _ranked(log_probs: TokenLogProbs, batch: Batch, length_power: float) -> tuple[Groups, Tensor, Tensor]:
    """The groups, and each sequence's score and relevance."""
    sequences = Sequences(batch)
    groups, relevance_S = Groups(sequences), sequences.label("relevance")
    alone = (groups.size_G == 1).nonzero().squeeze(1)
    if len(alone):
        first = sequences.unit_S[groups.group_S == alone[0]]
        raise BadInput(
            f"{len(alone)} units of one sequence have nothing to rank; the first is unit number {int(first)}",
            fix="give the sequences of a unit one name as `unit`, or drop those that are alone",
        )
    sum_S = sequences.sum(log_probs.logprob_T)
    return groups, sum_S / sequences.length_S.to(sum_S.dtype) ** length_power, relevance_S


def _compared(groups: Groups, relevance_S: Tensor) -> Tensor:
    """bool [S, S]: whether the first is of the second's group and more relevant."""
    together_SS = groups.group_S[:, None] == groups.group_S
    return together_SS & (relevance_S[:, None] > relevance_S)


def _ranks(groups: Groups, relevance_S: Tensor) -> Tensor:
    """int64: how many distinct relevances of its group lie below each, [S]."""
    key_S2 = torch.stack([groups.group_S.double(), relevance_S.double()], dim=1)
    level, own_S = torch.unique(key_S2, dim=0, return_inverse=True)
    levels_G = torch.bincount(level[:, 0].long(), minlength=len(groups))
    rank_S: Tensor = own_S - (levels_G.cumsum(0) - levels_G)[groups.group_S]
    return rank_S
