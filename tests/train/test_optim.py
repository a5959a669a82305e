"""Schedules, main values of bf16 weights, AdamW beside torch's, clipping, and who is decayed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gyrocompass.train import optim
from gyrocompass.train.optim import (
    AdamW,
    MainParameters,
    OptimizerConfig,
    ScheduleConfig,
    clipping,
    learning_rate,
)


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


def test_bf16_weights_move_by_less_than_their_resolution() -> None:
    """A step of 2e-5 is below bf16's resolution at 1; the main values add such steps up until they show."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    main = MainParameters(model)
    optimizer = AdamW(main, OptimizerConfig(weight_decay=0.0))
    for _ in range(400):
        main.clear_gradients()
        model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(2e-5)
    assert main["weight"].dtype == torch.float32
    torch.testing.assert_close(main["weight"], torch.full((64, 64), 1.0 - 400 * 2e-5), atol=1e-4, rtol=0)
    assert (model.weight < 1.0).all()


def test_gradients_of_bf16_weights_are_added_up_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    MainParameters(model)
    for value in [1.0] + [2.0**-9] * 8:  # each too small to change a bf16 sum of 1
        model(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    gradient = model.weight.grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert gradient.item() == 1.0 + 8 * 2.0**-9


def test_a_single_gradient_of_bf16_weights_stays_as_it_came() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    MainParameters(model)
    model(torch.ones(3, 2, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is not None and model.weight.grad.dtype == torch.bfloat16


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=200)
def test_a_main_value_is_kept_to_the_last_bit_and_the_model_has_it_rounded(
    numbers: list[float], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=random).to(torch.int32).view(torch.float32)
    ties = (torch.randint(-(2**15), 2**15, (100,), generator=random).to(torch.int32) << 16) + 2**15
    value = torch.cat([torch.tensor(numbers, dtype=torch.float32), bits, ties.view(torch.float32)])
    value = value[~value.isnan()]
    model = nn.Module()
    model.register_parameter("x", nn.Parameter(torch.zeros_like(value, dtype=torch.bfloat16)))
    main = MainParameters(model)
    main.assign("x", value)
    assert torch.equal(main["x"].view(torch.int32), value.view(torch.int32))
    own, nearest = model.x.detach(), value.to(torch.bfloat16)
    tie = value.view(torch.int32) & 0xFFFF == 2**15
    assert torch.equal(own[~tie], nearest[~tie])
    away = value[tie].view(torch.int32).bitwise_right_shift(16) + 1
    assert torch.equal(own[tie].view(torch.int16).to(torch.int32), away.to(torch.int16).to(torch.int32))


def test_float32_weights_are_stepped_themselves() -> None:
    model = nn.Linear(3, 2)
    assert MainParameters(model)["weight"].data_ptr() == model.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [7, 2**19])
def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int) -> None:
    """However the parameters are cut; what gets no gradient in a step is left alone."""
    monkeypatch.setattr(optim, "_at_once", lambda device: at_once)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 2, bias=False)).to(dtype)
    model.register_parameter("number", nn.Parameter(torch.tensor(0.5, dtype=dtype)))
    main = MainParameters(model)
    theirs = {name: value.clone().requires_grad_() for name, value in main.items()}
    config = OptimizerConfig(weight_decay=0.3, beta1=0.8, beta2=0.9)
    groups = [
        {"params": [x for x in theirs.values() if x.dim() >= 2], "weight_decay": 0.3},
        {"params": [x for x in theirs.values() if x.dim() < 2], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=config.epsilon, fused=True)
    ours = AdamW(main, config)
    for step in range(6):
        if step == 3:  # as after a resume
            saved, ours = {name: x.clone() for name, x in ours.tensors().items()}, AdamW(main, config)
            ours.restore(saved)
        for name, parameter in main.trained.items():
            absent = name == "number" and step % 2
            parameter.grad = None if absent else torch.randn(parameter.shape, dtype=dtype)
            theirs[name].grad = None if absent else 0.25 * parameter.grad.to(theirs[name].dtype)
        rate = 0.01 * (step + 1)
        for group in peer.param_groups:
            group["lr"] = rate
        ours.step(rate, 0.25)
        peer.step()
        for name, value in main.items():
            same = torch.equal(value, theirs[name])  # where it is not cut inside a vector of the processor's
            assert same or (at_once == 7 and torch.allclose(value, theirs[name], rtol=1e-6, atol=1e-8))
            assert torch.equal(main.trained[name].detach(), value.to(dtype))


def test_a_norm_is_over_all_gradients_and_not_rounded_to_their_dtype() -> None:
    model = nn.Linear(300, 20).to(torch.bfloat16)
    main = MainParameters(model)
    assert main.gradient_norm() == 0.0
    for parameter in main.trained.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    assert main.gradient_norm() == pytest.approx(2 * math.sqrt(301 * 20), rel=1e-6)


def test_clipped_gradients_have_the_norm_that_was_asked_for() -> None:
    """Seen in the first moment, which is 1 - beta1 times the gradient after one step."""
    model = nn.Linear(3, 2)
    main = MainParameters(model)
    for parameter in main.trained.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = main.gradient_norm()
    assert norm == pytest.approx(2 * math.sqrt(8))
    optimizer = AdamW(main, OptimizerConfig(beta1=0.5))
    optimizer.step(1e-3, clipping(norm, 1.0))
    moments = [x.flatten() for name, x in optimizer.tensors().items() if name.endswith("/exp_avg")]
    assert float(torch.cat(moments).norm()) == pytest.approx(0.5)


def test_a_norm_that_is_not_finite_is_told_and_clips_nothing() -> None:
    model = nn.Linear(3, 2)
    main = MainParameters(model)
    for parameter in main.trained.values():
        parameter.grad = torch.ones_like(parameter)
    assert model.bias.grad is not None
    model.bias.grad[0] = math.nan
    norm = main.gradient_norm()
    assert math.isnan(norm) and clipping(norm, 1.0) == 1.0 and clipping(math.inf, 1.0) == 1.0
    assert torch.equal(model.weight.grad, torch.ones(2, 3))  # type: ignore[arg-type]


def test_vectors_are_not_decayed_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    main = MainParameters(model)
    assert set(main) == {"0.weight", "0.bias"}
    before = {name: value.clone() for name, value in main.items()}
    for parameter in main.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    AdamW(main, OptimizerConfig(weight_decay=0.3)).step(0.1)
    torch.testing.assert_close(main["0.weight"], before["0.weight"] * (1 - 0.1 * 0.3))
    assert torch.equal(main["0.bias"], before["0.bias"])
