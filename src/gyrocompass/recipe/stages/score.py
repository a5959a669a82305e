"""Scoring and completing: what a model says of held-out documents, and how it goes on from prompts."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from pydantic import Field

from gyrocompass.core.artifact import Draft
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.ledger import Ledger
from gyrocompass.model.decoding import Decoding
from gyrocompass.model.fit import check_fit
from gyrocompass.model.generate import generate
from gyrocompass.model.open import open_model
from gyrocompass.model.score import score_dataset
from gyrocompass.recipe.stage import ModelName, Stage, TokensNames, Workplace
from gyrocompass.train.config import PRECISIONS


class ScoreStage(Stage):
    """The log-probability of every counted token of `data`, summed per slice, source and document."""

    kind: Literal["score"] = "score"
    makes: ClassVar[str] = "score"
    model: ModelName
    data: TokensNames = Field(min_length=1)
    sequence_length: int = Field(default=512, ge=2)
    rows_per_batch: int = Field(default=8, ge=1)
    precision: Literal["float64", "float32", "bf16"] = "float32"

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes ledger.parquet."""
        model = open_model(
            workplace.input("model"), dtype=PRECISIONS[self.precision], device=workplace.world.device
        )
        ledger = Ledger()
        for number in range(len(self.data)):
            data = TokenDataset.open(workplace.input(f"data.{number}"))
            check_fit(model, data, self.sequence_length, f"stages.{workplace.name}")
            task = workplace.progress.task(workplace.name, data.n_targets, unit="tok")
            ledger.merge(
                score_dataset(
                    model,
                    data,
                    length=self.sequence_length,
                    rows=self.rows_per_batch,
                    on_tokens=task.advance,
                )
            )
            task.finish()
        ledger.save(draft.path / "ledger.parquet")
        draft.counts |= {"tokens": ledger.total.count, "bytes": ledger.total.bytes}


class CompletionsStage(Stage):
    """How the model goes on from prompts: plain text, or a chat's user turn with `chat: true`."""

    kind: Literal["completions"] = "completions"
    makes: ClassVar[str] = "completions"
    model: ModelName
    prompts: tuple[str, ...] = Field(min_length=1)
    chat: bool = False
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes completions.json: for each prompt the text, its tokens and their log-probabilities."""
        folder = workplace.input("model")
        model = open_model(folder, dtype=PRECISIONS["float32"], device=workplace.world.device)
        completions = generate(
            model,
            load_tokenizer(folder),
            self.prompts,
            chat=self.chat,
            max_new_tokens=self.max_new_tokens,
            decoding=Decoding(temperature=self.temperature, top_p=self.top_p),
            seed=self.seed,
        )
        rows = [completion._asdict() for completion in completions]
        text = json.dumps(rows, indent=2, allow_nan=False)
        (draft.path / "completions.json").write_text(text, encoding="utf-8")
        draft.counts["completions"] = len(rows)
