"""The gradients of one window: the part of a step that must not depend on how the window is split.

    Window -> this rank's micro-batches -> log-probs -> terms -> shares of the loss -> gradients, added up

The normaliser is known before the first forward pass, so that shares and their gradients are summed over
micro-batches and ranks and no mean is taken of a mean.

An objective whose terms depend on each other across the window (in-batch negatives, sorted margins) is no sum
over micro-batches. Where the window is split, it takes two passes: the first, without gradients, collects the
answers of all micro-batches of all ranks; the loss of the whole gives the gradient of each answer; the second
pass makes each answer again and sends its own gradient through the model (Gao et al. 2021, "GradCache",
arXiv:2101.06983). The random state of each first pass is taken up by its second, so dropout is the same.

With scheduled sampling the model reads inputs some of which are its own tokens, drawn once for each
micro-batch. Only the model does: objectives see the batch as it was, so that what a term weighs depends on
the data alone, and the record keeps what the model says under gold inputs too.

What a live reference says of the window is known before the first pass of the policy: it depends on nothing
that the step changes.

Asked for, the norm of each objective's own gradient is measured at the final hidden states, by one more pass
back through the head for each. Hidden states of different tokens are different variables, so squared norms
add up over micro-batches and ranks.

Shape legend: T positions of a micro-batch, W of the whole window.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.objective import Composite
from gyrocompass.loss.reduce import Normaliser, Tally, normalise
from gyrocompass.loss.signal import Batch, Expect, TokenLogProbs
from gyrocompass.model.batch import to_batch
from gyrocompass.model.score import log_probs, precision
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.distributed import World
from gyrocompass.train.optim import MainParameters
from gyrocompass.train.record import StepRecord
from gyrocompass.train.reference import LiveReference
from gyrocompass.train.scheduled_sampling import scheduled_sampling
from gyrocompass.train.source import Window


class WindowPass(NamedTuple):
    """What one pass over a window leaves, besides the gradients."""

    record: StepRecord
    loss: float
    """Of the whole window, over all ranks."""
    gradient_norms: dict[str, float]
    """By objective, at the final hidden states; empty where they were not measured."""


def window_gradients(
    model: nn.Module,
    main: MainParameters,
    objective: Composite,
    window: Window,
    config: TrainConfig,
    weights: Mapping[str, float] | None = None,
    world: World = World(),  # noqa: B008  (immutable)
    *,
    step: int = 0,
    teacher: nn.Module | None = None,
    reference: LiveReference | None = None,
    slice_weights: Mapping[str, float] | None = None,
    measure_norms: bool = False,
) -> WindowPass:
    """Leave a window's gradients in the model, summed over micro-batches and ranks; nothing else changes.

    This is what a step of `train` does before it judges, clips and updates.

    Args:
        model: in the mode it is to run in.
        main: its parameters; their gradients are cleared first.
        objective: as parsed from `config.objective`.
        window: the whole window, the same on every rank.
        config: says the reduction, the precision and how the window is split.
        weights: of the objectives, by name; None: those of the first step.
        step: the optimizer step, counted from 0; scheduled sampling depends on it.
        teacher: what objectives of distillation learn from.
        reference: what objectives measure distances from, where the window does not bring it.
        slice_weights: what the token weights of each slice are multiplied by, all above 0; none: by 1.
        measure_norms: whether to measure each objective's gradient norm.
    """
    main.clear_gradients()
    batches = [_reweighted(b, window, slice_weights or {}) for b in _micro_batches(window, config, world)]
    if reference is not None:
        autocast = config.precision == "bf16_autocast"
        batches = [reference.annotated(batch, autocast=autocast) for batch in batches]
    objective = objective.on_slices(window.data.slice_names)
    norms = _Norms(objective.names) if measure_norms else None
    passing = _Passing(model, objective, config, weights, world, step, teacher, norms)
    record = StepRecord(window.data)
    if objective.whole_window and (world.size > 1 or len(batches) > 1):
        loss = passing.whole(batches, record)
    else:
        loss = passing.parts(batches, record)
    world.sum_gradients(list(main.trained.values()))
    return WindowPass(record, sum(world.gather_json(loss)), norms.over(world) if norms else {})


class _Norms:
    """Squares of each objective's gradient at the hidden states, added up over micro-batches."""

    def __init__(self, names: Sequence[str]) -> None:
        self.squares = dict.fromkeys(names, 0.0)

    def add(self, shares: Mapping[str, Tensor], h_TD: Tensor) -> None:
        """Take each objective's share of the loss of one micro-batch, without any weight."""
        for name, share in shares.items():
            if share.requires_grad:
                (slope_TD,) = torch.autograd.grad(share, h_TD, retain_graph=True, materialize_grads=True)
                self.squares[name] += float(slope_TD.double().square().sum())

    def over(self, world: World) -> dict[str, float]:
        """The norms over all ranks."""
        sums: Counter[str] = Counter()
        for squares in world.gather_json(self.squares):
            sums.update(squares)
        return {name: math.sqrt(sums[name]) for name in self.squares}


