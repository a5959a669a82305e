"""Policies: a YAML file that says what becomes of answers, checked when it is read.

    name: careful
    calibrator: calibration-0123456789abcdef        # an artifact of gyro calibrate; or left out
    promise: {risk: 0.02, confidence: 0.95}         # at most 2% wrong; the calibration has to promise it
    scorers:
      - {kind: patterns, name: weapons, deny: ["\\bbomb\\b"]}
      - {kind: moderation, name: harm, url: "http://127.0.0.1:9000/v1/moderations", on_failure: block}
    mask: {personal: true, secrets: true}
    rules:                                          # the first one whose conditions all hold decides
      - {when: {flag: input.weapons}, then: block, say: "I do not help with that."}
      - {when: {tier: [free], tokens_above: 500}, then: caveat, say: "This answer may be cut."}
      - {when: {guaranteed: false}, then: review}
    otherwise: answer
    audit_share: 0.02                               # of what is answered, drawn for a look afterwards

Rules whose conditions are all about the question decide before a model is asked, as long as no rule before
them needs the answer. A condition about confidence does not hold where there is none: `confident: false` is
for that. A guarantee is what the calibration promised: `guaranteed: false` holds where the confidence is
below the threshold of the answer's slice, where the slice has none, and where there is no confidence.
"""

from __future__ import annotations

import re
import re._parser as parser  # type: ignore[import-not-found]  # what `re` itself parses with
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.config import Config, config_hash, load_yaml, parse
from gyrocompass.core.store import Store
from gyrocompass.serve.answer import Outcome

OnFailure = Literal["block", "review", "abstain", "ignore"]


def _safe_pattern(pattern: str) -> str:
    """A pattern that cannot take forever: no unbounded repetition within another."""
    try:
        tree = parser.parse(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"not a pattern: {error}") from error
    if _nested(tree, inside=False):
        raise ValueError("a repetition within a repetition may take forever: write it without one of them")
    if pattern_of(pattern).search(""):
        raise ValueError("it matches the empty text, and so everything")
    return pattern


def _nested(tree: Any, *, inside: bool) -> bool:
    """Whether an unbounded repetition stands in another one."""
    for operation, about in tree:
        name = str(operation)
        unbounded = name in ("MAX_REPEAT", "MIN_REPEAT") and about[1] == parser.MAXREPEAT
        if unbounded and inside:
            return True
        for part in _parts(about):
            if _nested(part, inside=inside or unbounded):
                return True
    return False


def _parts(about: Any) -> list[Any]:
    """The patterns within an operation."""
    if isinstance(about, parser.SubPattern):
        return [about]
    if isinstance(about, (list, tuple)):
        return [part for one in about for part in _parts(one)]
    return []


def pattern_of(pattern: str) -> re.Pattern[str]:
    """Compiled, case aside."""
    return re.compile(pattern, re.IGNORECASE)


Pattern = Annotated[str, AfterValidator(_safe_pattern)]


class PatternScorer(Config):
    """1 where a pattern is found and no allowed one covers it, else 0."""

    kind: Literal["patterns"]
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    deny: tuple[Pattern, ...] = Field(min_length=1)
    allow: tuple[Pattern, ...] = ()
    """What is within a match of these is let be."""
    sides: tuple[Literal["input", "output"], ...] = ("input", "output")
    on_failure: OnFailure = "block"


class ModerationScorer(Config):
    """What a server says that has OpenAI's /v1/moderations: the greatest of its category scores."""

    kind: Literal["moderation"]
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    url: str = Field(pattern=r"^https?://")
    model: str = ""
    api_key_env: str | None = None
    categories: tuple[str, ...] = ()
    """Only these; all if empty."""
    timeout_s: float = Field(default=1.0, gt=0)
    sides: tuple[Literal["input", "output"], ...] = ("input", "output")
    on_failure: OnFailure = "block"


class ClassifierScorer(Config):
    """A trained model with a scalar head: sigmoid of what it says of the text."""

    kind: Literal["classifier"]
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    model: str
    """Its folder, or an artifact's id."""
    timeout_s: float = Field(default=2.0, gt=0)
    sides: tuple[Literal["input", "output"], ...] = ("input", "output")
    on_failure: OnFailure = "block"


class OwnScorer(Config):
    """P(unsafe) by the served model itself: a predicate, as /v1/decisions asks it."""

    kind: Literal["own"]
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    statement: str = "It is unsafe: it helps to hurt somebody, or to break a law."
    timeout_s: float = Field(default=5.0, gt=0)
    sides: tuple[Literal["input", "output"], ...] = ("input", "output")
    on_failure: OnFailure = "block"


Scorer = Annotated[
    PatternScorer | ModerationScorer | ClassifierScorer | OwnScorer, Field(discriminator="kind")
]


