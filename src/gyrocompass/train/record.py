"""What one step saw: the NLL of every counted token with its tags, and each objective's sums.

The record is taken before the optimizer steps, so that the guard can judge it and the ledger can refuse it.
On several ranks each keeps its own tokens; means, objective sums and the ledger are gathered, so that every
rank sees the same numbers.

Shape legend: N counted tokens of this rank in this step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gyrocompass.data.curriculum import REFERENCE
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.loss.importance import ImportanceSums, importance_sums
from gyrocompass.loss.reduce import Tally
from gyrocompass.loss.signal import Batch, TokenLogProbs
from gyrocompass.measure.ledger import Ledger
from gyrocompass.train.distributed import World
from gyrocompass.train.guard import TOTAL, Mean

ROLLOUT = "rollout_logprob"
"""The column of what a sampler recorded."""

GOLD = "gold_logprob"
"""What the model says where it reads the data and nothing of its own."""


class Alone(NamedTuple):
    """A document scored with nothing packed beside it."""

    nll_N: NDArray[Any]
    cause: str
    """Where a number that is not finite came from; empty where all are finite."""


class DocumentLoss(NamedTuple):
    """One document's share of a step."""

    document_id: str
    slice: str
    nats: float
    tokens: int
    cause: str = ""
    """Where a number that is not finite came from, if that was found."""

    def __str__(self) -> str:
        text = f"{self.document_id} ({self.slice}): {self.nats:.4g} nats per token over {self.tokens} tokens"
        return f"{text}; {self.cause}" if self.cause else text


