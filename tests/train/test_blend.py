"""Adaptive weights in the loop: laws 1 and 4, what is written down of them, and what does not fit.

Shape legend: T tokens of the window.
"""

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
    assert_same_run,
    config,
    run_program,
    trained,
)
from tiny_run import tiny_data, tiny_model

import processes
from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput, ConfigError, Interrupted
from gyrocompass.data.mixture import Sampler
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.registry import OBJECTIVES, objective
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs
from gyrocompass.model.batch import to_batch
from gyrocompass.model.head import find_head, hidden_states
from gyrocompass.train.checkpoint import steps_on_disk
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.distributed import World
from gyrocompass.train.loop import train
from gyrocompass.train.metrics import read_metrics
from gyrocompass.train.optim import MainParameters
from gyrocompass.train.source import Window
from gyrocompass.train.window import WindowPass, window_gradients

OBJECTIVE: list[Any] = [
    {"nll": {"name": "one", "slices": ["slice-1"]}},
    {"excess_nll": {"name": "zero", "slices": ["slice-0"]}},
    {"z_loss": {"coefficient": 1e-2, "weight": 0.5}},
]
LAGRANGIAN = {"objective": "zero", "bound": 0.02, "rate": 0.3, "initial": 0.5}
BLENDS: dict[str, dict[str, Any]] = {
    "uncertainty": {"uncertainty": {"rate": 0.1, "objectives": ["one", "z_loss"]}},
    "gradnorm": {"gradnorm": {"every_steps": 2, "objectives": ["one", "z_loss"], "rate": 0.1}},
    "dwa": {"dwa": {"every_steps": 1, "objectives": ["one", "z_loss"]}},
    "lagrangian": {"lagrangian": LAGRANGIAN, "doremi": {"rate": 0.5}},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def blended(blend: str, **changes: Any) -> TrainConfig:
    return config(**{"objective": OBJECTIVE, "blend": BLENDS[blend], "steps": 4, **changes})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


# --- law 1: partition ---


@pytest.mark.parametrize("blend", BLENDS)
def test_micro_batches_change_neither_parameters_nor_weights(blend: str, tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", blended(blend))
    split, _ = trained(tmp_path / "split", blended(blend, rows_per_micro_batch=2))
    assert_parameters_agree(split, whole, rtol=1e-10, atol=1e-12)
    rows = [rows_of(tmp_path / name) for name in ("whole", "split")]
    for ours, theirs in zip(*rows, strict=True):
        for key in ("objective_weights", "slice_weights"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-10)
    last, first = rows[0][-1], rows[0][0]
    assert last["objective_weights"] != first["objective_weights"]


@pytest.mark.slow
@pytest.mark.parametrize("blend", ["gradnorm", "lagrangian"])
def test_two_ranks_take_the_same_decisions_as_one_process(blend: str, tmp_path: Path) -> None:
    settings_ = blended(blend, rows_per_step=5, rows_per_micro_batch=2)
    one, _ = trained(tmp_path / "one", settings_)
    (tmp_path / "two").mkdir()
    arguments = [str(tmp_path / "two"), settings_.model_dump_json(), "--no-dropout"]
    assert processes.run_ranks(2, tiny_run.main, arguments) == [0, 0]
    two = load_file(tmp_path / "two" / "result.safetensors")
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(two[name], parameter.detach(), rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two" / "run"), strict=True):
        assert ours["objective_weights"] == pytest.approx(theirs["objective_weights"], rel=1e-10)


# --- law 4: resume ---


@pytest.mark.parametrize("blend", BLENDS)
def test_an_interrupted_run_goes_on_with_the_same_weights(blend: str, tmp_path: Path) -> None:
    settings_ = blended(blend, steps=5, precision="float32")
    whole, _ = trained(tmp_path / "whole", settings_)
    with pytest.raises(Interrupted):
        trained(tmp_path / "run", settings_, progress=InterruptAfter(3))
    resumed, _ = trained(tmp_path / "run", settings_)
    assert_parameters_agree(resumed, whole, rtol=0, atol=0)
    ours, theirs = (steps_on_disk(tmp_path / name)[-1] / "state.json" for name in ("run", "whole"))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    keys = ("step", "loss", "objective_weights", "slice_weights")
    again, before = ([{k: row[k] for k in keys} for row in rows_of(tmp_path / n)] for n in ("run", "whole"))
    assert again == before


@pytest.mark.slow
@pytest.mark.parametrize("blend", ["gradnorm", "lagrangian"])
def test_a_killed_run_resumes_bit_identical(blend: str, tmp_path: Path) -> None:
    """With dropout, and a curriculum too."""
    changes = {"steps": 6, "precision": "float32", "checkpoint_every_steps": 2}
    settings_ = blended(blend, **changes, curriculum={"by": "reference_loss", "parts": 4})
    assert run_program(tmp_path / "whole", settings_) == 0
    assert run_program(tmp_path / "killed", settings_, "--kill-at-step", "4") != 0
    assert run_program(tmp_path / "killed", settings_) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


# --- what is written down is what was done ---


def test_the_multiplier_in_the_metrics_follows_the_logged_means(tmp_path: Path) -> None:
    trained(tmp_path, blended("lagrangian", steps=6))
    rows = rows_of(tmp_path)
    multiplier = LAGRANGIAN["initial"]
    for row in rows:
        weights = row["objective_weights"]
        assert weights == pytest.approx({"one": 1.0, "zero": multiplier, "z_loss": 0.5})
        assert row["loss"] == pytest.approx(sum(weights[name] * row["objective"][name] for name in weights))
        multiplier = max(0.0, multiplier + 0.3 * (row["objective"]["zero"] - 0.02))
    assert sum(rows[0]["slice_weights"].values()) == pytest.approx(2.0)


def test_fixed_weights_are_written_too_and_schedules_move_them(tmp_path: Path) -> None:
    ramp = {"linear": {"from": 0.0, "to": 1.0, "steps": 2}}
    trained(tmp_path, config(objective=["nll", {"z_loss": {"weight": ramp}}]))
    assert [row["objective_weights"]["z_loss"] for row in rows_of(tmp_path)] == [0.0, 0.5, 1.0]
    assert all(row["slice_weights"] == {} for row in rows_of(tmp_path))


# --- what is measured ---


def measured(objective_: list[Any], rows: int, **keywords: Any) -> tuple[WindowPass, Batch, torch.nn.Module]:
    """A pass over one window, cut into micro-batches of so many rows."""
    settings_, data = config(objective=objective_, rows_per_micro_batch=rows), tiny_data()
    model = tiny_model(settings_, dropout=False)
    window = Window(next(Sampler(data, settings_.sampler())), data)
    composite = parse_objectives(objective_)
    passed = window_gradients(model, MainParameters(model), composite, window, settings_, **keywords)
    return passed, to_batch(window.packed), model


@pytest.mark.parametrize("rows", [6, 2])
def test_gradient_norms_are_those_at_the_final_hidden_states(rows: int) -> None:
    """Against full logits and one backward pass for each objective."""
    entries = [{"nll": {"slices": ["slice-0"]}}, {"z_loss": {"coefficient": 0.1, "weight": 7.0}}]
    passed, batch, model = measured(entries, rows, measure_norms=True)
    h_TD = hidden_states(model, batch).detach().requires_grad_()
    logits_TV = h_TD @ find_head(model).w_VD.T
    lse_T, weight_T = logits_TV.logsumexp(1), batch.weight_T.double()
    nll_T = lse_T - logits_TV.gather(1, batch.target_T.clamp(min=0)[:, None])[:, 0]
    own_T = weight_T * (batch.slice_T == 0)
    losses = {
        "nll": (own_T * nll_T).sum() / own_T.sum(),
        "z_loss": 0.1 * (weight_T * lse_T.square()).sum() / weight_T.sum(),
    }
    for name, loss in losses.items():
        (slope_TD,) = torch.autograd.grad(loss, h_TD, retain_graph=True)
        assert passed.gradient_norms[name] == pytest.approx(float(slope_TD.norm()), rel=1e-9)


def test_gradient_norms_of_whole_window_objectives() -> None:
    """In two passes as in one, and measuring changes no gradient."""

    def spread(log_probs: TokenLogProbs, batch: Batch) -> Terms:
        weight_T = batch.weight_T
        mean = (log_probs.logprob_T * weight_T).sum() / weight_T.sum()
        return Terms((log_probs.logprob_T - mean).square(), weight_T)

    objective(whole_window=True)(spread)
    try:
        entries = ["nll", "spread"]
        whole, split = (measured(entries, rows, measure_norms=True) for rows in (6, 2))
        plain = measured(entries, 2)
        assert split[0].gradient_norms == pytest.approx(whole[0].gradient_norms, rel=1e-10)
        assert min(whole[0].gradient_norms.values()) > 0 and plain[0].gradient_norms == {}
        for (_, ours), (_, theirs) in zip(
            split[2].named_parameters(), plain[2].named_parameters(), strict=True
        ):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    finally:
        del OBJECTIVES["spread"]


def test_slice_weights_multiply_the_weights_of_tokens() -> None:
    passed, batch, model = measured(["nll"], 2, slice_weights={"slice-0": 0.5, "slice-1": 3.0})
    with torch.no_grad():
        logits_TV = hidden_states(model, batch) @ find_head(model).w_VD.T
    nll_T = -logits_TV.log_softmax(1).gather(1, batch.target_T.clamp(min=0)[:, None])[:, 0]
    weight_T = batch.weight_T.double() * torch.tensor([0.5, 3.0, 0.0])[batch.slice_T]
    assert passed.loss == pytest.approx(float((weight_T * nll_T).sum() / weight_T.sum()), rel=1e-9)
    counted_T = batch.weight_T > 0
    excess_T = (nll_T + batch.columns["reference_logprob"].double()).clamp(min=0)
    for index, value in enumerate(passed.record.excess(World()).values()):
        own_T = counted_T & (batch.slice_T == index)
        assert value == pytest.approx(float(excess_T[own_T].mean()), rel=1e-9)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blend": {"lagrangian": {"objective": "nl", "bound": 1.0}}},
            r"no objective nl; did you mean nll\?",
        ),
        ({"blend": {"doremi": {}}, "reduction": {"by": "slice"}}, "token or constant"),
        ({"blend": {"dwaa": {}}}, r"did you mean dwa\?"),
        ({"curriculum": {"by": "lenght"}}, r"did you mean length\?"),
    ],
)
def test_a_mistake_in_the_config_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, {"steps": 1, "objective": ["nll", "z_loss"], **changes})


def test_data_that_lacks_a_slice_or_the_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"did you mean slice-0\?"):
        trained(tmp_path, config(objective=[{"nll": {"slices": ["slice0"]}}]))
    settings_, data = config(blend={"doremi": {}}), tiny_data()
    object.__setattr__(data, "columns", {})
    with pytest.raises(BadInput, match="no column reference_logprob"):
        train(tiny_model(settings_), data, settings_, tmp_path)