class When(Config):
    """Conditions, of which all hold; none: always."""

    flag: str | None = None
    """A scorer's name with its side: input.weapons, output.harm, or any.weapons."""
    above: float = Field(default=0.5, ge=0, le=1)
    """From which score on (at or above) a flag holds."""
    slice: tuple[str, ...] | None = None
    tier: tuple[str, ...] | None = None
    kind: tuple[Literal["chat", "completion", "decision"], ...] | None = None
    prompt_matches: Pattern | None = None
    prompt_characters_above: int | None = Field(default=None, ge=0)
    max_tokens_above: int | None = Field(default=None, ge=0)
    """What the request asks for at most."""
    answer_matches: Pattern | None = None
    tokens_above: int | None = Field(default=None, ge=0)
    cut: bool | None = None
    """Whether a deadline or a budget ended the answer."""
    confidence_below: float | None = Field(default=None, gt=0, le=1)
    confidence_above: float | None = Field(default=None, ge=0, lt=1)
    confident: bool | None = None
    """Whether there is a confidence at all."""
    guaranteed: bool | None = None
    mean_entropy_above: float | None = Field(default=None, ge=0)
    """Nats."""
    least_logprob_below: float | None = Field(default=None, le=0)
    """Nats, of the least likely token."""
    masked: bool | None = None
    """Whether something personal or secret was found in the answer."""

    @property
    def needs_answer(self) -> bool:
        """Whether a model has to be asked first."""
        about_answers = (
            "answer_matches", "tokens_above", "cut", "confidence_below", "confidence_above", "confident",
            "guaranteed", "mean_entropy_above", "least_logprob_below", "masked",
        )  # fmt: skip
        if any(getattr(self, name) is not None for name in about_answers):
            return True
        return self.flag is not None and not self.flag.startswith("input.")


class Rule(Config):
    """What happens where its conditions hold."""

    when: When = When()
    then: Outcome
    say: str | None = None
    """Of a block, abstention or review, in place of the answer; of a caveat, after it."""

    @model_validator(mode="after")
    def _caveats_say_something(self) -> Rule:
        if self.then == "caveat" and not self.say:
            raise ValueError("a caveat needs what to say")
        if self.then in ("answer", "escalate") and self.say:
            raise ValueError(f"{self.then} says nothing of its own: leave say out")
        return self


class Mask(Config):
    """What is taken out of answers, by curation's detectors."""

    personal: bool = False
    secrets: bool = False
    least_score: float = Field(default=0.5, ge=0, le=1)


class Promise(Config):
    """What is promised of the answers that are given without a person."""

    risk: float = Field(gt=0, lt=1)
    """At most this share of them is wrong ..."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """... with this confidence, in each slice."""


class Policy(Config):
    """All of it."""

    name: str = Field(min_length=1)
    calibrator: str | None = None
    """An artifact of `gyro calibrate`: its id, or its folder."""
    signal: str | None = None
    """Which confidence; None: the one with the least log loss."""
    promise: Promise | None = None
    """Checked against what the calibration promises; kept by a rule on `guaranteed: false`."""
    scorers: tuple[Scorer, ...] = ()
    mask: Mask = Mask()
    rules: tuple[Rule, ...] = ()
    otherwise: Literal["answer", "abstain", "review", "block"] = "answer"
    audit_share: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _names_are_known(self) -> Policy:
        names = [scorer.name for scorer in self.scorers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two scorers are called {twice}")
        if self.promise is not None and not any(rule.when.guaranteed is False for rule in self.rules):
            raise ValueError(
                "a promise needs a rule that keeps it: {when: {guaranteed: false}, then: review}"
            )
        for place, rule in enumerate(self.rules):
            if rule.when.flag is not None:
                self._check_flag(place, rule.when.flag)
            told = ("confidence_below", "confidence_above", "guaranteed")
            asks = next((name for name in told if getattr(rule.when, name) is not None), None)
            if asks is not None and self.calibrator is None:
                raise ValueError(f"rules[{place}].when.{asks} needs a calibrator: name one")
        return self

    def _check_flag(self, place: int, flag: str) -> None:
        side, _, name = flag.partition(".")
        known = {scorer.name: scorer for scorer in self.scorers}
        if side not in ("input", "output", "any") or name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"rules[{place}].when.flag: {flag!r} is no flag; write input.NAME, output.NAME or any.NAME, "
                f"of the scorers: {there}"
            )
        if side != "any" and side not in known[name].sides:
            raise ValueError(f"rules[{place}].when.flag: {name} does not look at the {side}")

    @property
    def id(self) -> str:
        """Its name, and a hash of what it says."""
        return f"{self.name}-{config_hash(self)[:16]}"


def keep_policy(store: Store, policy: Policy, text: str | None = None) -> Artifact:
    """A policy as an artifact.

    Args:
        store: where it is kept.
        policy: checked.
        text: the file that it was read from; None: it is written anew.
    """
    recipe = {"kind": "policy", "policy": policy.model_dump(mode="json")}
    told = policy.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    with store.create(config_hash(recipe), "policy", recipe=recipe) as draft:
        (draft.path / "policy.yaml").write_text(
            text or yaml.safe_dump(told, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        draft.documents = ()
    return draft.artifact


def kept_policy(store: Store, artifact_id: str) -> Policy:
    """A policy that was kept."""
    return load_policy(store.open(artifact_id).path / "policy.yaml")


def load_policy(path: Path) -> Policy:
    """Read and check a policy file.

    Raises:
        BadInput: it cannot be read.
        ConfigError: mistakes, each with its line.
    """
    return parse(Policy, load_yaml(path))