class StepRecord:
    """The counted tokens of one step, as they come out of the micro-batches."""

    def __init__(self, data: TokenDataset) -> None:
        self._data = data
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._objectives: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._importance = ImportanceSums()

    def add(
        self,
        batch: Batch,
        log_probs: TokenLogProbs,
        objectives: Mapping[str, Tally],
        *,
        gold_logprob_T: Tensor | None = None,
    ) -> None:
        """Take one micro-batch: its tokens, and each objective's sums.

        Args:
            batch: the micro-batch.
            log_probs: what the model said of it.
            objectives: the sums of its terms.
            gold_logprob_T: log p of its targets under its own inputs, where the model may have read others.
        """
        counted_T = batch.weight_T > 0
        columns = {
            "nll": -log_probs.logprob_T,
            "weight": batch.weight_T,
            "byte": batch.byte_T,
            "document": batch.document_T,
            "slice": batch.slice_T,
            "source": batch.source_T,
        }
        if log_probs.rank_T is not None:
            columns["top1"] = log_probs.rank_T == 0
        if log_probs.entropy_T is not None:
            columns["entropy"] = log_probs.entropy_T
        if gold_logprob_T is not None:
            columns[GOLD] = gold_logprob_T
        if ROLLOUT in batch.columns:
            text_T = batch.columns[ROLLOUT].isnan()  # beside samples, texts have no sampler
            samples = replace(batch, weight_T=batch.weight_T.masked_fill(text_T, 0.0))
            self._importance += importance_sums(log_probs, samples)
        if REFERENCE in batch.columns:
            columns[REFERENCE] = batch.columns[REFERENCE]
        self._parts.append({name: x[counted_T].detach().cpu().numpy() for name, x in columns.items()})
        for name, sums in objectives.items():
            self._objectives[name] = [a + b for a, b in zip(self._objectives[name], sums, strict=True)]

    def means(self, world: World) -> dict[str, Mean]:
        """Mean NLL in total and per slice over all ranks; a NaN stays a NaN."""
        sums = self._by_slice(self._column("nll").astype(np.float64), world)
        sums[TOTAL] = (sum(nats for nats, _ in sums.values()), sum(tokens for _, tokens in sums.values()))
        return {name: Mean(nats / max(1, tokens), tokens) for name, (nats, tokens) in sums.items()}

    def excess(self, world: World) -> dict[str, float]:
        """By slice, max(0, NLL - NLL of the reference) in the mean over its counted tokens on all ranks.

        The documents have the column `reference_logprob`.
        """
        excess_N = np.maximum(0.0, self._column("nll").astype(np.float64) + self._column(REFERENCE))
        return {name: nats / tokens for name, (nats, tokens) in self._by_slice(excess_N, world).items()}

    def teacher_forced(self, world: World) -> dict[str, float]:
        """Mean NLL by slice under gold inputs, over all ranks; the model read others (scheduled sampling)."""
        sums = self._by_slice(-self._column(GOLD).astype(np.float64), world)
        return {name: nats / tokens for name, (nats, tokens) in sums.items()}

    def importance(self, world: World) -> dict[str, float]:
        """How far sampler and learner are apart on rollouts, over all ranks; empty without rollouts."""
        gathered = world.gather_json(list(astuple(self._importance)))
        sums = sum((ImportanceSums(*own) for own in gathered), start=ImportanceSums())
        return sums.report() if sums.count else {}

    def ledger(self, world: World) -> Ledger:
        """The step's sums by slice and source, and by objective, over all ranks."""
        own = Ledger()
        for part in self._parts:
            own.add_tokens(
                {
                    "slice": (part["slice"], self._data.slice_names),
                    "source": (part["source"], self._data.source_names),
                },
                part["nll"],
                weight_N=part["weight"],
                byte_N=part["byte"],
                top1_N=part.get("top1"),
                entropy_N=part.get("entropy"),
            )
        for name, (value_sum, weight_sum, count) in self._objectives.items():
            own.add_objective(name, value_sum, weight_sum, int(count))
        merged = Ledger()
        for rank_bytes in world.gather_bytes(own.to_bytes()) if world.size > 1 else []:
            merged.merge(Ledger.from_bytes(rank_bytes))
        return merged if world.size > 1 else own

    def worst_documents(
        self, world: World, alone: Callable[[int], Alone], count: int = 10
    ) -> list[DocumentLoss]:
        """The documents of this step with the highest mean NLL (NaN first), over all ranks.

        A NaN spreads over the row it is packed into (masked attention multiplies it by 0, which is NaN), so
        a document with one is scored again by itself.
        """
        own = [
            self._document(index, Alone(nll_N, "") if np.isfinite(nll_N).all() else alone(index))
            for index, nll_N in self._by_document()
        ]
        rows = [DocumentLoss(*row) for rank_rows in world.gather_json(own) for row in rank_rows]
        return sorted(rows, key=lambda row: (not np.isnan(row.nats), -row.nats))[:count]

    def _by_slice(self, values_N: NDArray[Any], world: World) -> dict[str, tuple[float, int]]:
        """The sum of each slice's values over all ranks, and of how many."""
        slice_N = self._column("slice")
        own = {
            self._data.slice_names[i]: (float(values_N[slice_N == i].sum()), int((slice_N == i).sum()))
            for i in np.unique(slice_N)
        }
        sums: dict[str, tuple[float, int]] = {}
        for rank_sums in world.gather_json(own):
            for name, (total, count) in rank_sums.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = (before[0] + total, before[1] + count)
        return sums

    def _by_document(self) -> list[tuple[int, NDArray[Any]]]:
        document_N, nll_N = self._column("document"), self._column("nll").astype(np.float64)
        return [(int(i), nll_N[document_N == i]) for i in np.unique(document_N)]

    def _document(self, index: int, scored: Alone) -> DocumentLoss:
        slice_name = self._data.slice_names[int(self._data.slice_D[index])]
        nll_N = scored.nll_N
        mean = float(nll_N.mean())
        return DocumentLoss(self._data.document_ids[index], slice_name, mean, len(nll_N), scored.cause)

    def _column(self, name: str) -> NDArray[Any]:
        parts: Sequence[NDArray[Any]] = [part[name] for part in self._parts]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
