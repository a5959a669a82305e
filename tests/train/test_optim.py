"""Schedules, float32 masters, clipping, and which parameters are decayed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gyrocompass.train.optim import MainParameters, OptimizerConfig, ScheduleConfig, adamw, learning_rate


@given(
    shape=st.sampled_from(["constant", "cosine", "wsd"]),
    warmup=st.integers(0, 20),
    steps=st.integers(21, 200),
    final=st.floats(0.0, 1.0),
)
@settings(deadline=None, max_examples=100)
def test_every_schedule_warms_up_linearly_and_ends_near_its_final_share(
    shape: str, warmup: int, steps: int, final: float
) -> None:
    schedule = ScheduleConfig(shape=shape, warmup_steps=warmup, final_share=final)  # type: ignore[arg-type]
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 2.0 + 1e-12 or final == 0 for rate in rates)
    for step in range(warmup):
        assert rates[step] <= 2.0 * (step + 1) / warmup + 1e-12
    assert all(
        later <= earlier + 1e-12 for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False)
    )
    if shape == "constant":
        assert rates[-1] == 2.0


def test_cosine_ends_at_its_final_share() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleConfig(shape="cosine", final_share=0.1))
    assert learning_rate(config, 1000, 1000) == pytest.approx(0.1)
    assert learning_rate(config, 500, 1000) == pytest.approx(0.55)


def test_bf16_weights_move_through_their_masters() -> None:
    """A step of 2e-5 is below bf16's resolution at 1; the masters add such steps up until they show."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    main = MainParameters(model)
    optimizer = adamw(main, OptimizerConfig(learning_rate=2e-5, weight_decay=0.0))
    for _ in range(400):
        main.clear_gradients()
        model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        main.publish()
    assert main.named["weight"].dtype == torch.float32
    torch.testing.assert_close(
        main.named["weight"], torch.full((64, 64), 1.0 - 400 * 2e-5), atol=1e-4, rtol=0
    )
    assert (model.weight < 1.0).all()


def test_gradients_of_bf16_weights_are_added_up_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    main = MainParameters(model)
    for value in [1.0] + [2.0**-9] * 8:  # each too small to change a bf16 sum of 1
        model(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    gradient = main.named["weight"].grad
    assert gradient is not None and model.weight.grad is None
    assert gradient.item() == 1.0 + 8 * 2.0**-9


def test_float32_weights_are_stepped_themselves() -> None:
    model = nn.Linear(3, 2)
    assert MainParameters(model).named["weight"] is model.weight


def test_clip_reports_the_norm_before_and_scales_to_the_limit() -> None:
    model = nn.Linear(3, 2)
    main = MainParameters(model)
    for parameter in main.named.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    assert main.clip(1.0) == pytest.approx(2 * math.sqrt(8))
    assert main.clip(None) == pytest.approx(1.0, rel=1e-4)


def test_a_norm_that_is_not_finite_scales_nothing() -> None:
    model = nn.Linear(3, 2)
    main = MainParameters(model)
    for parameter in main.named.values():
        parameter.grad = torch.ones_like(parameter)
    assert main.named["bias"].grad is not None
    main.named["bias"].grad[0] = math.nan
    assert math.isnan(main.clip(1.0))
    assert torch.equal(main.named["weight"].grad, torch.ones(2, 3))  # type: ignore[arg-type]


def test_vectors_are_not_decayed_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    main = MainParameters(model)
    assert set(main.named) == {"0.weight", "0.bias"}
    groups = adamw(main, OptimizerConfig(weight_decay=0.3)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.3), (1, 0.0)]
