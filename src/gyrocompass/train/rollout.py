"""On-policy data: prompts, samples of the model, their rewards and advantages, as windows for the loop.

    prompts --Generate--> samples --reward--> rewards --advantages--> rows with columns --pack--> Window

A window is `prompts_per_step` prompts with `samples_per_prompt` samples each. Its tokens carry what policy
objectives read: `rollout_logprob` as the sampler recorded it, `advantage`, and where a reference or a value
head is there `reference_logprob`, `value` and `return`; its documents carry `reward` and `truncated`. Token
ids go from the sampler to the learner as they are: nothing is tokenised again.

The source runs ahead of the learner by `ahead_steps` windows: that many are asked for before they are needed.
Everything is a function of the config, the weights and the window's number; windows that wait are part of the
checkpoint, so a resumed run learns from the same samples (law 4). On several ranks each samples its share of
the prompts.

An engine that is served elsewhere writes the windows ahead while the learner computes: one thread waits for
its answers, in order. All else (rewards, what ranks exchange) happens where the answers are taken up, in the
learner's own thread; a checkpoint takes up all that were asked for, and so holds what it would hold had
nothing run beside it. Its weights are not ours: `staleness_steps` counts from the step that the engine names
with its answers, and where it names none there is only `asked_steps_ago`, below which staleness cannot be.

Left out: temperatures other than 1 (the learner's log-probabilities are those of the model, and the ratio to
the sampler's would be biased); sampling beside the learner with the model itself, whose weights move; and
with a value head, which is to say what it thought when the samples were asked for.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field

from gyrocompass.core.config import Config, config_hash
from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.data.pack import assemble, bundle, cut, pack
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.loss.advantages import flat_groups
from gyrocompass.loss.objective import Kind
from gyrocompass.measure.reward import WeightedSum
from gyrocompass.model.sampler import Sampled
from gyrocompass.train.answers import (
    AdvantageConfig,
    Annotate,
    Answer,
    Prompt,
    answer_row,
    as_sample,
    groups,
    sample_row,
    with_advantages,
)
from gyrocompass.train.distributed import World
from gyrocompass.train.source import Window


class Generate(Protocol):
    """Goes on from prompts: token ids and seeds in, one sample each out."""

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
        """One sample per prompt, in order."""


class RolloutConfig(Config):
    """How many samples a step learns from, and of what age."""

    prompts_per_step: int = Field(default=8, ge=1)
    samples_per_prompt: int = Field(default=4, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    slots: int = Field(default=16, ge=1)
    """Sequences that the embedded engine writes at the same time."""
    ahead_steps: int = Field(default=0, ge=0)
    """Windows that are asked for before they are needed; a served engine writes them meanwhile."""
    updates: int = Field(default=1, ge=1)
    """Steps that learn from each window, one after the other (PPO's epochs)."""
    advantage: AdvantageConfig = AdvantageConfig()
    seed: int = Field(default=0, ge=0)

    @property
    def samples(self) -> int:
        """Of a window."""
        return self.prompts_per_step * self.samples_per_prompt


class _Waiting(NamedTuple):
    """A window that has been asked for and not learned from."""

    number: int
    step: int
    """When it was asked for."""
    answers: list[Answer] | None = None
    """None until they are taken up."""
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
        served: the engine computes elsewhere, with weights that it alone knows the age of.
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
        served: bool = False,
        world: World = World(),  # noqa: B008  (immutable)
    ) -> None:
        self.prompts, self.generate, self.decode, self.reward = prompts, generate, decode, reward
        self.config, self.length, self.world = config, length, world
        self.reference, self.values = reference, values
        self.served = served
        self.number = 0
        self.waiting: deque[_Waiting] = deque()
        self.shown: dict[str, float] = {}
        beside = served and values is None and config.ahead_steps > 0
        self._thread = ThreadPoolExecutor(1, "rollouts") if beside else None
        self._asked: dict[int, Future[list[Sampled]]] = {}
        """What the thread is at, by the number of the window."""
        _check(prompts, config, length, has_reference=reference is not None, has_values=values is not None)

    def next(self, step: int) -> Window:
        """The window of a step; asked for now, or `ahead_steps` steps ago."""
        while len(self.waiting) <= self.config.ahead_steps:
            self.waiting.append(self._ask(_Waiting(self.number, step)))
            self.number += 1
        waiting = self.waiting[0] = self._taken_up(self.waiting[0])
        self.waiting.popleft()
        if waiting.updates + 1 < self.config.updates:
            self.waiting.appendleft(waiting._replace(updates=waiting.updates + 1))
        return self._window(waiting, step)

    def windows(self) -> None:
        """There is no end."""

    def slices(self) -> Mapping[Kind, Sequence[str]]:
        """Those of the prompts."""
        return {"rollouts": sorted({prompt.slice for prompt in self.prompts})}

    def metrics(self) -> dict[str, float]:
        """What the last window was like: rewards, lengths, ages."""
        return self.shown

    def state(self) -> dict[str, Any]:
        """The number of the next window to sample, and the windows that wait; those not written are awaited.

        What the engine fails at is left out, to be asked for again: `next` says that it failed.
        """
        try:
            for place, waiting in enumerate(self.waiting):
                self.waiting[place] = self._taken_up(waiting)
        except GyroError:
            pass
        ready = [
            [number, step, [list(answer) for answer in answers], updates]
            for number, step, answers, updates in takewhile(lambda w: w.answers is not None, self.waiting)
            if answers is not None
        ]
        missing = len(self.waiting) - len(ready)
        return {"number": self.number - missing, "waiting": ready}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Source`."""
        for asked in self._asked.values():
            asked.cancel()
        self._asked.clear()
        self.number = state["number"]
        self.waiting = deque(
            _Waiting(number, step, [Answer(*answer) for answer in answers], updates)
            for number, step, answers, updates in state["waiting"]
        )

    def fingerprint(self) -> str:
        """Of the prompts and their answers, the config, the rewards and whether there is a reference.

        Rewards are with what they were told. The engine is not in it: a run may go on with another server of
        the same model.
        """
        prompts = json.dumps(
            [prompt._asdict() | {"reference": dict(prompt.reference)} for prompt in self.prompts],
            sort_keys=True,
        )
        asked = {"prompts": prompts, "config": self.config, "rewards": self.reward.described()}
        return config_hash(asked | {"reference": self.reference is not None})

    # --- sampling ---

    def _ask(self, waiting: _Waiting) -> _Waiting:
        """Have a window written: now, or by the thread while the learner computes."""
        if self._thread is None:
            return self._taken_up(waiting)
        self._asked[waiting.number] = self._thread.submit(self._sampled, waiting.number)
        return waiting

    def _taken_up(self, waiting: _Waiting) -> _Waiting:
        """The window with its answers, in the order of its prompts, on every rank; waits for them.

        Raises:
            GyroError: the engine or a reward failed, here or on another rank.
        """
        if waiting.answers is not None:
            return waiting
        own: list[Answer] = []
        failure: GyroError | None = None
        try:
            asked = self._asked.get(waiting.number)
            sampled = self._sampled(waiting.number) if asked is None else asked.result()
            own = self._judged(waiting, sampled)
        except GyroError as error:
            failure = error
        said = None if failure is None else str(failure)
        gathered = self.world.gather_json([[list(answer) for answer in own], said])
        for rank, (_, failed) in enumerate(gathered):
            if failed is not None:
                raise failure or GyroError(f"sampling failed on rank {rank}: {failed}")
        self._asked.pop(waiting.number, None)
        return waiting._replace(answers=[Answer(*answer) for answers, _ in gathered for answer in answers])

    def _places(self, number: int) -> list[tuple[int, int, int]]:
        """This rank's share of a window: the prompt of each sample, its place, and the how-manieth it is."""
        drawn = self._drawn(number)
        share = range(
            len(drawn) * self.world.rank // self.world.size,
            len(drawn) * (self.world.rank + 1) // self.world.size,
        )
        return [
            (drawn[place], place, nth) for place in share for nth in range(self.config.samples_per_prompt)
        ]

    def _sampled(self, number: int) -> list[Sampled]:
        """What the engine writes; nothing here reads what the learner changes, but the engine itself."""
        asked = self._places(number)
        seeds = [self._seed(number, place, nth) for _, place, nth in asked]
        return self.generate([self.prompts[prompt].ids for prompt, _, _ in asked], seeds)

    def _judged(self, waiting: _Waiting, sampled: Sequence[Sampled]) -> list[Answer]:
        """This rank's samples with their rewards."""
        prompts = [prompt for prompt, _, _ in self._places(waiting.number)]
        samples = [
            as_sample(self.prompts[prompt], one, self.decode)
            for prompt, one in zip(prompts, sampled, strict=True)
        ]
        scored = self.reward.scored(samples)
        parts = [{name: values[nth] for name, values in scored.parts.items()} for nth in range(len(samples))]
        known = [one if self.served else one._replace(weights_step=waiting.step) for one in sampled]
        return [
            Answer(prompt, *one, reward, part, value)
            for prompt, one, reward, part, value in zip(
                prompts, known, scored.total, parts, self._values(prompts, sampled), strict=True
            )
        ]

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
        assert waiting.answers is not None, "taken up"
        dataset = TokenDataset.of(
            answer_row(f"{self.prompts[one.prompt].id}@{waiting.number}.{nth}", self.prompts[one.prompt], one)
            for nth, one in enumerate(waiting.answers)
        )
        dataset = with_advantages(
            dataset, waiting.answers, self.config.samples_per_prompt, self.config.advantage, self.reference
        )
        pieces = cut(dataset, self.length)
        bundles = bundle(dataset, pieces, self.length)
        rows = pack(np.add.reduceat(pieces.length_P, bundles[:-1]), self.length)
        laid = [[piece for b in row for piece in range(bundles[b], bundles[b + 1])] for row in rows]
        self.shown = self._described(waiting.answers, step - waiting.step, step)
        return Window(assemble(dataset, pieces, laid, self.length), dataset)

    def _described(self, answers: Sequence[Answer], asked_steps_ago: int, step: int) -> dict[str, float]:
        rewards = np.array([answer.reward for answer in answers])
        lengths = np.array([len(answer.token_ids) for answer in answers])
        described = {
            "samples": len(answers),
            "reward": float(rewards.mean()),
            "reward_deviation": float(rewards.std()),
            "length_tokens": float(lengths.mean()),
            "truncated_share": float(np.mean([not answer.finished for answer in answers])),
        }
        if self.served:
            described["asked_steps_ago"] = float(asked_steps_ago)
        drawn_with = [answer.weights_step for answer in answers if answer.weights_step is not None]
        if len(drawn_with) == len(answers):
            described["staleness_steps"] = float(step - min(drawn_with))
        if self.config.samples_per_prompt > 1:
            flat = flat_groups(
                torch.from_numpy(rewards), groups(len(rewards), self.config.samples_per_prompt)
            )
            described["flat_group_share"] = len(flat) * self.config.samples_per_prompt / len(rewards)
        for name in answers[0].parts:
            described[f"reward/{name}"] = float(np.mean([answer.parts[name] for answer in answers]))
        return described


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
