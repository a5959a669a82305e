"""The gate: what becomes of a question and of its answer, by a policy.

    question --input scorers, rules about questions--> a judgement, or on to the model
    answer   --output scorers, masks, confidence, rules--> a judgement; into the review queue if so

The first rule that holds decides; then what scorers failed at, if that is stricter. Nothing here raises: what
goes wrong inside blocks, and the log has it.
"""

from __future__ import annotations

import logging
import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from gyrocompass.data.curate import personal, secrets
from gyrocompass.data.curate.spans import Span, disjoint, mask, replace
from gyrocompass.serve.answer import Answered, Asked, Confidence, Judgement, Outcome
from gyrocompass.serve.confidence import Calibrated
from gyrocompass.serve.policy import Mask, OnFailure, Policy, Rule, When, pattern_of
from gyrocompass.serve.scorers import Looked, Looker, look, of_side

_LOG = logging.getLogger("gyrocompass.serve")
_MOST_SEEN = 10_000

SAID: Mapping[Outcome, str] = {
    "block": "I cannot help with that.",
    "abstain": "I am not sure enough to answer this.",
    "review": "A person will look at this before it is answered.",
}
"""Where a rule says nothing of its own."""

_STRICTNESS: Mapping[str, int] = {
    "ignore": 0, "answer": 0, "caveat": 1, "escalate": 2, "abstain": 3, "review": 4, "block": 5,
}  # fmt: skip


class ReviewQueue(Protocol):
    """Where people decide."""

    async def put(
        self,
        asked: Asked,
        answered: Answered,
        reasons: Sequence[str],
        confidence: Confidence | None,
        inclusion: float,
        *,
        urgent: bool = True,
        candidates: Sequence[str] = (),
    ) -> str:
        """Store an item durably; its id."""


class Facts(NamedTuple):
    """All that conditions are about."""

    asked: Asked
    answered: Answered | None
    flags: Mapping[str, float]
    confidence: Confidence | None
    threshold: float
    """From which confidence on an answer of this slice keeps the promise; infinite: never."""
    masked: bool


