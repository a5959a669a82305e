"""How aligned a model is: which of two held-out answers it prefers, and what its own samples are worth.

    held-out pairs ---> share of pairs whose chosen answer it prefers, by log-probability, by the ratio to the
                        reference, and by its scalar head if it has one
    prompts ----------> samples ---> each reward, length, share cut off, distance from the reference

A reference is the zero of its own ratios: each of its pairs is a tie, so its share is one half. A model with
a scalar head and without a reference is a reward model, and judged by that head alone.

Every model of a recipe is judged on the same pairs, prompts and seeds, so that differences are paired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import nn

from gyrocompass.core.artifact import Draft
from gyrocompass.core.errors import ConfigError
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.alignment import (
    ALIGNMENT,
    BY_LOGPROB,
    BY_RATIO,
    BY_REWARD,
    CUT_OFF,
    DISTANCE,
    PREFERRED,
    Figure,
    calibration,
    right_share,
)
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.reward_calibration import load_calibration
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.rewards.registry import REWARDS
from gyrocompass.model.columns import FloatArray, score_logprobs, score_rewards
from gyrocompass.model.fit import check_fit
from gyrocompass.model.open import open_model
from gyrocompass.model.scalar_head import has_scalar_head
from gyrocompass.recipe.stage import (
    ModelName,
    OptionalDocumentsName,
    OptionalModelName,
    OptionalTokensName,
    Workplace,
)
from gyrocompass.recipe.stages.judging import JudgingStage
from gyrocompass.recipe.stages.pairs import groups_of, margins, open_pairs
from gyrocompass.recipe.stages.rollouts import decoder, engine, read_prompts
from gyrocompass.train.answers import Prompt
from gyrocompass.train.config import PRECISIONS
from gyrocompass.train.draw import draw, sums
from gyrocompass.train.rollout import RolloutConfig

SHOWN_SAMPLES = 3


class AlignmentStage(JudgingStage):
    """Preferences and samples of one model, beside its reference."""

    kind: Literal["alignment"] = "alignment"
    version: ClassVar[int] = 2
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
    optional_rewards: tuple[str | dict[str, Any], ...] = ()
    """Measured too where what they need is here: ruff, bandit, a sandbox. What is left out is said."""
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
        if self.optional_rewards and not self.rewards:
            raise ValueError("optional_rewards go beside rewards")
        self.check_rewards()
        try:
            if self.rewards:
                parse_rewards([*self.rewards, *self.optional_rewards])  # together, for names given twice
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def reward_lists(self) -> Mapping[str, Sequence[str | Mapping[str, Any]]]:
        """See `JudgingStage`."""
        optional = {"optional_rewards": self.optional_rewards} if self.optional_rewards else {}
        return {**super().reward_lists(), **optional}

    def outside(self) -> Any:
        """Which of the optional rewards this machine can compute."""
        return self._possible_rewards()[1]

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes alignment.json: figures, a reward model's calibration, and some samples."""
        model = self._open(workplace, "model")
        reference = None
        if self.reference is not None:
            itself = workplace.input("reference") == workplace.input("model")
            reference = model if itself else self._open(workplace, "reference")
        found: dict[str, Any] = {"figures": [], "calibration": None, "samples": [], "left_out": {}}
        if self.pairs is not None:
            self._judge_pairs(workplace, model, reference, found)
        if self.prompts is not None:
            self._judge_samples(workplace, model, reference, found)
        sizes = {figure.name: figure.size for figure in found["figures"] if figure.slice == "total"}
        pairs = max((size for name, size in sizes.items() if name.startswith(PREFERRED)), default=0)
        draft.counts |= {"pairs": pairs, "samples": sizes.get("sample: tokens", 0)}
        found["figures"] = [figure._asdict() for figure in found["figures"]]
        (draft.path / ALIGNMENT).write_text(json.dumps(found, indent=1), encoding="utf-8")

    def _open(self, workplace: Workplace, role: str) -> nn.Module:
        dtype = PRECISIONS[self.precision]
        return open_model(workplace.input(role), dtype=dtype, device=workplace.world.device)

    def _logprobs(self, model: nn.Module, data: TokenDataset) -> FloatArray:
        return score_logprobs(model, self.sequence_length, self.rows_per_batch, data)

    # --- pairs ---

    def _judge_pairs(
        self, workplace: Workplace, model: nn.Module, reference: nn.Module | None, found: dict[str, Any]
    ) -> None:
        data = open_pairs(workplace.input("pairs"), f"stages.{workplace.name}.pairs")
        check_fit(model, data, self.sequence_length, f"stages.{workplace.name}")
        margins_of = {}
        if reference is not None or not has_scalar_head(model):
            own_N = self._logprobs(model, data)
            margins_of[BY_LOGPROB] = margins(data, sums(data, own_N))
            if reference is not None:
                its_N = own_N if reference is model else self._logprobs(reference, data)
                margins_of[BY_RATIO] = margins(data, sums(data, own_N - its_N))
        groups = groups_of(data)
        if has_scalar_head(model):
            margin_P = margins(data, score_rewards(model, self.sequence_length, self.rows_per_batch, data))
            margins_of[BY_REWARD] = margin_P
            saved = load_calibration(workplace.input("model"))
            fitted = (None, None) if saved is None else (saved.temperature, saved.split)
            measured = calibration(margin_P, groups, *fitted)
            found["calibration"] = None if measured is None else measured._asdict()
        slices = [data.slice_names[number] for number in data.slice_D[data.labels["side"] == 1]]
        for name, margin_P in margins_of.items():
            found["figures"] += by_slice(name, right_share(margin_P), slices, groups, is_share=True)

    # --- samples ---

    def _judge_samples(
        self, workplace: Workplace, model: nn.Module, reference: nn.Module | None, found: dict[str, Any]
    ) -> None:
        tokenizer = load_tokenizer(workplace.input("model"))
        longest = self.sequence_length + 1 - self.max_new_tokens
        prompts = read_prompts(workplace.input("prompts"), tokenizer, longest, self.prompt_slices)
        generate = engine(model, tokenizer, RolloutConfig(max_new_tokens=self.max_new_tokens), None)
        asked, samples, data = draw(
            prompts[: self.max_prompts], self.samples_per_prompt, self.seed, generate, decoder(tokenizer)
        )
        tools = self.tools(
            workplace,
            dtype=PRECISIONS[self.precision],
            length=self.sequence_length,
            rows=self.rows_per_batch,
        )
        entries, found["left_out"] = self._possible_rewards()
        rewards = parse_rewards(entries, tools)
        values: dict[str, Sequence[float]] = {
            f"sample: {name}": v for name, v in rewards.scored(samples).parts.items()
        }
        shares = {
            f"sample: {part.reward.name}"
            for part in rewards.parts
            if 0 <= part.reward.low <= part.reward.high <= 1
        }
        values["sample: tokens"] = [float(sample.n_tokens) for sample in samples]
        values[CUT_OFF] = [float(not sample.finished) for sample in samples]
        if reference is not None:
            own_N = self._logprobs(model, data)
            its_N = own_N if reference is model else self._logprobs(reference, data)
            values[DISTANCE] = sums(data, own_N - its_N).tolist()
        slices, groups = [prompt.slice for prompt in asked], [prompt.id for prompt in asked]
        for name, per_sample in values.items():
            is_share = name in shares or name == CUT_OFF
            found["figures"] += by_slice(name, per_sample, slices, groups, is_share=is_share)
        found["samples"] = _shown(asked, samples, self.samples_per_prompt)

    def _possible_rewards(self) -> tuple[list[str | dict[str, Any]], dict[str, str]]:
        """The rewards that can be computed here, and why others that may be missing cannot."""
        entries, left_out = list(self.rewards), {}
        for entry in self.optional_rewards:
            reason = REWARDS[_reward_name(entry)].why_not()
            if reason is None:
                entries.append(entry)
            else:
                left_out[parse_rewards([entry]).parts[0].reward.name] = reason
        return entries, left_out


def _reward_name(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))


def by_slice(
    name: str, values: Any, slices: Sequence[str], groups: Sequence[str], *, is_share: bool = False
) -> list[Figure]:
    """A figure for each slice, and one for all."""
    values_P = np.asarray(values, np.float64)
    found = []
    for slice_name in sorted(set(slices)):
        own = [number for number, of in enumerate(slices) if of == slice_name]
        own_groups = [groups[number] for number in own]
        found.append(Figure.of(name, slice_name, values_P[own], own_groups, is_share=is_share))
    return [*found, Figure.of(name, "total", values_P, groups, is_share=is_share)]


def _shown(asked: Sequence[Prompt], samples: Sequence[Sample], per_prompt: int) -> list[dict[str, str]]:
    return [
        {"prompt": asked[number].text, "completion": samples[number].completion}
        for number in range(0, min(len(samples), SHOWN_SAMPLES * per_prompt), per_prompt)
    ]
