"""The names of objectives: a decorated function can be asked for in YAML, by its own name.

    @objective(wants=("mean_logit",))
    def label_smoothing(log_probs, batch, *, epsilon: Share = 0.1) -> Terms: ...

    - label_smoothing: {epsilon: 0.05, weight: 1.0}

The keyword parameters of the function are the keys of the YAML entry, with the types, bounds and defaults of
its signature. `weight`, `name`, `of` and `slices` are taken: they belong to the entry, not to the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import create_model
from torch import Tensor

from gyrocompass.core.config import Config
from gyrocompass.loss.signal import Divergence, Terms

F = TypeVar("F", bound=Callable[..., Terms])


@dataclass(frozen=True)
class Registered:
    """An objective by name: what computes it, what it needs, and what it may be told."""

    name: str
    function: Callable[..., Terms]
    """(log_probs, batch, **parameters) -> Terms."""
    wants: frozenset[str]
    """The statistics of `TokenLogProbs` it reads besides logprob and lse."""
    candidates: Callable[..., Tensor] | None
    """(batch, **parameters) -> candidate_TC, for objectives about tokens other than the target."""
    divergence: Callable[..., Divergence] | None
    """(**parameters) -> the divergence from a teacher that it reads, as `divergence_TK[:, 0]`."""
    whole_window: bool
    """Whether its terms depend on each other across micro-batches and ranks: it is then evaluated on the
    whole window at once, at the cost of one more forward pass where the window is split."""
    parameters: type[Config]
    separable: bool
    """Whether each token's value depends on that token's log-probabilities alone, given the batch."""


OBJECTIVES: dict[str, Registered] = {}


def objective(
    *,
    wants: Collection[str] = (),
    candidates: Callable[..., Tensor] | None = None,
    divergence: Callable[..., Divergence] | None = None,
    whole_window: bool = False,
    separable: bool = False,
) -> Callable[[F], F]:
    """Register a function under its own name; it stays callable as it is.

    Args:
        wants: the statistics it reads besides `logprob_T` and `lse_T`; "scalar", "hidden" and "future" too.
        candidates: what names the candidate tokens it reads; takes the batch and the same parameters.
        divergence: which divergence from a teacher it reads; takes the same parameters.
        whole_window: its terms are not a function of one unit alone (negatives, sorting, ranking).
        separable: each token's value depends on that token's log-probabilities alone, given the batch: its
            gradient may be computed in the forward pass. (Said wrongly, it costs time, never exactness.)
    """

    def register(function: F) -> F:
        name = function.__name__
        assert name not in OBJECTIVES, f"two objectives are called {name}"
        fields: dict[str, Any] = {
            parameter.name: (
                parameter.annotation,
                ... if parameter.default is parameter.empty else parameter.default,
            )
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        taken = {"weight", "name", "of", "slices"} & set(fields)
        assert not taken, f"{name}: these keys belong to the entry: {taken}"
        model = create_model(f"{name}_parameters", __base__=Config, **fields)
        OBJECTIVES[name] = Registered(
            name, function, frozenset(wants), candidates, divergence, whole_window, model, separable
        )
        return function

    return register
