"""Data and rollouts in one window: laws 1, 2 and 4, whose tokens an objective counts, a run under a bound.

Shape legend: T positions of a window.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mixed_run
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_run import BLEND, LENGTH, NEW, OBJECTIVE, mixed, own_samples, rollouts_of
from safetensors.torch import load_file
from test_loop import InterruptAfter, assert_parameters_agree, assert_same_run
from tiny_run import VOCABULARY, tiny_data, tiny_model

import processes
from gyrocompass.core.errors import BadInput, Interrupted
from gyrocompass.data.mixture import Sampler
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.objective import Composite, parse_objectives
from gyrocompass.measure.ledger import Ledger
from gyrocompass.model.columns import score_logprobs
from gyrocompass.model.sampler import Sampled
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.loop import Outcome, train
from gyrocompass.train.metrics import read_metrics
from gyrocompass.train.optim import MainParameters
from gyrocompass.train.source import MixedSource, PackedSource, Window
from gyrocompass.train.window import WindowPass, window_gradients

KINDS = {"clipped_surrogate": "rollouts", "reference_kl": "rollouts", "prose": "data", "z_loss": "data"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(**changes: Any) -> TrainConfig:
    plain = {
        "steps": 4,
        "sequence_length": LENGTH,
        "rows_per_step": 5,
        "rows_per_micro_batch": 8,
        "precision": "float64",
        "optimizer": {"learning_rate": 1e-2, "clip_norm": 0.5},
        "guard": {"spike_z": None},
        "objective": OBJECTIVE,
        "blend": BLEND,
    }
    return TrainConfig.model_validate(plain | changes)


def made_up(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
    """An engine without a model: whatever the seed says."""
    found = []
    for seed in seeds:
        random = np.random.default_rng(seed)
        size = int(random.integers(1, NEW + 1))
        ids = random.integers(1, 9, size).tolist()
        found.append(Sampled(ids, (-3 * random.random(size)).tolist(), size < NEW))
    return found


def trained(
    folder: Path, settings_: TrainConfig, *, ahead: int = 0, **keywords: Any
) -> tuple[torch.nn.Module, Outcome]:
    model = tiny_model(settings_, dropout=False)
    source = mixed(model, settings_, ahead_steps=ahead)
    return model, train(model, source, settings_, folder, **keywords)


# --- law 1: partition, and whose tokens an objective counts ---


def passed(window: Window, objective: Composite, settings_: TrainConfig) -> tuple[WindowPass, dict[str, Any]]:
    model = tiny_model(settings_, dropout=False)
    main = MainParameters(model)
    done = window_gradients(model, main, objective, window, settings_)
    return done, {name: p.grad.clone() for name, p in main.trained.items() if p.grad is not None}


def of_kind(kind: str) -> list[Any]:
    """The objectives of one kind, for a window that holds no other."""
    return [entry for entry in OBJECTIVE for given in entry.values() if given["of"] == kind]


@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 9),
    reduction=st.sampled_from(
        [{"by": "token"}, {"by": "sequence"}, {"by": "slice"}, {"by": "constant", "constant": 77.0}]
    ),
)
@settings(deadline=None, max_examples=12)
def test_the_loss_is_that_of_the_two_apart(seed: int, rows: int, reduction: dict[str, Any]) -> None:
    """However it is split: no objective counts a token of the other kind, and none is divided by one."""
    settings_ = config(seed=seed, reduction=reduction, rows_per_micro_batch=rows)
    model = tiny_model(settings_, dropout=False)
    source = mixed(model, settings_, generate=made_up, seed=seed)
    window = source.next(0)
    assert window is not None
    whole, gradient = passed(window, parse_objectives(OBJECTIVE).within(source.slices()), settings_)

    plain = config(seed=seed, reduction=reduction, rows_per_micro_batch=1000)
    again = mixed(model, plain, generate=made_up, seed=seed)
    loss, summed = 0.0, dict.fromkeys(gradient, torch.tensor(0.0, dtype=torch.float64))
    for kind, part in (("data", again.data), ("rollouts", again.rollouts)):
        apart = part.next(0)
        assert apart is not None
        own = parse_objectives(of_kind(kind)).within(part.slices())
        done, own_gradient = passed(apart, own, plain)
        loss += done.loss
        summed = {name: summed[name] + g for name, g in own_gradient.items()}
        for name in own.names:
            assert whole.record._objectives[name] == pytest.approx(done.record._objectives[name], rel=1e-9)
    assert whole.loss == pytest.approx(loss, rel=1e-10)
    for name, g in gradient.items():
        torch.testing.assert_close(g, summed[name], rtol=1e-9, atol=1e-13)


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    settings_ = config(rows_per_micro_batch=2)
    one, outcome = trained(tmp_path / "one", settings_)
    (tmp_path / "two").mkdir()
    arguments = [str(tmp_path / "two"), settings_.model_dump_json()]
    assert processes.run_ranks(2, mixed_run.main, arguments) == [0, 0]
    two = load_file(tmp_path / "two" / "result.safetensors")
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(two[name], parameter.detach(), rtol=1e-9, atol=1e-11)
    ledger = Ledger.load(tmp_path / "two" / "ledger.parquet")
    assert ledger.total.count == outcome.ledger.total.count
    assert ledger.total.value == pytest.approx(outcome.ledger.total.value, rel=1e-9)


# --- law 2: accounting ---


def test_every_token_is_counted_once_under_its_own_name(tmp_path: Path) -> None:
    settings_, data = config(), tiny_data()
    model = tiny_model(settings_, dropout=False)
    outcome = train(model, mixed(model, settings_, generate=made_up), settings_, tmp_path)
    expected: dict[str, int] = {}
    texts = Sampler(data, settings_.sampler())
    for packed, _ in zip(texts, range(4), strict=False):
        for index in packed.slice_T[packed.weight_T > 0]:
            name = data.slice_names[index]
            expected[name] = expected.get(name, 0) + 1
    rollouts = rollouts_of(made_up)
    for step in range(4):
        samples = rollouts.next(step)
        for index, row in enumerate(samples.data.rows()):
            name = f"rollouts/{samples.data.slice_names[samples.data.slice_D[index]]}"
            expected[name] = expected.get(name, 0) + int(np.count_nonzero(row.weights))
    counts = {name: sums.count for name, sums in outcome.ledger.items("slice")}
    assert counts == expected and len(counts) == 4
    assert sum(counts.values()) == outcome.ledger.total.count
    sources = {name: sums.count for name, sums in outcome.ledger.items("source")}
    assert set(sources) == {"source-0", "source-1", "rollouts/source-0"}
    objectives = {name: sums.count for name, sums in outcome.ledger.items("objective")}
    samples_ = counts["rollouts/slice-0"] + counts["rollouts/slice-1"]
    assert objectives == {
        "clipped_surrogate": samples_,
        "reference_kl": samples_,
        "prose": counts["slice-0"],
        "z_loss": counts["slice-0"] + counts["slice-1"],
    }
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert set(row["slice_tokens"]) == set(counts) and sum(row["slice_tokens"].values()) == row["tokens"]
        in_samples = sum(n for name, n in row["slice_tokens"].items() if name.startswith("rollouts/"))
        assert row["rollout"]["samples"] == 16 and row["rollout"]["count"] == in_samples


def test_a_window_takes_its_share_of_each() -> None:
    settings_ = config()
    source = mixed(tiny_model(settings_, dropout=False), settings_, generate=made_up)
    window = source.next(0)
    assert window is not None
    packed, data = window.packed, window.data
    texts = next(Sampler(tiny_data(), settings_.sampler()))
    own = packed.take(0, texts.rows)
    assert np.array_equal(own.token_T, texts.token_T) and np.array_equal(own.weight_T, texts.weight_T)
    assert texts.rows == settings_.rows_per_step
    assert sum(name.startswith("p") and "@" in name for name in data.document_ids) == 16
    sampled_T = np.isfinite(packed.columns["advantage"])
    assert sampled_T.any() and not sampled_T[: texts.rows * LENGTH].any()
    assert np.isfinite(packed.columns["reference_logprob"][packed.weight_T > 0]).all()  # both bring theirs


# --- law 4: resume ---


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_interrupted_run_goes_on_bit_identical(tmp_path: Path, ahead: int) -> None:
    settings_ = config(steps=5, precision="float32")
    whole, _ = trained(tmp_path / "whole", settings_, ahead=ahead)
    with pytest.raises(Interrupted):
        trained(tmp_path / "run", settings_, ahead=ahead, progress=InterruptAfter(3))
    resumed, _ = trained(tmp_path / "run", settings_, ahead=ahead)
    assert_parameters_agree(resumed, whole, rtol=0, atol=0)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    for row in (*rows[0], *rows[1]):
        del row["time_s"], row["tokens_per_second"]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("killed_at", [2, 5])
def test_a_killed_run_resumes_bit_identical(tmp_path: Path, killed_at: int) -> None:
    settings_ = config(steps=6, precision="float32", checkpoint_every_steps=2)

    def go(name: str, *options: str) -> int:
        (tmp_path / name).mkdir(exist_ok=True)
        arguments = [str(tmp_path / name), settings_.model_dump_json(), "--ahead", "1", *options]
        return processes.run(mixed_run.main, arguments)

    assert go("whole") == 0
    assert go("killed", "--kill-at-step", str(killed_at)) == -9
    assert go("killed") == 0
    (tmp_path / "whole" / "run" / "evaluations.jsonl").touch()
    (tmp_path / "killed" / "run" / "evaluations.jsonl").touch()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_other_texts_or_other_samples_are_another_run(tmp_path: Path) -> None:
    settings_ = config(steps=1)
    trained(tmp_path, settings_)
    with pytest.raises(BadInput, match="a run with another config, data or model"):
        trained(tmp_path, settings_, ahead=1)
    model = tiny_model(settings_, dropout=False)
    other = MixedSource(
        PackedSource(tiny_data(seed=5), settings_.sampler()), mixed(model, settings_).rollouts
    )
    with pytest.raises(BadInput, match="a run with another config, data or model"):
        train(model, other, settings_, tmp_path)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"nll": {}}, "the run has data and rollouts, and the objective nll does not say which it is about"),
        ({"nll": {"of": "rollouts", "slices": ["slice-0"]}}, r"did you mean rollouts/slice-0\?"),
        ({"nll": {"of": "data", "slices": ["slice0"]}}, r"did you mean slice-0\?"),
        ({"reinforce": {"of": "data"}}, "column 'advantage' has no finite number .* train on rollouts"),
    ],
)
def test_an_objective_that_does_not_fit_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    settings_ = config(objective=[entry, {"clipped_surrogate": {"of": "rollouts"}}], blend=None)
    model = tiny_model(settings_, dropout=False)
    with pytest.raises(BadInput) as raised:
        train(model, mixed(model, settings_, generate=made_up), settings_, tmp_path)
    assert re.search(message, str(raised.value).replace("\n", " ")), str(raised.value)


def test_a_run_of_one_kind_knows_no_other(tmp_path: Path) -> None:
    settings_ = config(objective=[{"reinforce": {"of": "rollouts"}}], blend=None)
    with pytest.raises(BadInput, match="is of rollouts, and the run has only data"):
        train(tiny_model(settings_, dropout=False), tiny_data(), settings_, tmp_path)
    data_only = config(objective=[{"nll": {"of": "data"}}], blend=None)
    plain = config(objective=["nll"], blend=None)
    both = []
    for name, chosen in (("said", data_only), ("plain", plain)):
        model = tiny_model(chosen, dropout=False)
        both.append(model)
        train(model, tiny_data(), chosen, tmp_path / name)
    assert_parameters_agree(*both, rtol=0, atol=0)


def test_data_that_is_called_as_samples_are_is_refused() -> None:
    settings_, data = config(), tiny_data()
    object.__setattr__(data, "slice_names", ("rollouts/slice-0", "slice-1"))
    with pytest.raises(BadInput, match="the data has a slice rollouts/slice-0"):
        MixedSource(PackedSource(data, settings_.sampler()), rollouts_of(made_up))


def test_doremi_weighs_the_slices_of_the_data_alone(tmp_path: Path) -> None:
    settings_ = config(blend=BLEND | {"doremi": {"rate": 0.5}})
    model = tiny_model(settings_, dropout=False)
    train(model, mixed(model, settings_, generate=made_up), settings_, tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["slice_weights"]
    assert set(last) == {"slice-0", "slice-1"} and last["slice-0"] != last["slice-1"]
    assert all(np.isfinite(list(last.values())))


# --- a constrained run, beside one without the constraint ---


def prose() -> TokenDataset:
    """Texts that count up by one, two or three: a language that a tiny model learns."""
    rows = []
    for number in range(24):
        size = 20 + number % 9
        ids = [1 + (number + (1 + number % 3) * place) % (VOCABULARY - 1) for place in range(size)]
        rows.append(TokenRow(f"text-{number}", "prose", "made", ids, [1] * size, [1.0] * size))
    return TokenDataset.of(rows)


def learning(**changes: Any) -> TrainConfig:
    optimizer = {"learning_rate": 5e-3, "weight_decay": 0.0, "schedule": {"shape": "constant"}}
    plain = {"precision": "float32", "rows_per_step": 8, "rows_per_micro_batch": 16, "blend": None}
    return config(**{**plain, "optimizer": optimizer, "checkpoint_every_steps": 1000, **changes})


def test_reward_rises_while_the_loss_on_prose_is_held_under_a_bound(tmp_path: Path) -> None:
    """The issue's example. Reward wants one token everywhere, which prose has once in a while."""
    data, bound = prose(), 0.02
    first = tiny_model(learning(), dropout=False)
    at_first = {"steps": 300, "objective": ["nll"], "optimizer": {"learning_rate": 0.02, "weight_decay": 0.0}}
    train(first, data, learning(**at_first), tmp_path / "first")
    data = data.with_column("reference_logprob", score_logprobs(first, LENGTH, 8, data))

    def excess_nats(model: torch.nn.Module) -> float:
        """Over all texts, as the run leaves the model."""
        own_N = score_logprobs(model, LENGTH, 8, data)
        return float(np.nanmean(data.columns["reference_logprob"] - own_N))

    def run(name: str, weight: float, **changes: Any) -> tuple[float, list[dict[str, Any]]]:
        kept = {"excess_nll": {"name": "prose", "of": "data", "slices": ["prose"], "weight": weight}}
        settings_ = learning(objective=[{"clipped_surrogate": {"of": "rollouts"}}, kept], **changes)
        model = copy.deepcopy(first)
        rollouts = rollouts_of(partial(own_samples, model), advantage={"scale": "batch"})
        source = MixedSource(PackedSource(data, settings_.sampler()), rollouts)
        train(model, source, settings_, tmp_path / name)
        return excess_nats(model), read_metrics(tmp_path / name / "metrics.jsonl")

    def reward(rows: list[dict[str, Any]]) -> float:
        return float(np.mean([row["rollout"]["reward"] for row in rows]))

    lagrangian = {"objective": "prose", "bound": bound, "rate": 3.0}
    free_excess, free = run("free", 0.0, steps=40)
    held_excess, held = run("held", 1.0, steps=100, blend={"lagrangian": lagrangian})
    assert reward(free[-10:]) > reward(free[:5]) + 0.5 and free_excess > 25 * bound
    assert reward(held[-10:]) > reward(held[:5]) + 0.5
    assert held_excess < bound
    assert np.mean([row["objective"]["prose"] for row in held[50:]]) < bound  # in the mean over steps
    assert max(row["objective"]["prose"] for row in held) > bound  # it had to be held
    weights = [row["objective_weights"]["prose"] for row in held]
    assert weights[0] == 1.0 and max(weights) > 1.2
