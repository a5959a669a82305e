"""The gradients of one window: the part of a step that must not depend on how the window is split.

    Packed -> this rank's micro-batches -> log-probs -> terms -> shares of the loss -> gradients, added up

The normaliser is known before the first forward pass, so that shares and their gradients are summed over
micro-batches and ranks and no mean is taken of a mean.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from gyrocompass.data.pack import Packed
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.loss.objective import Composite
from gyrocompass.loss.reduce import Normaliser, normalise
from gyrocompass.loss.signal import Batch, TokenLogProbs
from gyrocompass.model.batch import to_batch
from gyrocompass.model.score import log_probs, precision
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.distributed import World
from gyrocompass.train.optim import MainParameters
from gyrocompass.train.record import StepRecord


class WindowPass(NamedTuple):
    """What one pass over a window leaves, besides the gradients."""

    record: StepRecord
    loss: float
    """Of the whole window, over all ranks."""


def window_gradients(
    model: nn.Module,
    main: MainParameters,
    objective: Composite,
    data: TokenDataset,
    packed: Packed,
    config: TrainConfig,
    step: int = 0,
    world: World = World(),  # noqa: B008  (immutable)
) -> WindowPass:
    """Put a window's gradients into `main`, summed over micro-batches and ranks; nothing else changes.

    This is what a step of `train` does before it judges, clips and updates.

    Args:
        model: in the mode it is to run in.
        main: the model's; its gradients are cleared first.
        objective: as parsed from `config.objective`.
        data: what the window was cut from.
        packed: the whole window, the same on every rank.
        config: says the reduction, the precision and how the window is split.
        step: for scheduled weights of objectives.
    """
    batches = _micro_batches(packed, config, world)
    normaliser = normalise(objective, batches, reduction=config.reduction, gather=world.gather)
    record = StepRecord(data)
    main.clear_gradients()
    loss = 0.0
    for batch in batches:
        loss_of = partial(_share, normaliser, objective, batch, step) if objective.separable else None
        with precision(world.device, config.precision == "bf16_autocast"):
            token_log_probs = log_probs(
                model,
                batch,
                want=objective.wants | {"rank", "entropy"},
                candidate_TC=objective.candidates(batch),
                expect=loss_of,
            )
        reduced = normaliser.loss(objective(token_log_probs, batch), batch, step)
        reduced.loss.backward()
        loss += float(reduced.loss.detach())
        record.add(batch, token_log_probs, reduced.report)
    world.sum_gradients(list(main.named.values()))
    return WindowPass(record, sum(world.gather_json(loss)))


def _share(
    normaliser: Normaliser, objective: Composite, batch: Batch, step: int, answer: TokenLogProbs
) -> Tensor:
    """The micro-batch's share of the loss, as a function of its log-probabilities."""
    return normaliser.share(objective(answer, batch), batch, step)


def _micro_batches(packed: Packed, config: TrainConfig, world: World) -> list[Batch]:
    share = packed.take(packed.rows * world.rank // world.size, packed.rows * (world.rank + 1) // world.size)
    return [to_batch(part, world.device) for part in share.split(config.rows_per_micro_batch)]
