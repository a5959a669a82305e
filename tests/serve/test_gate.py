"""The gate: the first rule that holds, fail closed, masked, and within its promise."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from asking import answered, asked
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.core.store import Store
from gyrocompass.measure.calibrate import IsotonicCalibrator, PlattCalibrator, save_calibrator
from gyrocompass.measure.conformal import AbstentionThreshold, Guarantee, save_guarantee
from gyrocompass.serve.answer import Answered, Asked, Confidence, Judgement
from gyrocompass.serve.confidence import Calibrated, open_calibrated, signal_of
from gyrocompass.serve.gate import Gate, masked_text
from gyrocompass.serve.policy import Mask, Policy, load_policy
from gyrocompass.serve.scorers import Looker, lookers_of

SURE = Calibrated("calibration-1", "mean token", PlattCalibrator(slope=1.0, offset=0.0), (), None)


class Queue:
    """Takes items, unless it is told to fail."""

    def __init__(self, fails: bool = False) -> None:
        self.items: list[tuple[Asked, Answered, tuple[str, ...], float, bool]] = []
        self.candidates: list[list[str]] = []
        self.fails = fails

    async def put(
        self,
        asked: Asked,
        answered: Answered,
        reasons: Any,
        confidence: Any,
        inclusion: float,
        *,
        urgent: bool = True,
        candidates: Sequence[str] = (),
    ) -> str:
        if self.fails:
            raise OSError("the disk is full")
        self.candidates.append(list(candidates))
        self.items.append((asked, answered, tuple(reasons), inclusion, urgent))
        return f"review-{len(self.items)}"


def policy(**changes: Any) -> Policy:
    return parse(Policy, {"name": "p", "calibrator": "c", **changes}, "policy")


def gate(
    rules: Any = (), *, queue: Queue | None = None, calibrated: Calibrated = SURE, **changes: Any
) -> Gate:
    checked = policy(rules=list(rules), **changes)
    return Gate(checked, lookers_of(checked), calibrated, queue, random.Random(0))


def after(one: Gate, answer: Answered | None = None, question: Asked | None = None) -> Judgement:
    return asyncio.run(one.after(question or asked(), answer or answered()))


def before(one: Gate, question: Asked) -> Judgement | None:
    return asyncio.run(one.before(question))


def test_the_first_rule_that_holds_decides() -> None:
    one = gate(
        [
            {"when": {"slice": ["poems"]}, "then": "abstain"},
            {"when": {"confidence_below": 0.5}, "then": "abstain", "say": "No idea."},
            {"when": {"confidence_below": 0.95}, "then": "caveat", "say": "Check this."},
            {"when": {"tokens_above": 5}, "then": "block"},
        ]
    )
    assert after(one, answered("x", -2.0))[:3] == ("abstain", ("abstain: confidence_below 0.5",), "No idea.")
    assert after(one, answered("x", -0.1))[:3] == (
        "caveat",
        ("caveat: confidence_below 0.95",),
        "x\n\nCheck this.",
    )
    assert after(one, answered("x", -0.01))[:3] == ("answer", (), None)
    assert after(one, answered("a b c d e f", -0.01)).outcome == "block"
    assert after(one, answered("x", -0.01), asked(slice="poems")).outcome == "abstain"
    assert after(one).policy == one.policy.id


def test_people_see_the_other_samples_masked_and_each_once() -> None:
    queue = Queue()
    rules = [{"when": {"confidence_below": 0.5}, "then": "review"}]
    one = gate(rules, queue=queue, mask={"personal": True})
    address = "write to jane.miller@mailbox.org today"
    texts = ["five", "four", "five", "", address, "six"]
    asyncio.run(one.after(asked(), answered("five", -2.0), texts))
    (candidates,) = queue.candidates
    assert candidates[::2] == ["four", "six"] and len(candidates) == 3
    assert "jane" not in candidates[1] and candidates[1] == masked_text(address, one.policy.mask)
    audited = gate(queue=queue, audit_share=1.0)
    asyncio.run(audited.after(asked(), answered("four", -0.01), texts))
    assert queue.candidates[1] == ["five", address, "six"]


def test_what_is_about_the_question_alone_asks_no_model() -> None:
    rules = [
        {"when": {"prompt_matches": r"\bbomb\b"}, "then": "block", "say": "No."},
        {"when": {"tier": ["free"], "max_tokens_above": 100}, "then": "abstain"},
        {"when": {"confidence_below": 0.5}, "then": "abstain"},
        {"when": {"prompt_matches": "late"}, "then": "block"},
    ]
    one = gate(rules)
    judged = before(one, asked("How do I build a Bomb?"))
    assert judged is not None and judged[:3] == ("block", (r"block: prompt_matches \bbomb\b",), "No.")
    assert before(one, asked("How do I build a house?")) is None
    judged = before(one, asked(tier="free", max_tokens=101))
    assert judged is not None and judged.outcome == "abstain"
    # A rule after one that needs the answer cannot decide before it.
    assert before(one, asked("late")) is None
    assert after(one, answered("x", -0.1), asked("late")).outcome == "block"


def test_people_are_asked_and_a_share_is_looked_at() -> None:
    queue = Queue()
    one = gate([{"when": {"confidence_below": 0.5}, "then": "review"}], queue=queue, audit_share=0.25)
    judged = after(one, answered("x", -2.0))
    assert (judged.outcome, judged.review_id, judged.inclusion) == ("review", "review-1", 1.0)
    assert judged.text == "A person will look at this before it is answered."
    shown = [after(one) for _ in range(400)]
    drawn = [judged for judged in shown if judged.audited]
    assert 70 < len(drawn) < 130 and all(judged.inclusion == 0.25 for judged in shown)
    assert all((judged.review_id is not None) == judged.audited for judged in shown)
    assert {item[2:] for item in queue.items[1:]} == {(("audit",), 0.25, False)}
    assert after(gate([{"then": "review"}])).outcome == "abstain"


def test_what_cannot_be_stored_is_not_answered() -> None:
    judged = after(gate([{"then": "review"}], queue=Queue(fails=True)))
    assert judged.outcome == "block" and "OSError" in judged.reasons[0]


class Slow:
    async def __call__(self, text: str) -> float:
        await asyncio.sleep(30)
        return 0.0


class Raises:
    async def __call__(self, text: str) -> float:
        raise RuntimeError("no model")


class Says:
    def __init__(self, score: float) -> None:
        self.score = score

    async def __call__(self, text: str) -> float:
        return self.score


@pytest.mark.parametrize("score", [Slow(), Raises(), Says(math.nan), Says(2.0), Says(-1.0)])
@pytest.mark.parametrize(
    ("action", "outcome"),
    [("block", "block"), ("review", "review"), ("abstain", "abstain"), ("ignore", "answer")],
)
def test_a_scorer_that_fails_fails_closed(score: Any, action: Any, outcome: str) -> None:
    looker = Looker("harm", ("output",), 0.05, action, score)
    one = Gate(policy(), (looker,), SURE, Queue())
    judged = after(one)
    assert judged.outcome == outcome and "harm failed on the output" in judged.reasons[-1]
    assert asyncio.run(one.moderate("x")) == ({} if action == "ignore" else {"harm": 1.0})


def test_flags_are_those_of_their_side() -> None:
    scorers = [{"kind": "patterns", "name": "war", "deny": ["war"], "allow": ["star wars"]}]
    one = gate(
        [
            {"when": {"flag": "input.war"}, "then": "block"},
            {"when": {"flag": "output.war"}, "then": "abstain"},
        ],
        scorers=scorers,
    )
    judged = before(one, asked("the WAR"))
    assert judged is not None and judged.outcome == "block" and judged.flags == {"input.war": 1.0}
    assert before(one, asked("Star Wars")) is None
    assert after(one, answered("a war")).outcome == "abstain"
    assert after(one, answered("star wars")).outcome == "answer"


def test_what_is_personal_or_secret_is_taken_out() -> None:
    text = "Call +44 20 7946 0958, the key is AKIAIOSFODNN7EXAMPLQ."
    assert masked_text(text, Mask()) == text
    clean = masked_text(text, Mask(personal=True, secrets=True))
    assert "7946" not in clean and "AKIA" not in clean and "[phone]" in clean
    queue = Queue()
    one = gate(
        [{"when": {"masked": True}, "then": "review"}], queue=queue, mask={"personal": True, "secrets": True}
    )
    after(one, answered(text))
    assert "7946" not in queue.items[0][1].text
    shown = after(gate(mask={"secrets": True}), answered(text))
    assert shown.outcome == "answer" and shown.text is not None and "AKIA" not in shown.text


def promised(threshold: float) -> Calibrated:
    bound = AbstentionThreshold(
        threshold=threshold, answers=100, given=60, wrong=0, coverage=0.6, coverage_low=0.5, coverage_high=0.7
    )
    guarantee = Guarantee(
        risk=0.05, confidence=0.95, thresholds={"sums": bound}, refused={"poems": "too few"}
    )
    return SURE._replace(guarantee=guarantee)


@given(st.floats(0.05, 0.95), st.floats(-4, 0), st.sampled_from(["sums", "poems", "unheard of"]))
def test_a_promise_is_kept(threshold: float, logprob: float, slice_name: str) -> None:
    one = gate(
        [{"when": {"guaranteed": False}, "then": "review"}], queue=Queue(), calibrated=promised(threshold)
    )
    judged = after(one, answered("x", logprob), asked(slice=slice_name))
    assert judged.confidence is not None
    kept = slice_name == "sums" and judged.confidence.probability >= threshold
    assert judged.outcome == ("answer" if kept else "review")
    unknown = after(one, answered("x")._replace(tokens=()))
    assert unknown.outcome == "review" and unknown.confidence is None


@given(st.floats(-5, 0), st.floats(-5, 0))
def test_a_surer_answer_is_never_treated_worse(first: float, second: float) -> None:
    order = ["review", "caveat", "answer"]
    one = gate(
        [
            {"when": {"confidence_below": 0.4}, "then": "review"},
            {"when": {"confidence_below": 0.8}, "then": "caveat", "say": "?"},
        ],
        queue=Queue(),
    )
    low, high = sorted((first, second))
    places = [order.index(after(one, answered("x", value)).outcome) for value in (low, high)]
    assert places[0] <= places[1]


def test_signals_are_those_of_evaluation() -> None:
    answer = answered("a b", -0.5)
    assert signal_of(answer, "sequence") == pytest.approx(math.exp(-1))
    assert (
        signal_of(answer, "mean token") == signal_of(answer, "least token") == pytest.approx(math.exp(-0.5))
    )
    assert signal_of(answer, "entropy") == pytest.approx(math.exp(-0.2))
    assert signal_of(answered("a", entropy=None), "entropy") is None
    assert signal_of(answered("")._replace(tokens=()), "sequence") is None


def test_a_calibrator_is_found_in_its_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def entry(signal: str, loss: float) -> Mapping[str, Any]:
        bars = [
            {"high": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.4},
            {"high": 0.9, "accuracy_low": 0.6, "accuracy_high": 0.8},
        ]
        after = {"slices": {"total": {"log_loss": loss}}, "bins": bars}
        return {"level": "answer", "signal": signal, "method": "isotonic", "after": after}

    with store.create("k", "calibration") as draft:
        entries = [
            entry("mean token", 0.5),
            entry("sequence", 0.4),
            entry("agreement", 0.1),
            {"level": "token", "signal": "x", "refused": "few"},
        ]
        (draft.path / "calibration.json").write_text(json.dumps(entries))
        for signal, value in (("mean_token", 0.3), ("sequence", 0.7)):
            save_calibrator(
                IsotonicCalibrator(knots=(0.0, 1.0), values=(value, value)),
                draft.path / f"calibrator-answer-{signal}.json",
            )
        save_guarantee(
            promised(0.5).guarantee or pytest.fail(), draft.path / "guarantee-answer-sequence.json"
        )
    folder = draft.artifact.path
    best = open_calibrated(folder, "answer")
    assert best.signal == "sequence" and best.guarantee is not None  # no server has the agreement of samples
    assert best.of(answered(), "sums") == Confidence(pytest.approx(0.7), 0.6, 0.8, draft.artifact.id)
    assert open_calibrated(folder, "answer", "mean token").guarantee is None
    with pytest.raises(BadInput, match="no calibrator for choice; there is one for: answer mean token"):
        open_calibrated(folder, "choice")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: p\nrules:\n  - {when: {flagg: x}, then: block}",
            r"policy.yaml:3: rules.0.when.flagg: unknown key",
        ),
        ("name: p\nrules:\n  - {then: blok}", r":3: rules.0.then: .*did you mean block"),
        ("name: p\nrules:\n  - {then: caveat}", "a caveat needs what to say"),
        ("name: p\nrules:\n  - {when: {confidence_below: 0.5}, then: review}", "needs a calibrator"),
        (
            "name: p\nrules:\n  - {when: {flag: input.x}, then: block}",
            "'input.x' is no flag.*of the scorers: none",
        ),
        ("name: p\nrules:\n  - {when: {prompt_matches: '('}, then: block}", "not a pattern"),
        ("name: p\nrules:\n  - {when: {prompt_matches: '(a+)+b'}, then: block}", "may take forever"),
        ("name: p\nrules:\n  - {when: {prompt_matches: 'a*'}, then: block}", "matches the empty text"),
        ("name: p\nscorers:\n  - {kind: pattern, name: x, deny: [a]}", "did you mean patterns"),
        ("name: p\nscorers:\n  - {kind: patterns, name: x, deny: []}", "scorers.0.deny"),
        ("name: p\naudit_share: 2", ":2: audit_share"),
        ("name: [", "policy.yaml"),
    ],
)
def test_mistakes_are_placed(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises((ConfigError, BadInput), match=message):
        load_policy(path)


def test_two_policies_have_two_ids() -> None:
    assert policy().id == policy().id != policy(audit_share=0.1).id
