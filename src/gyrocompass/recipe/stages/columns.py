"""Tokens with more columns: what a model says of them, kept for a training that does without the model.

    tokens, model --> the same tokens with their log-probability under a reference     (kind reference)
    tokens, model --> the same tokens with a teacher's likeliest at each               (kind teacher_top_k)

The model is a parent of the artifact, so cached numbers are never those of another one. For numbers that are
made while training instead, a training stage names its `reference` or `teacher` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from gyrocompass.core.artifact import Draft
from gyrocompass.data.curriculum import REFERENCE
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.columns import score_logprobs
from gyrocompass.model.fit import check_fit
from gyrocompass.model.open import open_model
from gyrocompass.model.teacher import with_teacher
from gyrocompass.recipe.stage import ModelName, Stage, TokensName, Workplace
from gyrocompass.recipe.stages.tokens import write_again
from gyrocompass.train.config import PRECISIONS

AddColumns = Callable[[nn.Module, TokenDataset, Callable[[int], Any]], TokenDataset]
"""(model, tokens, on_tokens) -> the tokens with more columns."""


class ColumnsStage(Stage):
    """What both stages share: the tokens, and how a model reads them."""

    makes: ClassVar[str] = "tokens"
    data: TokensName
    sequence_length: int = Field(default=512, ge=2)
    """That of the training, so that both see the same context."""
    rows_per_batch: int = Field(default=8, ge=1)
    precision: Literal["float64", "float32", "bf16", "bf16_autocast"] = "float32"

    @property
    def autocast(self) -> bool:
        """Whether forward passes run under bf16 autocast."""
        return self.precision == "bf16_autocast"

    def write(self, workplace: Workplace, draft: Draft, role: str, add: AddColumns) -> None:
        """Write the tokens with what `add` makes of them and of the model in a role."""
        dtype = PRECISIONS[self.precision]
        model = open_model(workplace.input(role), dtype=dtype, device=workplace.world.device)
        data = TokenDataset.open(workplace.input("data"))
        check_fit(model, data, self.sequence_length, f"stages.{workplace.name}")
        task = workplace.progress.task(workplace.name, data.n_targets, unit="tok")
        data = add(model, data, task.advance)
        task.finish()
        write_again(workplace, draft, data)


class ReferenceStage(ColumnsStage):
    """The same tokens with one more column: their log-probability under a reference model."""

    kind: Literal["reference"] = "reference"
    model: ModelName

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes tokens-*.parquet with the column `reference_logprob`."""

        def add(model: nn.Module, data: TokenDataset, on_tokens: Callable[[int], Any]) -> TokenDataset:
            length, rows = self.sequence_length, self.rows_per_batch
            logprob_N = score_logprobs(model, length, rows, data, autocast=self.autocast, on_tokens=on_tokens)
            return data.with_column(REFERENCE, logprob_N)

        self.write(workplace, draft, "model", add)


class TeacherTopKStage(ColumnsStage):
    """The same tokens with a teacher's `k` likeliest at each, for the objective `distillation_top_k`."""

    kind: Literal["teacher_top_k"] = "teacher_top_k"
    teacher: ModelName
    k: int = Field(default=16, ge=1)
    """How many tokens; a position costs 8 k bytes."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes tokens-*.parquet with the columns teacher_token/0.. and teacher_logprob/0.. ."""

        def add(model: nn.Module, data: TokenDataset, on_tokens: Callable[[int], Any]) -> TokenDataset:
            return with_teacher(
                data,
                model,
                k=self.k,
                length=self.sequence_length,
                rows=self.rows_per_batch,
                autocast=self.autocast,
                on_tokens=on_tokens,
            )

        self.write(workplace, draft, "teacher", add)
