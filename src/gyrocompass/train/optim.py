"""The optimizer: AdamW over float32 (or float64) parameters, and the learning rate of every step.

bf16 weights keep float32 masters. An AdamW step at 2e-5 is smaller than the distance between neighbouring
bf16 numbers for most weights, so that stepping bf16 directly moves few of them. Gradients of bf16 parameters
are added up over micro-batches in float32 as well: in bf16 the sum would depend on how a step is split.

The learning rate is a pure function of the step: there is no scheduler state to save or to get wrong.

Left out: other optimizers, parameter groups beyond "decay or not", stochastic rounding.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gyrocompass.core.config import Config


class ScheduleConfig(Config):
    """How the learning rate goes: linear warm-up, then one of three shapes.

    constant: stays. cosine: half a cosine from 1 to `final_share`. wsd (warm-up, stable, decay): stays, then
    falls linearly to `final_share` over the last `decay_share` of the steps.
    """

    shape: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_share: float = Field(default=0.2, ge=0, le=1)
    final_share: float = Field(default=0.1, ge=0, le=1)


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter, 2019), with the norm of the gradient clipped."""

    learning_rate: float = Field(default=3e-4, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (from 0) of `steps`.

    >>> config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleConfig(shape="wsd", warmup_steps=2))
    >>> [round(learning_rate(config, step, 10), 2) for step in (0, 1, 2, 7, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.55]
    """
    schedule = config.schedule
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return config.learning_rate * warmup * _shape(schedule, step, steps)


def _shape(schedule: ScheduleConfig, step: int, steps: int) -> float:
    if schedule.shape == "constant":
        return 1.0
    if schedule.shape == "wsd":
        decay_steps = max(1, round(schedule.decay_share * steps))
        progress = max(0, step - (steps - decay_steps)) / decay_steps
        return 1.0 - (1.0 - schedule.final_share) * progress
    after_warmup = max(0, step - schedule.warmup_steps)
    progress = after_warmup / max(1, steps - schedule.warmup_steps)
    return schedule.final_share + (1.0 - schedule.final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))


class MainParameters:
    """What the optimizer steps: the model's own parameters, or float32 masters of its 16-bit ones."""

    def __init__(self, model: nn.Module) -> None:
        self.named: dict[str, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.named[name] = self._main(parameter)

    def _main(self, parameter: Tensor) -> Tensor:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        master = parameter.detach().float().clone().requires_grad_()
        parameter.register_post_accumulate_grad_hook(lambda p: _move_gradient(p, master))
        self._copies.append((parameter, master))
        return master

    def publish(self) -> None:
        """Write the masters back into the model, rounded to its dtype."""
        with torch.no_grad():
            for parameter, master in self._copies:
                parameter.copy_(master)

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    def clip(self, clip_norm: float | None) -> float:
        """Scale the gradients so that their norm is at most `clip_norm`; the norm before that."""
        limit = math.inf if clip_norm is None else clip_norm
        norm = nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None])
        if math.isfinite(float(norm)) and float(norm) > limit:
            nn.utils.clip_grads_with_norm_(self.named.values(), limit, norm)
        return float(norm)


def _move_gradient(parameter: Tensor, master: Tensor) -> None:
    assert parameter.grad is not None
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def adamw(main: MainParameters, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases) are not decayed."""
    matrices = [p for p in main.named.values() if p.dim() >= 2]
    vectors = [p for p in main.named.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
