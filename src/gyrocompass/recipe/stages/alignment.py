"""How aligned a model is: which of two held-out answers it prefers, and what its own samples are worth.

    held-out pairs ---> share of pairs whose chosen answer it prefers, by log-probability, by the ratio to the
                        reference, and by its scalar head if it has one
    prompts ----------> samples ---> each reward, length, share cut off, distance from the reference

Every model of a recipe is judged on the same pairs, prompts and seeds, so that differences are paired.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import nn

from gyrocompass.core.artifact import Draft
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.alignment import ALIGNMENT, Figure, calibration, right_share
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.reward_calibration import load_calibration
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.model.columns import FloatArray, score_logprobs, score_rewards
from gyrocompass.model.fit import check_fit
from gyrocompass.model.scalar_head import has_scalar_head
from gyrocompass.recipe.stage import (
    ModelName,
    OptionalDocumentsName,
    OptionalModelName,
    OptionalTokensName,
    Workplace,
)
from gyrocompass.recipe.stages.judging import JudgingStage
from gyrocompass.recipe.stages.model import open_model
from gyrocompass.recipe.stages.pairs import groups_of, margins, open_pairs
from gyrocompass.recipe.stages.rollouts import decoder, engine, read_prompts
from gyrocompass.train.config import PRECISIONS
from gyrocompass.train.rollout import Prompt, RolloutConfig, as_sample, sample_row

SHOWN_SAMPLES = 3


class AlignmentStage(JudgingStage):
    """Preferences and samples of one model, beside its reference."""

    kind: Literal["alignment"] = "alignment"
    makes: ClassVar[str] = "alignment"
    model: ModelName
    reference: OptionalModelName = None
    """The model that distances are measured from; the same for all that are to be compared."""
    pairs: OptionalTokensName = None
    """Tokens of held-out preferences."""
    prompts: OptionalDocumentsName = None
    """Documents whose prompts are sampled from."""
    prompt_slices: tuple[str, ...] | None = None
    max_prompts: int = Field(default=32, ge=2)
    samples_per_prompt: int = Field(default=2, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    rows_per_batch: int = Field(default=8, ge=1)
    precision: Literal["float64", "float32", "bf16"] = "float32"
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> AlignmentStage:
        if self.pairs is None and self.prompts is None:
            raise ValueError("give pairs, prompts or both")
        if (self.prompts is None) != (not self.rewards):
            raise ValueError("prompts and rewards go together")
        self.check_rewards()
        return self

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes alignment.json: figures, a reward model's calibration, and some samples."""
        model = self._open(workplace, "model")
        reference = self._open(workplace, "reference") if self.reference else None
        found: dict[str, Any] = {"figures": [], "calibration": None, "samples": []}
        if self.pairs is not None:
            self._judge_pairs(workplace, model, reference, found)
        if self.prompts is not None:
            self._judge_samples(workplace, model, reference, found)
        sizes = {figure.name: figure.size for figure in found["figures"] if figure.slice == "total"}
        pairs, samples = sizes.get("preferred by log-probability"), sizes.get("sample: tokens")
        draft.counts |= {"pairs": pairs or 0, "samples": samples or 0}
        found["figures"] = [figure._asdict() for figure in found["figures"]]
        (draft.path / ALIGNMENT).write_text(json.dumps(found, indent=1), encoding="utf-8")

    def _open(self, workplace: Workplace, role: str) -> nn.Module:
        dtype = PRECISIONS[self.precision]
        return open_model(workplace.input(role), dtype=dtype, device=workplace.world.device)

    # --- pairs ---

    def _judge_pairs(
        self, workplace: Workplace, model: nn.Module, reference: nn.Module | None, found: dict[str, Any]
    ) -> None:
        data = open_pairs(workplace.input("pairs"), f"stages.{workplace.name}.pairs")
        check_fit(model, data, self.sequence_length, f"stages.{workplace.name}")
        own_D = _sums(data, score_logprobs(model, self.sequence_length, self.rows_per_batch, data))
        margins_of = {"preferred by log-probability": margins(data, own_D)}
        if reference is not None:
            its_D = _sums(data, score_logprobs(reference, self.sequence_length, self.rows_per_batch, data))
            if reference is not model and not np.array_equal(own_D, its_D):
                margins_of["preferred by ratio to reference"] = margins(data, own_D - its_D)
        groups = groups_of(data)
        if has_scalar_head(model):
            margin_P = margins(data, score_rewards(model, self.sequence_length, self.rows_per_batch, data))
            margins_of["preferred by reward model"] = margin_P
            saved = load_calibration(workplace.input("model"))
            fitted = (None, None) if saved is None else (saved.temperature, saved.split)
            measured = calibration(margin_P, groups, *fitted)
            found["calibration"] = None if measured is None else measured._asdict()
        slices = [data.slice_names[number] for number in data.slice_D[data.labels["side"] == 1]]
        for name, margin_P in margins_of.items():
            found["figures"] += by_slice(name, right_share(margin_P), slices, groups)

    # --- samples ---

    def _judge_samples(
        self, workplace: Workplace, model: nn.Module, reference: nn.Module | None, found: dict[str, Any]
    ) -> None:
        tokenizer = load_tokenizer(workplace.input("model"))
        longest = self.sequence_length + 1 - self.max_new_tokens
        prompts = read_prompts(workplace.input("prompts"), tokenizer, longest, self.prompt_slices)
        asked = [p for p in prompts[: self.max_prompts] for _ in range(self.samples_per_prompt)]
        config = RolloutConfig(max_new_tokens=self.max_new_tokens)
        seeds = [self.seed * 1_000_003 + number for number in range(len(asked))]
        sampled = engine(model, tokenizer, config, None)([prompt.ids for prompt in asked], seeds)
        decode = decoder(tokenizer)
        samples = [as_sample(p, one, decode) for p, one in zip(asked, sampled, strict=True)]
        tools = self.tools(
            workplace,
            dtype=PRECISIONS[self.precision],
            length=self.sequence_length,
            rows=self.rows_per_batch,
        )
        scored = parse_rewards(self.rewards, tools).scored(samples)
        values: dict[str, Sequence[float]] = {f"sample: {name}": v for name, v in scored.parts.items()}
        values["sample: tokens"] = [float(sample.n_tokens) for sample in samples]
        values["sample: cut off"] = [float(not sample.finished) for sample in samples]
        if reference is not None:
            data = TokenDataset.of(
                sample_row(f"{prompt.id}@{number}", prompt, one.token_ids)
                for number, (prompt, one) in enumerate(zip(asked, sampled, strict=True))
            )
            own_N, its_N = (
                score_logprobs(one, self.sequence_length, self.rows_per_batch, data)
                for one in (model, reference)
            )
            distance_D = _sums(data, own_N - its_N)
            values["sample: KL from reference, nats"] = distance_D.tolist()
        slices, groups = [prompt.slice for prompt in asked], [prompt.id for prompt in asked]
        for name, per_sample in values.items():
            found["figures"] += by_slice(name, per_sample, slices, groups)
        found["samples"] = _shown(asked, samples, self.samples_per_prompt)


def by_slice(name: str, values: Any, slices: Sequence[str], groups: Sequence[str]) -> list[Figure]:
    """A figure for each slice, and one for all."""
    values_P = np.asarray(values, np.float64)
    found = []
    for slice_name in sorted(set(slices)):
        own = [number for number, of in enumerate(slices) if of == slice_name]
        found.append(Figure.of(name, slice_name, values_P[own], [groups[number] for number in own]))
    return [*found, Figure.of(name, "total", values_P, groups)]


def _sums(data: TokenDataset, values_N: FloatArray) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sums over the counted tokens of each document."""
    counted_N = np.where(data.weight_N > 0, values_N, 0).astype(np.float64)
    return np.add.reduceat(counted_N, data.offset_D[:-1])


def _shown(asked: Sequence[Prompt], samples: Sequence[Sample], per_prompt: int) -> list[dict[str, str]]:
    return [
        {"prompt": asked[number].text, "completion": samples[number].completion}
        for number in range(0, min(len(samples), SHOWN_SAMPLES * per_prompt), per_prompt)
    ]
