"""One question through gate, model and gate again, and into the log; whole, or piece by piece.

    before --> write --> after --> (escalate: the stronger backend writes, and is judged too) --> event

Where there is a gate nothing is shown before it has decided: a stream then starts when the answer is whole.
Without one, pieces are shown as they come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from gyrocompass.serve.answer import Answered, Asked, EventSink, Judgement
from gyrocompass.serve.backend import Backend, Job, Piece, Samples
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.services import Lane, Way
from gyrocompass.serve.traces import span

NO_STRONGER = "the gate asked for a stronger model, and none is set"
ABSTENTION = "I am not sure enough to answer this."
_MOST_SHADOWED = 16


class Outcome(NamedTuple):
    """One sample, as it ended."""

    answered: Answered
    judgement: Judgement | None
    extra: Mapping[str, Any]
    reply: Mapping[str, Any]


class Exchange:
    """Asks a lane on behalf of clients.

    Args:
        way: where requests go. The lane's backend writes the answers; its gate decides, if it has one; what
            that escalates the stronger backend writes, or it becomes an abstention. A shadow is asked when
            the answer is there.
        events: the log; None: nothing is kept.
    """

    def __init__(self, way: Way, events: EventSink | None = None) -> None:
        lane = way.lane
        self.backend, self._stronger, self._gate = lane.backend, lane.stronger, lane.gate
        self._events, self._shadow = events, way.shadow

    @property
    def shows_live(self) -> bool:
        """Whether pieces may be shown before an answer is whole."""
        return self._gate is None

    async def whole(self, asked: Asked, job: Job) -> list[Outcome]:
        """Every sample, judged and logged.

        Raises:
            Failure: as for `Backend.write`.
        """
        try:
            with span(asked, job, self.backend.name) as traced:
                found = await self._whole(asked, job)
                traced.ended([outcome.answered for outcome in found], [one.judgement for one in found])
        except Failure as failure:
            self.record(asked, None, None, failure.status)
            raise
        except asyncio.CancelledError:
            self.record(asked, None, None, 499)
            raise
        asyncio.get_running_loop().call_soon(self._keep, asked, found)  # the answer need not wait for its log
        self._ask_shadow(asked, job)
        return found

    def _keep(self, asked: Asked, outcomes: Sequence[Outcome]) -> None:
        for sample, outcome in enumerate(outcomes):
            self.record(asked, outcome.answered, outcome.judgement, 200, sample)

    async def _whole(self, asked: Asked, job: Job) -> list[Outcome]:
        if self._gate is not None and (judgement := await self._gate.before(asked)) is not None:
            waited_s = time.time() - asked.received_at
            nothing = Answered("", (), "stop", 0, 0.0, waited_s, waited_s, "")
            return [Outcome(nothing, judgement, {}, {})] * job.samples
        samples = await _gathered(self.backend, job)
        found, written = [], samples.answered()
        texts = [answered.text for answered in written]
        for answered, extra in zip(written, samples.extra, strict=True):
            outcome = Outcome(answered, None, extra, samples.reply)
            found.append(outcome if self._gate is None else await self._judged(asked, job, outcome, texts))
        return found

    async def _judged(self, asked: Asked, job: Job, outcome: Outcome, texts: Sequence[str]) -> Outcome:
        """Judge one of the `texts` that were written to this question."""
        assert self._gate is not None
        judgement = await self._gate.after(asked, outcome.answered, texts)
        if judgement.outcome != "escalate":
            return outcome._replace(judgement=judgement)
        if self._stronger is not None:
            samples = await _gathered(self._stronger, job._replace(samples=1))
            outcome = Outcome(samples.answered()[0], None, samples.extra[0], samples.reply)
            second = await self._gate.after(asked, outcome.answered, texts)
            judgement = second._replace(reasons=(*judgement.reasons, *second.reasons))
            if judgement.outcome != "escalate":
                return outcome._replace(judgement=judgement)
        reasons = judgement.reasons if self._stronger is not None else (*judgement.reasons, NO_STRONGER)
        return outcome._replace(
            judgement=judgement._replace(outcome="abstain", reasons=reasons, text=ABSTENTION)
        )

    async def live(self, asked: Asked, job: Job) -> AsyncIterator[Piece]:
        """Pieces as they come, for a server without a gate; logged when they end, however they do.

        Raises:
            Failure: as for `Backend.write`.
        """
        samples = Samples(job, self.backend.name)
        status = 499  # of a client that left, unless we come to the end
        try:
            with span(asked, job, self.backend.name) as traced:
                async for piece in self.backend.write(job):
                    samples.add(piece, time.time())
                    yield piece
                traced.ended(samples.answered(), ())
            status = 200
            self._ask_shadow(asked, job)
        except Failure as failure:
            status = failure.status
            raise
        finally:
            for sample, answered in enumerate(samples.answered()):
                self.record(asked, answered, None, status, sample)

    def _ask_shadow(self, asked: Asked, job: Job) -> None:
        """Let the shadow answer too, behind the answer; where too many do, this question is left out."""
        if self._shadow is None or len(_SHADOWED) >= _MOST_SHADOWED:
            return
        now = time.time()
        model = self._shadow.lineage.get("model") or asked.model
        asked = asked._replace(
            id=f"{asked.id}.shadow", model=model, arm="shadow", received_at=now, webhook=None, consent=False
        )
        job = job._replace(received_at=now)
        task = asyncio.ensure_future(_shadowed(self._shadow, self._events, asked, job))
        _SHADOWED.add(task)
        task.add_done_callback(_SHADOWED.discard)

    def record(
        self,
        asked: Asked,
        answered: Answered | None,
        judgement: Judgement | None,
        status: int,
        sample: int = 0,
    ) -> None:
        """Log how a request ended."""
        if self._events is not None:
            self._events.record(asked, answered, judgement, status, sample)


_SHADOWED: set[asyncio.Future[None]] = set()
"""What shadows are at."""


async def _shadowed(lane: Lane, events: EventSink | None, asked: Asked, job: Job) -> None:
    with suppress(Failure):  # the event has it
        await Exchange(Way(lane), events).whole(asked, job)


async def _gathered(backend: Backend, job: Job) -> Samples:
    samples = Samples(job, backend.name)
    async for piece in backend.write(job):
        samples.add(piece, time.time())
    return samples
