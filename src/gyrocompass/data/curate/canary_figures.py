"""What the finders of a build find of planted canaries, with the options they were run with.

    steps of a build --canary_figures--> CanaryFigure, ...    recall and precision by step and slice

The texts are drawn anew each time, from one seed: a few hundred, some tenths of a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gyrocompass.data.curate import canaries_personal, canaries_secrets
from gyrocompass.data.curate.canaries import CARRIERS, Found
from gyrocompass.data.curate.config import NamedStep
from gyrocompass.data.curate.personal import PersonalData
from gyrocompass.data.curate.secrets import Secrets

TEXTS = 100


class CanaryFigure(NamedTuple):
    """Of one step in one slice of the planted texts."""

    step: str
    slice: str
    planted: int
    recall: float
    precision: float
    worst_kind: str
    """The planted kind with the least recall."""
    worst_recall: float


def canary_figures(steps: Iterable[NamedStep], texts: int = TEXTS) -> Iterator[CanaryFigure]:
    """Measure each finder of personal data and of secrets.

    Args:
        steps: of a build.
        texts: of each slice; each holds three planted values and three decoys.
    """
    for named in steps:
        if isinstance(named.step, PersonalData):
            table = canaries_personal.measured(
                n=texts, kinds=named.step.kinds, minimum_score=named.step.minimum_score
            )
        elif isinstance(named.step, Secrets):
            table = canaries_secrets.measured(
                named.step.engine, n=texts, minimum_score=named.step.minimum_score
            )
        else:
            continue
        yield from (_figure(named.label, slice_name, table) for slice_name in (*CARRIERS, "all"))


def _figure(step: str, slice_name: str, table: dict[tuple[str, str], Found]) -> CanaryFigure:
    total = table[slice_name, "all"]
    kinds: Sequence[tuple[float, str]] = [
        (found.recall, kind)
        for (where, kind), found in table.items()
        if where == slice_name and kind != "all" and found.planted
    ]
    worst_recall, worst_kind = min(kinds)
    return CanaryFigure(
        step, slice_name, total.planted, total.recall, total.precision, worst_kind, worst_recall
    )
