"""A run's objective: named objectives with weights and schedules, read from YAML.

    objectives:
      - nll                                             # weight 1
      - z_loss: {coefficient: 1.0e-4}
      - unlikelihood: {window: 64, weight: {linear: {from: 0.0, to: 0.5, steps: 1000}}}
      - nll: {name: prose, slices: [prose/docs, prose/comments]}      # of these slices alone
      - clipped_surrogate: {of: rollouts}               # of the model's own samples alone

    [entry, ...] --parse_objectives--> Composite
    Composite(log_probs, batch) -> {name: Terms}        the terms of each, unreduced and apart

The terms stay apart until `reduce.py` adds them up, so each is reported by its name. Left out: weights that
adapt to what the run measures (`blend.py`).

Shape legend: T tokens, C candidate tokens per position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, PositiveInt, Tag, create_model, model_validator
from torch import Tensor

from gyrocompass.core.config import Config, parse
from gyrocompass.core.errors import BadInput, ConfigError, did_you_mean
from gyrocompass.loss import contrastive as contrastive  # these modules' objectives register themselves
from gyrocompass.loss import distill as distill
from gyrocompass.loss import likelihood as likelihood
from gyrocompass.loss import multi_token as multi_token
from gyrocompass.loss import policy as policy
from gyrocompass.loss import policy_value as policy_value
from gyrocompass.loss import preference as preference
from gyrocompass.loss import reference_free as reference_free
from gyrocompass.loss import reference_kl as reference_kl
from gyrocompass.loss import retrieval as retrieval
from gyrocompass.loss import reward as reward
from gyrocompass.loss import unpaired as unpaired
from gyrocompass.loss.registry import OBJECTIVES, Registered
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, Divergence, Terms, TokenLogProbs

Kind = Literal["data", "rollouts"]
"""What a window may hold: texts that were there before, and the model's own samples."""


class Ramp(Config):
    """From one weight to another over a number of optimizer steps; it stays there after."""

    start: float = Field(alias="from")
    to: float
    steps: PositiveInt


class Schedule(Config):
    """A weight that changes with the step: one of a linear or a cosine ramp."""

    linear: Ramp | None = None
    cosine: Ramp | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Schedule:
        if (self.linear is None) == (self.cosine is None):
            raise ValueError("a schedule is one of linear and cosine")
        return self

    def at(self, step: int) -> float:
        """The weight at an optimizer step, counted from 0."""
        ramp = self.linear or self.cosine
        assert ramp is not None
        way = min(step / ramp.steps, 1.0)
        if self.cosine is not None:
            way = (1 - math.cos(math.pi * way)) / 2
        return ramp.start + (ramp.to - ramp.start) * way


