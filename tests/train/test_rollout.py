"""Rollouts: windows of the model's own samples, with what objectives read of them, the same after a resume.

The tiny task: of the tokens that follow a prompt, as many as possible should be the token 5.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import ARCHITECTURE

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.measure.gaming import GamingConfig
from gyrocompass.measure.reward import Part, Sample, WeightedSum
from gyrocompass.model.columns import score_logprobs, score_tokens, score_values
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.sampler import Sampled, Sampling, sample
from gyrocompass.model.scalar_head import attach_scalar_head
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.loop import Outcome, train
from gyrocompass.train.rollout import Prompt, RolloutConfig, RolloutSource
from gyrocompass.train.watch import GamingWatch, WatchConfig

WANTED, END, LENGTH, NEW = 5, 0, 24, 8
PROMPTS = [Prompt(f"p{n}", f"slice-{n % 2}", "made", f"{n}", (n + 1, 7), {}) for n in range(6)]


class Share:
    """The share of a sample's tokens that are one token; as text, tokens are numbers with spaces."""

    low, high = 0.0, 1.0

    def __init__(self, token: int, name: str = "wanted") -> None:
        self.token, self.name = token, name

    def __call__(self, samples: Sequence[Sample], /) -> list[float]:
        written = [sample.completion.split() for sample in samples]
        return [words.count(str(self.token)) / max(1, len(words)) for words in written]


