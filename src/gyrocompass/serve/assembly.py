"""What a server is put together from: a store, a policy, keys, a queue, a log.

backend, policy --make_lane--> Lane             one of them: OneWay; as a registry says: `following`
store, ways     --assemble---> Services, ready for `make_app`
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.model.decoding import Decoding
from gyrocompass.serve.answer import Answered, Asked, EventSink, Judgement
from gyrocompass.serve.backend import Backend, Job
from gyrocompass.serve.confidence import artifact_folder, calibrated_for, open_calibrated
from gyrocompass.serve.decisions import Calibrate, answer_of, labels_of, prompt_of
from gyrocompass.serve.events import EventLog, EventSettings
from gyrocompass.serve.exchange import Exchange
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.gate import Gate, masked_text
from gyrocompass.serve.keys import Keys, list_keys
from gyrocompass.serve.pages.routes import Ask, pages_router
from gyrocompass.serve.policy import Mask, Policy
from gyrocompass.serve.review import Reviews, ReviewSettings
from gyrocompass.serve.review_routes import review_router
from gyrocompass.serve.scorers import lookers_of
from gyrocompass.serve.services import Lane, Services, Ways
from gyrocompass.serve.sessions import Sessions, secret_of
from gyrocompass.serve.thumbs import thumbs_router
from gyrocompass.serve.webhooks import Webhooks
from gyrocompass.serve.wire import Predicate


def make_lane(
    store: Store,
    backend: Backend,
    *,
    stronger: Backend | None = None,
    policy: Policy | None = None,
    queue: Reviews | None = None,
    lineage: Mapping[str, str | None] | None = None,
) -> Lane:
    """A backend behind a gate.

    Args:
        store: with the artifacts that a policy names.
        backend: writes answers.
        stronger: writes those that the gate escalates.
        policy: of the gate; None: every answer is shown.
        queue: where the gate sends what people are to decide on; None: it abstains.
        lineage: ids of what answers.

    Raises:
        BadInput: the policy names what there is not, or promises what its calibration does not.
    """
    if policy is None:
        return Lane(backend, stronger, lineage=lineage or {})
    gate = Gate(policy, _lookers(policy, store, backend), calibrated_for(policy, store), queue)
    return Lane(
        backend,
        stronger,
        gate,
        gate.moderate if policy.scorers else None,
        _choice_calibrator(policy, store),
        lineage or {},
        gate.close,
    )


def assemble(
    store: Store,
    ways: Ways,
    *,
    events: EventSettings | None = None,
    reviews: ReviewSettings | None = None,
    open_to_all: bool = True,
    background: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
) -> Services:
    """Everything behind the routes.

    Args:
        store: with the database.
        ways: who gets which lane.
        events: what the log keeps.
        reviews: how people decide.
        open_to_all: whether requests need no key as long as there is none; for a server that this machine
            alone can reach.
        background: what else runs as long as the server does.

    Raises:
        BadInput: keys are needed and there are none.
    """
    database = store.database
    keys = Keys(database) if list_keys(database) or not open_to_all else None
    if not open_to_all and not list_keys(database):
        raise BadInput(
            "a server that other machines can reach needs keys, and there are none",
            fix="make one: gyro keys create NAME --scopes infer",
        )
    queue = Reviews(database, reviews)
    log = EventLog(database, events or EventSettings(), partial(masked_text, settings=_EVERYTHING))
    secret = secret_of(store.root)
    hooks = Webhooks(database, queue.status, secret)
    ask = _asker(ways, log)
    pages = pages_router(store, queue, Sessions(secret), keys, ask)
    return Services(
        ways,
        log,
        keys,
        (review_router(queue, keys), thumbs_router(database, keys), pages),
        (partial(asyncio.to_thread, log.close),),
        (hooks.run, *background),
    )


def _asker(ways: Ways, events: EventSink) -> Ask:
    """Asks for the playground, as a client would."""

    async def ask(prompt: str, limit: int, warmth: float) -> tuple[Answered, Judgement | None]:
        exchange = Exchange(ways.of(""), events)
        if not prompt.strip():
            raise Failure(400, "there is nothing to answer")
        messages = [{"role": "user", "content": prompt}]
        try:
            chats = (await exchange.backend.tokenizer_info()).get("chat_template") is not None
        except Failure:  # a server that does not say; most chat
            chats = True
        job = Job.plain(messages)._replace(
            prompt=messages if chats else prompt,
            decoding=Decoding(temperature=warmth),
            max_tokens=limit,
            alternatives=5,
        )
        kind: Literal["chat", "completion"] = "chat" if chats else "completion"
        said = messages if chats else ()
        asked = Asked(job.id, kind, prompt, said, "", "", "", "playground", limit, None, job.received_at)
        (outcome,) = await exchange.whole(asked, job)
        return outcome.answered, outcome.judgement

    return ask


_EVERYTHING = Mask(personal=True, secrets=True)


def _choice_calibrator(policy: Policy, store: Store) -> Calibrate | None:
    """For decisions, where the calibration has one."""
    if policy.calibrator is None:
        return None
    try:
        found = open_calibrated(artifact_folder(policy.calibrator, store), "choice")
    except BadInput:
        return None
    return lambda probability: found.of_raw(probability, "", 1)


def _lookers(policy: Policy, store: Store, backend: Backend) -> Any:
    return lookers_of(policy, own=_own(backend), classifier=partial(_classifier, store))


def _own(backend: Backend) -> Callable[[str, str], Awaitable[float]]:
    """P(statement) of a text, as /v1/decisions has it."""

    async def ask(text: str, statement: str) -> float:
        question = Predicate(type="predicate", instructions=statement)
        job = Job.plain([{"role": "user", "content": prompt_of(text, question)}])
        told, _ = await backend.likelihoods(job, labels_of(question))
        return float(answer_of(question, told, None)[0]["probability"])

    return ask


def _classifier(store: Store, name: str) -> Callable[[str], float]:
    """Sigmoid of what a model with a scalar head says of a text."""
    from gyrocompass.serve.classifier import open_classifier

    return open_classifier(artifact_folder(name, store))
