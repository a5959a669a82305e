"""Scheduled sampling in the loop: laws 1 and 4, and the NLL under gold inputs beside the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from test_loop import (
    InterruptAfter,
    assert_parameters_agree,
    config,
    trained,
)
from tiny_run import tiny_data, tiny_model

import processes
from gyrocompass.core.errors import Interrupted
from gyrocompass.loss.registry import OBJECTIVES, objective
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs
from gyrocompass.model.score import score_dataset
from gyrocompass.recipe.stages.train import TrainStage
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.metrics import read_metrics

OBJECTIVE: list[Any] = ["nll", {"unlikelihood": {"window": 8, "weight": 0.5}}]
RAMP = {"epsilon": {"linear": {"from": 0.0, "to": 0.9, "steps": 2}}, "seed": 5}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def sampled(**changes: Any) -> TrainConfig:
    return config(**{"objective": OBJECTIVE, "scheduled_sampling": RAMP, **changes})


def rows_of(folder: Path, *keys: str) -> list[list[Any]]:
    return [[row[key] for key in keys] for row in read_metrics(folder / "metrics.jsonl")]


# --- law 1: partition ---


@pytest.mark.parametrize("blend", [None, {"gradnorm": {"every_steps": 1, "rate": 0.1}}])
def test_micro_batches_change_nothing(blend: Any, tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", sampled(blend=blend))
    split, _ = trained(tmp_path / "split", sampled(blend=blend, rows_per_micro_batch=1))
    assert_parameters_agree(split, whole, rtol=1e-10, atol=1e-12)
    ours, theirs = (rows_of(tmp_path / name, "teacher_forced_nll_nats") for name in ("split", "whole"))
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-10)


def test_an_objective_of_the_whole_window_reads_the_same_inputs_in_both_passes(tmp_path: Path) -> None:
    def together(log_probs: TokenLogProbs, batch: Batch) -> Terms:
        mean = log_probs.logprob_T.sum() / (batch.weight_T > 0).sum()
        return Terms((log_probs.logprob_T - mean).square(), batch.weight_T)

    objective(whole_window=True)(together)
    try:
        options = {"objective": ["together", *OBJECTIVE]}
        whole, _ = trained(tmp_path / "whole", sampled(**options))
        split, _ = trained(tmp_path / "split", sampled(**options, rows_per_micro_batch=2))
    finally:
        del OBJECTIVES["together"]
    assert_parameters_agree(split, whole, rtol=1e-9, atol=1e-11)


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    settings_ = sampled(rows_per_step=5, rows_per_micro_batch=2)
    one, _ = trained(tmp_path / "one", settings_)
    (tmp_path / "two").mkdir()
    arguments = [str(tmp_path / "two"), settings_.model_dump_json(), "--no-dropout"]
    assert processes.run_ranks(2, tiny_run.main, arguments) == [0, 0]
    two = load_file(tmp_path / "two" / "result.safetensors")
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(two[name], parameter.detach(), rtol=1e-10, atol=1e-12)
    ours, theirs = (rows_of(tmp_path / n, "teacher_forced_nll_nats") for n in ("one", "two/run"))
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-10)


# --- law 4: resume ---


def test_an_interrupted_run_goes_on_bit_identical(tmp_path: Path) -> None:
    """With dropout, whose random state the first pass must leave alone."""
    from gyrocompass.train.loop import train

    def run(folder: Path, **keywords: Any) -> torch.nn.Module:
        settings_ = sampled(steps=4, precision="float32", checkpoint_every_steps=1)
        model = tiny_model(settings_)
        torch.manual_seed(0)
        train(model, tiny_data(), settings_, folder, **keywords)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "run", progress=InterruptAfter(2))
    assert_parameters_agree(run(tmp_path / "run"), whole, rtol=0, atol=0)
    keys = ("step", "loss", "nll_nats", "teacher_forced_nll_nats")
    assert json.dumps(rows_of(tmp_path / "run", *keys)) == json.dumps(rows_of(tmp_path / "whole", *keys))


# --- what is configured and reported ---


def test_a_schedule_is_read_again_as_it_was_dumped() -> None:
    """A stage hands its own keys on to the loop in this way."""
    assert TrainConfig.model_validate(sampled().model_dump()) == sampled()


def test_the_teacher_forced_nll_is_that_of_the_data(tmp_path: Path) -> None:
    """An epoch in one window: what `score_dataset` says of the model before its step."""
    settings_ = sampled(steps=1, rows_per_step=64, scheduled_sampling={"epsilon": 1.0})
    before = score_dataset(tiny_model(settings_, dropout=False), tiny_data(), length=32)
    trained(tmp_path, settings_.model_copy(update={"steps": None, "epochs": 1}))
    ((forced, own),) = rows_of(tmp_path, "teacher_forced_nll_nats", "nll_nats")
    assert forced == pytest.approx({n: s.value / s.count for n, s in before.items("slice")}, rel=1e-9)
    assert all(abs(forced[name] - own[name]) > 1e-6 for name in own)


def test_where_nothing_is_replaced_the_run_is_one_without(tmp_path: Path) -> None:
    plain, _ = trained(tmp_path / "plain", sampled(scheduled_sampling=None))
    never, _ = trained(tmp_path / "never", sampled(scheduled_sampling={"epsilon": 0.0}))
    assert_parameters_agree(never, plain, rtol=0, atol=0)
    for forced, own in rows_of(tmp_path / "never", "teacher_forced_nll_nats", "nll_nats"):
        assert forced == pytest.approx(own, rel=1e-12)
    assert "teacher_forced_nll_nats" not in read_metrics(tmp_path / "plain" / "metrics.jsonl")[0]


def test_rollouts_have_nothing_to_replace() -> None:
    with pytest.raises(ValueError, match="scheduled_sampling goes with data"):
        TrainStage.model_validate(
            {"model": "m", "prompts": "p", "rewards": ["length"], "steps": 1, "rollouts": {}}
            | {"scheduled_sampling": {}}
        )
