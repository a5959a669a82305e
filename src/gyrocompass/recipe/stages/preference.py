"""Preferences, and what the reference says of them: the data that alignment learns from."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nsmallest
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from gyrocompass.core.artifact import Draft
from gyrocompass.data.corrupt import preferences
from gyrocompass.data.document import Document, read_documents
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.fit import check_fit
from gyrocompass.model.score import evaluating, scored_tokens
from gyrocompass.recipe.stage import DocumentsName, ModelName, Stage, TokensName, Workplace
from gyrocompass.recipe.stages.corpus import counting, write_stage_records
from gyrocompass.recipe.stages.model import open_model
from gyrocompass.recipe.stages.tokens import write_again
from gyrocompass.train.config import PRECISIONS

REFERENCE = "reference_logprob"


class PreferencesStage(Stage):
    """Preferences of code over the same code made worse, from conversations that end in code."""

    kind: Literal["preferences"] = "preferences"
    makes: ClassVar[str] = "documents"
    documents: DocumentsName
    most: int | None = Field(default=None, ge=1)
    """Keep so many, chosen by the hash of their content; None: all."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes documents.parquet with preferences; each knows the conversation it was derived from."""
        derived: Iterable[Document] = preferences(read_documents(workplace.input("documents")))
        if self.most is not None:
            derived = nsmallest(self.most, derived, key=lambda document: document.content_hash)
        write_stage_records(draft, counting(derived, workplace))


class ReferenceStage(Stage):
    """The same tokens with one more column: their log-probability under a reference model.

    The reference is a parent of the artifact, so cached numbers are never those of another model.
    """

    kind: Literal["reference"] = "reference"
    makes: ClassVar[str] = "tokens"
    data: TokensName
    model: ModelName
    sequence_length: int = Field(default=512, ge=2)
    rows_per_batch: int = Field(default=8, ge=1)
    precision: Literal["float64", "float32", "bf16"] = "float32"

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes tokens-*.parquet with the column `reference_logprob`."""
        dtype = PRECISIONS[self.precision]
        model = open_model(workplace.input("model"), dtype=dtype, device=workplace.world.device)
        data = TokenDataset.open(workplace.input("data"))
        check_fit(model, data, self.sequence_length, f"stages.{workplace.name}")
        task = workplace.progress.task(workplace.name, data.n_targets, unit="tok")
        logprob_N = np.full(data.n_tokens, np.nan, np.float32)
        with evaluating(model):
            for part in scored_tokens(model, data, self.sequence_length, self.rows_per_batch):
                logprob_N[part.index_K] = part.logprob_K
                task.advance(len(part.index_K))
        task.finish()
        write_again(workplace, draft, data.with_column(REFERENCE, logprob_N))