WISH = WeightedSum((Part(Share(WANTED)),))


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def tiny(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return new_causal_lm(ARCHITECTURE | {"attention_dropout": 0.0}, seed=0).to(dtype)


def embedded(model: torch.nn.Module, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
    return sample(model, prompts, seeds, Sampling(NEW, (END,)), slots=8)


def source_of(model: torch.nn.Module, reward: WeightedSum = WISH, **changes: Any) -> RolloutSource:
    settings = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": NEW, **changes}
    more = {name: settings.pop(name) for name in ("reference", "values", "generate") if name in settings}
    generate = more.pop("generate", partial(embedded, model))
    return RolloutSource(
        PROMPTS, generate, decode, reward, RolloutConfig.model_validate(settings), LENGTH, **more
    )


def config(**changes: Any) -> TrainConfig:
    settings = {
        "steps": 6,
        "sequence_length": LENGTH,
        "rows_per_micro_batch": 4,
        "objective": [{"clipped_surrogate": {}}],
        "optimizer": {"learning_rate": 0.05, "weight_decay": 0.0, "schedule": {"shape": "constant"}},
        "guard": {"spike_z": None},
        "checkpoint_every_steps": 2,
    }
    return TrainConfig.model_validate(settings | changes)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def run(folder: Path, settings: TrainConfig, **changes: Any) -> tuple[torch.nn.Module, Outcome]:
    model = tiny()
    return model, train(model, source_of(model, **changes), settings, folder)


def test_a_window_carries_what_objectives_read() -> None:
    model = tiny(torch.float64)
    source = source_of(model, reference=partial(score_logprobs, model, LENGTH, 8))
    window = source.next(0)
    data, packed = window.data, window.packed
    assert data.n_documents == 16 and data.whole_D.all()
    assert set(packed.columns) == {"rollout_logprob", "reference_logprob", "advantage", "reward", "truncated"}
    counted = packed.weight_T > 0
    for name in packed.columns:
        assert np.isfinite(packed.columns[name][counted]).all(), name
    gap = packed.columns["rollout_logprob"] - packed.columns["reference_logprob"]
    assert np.abs(gap[counted]).max() < 1e-6  # the sampler's numbers are the model's own
    reward_S = data.labels["reward"].reshape(4, 4)
    advantage_D = np.array([data.columns["advantage"][end - 1] for end in data.offset_D[1:]])
    np.testing.assert_allclose(advantage_D, (reward_S - reward_S.mean(1, keepdims=True)).ravel(), atol=1e-6)


def test_prompts_come_in_epochs_and_windows_do_not_repeat() -> None:
    source = source_of(tiny(), prompts_per_step=3)
    seen = [[name.split("@")[0] for name in source.next(step).data.document_ids[::4]] for step in range(4)]
    assert sorted(itertools.chain(*seen[:2])) == sorted(itertools.chain(*seen[2:])) == [p.id for p in PROMPTS]
    again = source_of(tiny(), prompts_per_step=3)
    assert [again.next(step).data.document_ids[0] for step in range(4)] == [
        f"{names[0]}@{number}.0" for number, names in enumerate(seen)
    ]


def test_the_reward_rises(tmp_path: Path) -> None:
    run(tmp_path, config(steps=20), advantage={"scale": "batch"})
    rewards = [row["rollout"]["reward"] for row in rows(tmp_path)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    last = rows(tmp_path)[-1]["rollout"]
    assert last["samples"] == 16 and last["reward/wanted"] == pytest.approx(last["reward"])
    assert last["largest_gap_nats"] < 1e-4 and last["staleness_steps"] == 0


def test_equal_rewards_move_nothing(tmp_path: Path) -> None:
    model, _ = run(tmp_path, config(steps=2), reward=WeightedSum((Part(Share(10_000)),)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(tiny().named_parameters())[name]), name
    assert rows(tmp_path)[0]["rollout"]["flat_group_share"] == 1


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_resumed_run_learns_from_the_same_samples(tmp_path: Path, ahead: int) -> None:
    whole, _ = run(tmp_path / "whole", config(), ahead_steps=ahead)
    died = tmp_path / "died"
    calls = itertools.count()

    def dying(model: torch.nn.Module, *asked: Any) -> list[Sampled]:
        if next(calls) == 4 + ahead:
            raise GyroError("the engine failed 4 times in a row")
        return embedded(model, *asked)

    model = tiny()
    with pytest.raises(GyroError, match="failed 4 times"):
        train(model, source_of(model, ahead_steps=ahead, generate=partial(dying, model)), config(), died)
    resumed, _ = run(died, config(), ahead_steps=ahead)
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    plain = [[row["loss"], row["rollout"]] for row in rows(tmp_path / "whole")]
    assert plain == [[row["loss"], row["rollout"]] for row in rows(died)]
    assert [row["rollout"]["staleness_steps"] for row in rows(died)][-1] == ahead


def test_a_window_is_learned_from_as_often_as_asked(tmp_path: Path) -> None:
    model = tiny()
    attach_scalar_head(model)
    values = partial(score_values, model, LENGTH, 8)
    source = source_of(model, updates=3, advantage={"kind": "gae"}, values=values)
    objective = [{"clipped_surrogate": {}}, {"value_loss": {"weight": 0.5}}]
    train(model, source, config(steps=4, objective=objective), tmp_path)
    rewards = [row["rollout"]["reward"] for row in rows(tmp_path)]
    gaps = [row["rollout"]["largest_gap_nats"] for row in rows(tmp_path)]
    assert rewards[0] == rewards[1] == rewards[2] and gaps[0] < 1e-4 < gaps[2]
    assert [row["rollout"]["staleness_steps"] for row in rows(tmp_path)] == [0, 1, 2, 0]
    first, second = source.next(4), source.next(5)
    assert np.array_equal(first.packed.columns["value"], second.packed.columns["value"], equal_nan=True)


def test_gae_brings_values_and_returns(tmp_path: Path) -> None:
    model = tiny()
    attach_scalar_head(model)
    values = partial(score_values, model, LENGTH, 8)
    source = source_of(model, samples_per_prompt=9, advantage={"kind": "gae"}, values=values)
    objective = [{"clipped_surrogate": {}}, {"value_loss": {"weight": 0.5}}]
    train(model, source, config(steps=3, objective=objective), tmp_path)
    window = source.next(3)
    assert {"value", "return"} <= set(window.packed.columns)
    assert float(attach_scalar_head(model).weight.detach().abs().sum()) > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples_per_prompt": 1}, "compare the samples of a prompt, and there is one"),
        ({"max_new_tokens": 40}, "do not fit into rows of 24"),
        ({"advantage": {"beta": 0.1}}, "needs a reference"),
        ({"advantage": {"kind": "gae"}}, "needs a value head"),
        ({"advantage": {"kind": "leave_one_out", "scale": "group"}}, "are not scaled"),
    ],
)
def test_what_cannot_work_is_said_before_any_sample(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        source_of(tiny(), **changes)


def test_a_reward_out_of_its_range_ends_the_run(tmp_path: Path) -> None:
    class Broken(Share):
        def __call__(self, samples: Sequence[Sample], /) -> list[float]:
            return [float("nan")] * len(samples)

    with pytest.raises(GyroError, match="the reward wanted is nan for sample 0"):
        run(tmp_path, config(), reward=WeightedSum((Part(Broken(1)),)))


def test_the_watch_ends_a_run_whose_reward_is_gamed(tmp_path: Path) -> None:
    """The proxy likes the token 5; gold likes any token but that one."""
    model, reference = tiny(), tiny()

    class Other(Share):
        def __call__(self, samples: Sequence[Sample], /) -> list[float]:
            return [1 - value for value in super().__call__(samples)]

    watch = GamingWatch(
        PROMPTS,
        partial(embedded, model),
        decode,
        WISH,
        WeightedSum((Part(Other(WANTED, "other")),)),
        partial(score_tokens, model, LENGTH, 8),
        partial(score_logprobs, reference, LENGTH, 8),
        WatchConfig(gold=("parses",), samples_per_prompt=8, prompts=6, halt=GamingConfig(patience=2)),
        tmp_path,
    )
    settings = config(steps=40, evaluate_every_steps=2)
    outcome = train(model, source_of(model), settings, tmp_path, watch=watch)
    looks = rows(tmp_path, "watch.jsonl")
    assert outcome.stopped_early and outcome.steps < 40
    assert looks[-1]["proxy"]["value"] > looks[0]["proxy"]["value"]
    assert looks[-1]["gold"]["value"] < looks[0]["gold"]["value"]
    assert outcome.best_step is not None and outcome.best_step < outcome.steps
    assert looks[0]["step"] == 0 and looks[0]["kl_nats"] == pytest.approx(0, abs=1e-4)
    assert looks[-1]["kl_nats"] > looks[0]["kl_nats"]
