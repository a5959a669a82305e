"""Rollouts: windows of the model's own samples, with what objectives read of them, the same after a resume.

The tiny task: of the tokens that follow a prompt, as many as possible should be the token 5.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import ARCHITECTURE

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.gaming import GamingConfig
from gyrocompass.measure.reward import Part, Sample, WeightedSum
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.model.columns import score_logprobs, score_tokens, score_values
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.sampler import Sampled, Sampling, sample
from gyrocompass.model.scalar_head import attach_scalar_head
from gyrocompass.train.answers import FloatArray, Prompt
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.distributed import World
from gyrocompass.train.loop import Outcome, train
from gyrocompass.train.rollout import RolloutConfig, RolloutSource
from gyrocompass.train.watch import GamingWatch, WatchConfig

WANTED, END, LENGTH, NEW = 5, 0, 24, 8
PATIENCE_S = 60
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
    more = {
        name: settings.pop(name)
        for name in ("reference", "values", "generate", "served", "world")
        if name in settings
    }
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


# --- an engine that is served elsewhere ---


def written(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, weights_step: int | None = None
) -> list[Sampled]:
    """What a server answers: the seed decides, not the learner."""
    sizes = [1 + seed % NEW for seed in seeds]
    return [Sampled([WANTED] * size, [-1.0] * size, True, weights_step) for size in sizes]


def test_a_served_engine_writes_ahead_while_the_learner_computes() -> None:
    """The second window cannot be written before the first has been given to the learner."""
    learns, calls = threading.Event(), itertools.count()

    def generate(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
        if next(calls) == 1:
            assert learns.wait(PATIENCE_S), "the learner waits for a window that it does not need"
        return written(prompts, seeds)

    source = source_of(tiny(), generate=generate, served=True, ahead_steps=1)
    first = source.next(0)
    learns.set()
    second = source.next(1)
    plain = source_of(tiny(), generate=written, served=True)
    for step, window in enumerate((first, second)):
        again = plain.next(step)
        assert again.data.document_ids == window.data.document_ids
        assert np.array_equal(again.packed.token_T, window.packed.token_T)


@pytest.mark.parametrize("served", [False, True])
def test_a_checkpoint_holds_what_it_would_hold_had_nothing_run_beside_it(served: bool) -> None:
    """Law 4: what was asked for is awaited, so the state does not tell how fast the engine is."""
    generate = partial(written, weights_step=0)
    plain, source, resumed = (
        source_of(tiny(), generate=generate, served=served, ahead_steps=ahead) for ahead in (0, 2, 2)
    )
    source.next(0)
    state = json.loads(json.dumps(source.state()))
    assert state["number"] == 3 and [entry[:2] for entry in state["waiting"]] == [[1, 0], [2, 0]]
    resumed.restore(state)
    assert json.loads(json.dumps(resumed.state())) == state
    plain.next(0)
    for step in (1, 2, 3, 4):
        one, other, apart = (which.next(step) for which in (resumed, source, plain))
        assert np.array_equal(one.packed.token_T, other.packed.token_T)
        assert np.array_equal(one.packed.token_T, apart.packed.token_T)
        assert resumed.metrics() == source.metrics()


def test_a_run_whose_served_engine_dies_resumes_bit_identical(tmp_path: Path) -> None:
    """What the engine could not write is asked for again; the checkpoint before it is needed is whole."""
    whole = tiny()
    train(whole, source_of(whole, generate=written, served=True, ahead_steps=2), config(), tmp_path / "whole")
    calls = itertools.count()

    def dying(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
        if next(calls) >= 5:  # asked for in step 4 and in flight at its checkpoint, needed in step 6
            raise GyroError("the engine failed 4 times in a row")
        return written(prompts, seeds)

    died, model = tmp_path / "died", tiny()
    with pytest.raises(GyroError, match="failed 4 times"):
        train(model, source_of(model, generate=dying, served=True, ahead_steps=2), config(), died)
    saved = json.loads((died / "step-00000004" / "state.json").read_text())["source"]
    assert saved["number"] == 5 and [entry[0] for entry in saved["waiting"]] == [4]
    assert len(rows(died)) == 5
    resumed = tiny()
    train(resumed, source_of(resumed, generate=written, served=True, ahead_steps=2), config(), died)
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_rank_whose_engine_fails_ends_all_ranks() -> None:
    """The others do not wait for samples that never come."""

    class OneOfTwo(World):
        def gather_json(self, value: Any) -> list[Any]:
            return [value, [[], "the engine failed 4 times in a row"]]

    source = source_of(tiny(), generate=written, world=OneOfTwo(0, 2))
    with pytest.raises(GyroError, match="sampling failed on rank 1: the engine failed 4 times"):
        source.next(0)


def test_staleness_counts_from_the_weights_that_drew_a_sample() -> None:
    """The model's own are those of the step; a server's are those it names, and unknown if it names none."""
    metrics = {}
    for name, served, weights_step in (("own", False, 40), ("named", True, 40), ("unnamed", True, None)):
        generate = partial(written, weights_step=weights_step)
        source = source_of(tiny(), generate=generate, served=served, ahead_steps=1)
        for step in (50, 51):
            source.next(step)
        metrics[name] = source.metrics()
    assert metrics["own"]["staleness_steps"] == 1 and "asked_steps_ago" not in metrics["own"]
    assert metrics["named"]["staleness_steps"] == 11 and metrics["named"]["asked_steps_ago"] == 1
    assert "staleness_steps" not in metrics["unnamed"] and metrics["unnamed"]["asked_steps_ago"] == 1


def test_the_oldest_weights_count() -> None:
    def generate(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
        return [one._replace(weights_step=8 - n % 2) for n, one in enumerate(written(prompts, seeds))]

    source = source_of(tiny(), generate=generate, served=True)
    source.next(8)
    assert source.metrics()["staleness_steps"] == 1


def test_the_fingerprint_covers_what_decides_a_window() -> None:
    def of(prompts: Sequence[Prompt] = PROMPTS, rewards: Sequence[Any] = ("parses",), **more: Any) -> str:
        settings, reward = RolloutConfig(max_new_tokens=NEW), parse_rewards(rewards)
        return RolloutSource(prompts, written, decode, reward, settings, LENGTH, **more).fingerprint()

    def reference(data: TokenDataset) -> FloatArray:
        return np.zeros(data.n_tokens, np.float32)

    def answered(answer: str) -> str:
        return of([prompt._replace(reference={"answer": answer}) for prompt in PROMPTS])

    length = {"target": 9, "slack": 5}
    others = [
        answered("4"),
        answered("5"),
        of([prompt._replace(slice="other") for prompt in PROMPTS]),
        of(rewards=[{"length": length}]),
        of(rewards=[{"length": length | {"slack": 6}}]),
        of(rewards=[{"length": length | {"weight": 0.5}}]),
        of(reference=reference),
    ]
    assert len({of(), *others}) == 1 + len(others)
    assert answered("4") == others[0] and of(rewards=[{"length": dict(length)}]) == others[3]


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