class _Read(NamedTuple):
    """A micro-batch and what the model reads of it."""

    batch: Batch
    inputs: Batch
    """The batch, or one with some inputs of the model's own."""
    gold_logprob_T: Tensor | None
    """log p of the targets under the batch's own inputs, where the model reads others."""


class _Passing(NamedTuple):
    """A model and an objective, about to see a window."""

    model: nn.Module
    objective: Composite
    config: TrainConfig
    weights: Mapping[str, float] | None
    world: World
    step: int
    teacher: nn.Module | None
    norms: _Norms | None

    def parts(self, batches: Sequence[Batch], record: StepRecord) -> float:
        """Each micro-batch by itself; this rank's share of the loss."""
        normaliser = normalise(
            self.objective,
            batches,
            self.weights,
            reduction=self.config.reduction,
            gather=self.world.gather,
        )
        loss = 0.0
        for batch in batches:
            known = self.objective.separable and self.norms is None
            loss_of = partial(_share, normaliser, self.objective, batch) if known else None
            read = self._read(batch)
            answer = self._answer(read, loss_of)
            terms = self.objective(answer, batch)
            if self.norms is not None:
                self.norms.add(normaliser.shares(terms, batch), _hidden(answer))
            reduced = normaliser.loss(terms, batch)
            reduced.loss.backward()
            loss += float(reduced.loss.detach())
            self._keep(record, read, answer, reduced.report)
        return loss

    def whole(self, batches: Sequence[Batch], record: StepRecord) -> float:
        """All micro-batches of all ranks together, in two passes; the first rank has the loss."""
        if any(rows == 0 for rows in self.world.gather_json(len(batches))):
            raise BadInput(
                "this objective sees the whole window at once, and a rank has no row of it",
                fix="raise rows_per_step to at least the number of ranks",
            )
        reads = [self._read(batch) for batch in batches]
        first, random_states = [], []
        for read in reads:
            random_states.append(_random_state(self.world.device))
            with torch.no_grad():
                first.append(self._answer(read, None))
        joined, place = _joined_batches(batches, self.world)
        answer = _joined_answers(first, self.world)
        normaliser = normalise(self.objective, [joined], self.weights, reduction=self.config.reduction)
        terms = self.objective(answer, joined)
        shares = normaliser.shares(terms, joined) if self.norms is not None else {}
        by_objective = {name: _slopes(share, answer) for name, share in shares.items()}
        reduced = normaliser.loss(terms, joined)
        slopes_of_loss = _slopes(reduced.loss, answer)
        report: dict[str, Tally] = reduced.report if self.world.is_first else {}
        for read, seen, random_state in zip(reads, first, random_states, strict=True):
            positions = slice(place, place := place + len(read.batch.token_T))
            own_slopes = {name: _at(positions, slopes) for name, slopes in by_objective.items()}
            _restore_random_state(random_state)
            self._again(read, _at(positions, slopes_of_loss), own_slopes)
            self._keep(record, read, seen, report)
            report = {}
        return float(reduced.loss.detach()) if self.world.is_first else 0.0

    def _again(
        self, read: _Read, slopes: Mapping[str, Tensor], by_objective: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """The second pass of a micro-batch: the gradient of its answer goes through the model."""
        surrogate = partial(_linear, slopes)
        answer = self._answer(read, surrogate if self.norms is None else None)
        if self.norms is not None:
            shares = {name: _linear(own, answer) for name, own in by_objective.items()}
            self.norms.add(shares, _hidden(answer))
        surrogate(answer).backward()

    def _read(self, batch: Batch) -> _Read:
        """What the model is to read of a micro-batch; where that is its own, it is drawn here."""
        sampling = self.config.scheduled_sampling
        if sampling is None:
            return _Read(batch, batch, None)
        with precision(self.world.device, self.config.precision == "bf16_autocast"):
            mixed = scheduled_sampling(self.model, batch, sampling, self.step)
        return _Read(batch, mixed.batch, mixed.teacher_forced_T)

    def _keep(
        self, record: StepRecord, read: _Read, answer: TokenLogProbs, report: Mapping[str, Tally]
    ) -> None:
        """Enter a micro-batch into the record; with scheduled sampling, also its NLL under gold inputs."""
        gold_T = answer.logprob_T if read.gold_logprob_T is None else read.gold_logprob_T
        sampled = self.config.scheduled_sampling is not None
        record.add(read.batch, answer, report, gold_logprob_T=gold_T if sampled else None)

    def _answer(self, read: _Read, expect: Expect | None) -> TokenLogProbs:
        measured = frozenset({"hidden"}) if self.norms is not None else frozenset[str]()
        with precision(self.world.device, self.config.precision == "bf16_autocast"):
            return log_probs(
                self.model,
                read.inputs,
                want=self.objective.wants | {"rank", "entropy"} | measured,
                candidate_TC=self.objective.candidates(read.batch),
                expect=expect,
                divergences=self.objective.divergences,
                teacher=self.teacher,
            )


def _share(normaliser: Normaliser, objective: Composite, batch: Batch, answer: TokenLogProbs) -> Tensor:
    """The micro-batch's share of the loss, as a function of its log-probabilities."""
    return normaliser.share(objective(answer, batch), batch)


def _micro_batches(window: Window, config: TrainConfig, world: World) -> list[Batch]:
    rows = window.packed.rows
    share = window.packed.take(rows * world.rank // world.size, rows * (world.rank + 1) // world.size)
    return [to_batch(part, world.device) for part in share.split(config.rows_per_micro_batch)]


def _reweighted(batch: Batch, window: Window, slice_weights: Mapping[str, float]) -> Batch:
    """The batch with its token weights multiplied, slice by slice."""
    if not slice_weights:
        return batch
    factors = [slice_weights.get(name, 1.0) for name in window.data.slice_names]
    factor_S = batch.weight_T.new_tensor([*factors, 1.0])  # the last one is padding's, number -1
    return replace(batch, weight_T=batch.weight_T * factor_S[batch.slice_T])


def _hidden(answer: TokenLogProbs) -> Tensor:
    assert answer.hidden_TD is not None, "asked for where norms are measured"
    if not answer.hidden_TD.requires_grad:
        raise BadInput(
            "gradnorm measures gradients at the final hidden states, which no trained parameter moves",
            fix="train more than the head, or choose another blend",
        )
    return answer.hidden_TD


# --- a window as one ---


def _slopes(share: Tensor, answer: TokenLogProbs) -> dict[str, Tensor]:
    """The gradient of a loss with respect to each field of the answer that it depends on."""
    if not share.requires_grad:
        return {}
    names, leaves = zip(*_floating(answer), strict=True)
    slopes = torch.autograd.grad(share, leaves, retain_graph=True, allow_unused=True)
    return {name: slope for name, slope in zip(names, slopes, strict=True) if slope is not None}


def _at(positions: slice, slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: slope[positions] for name, slope in slopes.items()}


def _linear(slopes: Mapping[str, Tensor], answer: TokenLogProbs) -> Tensor:
    """sum over fields and positions of field * slope: what has these slopes as its gradient."""
    anchor = answer.logprob_T.sum() * 0.0  # where nothing has a slope, still a differentiable 0
    return anchor + sum(
        ((getattr(answer, name) * slope.to(getattr(answer, name))).sum() for name, slope in slopes.items()),
        start=anchor,
    )


def _floating(answer: TokenLogProbs) -> list[tuple[str, Tensor]]:
    return [(n, x) for n, x in answer._asdict().items() if x is not None and x.is_floating_point()]


def _joined_answers(parts: Sequence[TokenLogProbs], world: World) -> TokenLogProbs:
    """The answers of all ranks, in rank order; floating fields are leaves that take gradients."""
    joined: dict[str, Tensor] = {}
    for name in TokenLogProbs._fields:
        own = [getattr(part, name) for part in parts]
        if not all(field is None for field in own):
            whole = _gathered(torch.cat([field.detach() for field in own]), world)
            joined[name] = whole.requires_grad_() if whole.is_floating_point() else whole
    return TokenLogProbs(**joined)


def _joined_batches(parts: Sequence[Batch], world: World) -> tuple[Batch, int]:
    """The micro-batches of all ranks as one, segments numbered on, and where this rank's begin."""
    segments, offset = [], 0
    for part in parts:
        segments.append(torch.where(part.segment_T < 0, -1, part.segment_T + offset))
        offset += int(part.segment_T.max()) + 1
    before = world.gather_json([offset, sum(len(part.token_T) for part in parts)])[: world.rank]
    shift = sum(n_segments for n_segments, _ in before)
    segment_T = torch.cat(segments)
    names = [f.name for f in fields(Batch) if f.name not in ("segment_T", "length", "columns")]
    joined = {name: _gathered(torch.cat([getattr(p, name) for p in parts]), world) for name in names}
    columns = {n: _gathered(torch.cat([p.columns[n] for p in parts]), world) for n in parts[0].columns}
    joined["segment_T"] = _gathered(torch.where(segment_T < 0, -1, segment_T + shift), world)
    whole = Batch(**joined, length=parts[0].length, columns=columns)
    return whole, sum(n_tokens for _, n_tokens in before)


def _gathered(own: Tensor, world: World) -> Tensor:
    """A tensor of all ranks, concatenated along its first dimension."""
    if world.size == 1:
        return own.contiguous().clone()
    return world.gather(own.flatten()).view(-1, *own.shape[1:])


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