class Gate:
    """A `Gatekeeper` by a policy.

    Args:
        policy: checked.
        lookers: its scorers at work.
        calibrated: its calibrator; None: there is no confidence.
        reviews: where people decide; None: what they should decide on is an abstention.
        draw: from 0 to 1, for the share that is looked at afterwards.
    """

    def __init__(
        self,
        policy: Policy,
        lookers: tuple[Looker, ...] = (),
        calibrated: Calibrated | None = None,
        reviews: ReviewQueue | None = None,
        draw: random.Random | None = None,
    ) -> None:
        self.policy, self._lookers, self._calibrated, self._reviews = policy, lookers, calibrated, reviews
        self._by_side = {side: of_side(lookers, side) for side in ("input", "output")}
        self._draw = draw or random.SystemRandom()
        self._id = policy.id
        self._early = _early_rules(policy)
        self._seen: OrderedDict[str, Looked] = OrderedDict()
        """What scorers said of questions that are being answered."""

    async def before(self, asked: Asked) -> Judgement | None:
        """See `Gatekeeper`."""
        try:
            looked = await self._look("input", asked.prompt)
            self._seen[asked.id] = looked
            if len(self._seen) > _MOST_SEEN:
                self._seen.popitem(last=False)
            facts = Facts(asked, None, looked.flags, None, math.inf, False)
            rule = next((rule for rule in self._early if holds(rule.when, facts)), None)
            outcome, reasons = _with_failures(rule.then if rule else "answer", _reasons(rule), looked)
            if outcome in ("answer", "caveat", "escalate"):
                return None
            nothing = Answered("", (), "stop", 0, 0.0, 0.0, 0.0, "")
            return await self._judged(facts, nothing, outcome, reasons, rule)
        except Exception as error:
            return self._broken(error)

    async def after(self, asked: Asked, answered: Answered, others: Sequence[str] = ()) -> Judgement:
        """See `Gatekeeper`."""
        try:
            return await self._after(asked, answered, others)
        except Exception as error:
            return self._broken(error)

    async def close(self) -> None:
        """Let go of what scorers hold."""
        for looker in self._lookers:
            if looker.close is not None:
                await looker.close()

    async def moderate(self, text: str) -> Mapping[str, float]:
        """What the scorers say of a text, by name; one that failed counts as 1."""
        found: dict[str, float] = {}
        for side in ("input", "output"):
            looked = await self._look(side, text)
            for flag, score in looked.flags.items():
                name = flag.partition(".")[2]
                found[name] = max(score, found.get(name, 0.0))
            found |= {
                reason.partition(" ")[0]: 1.0 for reason, action in looked.failures if action != "ignore"
            }
        return found

    async def _look(self, side: str, text: str) -> Looked:
        return await look(self._by_side[side], side, text)

    async def _after(self, asked: Asked, answered: Answered, others: Sequence[str]) -> Judgement:
        inputs = self._seen.get(asked.id) or await self._look("input", asked.prompt)
        outputs = await self._look("output", answered.text)
        looked = Looked({**inputs.flags, **outputs.flags}, (*inputs.failures, *outputs.failures))
        confidence, threshold = None, math.inf
        if self._calibrated is not None:
            confidence = self._calibrated.of(answered, asked.slice)
            if self._calibrated.guarantee is not None:
                threshold = self._calibrated.guarantee.threshold(asked.slice)
        clean = masked_text(answered.text, self.policy.mask)
        facts = Facts(asked, answered, looked.flags, confidence, threshold, clean != answered.text)
        rule = next((rule for rule in self.policy.rules if holds(rule.when, facts)), None)
        outcome, reasons = _with_failures(
            rule.then if rule else self.policy.otherwise, _reasons(rule), looked
        )
        return await self._judged(facts, answered._replace(text=clean), outcome, reasons, rule, others)

    async def _judged(
        self,
        facts: Facts,
        answered: Answered,
        outcome: Outcome,
        reasons: tuple[str, ...],
        rule: Rule | None,
        others: Sequence[str] = (),
    ) -> Judgement:
        """Put it into the queue if people are to see it, and say what the user gets."""
        if outcome == "review" and self._reviews is None:
            outcome, reasons = "abstain", (*reasons, "there is no review queue")
        inclusion, review_id = self._inclusion(outcome), None
        audited = outcome != "review" and inclusion is not None and self._draw.random() < inclusion
        if self._reviews is not None and inclusion is not None and (audited or outcome == "review"):
            review_id = await self._reviews.put(
                facts.asked,
                answered,
                ("audit",) if audited else reasons,
                facts.confidence,
                inclusion,
                urgent=not audited,
                candidates=self._besides(answered, others),
            )
        return Judgement(
            outcome,
            reasons,
            _text(outcome, rule, answered.text, facts),
            facts.confidence,
            facts.flags,
            self._id,
            review_id,
            audited,
            inclusion,
        )

    def _inclusion(self, outcome: Outcome) -> float | None:
        """The probability with which people see such an answer; None: they cannot."""
        if self._reviews is None:
            return None
        if outcome == "review":
            return 1.0
        return self.policy.audit_share or None if outcome in ("answer", "caveat") else None

    def _besides(self, answered: Answered, others: Sequence[str]) -> list[str]:
        """Other answers, each once, masked as the answer is."""
        clean = dict.fromkeys(masked_text(other, self.policy.mask) for other in others)
        return [other for other in clean if other and other != answered.text]

    def _broken(self, error: Exception) -> Judgement:
        """Nothing passes that was not looked at."""
        _LOG.error("the gate failed, and blocks: %s", error, exc_info=error)
        reason = f"the gate failed: {type(error).__name__}"
        return Judgement("block", (reason,), SAID["block"], policy=self._id)


