"""The optimizer: AdamW over float32 (or float64) parameters, and the learning rate of every step.

bf16 weights keep float32 main values. An AdamW step at 2e-5 is smaller than the distance between neighbouring
bf16 numbers for most weights, so that stepping bf16 directly moves few of them. Gradients of bf16 parameters
are added up over micro-batches in float32 as well: in bf16 the sum would depend on how a step is split.

The learning rate is a pure function of the step: there is no scheduler state to save or to get wrong.

Left out: other optimizers, parameter groups beyond "decay or not", stochastic rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gyrocompass.core.config import Config
from gyrocompass.train.distributed import buckets


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


class Piece(NamedTuple):
    """Some rows of a parameter."""

    name: str
    rows: slice
    own: Tensor
    """The model's; what is written into it is the model's new value."""
    lower: Tensor | None
    """Of a bf16 parameter: the lower halves of its main values."""


class MainParameters(Mapping[str, Tensor]):
    """The trained parameters of a model by name, as the optimizer has them: in float32 or wider.

    A bf16 parameter is the upper half of its float32 main value; the lower half is kept beside it in 16 bits.
    Both together are the value, exactly, in 4 bytes (decision 0027). Values of bf16 parameters are thus made
    when they are asked for, and are copies. Gradients are in `.grad` of the model's own parameters: as they
    came while there is one of them, in float32 once a second is added.
    """

    def __init__(self, model: nn.Module) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        """The model's own."""
        self._lower: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            if parameter.dtype == torch.bfloat16:
                self._lower[name] = torch.zeros_like(parameter, dtype=torch.int16)
                parameter.grad_dtype = None  # any: float32 beside a bf16 parameter
                parameter.register_hook(partial(_widen_gradient, parameter))

    def __getitem__(self, name: str) -> Tensor:
        parameter = self.trained[name].detach()
        if name not in self._lower:
            return parameter
        return _joined(parameter, self._lower[name], torch.empty_like(parameter, dtype=torch.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self.trained)

    def __len__(self) -> int:
        return len(self.trained)

    def assign(self, name: str, value: Tensor) -> None:
        """Give a parameter another value; the model has it rounded to its dtype."""
        parameter = self.trained[name].detach()
        if name in self._lower:
            _split(value.to(parameter.device, torch.float32, copy=True), parameter, self._lower[name])
        else:
            parameter.copy_(value)

    def pieces(self, name: str) -> Iterator[Piece]:
        """A parameter by rows, as many at a time as fit into what is stepped at once."""
        parameter = torch.atleast_1d(self.trained[name].detach())
        lower = self._lower.get(name)
        for rows in _rows(parameter):
            yield Piece(name, rows, parameter[rows], None if lower is None else torch.atleast_1d(lower)[rows])

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for parameter in self.trained.values():
            parameter.grad = None

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients together, in float32 or wider."""
        gradients = [torch.atleast_1d(p.grad) for p in self.trained.values() if p.grad is not None]
        norms = [
            torch.linalg.vector_norm(gradient[rows].to(_wide(gradient.dtype)))
            for gradient in gradients
            for rows in _rows(gradient)
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def clipping(norm: float, clip_norm: float | None) -> float:
    """What gradients of this norm are multiplied by, so that it is at most `clip_norm`.

    >>> clipping(4.0, 1.0), clipping(0.5, 1.0), clipping(4.0, None), clipping(math.nan, 1.0)
    (0.25, 1.0, 1.0, 1.0)
    """
    return clip_norm / norm if clip_norm is not None and math.isfinite(norm) and norm > clip_norm else 1.0


class AdamW:
    """AdamW; vectors (norms, biases) are not decayed.

    With g the gradient, t how often the parameter was stepped, and m, v zero at first:

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        w = w - rate * (decay w + m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon))

    A parameter without a gradient is left alone. Source: Loshchilov and Hutter, 2019.
    """

    def __init__(self, main: MainParameters, config: OptimizerConfig) -> None:
        self._main, self._config = main, config
        self._state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, rate: float, scale: float = 1.0) -> None:
        """Take one step with the gradients times `scale`; they may be scaled in place."""
        stepped = [name for name, parameter in self._main.trained.items() if parameter.grad is not None]
        for name in stepped:
            self._state.setdefault(name, _no_moments(self._main.trained[name]))
        for decay in sorted({self._decay(name) for name in stepped}):
            pieces = [p for name in stepped if self._decay(name) == decay for p in self._main.pieces(name)]
            together = list(buckets(pieces, lambda piece: piece.own, _at_once(pieces[0].own.device)))
            room = _Room(max(sum(piece.own.numel() for piece in bucket) for bucket in together))
            for bucket in together:
                room.clear()
                self._step(bucket, rate, scale, decay, room)
        for name in stepped:
            self._state[name]["step"] += 1

    def _decay(self, name: str) -> float:
        return self._config.weight_decay if self._main.trained[name].dim() >= 2 else 0.0

    def _step(self, bucket: Sequence[Piece], rate: float, scale: float, decay: float, room: _Room) -> None:
        values, gradients = [], []
        for piece in bucket:
            value, gradient = piece.own, _part(self._main.trained[piece.name].grad, piece)
            if piece.lower is not None:
                value = _joined(piece.own, piece.lower, room.like(piece.own))
            if gradient.dtype != value.dtype:
                gradient = room.like(piece.own).copy_(gradient)
            values.append(value)
            gradients.append(gradient if scale == 1.0 else gradient.mul_(scale))
        states = [self._state[piece.name] for piece in bucket]
        adamw(
            values,
            gradients,
            [_part(state["exp_avg"], piece) for state, piece in zip(states, bucket, strict=True)],
            [_part(state["exp_avg_sq"], piece) for state, piece in zip(states, bucket, strict=True)],
            [],
            [state["step"].clone() for state in states],  # counted up by each piece of a parameter
            fused=True,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=rate,
            weight_decay=decay,
            eps=self._config.epsilon,
            maximize=False,
        )
        for value, piece in zip(values, bucket, strict=True):
            if piece.lower is not None:
                _split(value, piece.own, piece.lower)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: moments and step counts, as `NAME/exp_avg`."""
        return {f"{name}/{key}": value for name, state in self._state.items() for key, value in state.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned."""
        self._state.clear()
        for path, value in tensors.items():
            name, key = path.rsplit("/", 1)
            self._state.setdefault(name, {})[key] = value.to(self._main.trained[name].device)


def _no_moments(parameter: Tensor) -> dict[str, Tensor]:
    wide = _wide(parameter.dtype)
    moments = {key: torch.zeros_like(parameter, dtype=wide) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **moments}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _rows(tensor: Tensor) -> Iterator[slice]:
    """A tensor's rows, cut so that each part has about as many elements as are stepped at once."""
    each = max(1, _at_once(tensor.device) * len(tensor) // max(1, tensor.numel()))
    return (slice(start, start + each) for start in range(0, len(tensor), each))


def _at_once(device: torch.device) -> int:
    """Elements that are stepped together: what a CPU's cache holds, or what keeps a GPU busy."""
    return 2**25 if device.type == "cuda" else 2**19


def _part(tensor: Tensor | None, piece: Piece) -> Tensor:
    assert tensor is not None
    part: Tensor = torch.atleast_1d(tensor)[piece.rows]
    return part


# --- a float32 number as a bf16 number and 16 bits ---


def _joined(upper: Tensor, lower: Tensor, number: Tensor) -> Tensor:
    """Write the float32 numbers of which these are the halves: the rounded number, and a signed rest."""
    number.view(torch.int32).copy_(upper.view(torch.int16)).bitwise_left_shift_(16).add_(lower)
    return number


def _split(number: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Write the halves: the nearest bf16 number (the one further from 0 if two are), and what is left.

    In bits, a float32 number is its bf16 rounding times 2^16 plus a rest between -2^15 and 2^15 - 1: its
    lower half as a signed number. `number` is used up.
    """
    bits = number.view(torch.int32)
    lower.copy_(bits)  # the lower bits of each
    upper.view(torch.int16).copy_(bits.add_(2**15).bitwise_right_shift_(16))


class _Room:
    """float32 numbers that are made once: fresh memory for each piece takes longer than the piece."""

    def __init__(self, elements: int) -> None:
        self._elements, self._taken = 2 * elements, 0
        self._flat: Tensor | None = None

    def like(self, piece: Tensor) -> Tensor:
        """Room for a piece's numbers, beside what was taken since it was cleared."""
        if self._flat is None:
            self._flat = torch.empty(self._elements, device=piece.device)
        start, self._taken = self._taken, self._taken + piece.numel()
        return self._flat[start : self._taken].view(piece.shape)

    def clear(self) -> None:
        """Forget what was taken."""
        self._taken = 0


def _widen_gradient(parameter: Tensor, incoming: Tensor) -> None:
    """Before a second gradient is added to a bf16 one: the sum is in float32."""
    if parameter.grad is not None:
        parameter.grad = parameter.grad.float()