Weight = Annotated[
    Annotated[float, Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(lambda value: "schedule" if isinstance(value, Mapping | Schedule) else "number"),
]


@dataclass(frozen=True)
class Part:
    """One named objective of a composite, with its parameters bound."""

    name: str
    registered: Registered
    parameters: Mapping[str, Any]
    weight: float | Schedule
    of: Kind | None = None
    """Which kind of text it is about; None: there is only one."""
    slices: tuple[str, ...] | None = None
    """The slices it is about; None: all, of its kind once `Composite.within` has said which those are."""
    slice_numbers: tuple[int, ...] | None = None
    """Theirs in the batches to come; None until `Composite.on_slices` has said it."""

    def seen(self, batch: Batch) -> Batch:
        """The batch as this objective reads it: nothing counts outside its slices."""
        if self.slices is None:
            return batch
        assert self.slice_numbers is not None, "say composite.on_slices(names) first"
        own = batch.slice_T.new_tensor(self.slice_numbers)
        elsewhere_T = torch.isin(batch.slice_T, own, invert=True)
        return replace(
            batch,
            weight_T=batch.weight_T.masked_fill(elsewhere_T, 0.0),
            target_T=batch.target_T.masked_fill(elsewhere_T, IGNORE_INDEX),
        )

    def candidates(self, batch: Batch) -> Tensor | None:
        """The candidate tokens [T, C] this objective asks for, if it is about any."""
        find = self.registered.candidates
        return None if find is None else find(self.seen(batch), **self.parameters)

    @property
    def divergence(self) -> Divergence | None:
        """The divergence from a teacher this objective reads, if it reads one."""
        choose = self.registered.divergence
        return None if choose is None else choose(**self.parameters)


@dataclass(frozen=True)
class Composite:
    """Named objectives together: what they need from the primitive, their terms, and their weights.

    >>> parse_objectives(["nll", {"z_loss": {"weight": 0.5}}]).weights(step=0)
    {'nll': 1.0, 'z_loss': 0.5}
    """

    parts: tuple[Part, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts, as reports show them."""
        return tuple(part.name for part in self.parts)

    @property
    def wants(self) -> frozenset[str]:
        """What to pass to `token_logprobs` as `want`."""
        return frozenset[str]().union(*(part.registered.wants for part in self.parts))

    @property
    def separable(self) -> bool:
        """Whether every part is separable per token, and with them any weighted sum of the terms."""
        return all(part.registered.separable for part in self.parts)

    @property
    def whole_window(self) -> bool:
        """Whether a part must see all of a window at once."""
        return any(part.registered.whole_window for part in self.parts)

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        """The divergences from a teacher that the parts read, in their order."""
        return tuple(asked for part in self.parts if (asked := part.divergence) is not None)

    def candidates(self, batch: Batch) -> Tensor | None:
        """What to pass to `token_logprobs` as `candidate_TC`: int64 [T, C], or None if no part asks."""
        asked = [candidate_TC for part in self.parts if (candidate_TC := part.candidates(batch)) is not None]
        return torch.cat(asked, dim=1) if asked else None

    def __call__(self, log_probs: TokenLogProbs, batch: Batch) -> dict[str, Terms]:
        """The terms of each part, by name; `log_probs` holds `wants` and `candidates(batch)`."""
        terms: dict[str, Terms] = {}
        column = taught = 0
        for part in self.parts:
            seen, candidate_TC = log_probs, part.candidates(batch)
            if part.divergence is not None:
                assert log_probs.divergence_TK is not None, "ask log_probs for composite.divergences"
                seen = seen._replace(divergence_TK=log_probs.divergence_TK[:, taught : taught + 1])
                taught += 1
            if candidate_TC is not None:
                assert log_probs.candidate_TC is not None, (
                    "ask token_logprobs for composite.candidates(batch)"
                )
                columns = slice(column, column := column + candidate_TC.shape[1])
                seen = seen._replace(candidate_TC=log_probs.candidate_TC[:, columns])
            terms[part.name] = part.registered.function(seen, part.seen(batch), **part.parameters)
        return terms

    def on_slices(self, names: Sequence[str]) -> Composite:
        """The same, for batches whose slices have these names; a part's slice that is not there is empty."""
        assert all(part.of is None or part.slices is not None for part in self.parts), "say within first"
        numbers = {name: number for number, name in enumerate(names)}
        return Composite(
            tuple(
                part
                if part.slices is None
                else replace(part, slice_numbers=tuple(numbers[n] for n in part.slices if n in numbers))
                for part in self.parts
            )
        )

    def within(self, slices: Mapping[Kind, Sequence[str]]) -> Composite:
        """The same, for a run that reads these slices of each kind: `of` becomes the slices it stands for.

        Raises:
            BadInput: a slice or a kind that the run does not have (the nearest slice is named), or no kind of
                two.
        """
        return Composite(tuple(replace(part, slices=_slices_of(part, slices)) for part in self.parts))

    def weights(self, step: int) -> dict[str, float]:
        """The weight of each part at an optimizer step, counted from 0."""
        return {
            part.name: part.weight.at(step) if isinstance(part.weight, Schedule) else part.weight
            for part in self.parts
        }


def parse_objectives(entries: Sequence[str | Mapping[str, Any]], where: str = "objectives") -> Composite:
    """Read a YAML list of objectives.

    Args:
        entries: each a name, or {name: {its parameters, weight, name, slices}}. `weight` is a number (default
            1) or a schedule; `name` is what reports call the term, needed when an objective is listed twice;
            `of` says whether it is about data or rollouts, where a run reads both; `slices` names those whose
            tokens, sequences or pairs it is about (default: all).
        where: what errors name as the place.

    Raises:
        ConfigError: an unknown objective or parameter (the nearest known one is named), a parameter out of
            bounds, a name used twice, an empty list.
    """
    if isinstance(entries, str | Mapping) or not entries:
        raise ConfigError("objectives are a list with at least one entry", where=where, fix="- nll")
    parts = [_part(entry, f"{where}.{index}") for index, entry in enumerate(entries)]
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two objectives are called {name}", where=where, fix=f"- {name}: {{name: another, ...}}"
            )
    return Composite(tuple(parts))


def _slices_of(part: Part, slices: Mapping[Kind, Sequence[str]]) -> tuple[str, ...] | None:
    """The slices a part is about in a run with these; None: all there are."""
    if part.of is None and len(slices) > 1:
        raise BadInput(
            f"the run has data and rollouts, and the objective {part.name} does not say which it is about",
            fix="give it `of: data` or `of: rollouts`",
        )
    if part.of is not None and part.of not in slices:
        raise BadInput(
            f"the objective {part.name} is of {part.of}, and the run has only {', '.join(slices)}",
            fix="leave `of` out" if part.of == "data" else "add rollouts, or leave `of` out",
        )
    known = [name for kind, names in slices.items() if part.of in (None, kind) for name in names]
    for name in part.slices or ():
        if name not in known:
            raise BadInput(
                f"the objective {part.name} is about the slice {name}, "
                f"which is not in the {part.of or ', '.join(slices)}" + did_you_mean(name, known)
            )
    return tuple(known) if part.slices is None and part.of is not None else part.slices


def _part(entry: str | Mapping[str, Any], where: str) -> Part:
    """One entry, checked against the signature of its objective."""
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(
            f"an entry is one objective's name, or {{name: {{...}}}}; found {entry!r}", where=where
        )
    ((name, given),) = entry.items()
    if name not in OBJECTIVES:
        raise ConfigError(f"unknown objective {name!r}{did_you_mean(str(name), OBJECTIVES)}", where=where)
    checked = parse(_entry_model(OBJECTIVES[name]), {} if given is None else given, f"{where}.{name}")
    keys = dict(checked)
    called, weight, of, slices = (keys.pop(key) for key in ("name", "weight", "of", "slices"))
    return Part(called, OBJECTIVES[name], keys, weight, of, slices)


@cache
def _entry_model(registered: Registered) -> type[Config]:
    """What an entry of this objective may hold: its parameters, a weight, a name, a kind and slices."""
    shared: dict[str, Any] = {
        "weight": (Weight, 1.0),
        "name": (str, registered.name),
        "of": (Kind | None, None),
        "slices": (Annotated[tuple[str, ...], Field(min_length=1)] | None, None),
    }
    return create_model(f"{registered.name}_entry", __base__=registered.parameters, **shared)
