"""What a question and its answer are to everything behind the HTTP surface.

    Asked --Gatekeeper.before--> None | Judgement             a judgement here: no model is asked
    Asked, Answered --Gatekeeper.after--> Judgement           what the user gets, and why
    each ends as one event in an EventSink

The app fills an `Asked` from a request and an `Answered` from an engine; gates, queues and logs see these
alone, never HTTP and never a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

Outcome = Literal["answer", "caveat", "abstain", "escalate", "review", "block"]
"""In words: as it is; with a sentence of warning; "I don't know"; ask a stronger upstream; a person
decides; refused."""


class Asked(NamedTuple):
    """One question as it came in."""

    id: str
    """Of the request, which is in the answer, the event and the review item: 32 hexadecimal digits."""
    kind: Literal["chat", "completion", "decision"]
    prompt: str
    """The text the model sees, the chat template applied."""
    messages: Sequence[Mapping[str, Any]]
    """Of a chat, as they were given; else empty."""
    model: str
    user: str
    """A keyed hash of who asks; empty: not known."""
    tier: str
    """Of the API key: policies speak of it. Empty: no key."""
    slice: str
    """What sort of question the client says it is; empty: nothing said."""
    max_tokens: int
    deadline_s: float | None
    """Seconds from `received_at` after which an answer is cut."""
    received_at: float
    """Seconds since 1970, UTC."""
    consent: bool = False
    """Whether the user agreed that the exchange may become training data."""
    webhook: str | None = None
    """Called when a person has decided on the answer."""
    rollout: str = ""
    """The trial that this is a part of; empty: none."""
    arm: str = ""
    """Of the trial: champion, challenger or shadow."""


class Token(NamedTuple):
    """One token of an answer, with what the untouched distribution says of it."""

    text: str
    id: int | None
    """None: an upstream does not tell."""
    logprob: float
    """Nats."""
    entropy: float | None
    """Of the distribution, nats; None where only the likeliest tokens are known."""
    alternatives: Sequence[tuple[str, float]]
    """The likeliest tokens in this place with their log p."""


class Answered(NamedTuple):
    """What an engine wrote."""

    text: str
    tokens: Sequence[Token]
    finish: Literal["stop", "length", "cut"]
    """"cut": a deadline or a budget ended it early."""
    prompt_tokens: int
    queued_s: float
    """From arrival to the first computation."""
    first_token_s: float
    """From arrival."""
    total_s: float
    """From arrival."""
    engine: str
    """"embedded", or the upstream's URL."""


class Confidence(NamedTuple):
    """How probable it is that the answer is right, by a calibrator."""

    probability: float
    low: float | None
    high: float | None
    """A 95% interval of the calibrator at this confidence; None where it has none."""
    calibrator: str
    """The artifact's id."""


class Judgement(NamedTuple):
    """What becomes of an answer."""

    outcome: Outcome
    reasons: tuple[str, ...] = ()
    """The rules that decided, in words for the user and the log."""
    text: str | None = None
    """What the user gets in place of the answer's text: masked, or with a caveat, or a refusal. None: the
    answer's own."""
    confidence: Confidence | None = None
    flags: Mapping[str, float] = {}
    """Safety scores by name, of question and answer: "input.patterns", "output.moderation", ..."""
    policy: str = ""
    """The id of the policy; empty: none."""
    review_id: str | None = None
    """Of the item that a person will look at; stored before this is returned."""
    audited: bool = False
    """Whether it was answered and also drawn for a look afterwards."""
    inclusion: float | None = None
    """The probability with which it was drawn for review: 1 where the gate sent it."""


class Gatekeeper(Protocol):
    """Decides before and after a model is asked. Raises nothing: what fails inside fails closed."""

    async def before(self, asked: Asked) -> Judgement | None:
        """A judgement that needs no answer (a block, an abstention); None: go on."""

    async def after(self, asked: Asked, answered: Answered, others: Sequence[str] = ()) -> Judgement:
        """What becomes of this answer; `others` were written to the same question, and people see them."""


class EventSink(Protocol):
    """Where a request ends up: `record` never blocks the answer for longer than putting it in a queue."""

    def record(
        self,
        asked: Asked,
        answered: Answered | None,
        judgement: Judgement | None,
        status: int,
        sample: int = 0,
    ) -> None:
        """Of a request that ended with this HTTP status; one call for each of its samples."""