def holds(when: When, facts: Facts) -> bool:
    """Whether all conditions hold."""
    asked, answered = facts.asked, facts.answered
    if when.flag is not None and _score(when.flag, facts.flags) < when.above:
        return False
    if when.slice is not None and asked.slice not in when.slice:
        return False
    if when.tier is not None and asked.tier not in when.tier:
        return False
    if when.kind is not None and asked.kind not in when.kind:
        return False
    if when.prompt_matches is not None and not pattern_of(when.prompt_matches).search(asked.prompt):
        return False
    if when.prompt_characters_above is not None and len(asked.prompt) <= when.prompt_characters_above:
        return False
    if when.max_tokens_above is not None and asked.max_tokens <= when.max_tokens_above:
        return False
    return answered is None or (_of_answer(when, answered, facts) and _of_confidence(when, facts))


def _of_answer(when: When, answered: Answered, facts: Facts) -> bool:
    if when.answer_matches is not None and not pattern_of(when.answer_matches).search(answered.text):
        return False
    if when.tokens_above is not None and len(answered.tokens) <= when.tokens_above:
        return False
    if when.cut is not None and (answered.finish == "cut") != when.cut:
        return False
    if when.masked is not None and facts.masked != when.masked:
        return False
    if when.mean_entropy_above is not None:
        entropies = [token.entropy for token in answered.tokens if token.entropy is not None]
        if not entropies or sum(entropies) / len(entropies) <= when.mean_entropy_above:
            return False
    if when.least_logprob_below is None:
        return True
    return min((token.logprob for token in answered.tokens), default=0.0) < when.least_logprob_below


def _of_confidence(when: When, facts: Facts) -> bool:
    probability = None if facts.confidence is None else facts.confidence.probability
    if when.confident is not None and (probability is not None) != when.confident:
        return False
    if when.confidence_below is not None and (probability is None or probability >= when.confidence_below):
        return False
    if when.confidence_above is not None and (probability is None or probability <= when.confidence_above):
        return False
    kept = probability is not None and probability >= facts.threshold
    return when.guaranteed is None or kept == when.guaranteed


def _score(flag: str, flags: Mapping[str, float]) -> float:
    side, _, name = flag.partition(".")
    sides = ("input", "output") if side == "any" else (side,)
    return max((flags.get(f"{one}.{name}", 0.0) for one in sides), default=0.0)


def _early_rules(policy: Policy) -> tuple[Rule, ...]:
    """Rules that may decide before there is an answer: those before the first one that needs it."""
    found: list[Rule] = []
    for rule in policy.rules:
        if rule.when.needs_answer:
            break
        found.append(rule)
    return tuple(found)


def _reasons(rule: Rule | None) -> tuple[str, ...]:
    if rule is None:
        return ()
    conditions = rule.when.model_dump(exclude_defaults=True, mode="json")
    return (
        f"{rule.then}: " + (", ".join(f"{name} {value}" for name, value in conditions.items()) or "always"),
    )


def _with_failures(
    outcome: Outcome, reasons: tuple[str, ...], looked: Looked
) -> tuple[Outcome, tuple[str, ...]]:
    """The stricter of what a rule says and what is done where a scorer failed."""
    for reason, action in looked.failures:
        reasons = (*reasons, reason)
        stricter = _outcome(action)
        if stricter is not None and _STRICTNESS[stricter] > _STRICTNESS[outcome]:
            outcome = stricter
    return outcome, reasons


def _outcome(action: OnFailure) -> Outcome | None:
    return None if action == "ignore" else action


def _text(outcome: Outcome, rule: Rule | None, clean: str, facts: Facts) -> str | None:
    """What the user gets in place of the answer's text; None: that."""
    said = rule.say if rule is not None and rule.then == outcome else None
    if outcome in SAID:
        return said or SAID[outcome]
    text = clean if facts.masked else None
    if outcome == "caveat":
        return f"{clean}\n\n{said}"
    return text


def masked_text(text: str, settings: Mask) -> str:
    """A text without what is personal or secret in it, as curation finds it."""
    spans: list[Span] = []
    if settings.personal:
        spans += [span for span in personal.find_in(text) if span.score >= settings.least_score]
    if settings.secrets:
        spans += [span for span in secrets.find_in(text) if span.score >= settings.least_score]
    return replace(text, disjoint(spans), mask) if spans else text
