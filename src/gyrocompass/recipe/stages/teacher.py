"""What a teacher says of the data: its likeliest tokens, kept for a student that is trained without it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from gyrocompass.core.artifact import Draft
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.fit import check_fit
from gyrocompass.model.teacher import with_teacher
from gyrocompass.recipe.stage import ModelName, Stage, TokensName, Workplace
from gyrocompass.recipe.stages.model import open_model
from gyrocompass.recipe.stages.tokens import write_again
from gyrocompass.train.config import PRECISIONS


class TeacherTopKStage(Stage):
    """The same tokens with a teacher's `k` likeliest at each, for the objective `distillation_top_k`.

    The teacher is a parent of the artifact, so cached numbers are never those of another model.
    """

    kind: Literal["teacher_top_k"] = "teacher_top_k"
    makes: ClassVar[str] = "tokens"
    data: TokensName
    teacher: ModelName
    k: int = Field(default=16, ge=1)
    """How many tokens; a position costs 8 k bytes."""
    sequence_length: int = Field(default=512, ge=2)
    """That of the student's training, so that both see the same context."""
    rows_per_batch: int = Field(default=8, ge=1)
    precision: Literal["float64", "float32", "bf16", "bf16_autocast"] = "float32"

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes tokens-*.parquet with the columns teacher_token/0.. and teacher_logprob/0.. ."""
        dtype = PRECISIONS[self.precision]
        teacher = open_model(workplace.input("teacher"), dtype=dtype, device=workplace.world.device)
        data = TokenDataset.open(workplace.input("data"))
        check_fit(teacher, data, self.sequence_length, f"stages.{workplace.name}")
        task = workplace.progress.task(workplace.name, data.n_targets, unit="tok")
        data = with_teacher(
            data,
            teacher,
            k=self.k,
            length=self.sequence_length,
            rows=self.rows_per_batch,
            autocast=self.precision == "bf16_autocast",
            on_tokens=task.advance,
        )
        task.finish()
        write_again(workplace, draft, data)
