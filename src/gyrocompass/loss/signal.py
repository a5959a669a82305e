"""The centre types: what the primitive returns, what an objective reads and what it answers.

    hidden states, head weight, targets --token_logprobs--> TokenLogProbs
    TokenLogProbs, Batch                --Objective------> Terms
    Terms                               --reduce---------> loss

Shape legend: T tokens (flattened rows of one micro-batch), D hidden width, V vocabulary,
C candidate tokens asked for per position, K tokens of a top list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor

from gyrocompass.core.errors import BadInput

Kind = Literal["forward_kl", "reverse_kl", "jsd", "total_variation"]
"""The divergences there are."""

IGNORE_INDEX = -100
"""The target of a position that predicts nothing."""

COLUMN_SOURCES: Mapping[str, str] = {
    "reference_logprob": "score the data with the reference first, by a stage of kind reference; or name one "
    "that is asked while training, `reference: STAGE`",
    "side": "give preference records: prompt, chosen, rejected",
    "desirable": "give records with a label: prompt, completion, label",
    "mismatched": "give each prompt another's completion too, labels: {mismatched: 1}; or set kl: matched",
    "margin": "give preference records a number: margin",
    "tie": "give each preference record labels: {tie: 1} where both answers are as good, else {tie: 0}",
    "score": "give records with a number: prompt, completion, score",
    "step_reward": "give records with answers in steps: prompt, steps: [{text, reward}]",
    "advantage": "train on rollouts, which bring advantages",
    "rollout_logprob": "train on rollouts, which bring their sampler's log-probabilities",
    "truncated": "train on rollouts, which say of each answer whether it was cut off",
    "value": "train on rollouts with a value head, which bring what it said",
    "return": "train on rollouts with a value head, which bring what it is to learn",
    "teacher_token/0": "score the data with the teacher first: a stage of kind teacher_top_k",
    "relevance": "give each record of a unit labels: {relevance: number}, higher where it should rank higher",
    "role": "give each record of a unit labels: {role: N}; 0 a query, 1 what answers it, 2 what does not",
    "retriever_logprob": "give each passage of a question labels: {retriever_logprob: its retriever's score}",
}
"""Where a column comes from, for those who miss it."""


class TokenLogProbs(NamedTuple):
    """What one pass over the head knows about each target: float32 (float64 for float64 inputs), in nats.

    A position whose target is `IGNORE_INDEX` is not computed: every field is 0 there.
    """

    logprob_T: Tensor
    """log p(target)."""
    lse_T: Tensor
    """The log-normaliser, log sum_v exp(logit_v)."""
    entropy_T: Tensor | None = None
    """-sum_v p_v log p_v."""
    mean_logit_T: Tensor | None = None
    """The mean of the finite logits (a padded vocabulary's -inf entries are not counted)."""
    sum_sq_T: Tensor | None = None
    """sum_v p_v^2."""
    rank_T: Tensor | None = None
    """int64: how many tokens score strictly above the target; 0 = top-1. No gradient."""
    candidate_TC: Tensor | None = None
    """log p of the candidate tokens that were asked for; 0 where the candidate is `IGNORE_INDEX`."""
    top_TK: Tensor | None = None
    """The largest log-probabilities, descending; -inf where the distribution has fewer tokens."""
    top_token_TK: Tensor | None = None
    """int64: their tokens."""
    drawn_T: Tensor | None = None
    """int64: a token drawn from the distribution."""
    scalar_T: Tensor | None = None
    """What the model's scalar head says at each position: a reward, a value."""
    divergence_TK: Tensor | None = None
    """The divergences from a teacher that were asked for, one column each; 0 where not counted."""
    hidden_TD: Tensor | None = None
    """The hidden states themselves, for objectives about whole texts."""
    future_TK: Tensor | None = None
    """log p of the tokens after the target, by the model's future heads; 0 where there is none to predict."""


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch, flat: T = rows * length, row after row.

    `target_T` is already shifted: position t predicts `target_T[t]`. A position counts if and only if
    its weight is above 0, and then its target is a token id; else its target is `IGNORE_INDEX`.
    """

    token_T: Tensor
    """int64: the ids the model reads."""
    target_T: Tensor
    """int64: the id each position predicts, or `IGNORE_INDEX`."""
    position_T: Tensor
    """int64: restarts at 0 with each segment; attention stays inside a segment."""
    segment_T: Tensor
    """int64: which segment of the batch; -1 for padding."""
    document_T: Tensor
    """int64: index into the dataset's documents; -1 for padding."""
    slice_T: Tensor
    """int64: index into the dataset's slice names; -1 for padding."""
    source_T: Tensor
    """int64: index into the dataset's source names; -1 for padding."""
    weight_T: Tensor
    """float32, >= 0: the weight of each prediction."""
    byte_T: Tensor
    """int64: how many bytes of text the target stands for (0 for special tokens and padding)."""
    unit_T: Tensor
    """int64: index of the unit, such as a pair, whose segments share a micro-batch; -1 for padding."""
    length: int
    """Tokens in a row."""
    columns: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """Whatever else an objective names, float [T], NaN where there is none: reference log-probs, advantages.
    A number of a whole document (a side of a pair, a margin) stands at each of its positions."""

    def column(self, name: str, at_T: Tensor) -> Tensor:
        """A column where it is read (`at_T`, bool), 0 elsewhere: what is not read reaches no gradient.

        Raises:
            BadInput: there is no such column, or it has no number at a place where it is read.
        """
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise BadInput(f"the data has no column {name!r}; it has: {known}", fix=COLUMN_SOURCES.get(name))
        values_T = self.columns[name]
        missing_T = at_T & ~values_T.isfinite()
        if missing_T.any():
            place = int(missing_T.nonzero()[0])
            raise BadInput(
                f"the column {name!r} has no finite number at {int(missing_T.sum())} of "
                f"{int(at_T.sum())} positions; the first is of document number {int(self.document_T[place])}",
                fix=COLUMN_SOURCES.get(name),
            )
        return values_T.masked_fill(~at_T, 0.0)


class Divergence(NamedTuple):
    """A divergence from a teacher that an objective asks for; see `gyrocompass.loss.divergence`."""

    kind: Kind
    beta: float = 0.5
    temperature: float = 1.0
    """Divides the logits of both before they are compared."""


class Terms(NamedTuple):
    """An objective's answer, unreduced: one entry per token, sequence, pair or group.

    `weight` depends on the batch alone, never on the model: a window of micro-batches is normalised by
    weights that are known before its first forward pass. What depends on the model goes into `value`.
    """

    value: Tensor
    """The objective's value, in nats or its own unit."""
    weight: Tensor
    """>= 0; 0 = not counted."""


Objective = Callable[[TokenLogProbs, Batch], Terms]

Expect = Callable[[TokenLogProbs], Tensor]
"""The loss that will be taken of an answer, a scalar: said beforehand, its gradient comes along."""
