"""The probe finds the faults that servers have, and none where there is none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from parrot import Parrot, alone, token

from gyrocompass.core.errors import GyroError
from gyrocompass.serve.app import make_app
from gyrocompass.serve.backend import Job, Piece, Scored
from gyrocompass.serve.probe import probe
from gyrocompass.serve.services import ServeSettings

Serve = Callable[[Any], str]


class Prefixed(Parrot):
    """Reads a BOS before every prompt, and tells of it."""

    async def score(self, job: Job) -> Scored:
        scored = await super().score(job)
        tokens = [token("B")._replace(logprob=float("nan"), alternatives=[]), token("T"), *scored.tokens[1:]]
        return Scored(tokens, [0, *scored.text_offset])


class Swallowing(Parrot):
    """Leaves the last token of a prompt out."""

    async def score(self, job: Job) -> Scored:
        scored = await super().score(job)
        return Scored(scored.tokens[:-1], scored.text_offset[:-1])


class Fine(Parrot):
    """Has numbers that are not round."""

    skew = 1.0

    async def score(self, job: Job) -> Scored:
        scored = await super().score(job)
        tokens = [self._skewed(one) for one in scored.tokens]
        return Scored(tokens, scored.text_offset)

    async def write(self, job: Job) -> AsyncIterator[Piece]:
        async for piece in super().write(job):
            yield piece._replace(tokens=[self._skewed(one) for one in piece.tokens])

    def _skewed(self, one: Any) -> Any:
        factor = 1.0123457 * self.skew
        return one._replace(
            logprob=one.logprob * factor,
            alternatives=[(text, value * factor) for text, value in one.alternatives],
        )


class Moody(Fine):
    """Says something else each time."""

    async def score(self, job: Job) -> Scored:
        self.skew *= 1.01
        return await super().score(job)


class Confident(Fine):
    """Its best token is less likely than the one that is there."""

    def _skewed(self, one: Any) -> Any:
        return super()._skewed(one)._replace(alternatives=[("~", one.logprob * 2)])


def wrong(served: Serve, parrot: Parrot) -> set[str]:
    found = probe(served(make_app(alone(parrot), ServeSettings())))
    return {finding.name for finding in found if finding.verdict != "right"}


def test_nothing_is_found_where_nothing_is_wrong(served: Serve) -> None:
    assert wrong(served, Fine()) == set()


@pytest.mark.parametrize(
    ("parrot", "faults"),
    [
        (Parrot(), {"fine-grained"}),
        (Prefixed(), {"one value per token", "fine-grained"}),
        (Swallowing(), {"one value per token", "fine-grained"}),
        (Moody(), {"the same again", "in one batch", "side by side", "written as echoed"}),
        (Confident(), {"greedy can be told"}),
    ],
)
def test_faults_are_named(served: Serve, parrot: Parrot, faults: set[str]) -> None:
    assert wrong(served, parrot) == faults


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(GyroError, match="cannot be asked"):
        probe("http://127.0.0.1:9")
