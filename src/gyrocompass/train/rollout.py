"""On-policy data: prompts, samples of the model, their rewards and advantages, as windows for the loop.

    prompts --Generate--> samples --reward--> rewards --advantages--> rows with columns --pack--> Window

A window is `prompts_per_step` prompts with `samples_per_prompt` samples each. Its tokens carry what policy
objectives read: `rollout_logprob` as the sampler recorded it, `advantage`, and where a reference or a value
head is there `reference_logprob`, `value` and `return`; its documents carry `reward` and `truncated`. Token
ids go from the sampler to the learner as they are: nothing is tokenised again.

The source runs ahead of the learner by `ahead_steps` windows: that many are sampled before they are needed,
and each says how many steps old its weights were when it is learned from (`staleness_steps`). Everything is a
function of the config, the weights and the window's number; windows that wait are part of the checkpoint, so
a resumed run learns from the same samples (law 4). On several ranks each samples its share of the prompts.

Left out: temperatures other than 1 (the learner's log-probabilities are those of the model, and the ratio to
the sampler's would be biased), and sampling while the learner computes.

Shape legend: S samples of a window, N tokens of its dataset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from gyrocompass.core.config import Config, config_hash
from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.data.pack import assemble, bundle, cut, pack
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.advantages import (
    flat_groups,
    generalised_advantages,
    group_advantages,
    leave_one_out,
    token_rewards,
)
from gyrocompass.measure.reward import Sample, WeightedSum
from gyrocompass.model.columns import FloatArray
from gyrocompass.model.sampler import Sampled
from gyrocompass.train.distributed import World
from gyrocompass.train.source import Window


class Generate(Protocol):
    """Goes on from prompts: token ids and seeds in, one sample each out."""

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
        """One sample per prompt, in order."""


Annotate = Callable[[TokenDataset], FloatArray]
"""A number for each token of a dataset, [N]: a reference's log-probabilities, a value head's values."""


class Prompt(NamedTuple):
    """What a sample goes on from, and what its reward is measured against."""

    id: str
    slice: str
    source: str
    text: str
    ids: tuple[int, ...]
    reference: Mapping[str, Any]
    """Fields of the record that rewards read: an answer, tests, a schema."""


class AdvantageConfig(Config):
    """How much better than expected a sample was.

    group: its reward less its group's mean (GRPO; `scale: group` divides by the group's deviation, as first
    published, and weighs hard and easy groups up). leave_one_out: less the mean of the others (RLOO). gae:
    token by token, by the value head (PPO). With `beta` above 0 the distance from the reference is taken off
    the reward: of the whole sample, or with gae of each token.
    """

    kind: Literal["group", "leave_one_out", "gae"] = "group"
    scale: Literal["none", "group", "batch"] = "none"
    beta: float = Field(default=0.0, ge=0)
    gamma: float = Field(default=1.0, ge=0, le=1)
    lambda_: float = Field(default=0.95, ge=0, le=1, alias="lambda")


class RolloutConfig(Config):
    """How many samples a step learns from, and of what age."""

    prompts_per_step: int = Field(default=8, ge=1)
    samples_per_prompt: int = Field(default=4, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    slots: int = Field(default=16, ge=1)
    """Sequences that the embedded engine writes at the same time."""
    ahead_steps: int = Field(default=0, ge=0)
    updates: int = Field(default=1, ge=1)
    """Steps that learn from each window, one after the other (PPO's epochs)."""
    advantage: AdvantageConfig = AdvantageConfig()
    seed: int = Field(default=0, ge=0)


class _Answer(NamedTuple):
    """A sample with its reward, as JSON between ranks and in checkpoints."""

    prompt: int
    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    reward: float
    parts: dict[str, float]
    values: list[float]
    """What the value head said when it was sampled; empty without one."""


class _Waiting(NamedTuple):
    """A window that has been sampled and not learned from."""

    number: int
    step: int
    """When it was sampled."""
    answers: list[_Answer]
    updates: int = 0
    """Steps that have learned from it."""


class RolloutSource:
    """Windows of samples; a `Source`.

    Args:
        prompts: what to go on from; read in an order that the seed decides, again and again.
        generate: the engine, which sees the model as it is when it is called.
        decode: token ids to the text that is rewarded.
        reward: of a sample.
        config: how many.
        length: positions in a row; every prompt with `max_new_tokens` more fits.
        reference: log-probabilities of the reference, for objectives or advantages that read them.
        values: of the value head, for `gae`.
        world: this process among its peers.

    Raises:
        BadInput: no prompt, one that is too long, groups of one, or advantages that lack what they read.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        generate: Generate,
        decode: Callable[[Sequence[int]], str],
        reward: WeightedSum,
        config: RolloutConfig,
        length: int,
        *,
        reference: Annotate | None = None,
        values: Annotate | None = None,
        world: World = World(),  # noqa: B008  (immutable)
    ) -> None:
        self.prompts, self.generate, self.decode, self.reward = prompts, generate, decode, reward
        self.config, self.length, self.world = config, length, world
        self.reference, self.values = reference, values
        self.number = 0
        self.waiting: deque[_Waiting] = deque()
        self.shown: dict[str, float] = {}
        _check(prompts, config, length, has_reference=reference is not None, has_values=values is not None)

    def next(self, step: int) -> Window:
        """The window of a step; sampled now, or `ahead_steps` steps ago."""
        while len(self.waiting) <= self.config.ahead_steps:
            self.waiting.append(_Waiting(self.number, step, self._sample(self.number)))
            self.number += 1
        waiting = self.waiting.popleft()
        if waiting.updates + 1 < self.config.updates:
            self.waiting.appendleft(waiting._replace(updates=waiting.updates + 1))
        return self._window(waiting, step)

    def windows(self) -> None:
        """There is no end."""

    def metrics(self) -> dict[str, float]:
        """What the last window was like: rewards, lengths, ages."""
        return self.shown

    def state(self) -> dict[str, Any]:
        """The number of the next window to sample, and the windows that wait."""
        waiting = [
            [w.number, w.step, [list(answer) for answer in w.answers], w.updates] for w in self.waiting
        ]
        return {"number": self.number, "waiting": waiting}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Source`."""
        self.number = state["number"]
        self.waiting = deque(
            _Waiting(number, step, [_Answer(*answer) for answer in answers], updates)
            for number, step, answers, updates in state["waiting"]
        )

    def fingerprint(self) -> str:
        """Of the prompts, the config and the rewards' names and weights."""
        prompts = [[prompt.id, list(prompt.ids)] for prompt in self.prompts]
        rewards = [[part.reward.name, part.weight] for part in self.reward.parts]
        return config_hash({"prompts": prompts, "config": self.config, "rewards": rewards})

    # --- sampling ---

    def _sample(self, number: int) -> list[_Answer]:
        """All samples of a window, in the order of its prompts, on every rank."""
        drawn = self._drawn(number)
        share = range(
            len(drawn) * self.world.rank // self.world.size,
            len(drawn) * (self.world.rank + 1) // self.world.size,
        )
        asked = [
            (drawn[place], place, nth) for place in share for nth in range(self.config.samples_per_prompt)
        ]
        seeds = [self._seed(number, place, nth) for _, place, nth in asked]
        sampled = self.generate([self.prompts[prompt].ids for prompt, _, _ in asked], seeds)
        samples = [
            as_sample(self.prompts[prompt], one, self.decode)
            for (prompt, _, _), one in zip(asked, sampled, strict=True)
        ]
        scored = self.reward.scored(samples)
        parts = [{name: values[nth] for name, values in scored.parts.items()} for nth in range(len(samples))]
        values = self._values([prompt for prompt, _, _ in asked], sampled)
        own = [
            _Answer(prompt, *one, reward, part, value)
            for (prompt, _, _), one, reward, part, value in zip(
                asked, sampled, scored.total, parts, values, strict=True
            )
        ]
        gathered = self.world.gather_json([list(answer) for answer in own])
        return [_Answer(*answer) for answers in gathered for answer in answers]

    def _values(self, asked: Sequence[int], sampled: Sequence[Sampled]) -> list[list[float]]:
        """What the value head says of each written token, now."""
        if self.values is None or not asked:
            return [[] for _ in asked]
        dataset = TokenDataset.of(
            sample_row(str(nth), self.prompts[prompt], one.token_ids)
            for nth, (prompt, one) in enumerate(zip(asked, sampled, strict=True))
        )
        value_N = self.values(dataset)
        ends = dataset.offset_D[1:].tolist()
        return [
            value_N[end - len(one.token_ids) : end].tolist() for end, one in zip(ends, sampled, strict=True)
        ]

    def _drawn(self, number: int) -> list[int]:
        """The prompts of a window: the permutations of all epochs, one after the other."""
        per_step, total = self.config.prompts_per_step, len(self.prompts)
        drawn = []
        for nth in range(number * per_step, (number + 1) * per_step):
            epoch, place = divmod(nth, total)
            order = np.random.default_rng([self.config.seed, epoch]).permutation(total)
            drawn.append(int(order[place]))
        return drawn

    def _seed(self, number: int, place: int, nth: int) -> int:
        words = np.random.SeedSequence([self.config.seed, number, place, nth]).generate_state(1, np.uint64)
        return int(words[0] >> 20)  # the sampler multiplies it by a million

    # --- a window of them ---

    def _window(self, waiting: _Waiting, step: int) -> Window:
        dataset = TokenDataset.of(
            self._row(waiting.number, nth, one) for nth, one in enumerate(waiting.answers)
        )
        dataset = self._with_advantages(dataset, waiting.answers)
        pieces = cut(dataset, self.length)
        bundles = bundle(dataset, pieces, self.length)
        rows = pack(np.add.reduceat(pieces.length_P, bundles[:-1]), self.length)
        laid = [[piece for b in row for piece in range(bundles[b], bundles[b + 1])] for row in rows]
        self.shown = self._describe(waiting, step)
        return Window(assemble(dataset, pieces, laid, self.length), dataset)

    def _row(self, number: int, nth: int, answer: _Answer) -> TokenRow:
        prompt = self.prompts[answer.prompt]
        before = [float("nan")] * len(prompt.ids)
        return sample_row(
            f"{prompt.id}@{number}.{nth}",
            prompt,
            answer.token_ids,
            columns={"rollout_logprob": [*before, *answer.logprobs]}
            | ({"value": [*before, *answer.values]} if answer.values else {}),
            labels={"reward": answer.reward, "truncated": float(not answer.finished)},
        )

    def _with_advantages(self, dataset: TokenDataset, answers: Sequence[_Answer]) -> TokenDataset:
        """The dataset with the columns that depend on all of its samples."""
        if self.reference is not None:
            dataset = dataset.with_column("reference_logprob", self.reference(dataset))
        config = self.config.advantage
        reward_S = torch.tensor([answer.reward for answer in answers], dtype=torch.float64)
        said_N = np.flatnonzero(dataset.weight_N > 0)
        sequence_K = torch.from_numpy(np.searchsorted(dataset.offset_D, said_N, side="right") - 1)
        logprob_K = _column(dataset, "rollout_logprob", said_N)
        reference_K = logprob_K if self.reference is None else _column(dataset, "reference_logprob", said_N)
        if config.kind == "gae":
            reward_K = token_rewards(reward_S, sequence_K, logprob_K, reference_K, beta=config.beta)
            value_K = _column(dataset, "value", said_N)
            advantage_K, return_K = generalised_advantages(
                reward_K, value_K, sequence_K, gamma=config.gamma, lambda_=config.lambda_
            )
            dataset = dataset.with_column("return", _laid(dataset, said_N, return_K))
        else:
            distance_S = torch.zeros_like(reward_S).index_add(0, sequence_K, logprob_K - reference_K)
            advantage_S = self._group_advantages(reward_S - config.beta * distance_S)
            advantage_K = advantage_S[sequence_K]
        return dataset.with_column("advantage", _laid(dataset, said_N, advantage_K))

    def _group_advantages(self, reward_S: torch.Tensor) -> torch.Tensor:
        group_S = self._groups(len(reward_S))
        if self.config.advantage.kind == "leave_one_out":
            return leave_one_out(reward_S, group_S)
        return group_advantages(reward_S, group_S, scale=self.config.advantage.scale)

    def _groups(self, n_samples: int) -> torch.Tensor:
        return torch.arange(n_samples) // self.config.samples_per_prompt

    def _describe(self, waiting: _Waiting, step: int) -> dict[str, float]:
        answers = waiting.answers
        rewards = np.array([answer.reward for answer in answers])
        lengths = np.array([len(answer.token_ids) for answer in answers])
        described = {
            "samples": len(answers),
            "reward": float(rewards.mean()),
            "reward_deviation": float(rewards.std()),
            "length_tokens": float(lengths.mean()),
            "truncated_share": float(np.mean([not answer.finished for answer in answers])),
            "staleness_steps": float(step - waiting.step),
        }
        if self.config.samples_per_prompt > 1:
            flat = flat_groups(torch.from_numpy(rewards), self._groups(len(rewards)))
            described["flat_group_share"] = len(flat) * self.config.samples_per_prompt / len(rewards)
        for name in answers[0].parts:
            described[f"reward/{name}"] = float(np.mean([answer.parts[name] for answer in answers]))
        return described


def as_sample(prompt: Prompt, sampled: Sampled, decode: Callable[[Sequence[int]], str]) -> Sample:
    """What was written after a prompt, as rewards take it."""
    return Sample(
        prompt=prompt.text,
        completion=decode(sampled.token_ids),
        reference=prompt.reference,
        n_tokens=len(sampled.token_ids),
        finished=sampled.finished,
        prompt_ids=prompt.ids,
        token_ids=sampled.token_ids,
    )


def sample_row(name: str, prompt: Prompt, token_ids: Sequence[int], **more: Any) -> TokenRow:
    """A prompt and what was written after it as a row of tokens, of which the written ones count."""
    n_prompt, n_written = len(prompt.ids), len(token_ids)
    return TokenRow(
        name,
        prompt.slice,
        prompt.source,
        [*prompt.ids, *token_ids],
        [0] * (n_prompt + n_written),
        [0.0] * n_prompt + [1.0] * n_written,
        unit=name,
        **more,
    )


def _column(dataset: TokenDataset, name: str, at_K: NDArray[np.int64]) -> torch.Tensor:
    values_K = dataset.columns[name][at_K]
    if not np.isfinite(values_K).all():
        where = int(np.flatnonzero(~np.isfinite(values_K))[0])
        raise GyroError(
            f"the column {name} of a rollout is not finite",
            where=f"token {where} of {dataset.document_ids[0]} and what was sampled with it",
            fix="look at the weights: a NaN in them, or an overflow in a 16-bit dtype",
        )
    return torch.from_numpy(values_K.astype(np.float64))


def _laid(dataset: TokenDataset, at_K: NDArray[np.int64], values_K: torch.Tensor) -> FloatArray:
    values_N = np.full(dataset.n_tokens, np.nan, np.float32)
    values_N[at_K] = values_K.numpy()
    return values_N


def _check(
    prompts: Sequence[Prompt], config: RolloutConfig, length: int, *, has_reference: bool, has_values: bool
) -> None:
    if not prompts:
        raise BadInput("there is no prompt to sample from", fix="give documents with prompts")
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if len(longest.ids) + config.max_new_tokens > length + 1:
        raise BadInput(
            f"a prompt of {len(longest.ids)} tokens and {config.max_new_tokens} new ones do not fit into "
            f"rows of {length}",
            where=f"prompt {longest.id}",
            fix="raise sequence_length, lower max_new_tokens, or set max_prompt_tokens",
        )
    advantage = config.advantage
    if advantage.kind != "gae" and config.samples_per_prompt < 2:
        raise BadInput(
            f"advantages by {advantage.kind} compare the samples of a prompt, and there is one",
            fix="set samples_per_prompt to 2 or more, or the advantage's kind to gae",
        )
    if advantage.kind != "group" and advantage.scale != "none":
        raise BadInput(
            f"advantages by {advantage.kind} are not scaled", fix="leave `scale` out, or take the kind group"
        )
    if advantage.beta and not has_reference:
        raise BadInput("a distance in the reward needs a reference", fix="name one: `reference: STAGE`")
    if advantage.kind == "gae" and not has_values:
        raise BadInput("gae needs a value head", fix="set `scalar_head: true`")
