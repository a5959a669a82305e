"""The demo's second half, scene by scene; each leaves what it found for the story.

    judged, calibrated --> registered, promoted --> served, asked, reviewed --> a challenger learns, is
    judged, tried on users, kept or not; of two planted versions one is refused and one is taken back

All of it goes through what users have: files, the registry, the server's HTTP, the loop. Nothing is staged
but the people, and two versions that are meant to be bad.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import cycle as repeat
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from gyrocompass.core.config import config_hash, load_yaml, parse
from gyrocompass.core.folder import write_whole
from gyrocompass.core.store import Store
from gyrocompass.govern.card import learned_from, whole
from gyrocompass.govern.promote import Decision, PromotionRule, promote
from gyrocompass.govern.registry import champion, register, roll_back
from gyrocompass.govern.rollout import RolloutPlan, look, reopened, running, start
from gyrocompass.recipe.life import files as written
from gyrocompass.recipe.life.files import BASE, NAME, RIGHT, Files
from gyrocompass.recipe.life.server import serving
from gyrocompass.recipe.life.story import STORY, write_story
from gyrocompass.recipe.life.users import Question, Reply, apart, ask_all, questions, review_all, with_others
from gyrocompass.recipe.loop.config import Loop
from gyrocompass.recipe.loop.cycle import ENDED, Cycle, run_loop
from gyrocompass.recipe.recipe import Recipe, recipe_from
from gyrocompass.recipe.run import read_run, run_folder, run_recipe
from gyrocompass.recipe.serving import SETTLE_S
from gyrocompass.serve.policy import Policy, keep_policy

BY = "the demo"
_TASK_ITEMS, _FIRST_USERS, _BATCH, _MOST_BATCHES = 240, 80, 40, 12
_WAIT_S = 20.0


class Stage:
    """What the scenes share."""

    def __init__(self, recipe: Recipe, store: Store, console: Console, *, small: bool) -> None:
        self.recipe, self.store, self.small = recipe, store, small
        self._console = console
        self.files = Files(run_folder(store, "life"))
        self.files.folder.mkdir(parents=True, exist_ok=True)
        self.made = {stage.name: stage.artifact for stage in read_run(store, recipe.name).stages}
        self.told: dict[str, Any] = {}

    def tell(self, text: str) -> None:
        """A line on the terminal."""
        self._console.print(f"life: {text}", highlight=False, markup=False, soft_wrap=True)


def live(recipe: Recipe, store: Store, console: Console, *, small: bool) -> Path:
    """Play it, unless it was played with what was made here; the story's page.

    Args:
        recipe: that has just run in the store, with the stages of `stdlib`.
        store: of that run.
        console: where scenes are told.
        small: few users and few steps.
    """
    began = time.monotonic()
    stage = Stage(recipe, store, console, small=small)
    key = config_hash({"made": stage.made, "small": small})
    page = stage.files.folder / "life.html"
    known = stage.files.folder / STORY
    if known.is_file() and page.is_file() and json.loads(known.read_bytes()).get("key") == key:
        stage.tell(f"played before with these models: {page}")
        return page
    library, seen = (store.open(stage.made[name]).path for name in ("library", "documents"))
    for_tasks, for_users = apart(questions(library, seen), 0.4)
    written.write_tasks(stage.files, for_tasks[: 40 if small else _TASK_ITEMS])
    policy = _judged(stage)
    _promoted(stage, policy)
    asking = repeat(for_users)
    with serving(store, NAME) as url:
        _asked(stage, url, list(islice(asking, 20 if small else _FIRST_USERS)))
        _refused(stage)
        _taken_back(stage, url, policy, asking)
        _learned(stage, url, asking)
        _way_back(stage, url, list(islice(asking, 12)))
    stage.told |= {"key": key, "small": small, "seconds": time.monotonic() - began}
    write_whole(known, json.dumps(stage.told, indent=1, ensure_ascii=False))
    write_story(stage.told, store, read_run(store, recipe.name), page)
    stage.tell(f"the whole story in {stage.told['seconds']:.0f} s: {page}")
    return page


def _judged(stage: Stage) -> Policy:
    """How sure is it of its own answers, and how right is it to be?"""
    recipe = recipe_from(written.judged(stage.files, stage.recipe), [], "the demo")
    run_recipe(recipe, stage.store, Console(quiet=True))
    made = {one.name: one.artifact for one in read_run(stage.store, recipe.name).stages}
    evaluation = stage.store.open(made["judged_answers"]).path
    policy = written.write_policy(stage.files, stage.store, made["calibrated_answers"], evaluation)
    verdicts, steps = (4, 4) if stage.small else (10, 24)
    calibrated = policy.calibrator is not None
    written.write_rules(stage.files, stage.recipe, calibrated=calibrated, verdicts=verdicts, steps=steps)
    found = json.loads((evaluation / "evaluation.json").read_bytes())
    figures = [line for task in found["tasks"] for line in task["figures"] if line["slice"] == "total"]
    fitted = json.loads((stage.store.open(made["calibrated_answers"]).path / "calibration.json").read_bytes())
    stage.told["judged"] = {
        "figures": [{k: line[k] for k in ("name", "value", "low", "high", "size")} for line in figures],
        "calibration": _best(fitted),
        "policy": policy.id,
        "rules": [rule.model_dump(mode="json", exclude_defaults=True) for rule in policy.rules],
    }
    value = next(line["value"] for line in figures if line["name"] == RIGHT)
    stage.tell(f"judged on lines of modules it never saw: {value:.0%} of its completions begin rightly")
    return policy


def _best(fitted: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The calibration of answers that tells right from wrong best."""
    usable = [one for one in fitted if one["level"] == "answer" and "after" in one]
    if not usable:
        return None
    best = max(usable, key=lambda one: one["after"]["slices"]["total"]["auroc"] or 0.0)
    sides = {
        side: {name: best[key]["slices"]["total"][name] for name in ("debiased", "low", "high")}
        for side, key in (("before", "before_on_test"), ("after", "after"))
    }
    return {"signal": best["signal"], "method": best["method"], "outcomes": best["outcomes"], **sides}


def _rule(stage: Stage) -> PromotionRule:
    return parse(PromotionRule, load_yaml(stage.files.rule))


def _promoted(stage: Stage, policy: Policy) -> None:
    kept = keep_policy(stage.store, policy)
    found = register(stage.store, NAME, stage.made[BASE], BY, kept.id)
    decision = None
    if champion(stage.store, NAME) is None:
        decision = promote(stage.store, NAME, found.version, _rule(stage), BY, ())
        assert decision.promoted, decision.clauses
    stage.told["promoted"] = {"version": found.version, "model": found.artifact_id, **_told(decision)}
    stage.tell(f"{NAME}:{found.version} is registered with its policy, and champion")


def _told(decision: Decision | None) -> dict[str, Any]:
    if decision is None:
        return {"decision": None, "clauses": []}
    clauses = [{"kind": one.clause["kind"], "holds": one.holds, "why": one.why} for one in decision.clauses]
    return {"decision": decision.artifact.id, "clauses": clauses}


def _asked(stage: Stage, url: str, code: list[Question]) -> None:
    """The first users, and the person who looks at what the gate did not let through."""
    asked = with_others(code)
    replies = ask_all(url, asked, [f"user {place // 2}" for place in range(len(asked))])
    verdicts = review_all(url, asked)
    shown: dict[str, Reply] = {}
    for reply in replies:
        shown.setdefault(reply.decision or str(reply.status), reply)
    outcomes = Counter((one.question.kind, one.decision or f"status {one.status}") for one in replies)
    stage.told["asked"] = {
        "requests": len(replies),
        "outcomes": [[kind, decision, count] for (kind, decision), count in sorted(outcomes.items())],
        "verdicts": dict(verdicts),
        "median_s": sorted(one.seconds for one in replies)[len(replies) // 2],
        "examples": [_example(one) for one in shown.values()],
        "answer": _traced(stage, next((one for one in replies if one.decision == "answer"), replies[0])),
    }
    stage.tell(
        f"{len(replies)} questions: "
        + ", ".join(f"{count} {name}" for name, count in Counter(r.decision for r in replies).most_common())
        + f"; a person decided on {verdicts.total()}"
    )


def _example(reply: Reply) -> dict[str, Any]:
    choice = (reply.told.get("choices") or [{}])[0]
    gate, confidence = choice.get("gate") or {}, choice.get("confidence") or {}
    return {
        "question": reply.question.text,
        "text": reply.text,
        "decision": reply.decision,
        "reasons": gate.get("reasons", []),
        "confidence": confidence.get("probability"),
        "interval": confidence.get("interval"),
    }


def _traced(stage: Stage, reply: Reply) -> dict[str, Any]:
    """From an answer to the documents that its model learned from."""
    from gyrocompass.core.lineage import walk

    lineage = dict(reply.told.get("lineage") or {})
    model = lineage.get("model") or stage.made[BASE]
    tree = walk(stage.store, model).artifact
    assert tree is not None
    learned = learned_from(stage.store, whole(tree))
    rows = stage.store.documents(stage.made["train_documents"])
    return {
        "lineage": lineage,
        "by_slice": dict(sorted(learned.by(0).items())),
        "licences": dict(sorted(learned.by(2).items())),
        "documents": [row.document_id for row in islice(rows, 3)],
    }


def _refused(stage: Stage) -> None:
    """A version that learned nothing asks to be champion."""
    found = register(stage.store, NAME, stage.made["untrained"], BY)
    decision = promote(stage.store, NAME, found.version, _rule(stage), BY, ())
    stage.told["refused"] = {"version": found.version, "promoted": decision.promoted, **_told(decision)}
    why = next((one.why for one in decision.clauses if not one.holds), "")
    stage.tell(f"{NAME}:{found.version}, planted: refused ({why})")


def _taken_back(stage: Stage, url: str, policy: Policy, asking: Any) -> None:
    """The same model behind a policy that answers nothing is tried on users."""
    timid = {"name": "timid", "rules": (), "otherwise": "abstain", "audit_share": 0.0}
    strict = policy.model_copy(update=timid)
    kept = keep_policy(stage.store, strict)
    found = register(stage.store, NAME, stage.made[BASE], BY, kept.id)
    plan = parse(RolloutPlan, load_yaml(stage.files.folder / "canary.yaml"))
    trial = start(stage.store, NAME, found.version, plan, BY)
    path = _try(stage, url, asking, trial.id, "canary")
    ended = reopened(stage.store, trial.id)
    about = {"version": found.version, "state": ended.state, "why": ended.why, "path": path}
    stage.told["taken_back"] = about
    stage.tell(f"{NAME}:{found.version}, planted: {ended.state} ({ended.why})")


def _try(stage: Stage, url: str, asking: Any, rollout_id: str, who: str) -> list[dict[str, Any]]:
    """Users ask until the trial has ended; what was known of its first guardrail on the way."""
    path: list[dict[str, Any]] = []
    time.sleep(1.5)  # the server looks at the registry four times a second, and opens the model
    for batch in range(_MOST_BATCHES):
        code = list(islice(asking, _BATCH))
        ask_all(url, code, [f"{who} {rollout_id} {batch} {place}" for place in range(len(code))])
        time.sleep(1.0)  # events are written behind the answers
        trial = reopened(stage.store, rollout_id)
        path.append(look(stage.store, trial)[0]._asdict())
        if trial.state != "running":
            break
    until = time.monotonic() + 2 * SETTLE_S
    while running(stage.store, NAME) is not None and time.monotonic() < until:
        time.sleep(0.2)
    return path


def _learned(stage: Stage, url: str, asking: Any) -> None:
    """The loop: feedback, curated, becomes a challenger, which is judged, tried, and kept or not."""
    loop, quiet = Loop(stage.files.loop), Console(quiet=True)
    cycle = run_loop(loop, stage.store, quiet, once=True)
    if cycle is None:
        stage.told["learned"] = None
        stage.tell("too few verdicts for a challenger")
        return
    stage.tell(f"cycle {cycle.number} ({cycle.why}): {NAME}:{cycle.version} is trained; {cycle.state}")
    path: list[dict[str, Any]] = []
    if cycle.rollout is not None:
        path = _try(stage, url, asking, cycle.rollout, "someone")
        cycle = run_loop(loop, stage.store, quiet, once=True) or cycle
        if cycle.state not in ENDED:
            cycle = run_loop(loop, stage.store, quiet, once=True, give_up=True) or cycle
    stage.told["learned"] = {
        "cycle": cycle.model_dump(mode="json"),
        "path": path,
        "clauses": _clauses(stage, cycle),
        "feedback": dict(stage.store.open(cycle.feedback).manifest.counts) if cycle.feedback else {},
    }
    stage.tell(f"{NAME}:{cycle.version}: {cycle.state} ({cycle.told})")


def _clauses(stage: Stage, cycle: Cycle) -> list[dict[str, Any]]:
    if cycle.decision is None:
        return []
    told = json.loads((stage.store.open(cycle.decision).path / "decision.json").read_bytes())
    return [
        {"kind": one["clause"]["kind"], "holds": one["holds"], "why": one["why"]} for one in told["clauses"]
    ]


def _way_back(stage: Stage, url: str, code: list[Question]) -> None:
    """A drill: back to the champion before, while users ask; and forth again, if the rule still holds."""
    now = champion(stage.store, NAME)
    assert now is not None
    if now.version == stage.told["promoted"]["version"]:
        stage.told["way_back"] = None
        return
    time.sleep(1.0)
    replies: list[Reply] = []
    users = [f"drill {place}" for place in range(len(code))]
    asking = threading.Thread(target=lambda: replies.extend(ask_all(url, code, users)))
    asking.start()
    began = time.monotonic()
    back = roll_back(stage.store, NAME, BY)
    while _version(url) != f"{NAME}:{back.version}" and time.monotonic() - began < _WAIT_S:
        time.sleep(0.02)
    seconds = time.monotonic() - began
    asking.join()
    lost = sum(reply.status != 200 for reply in replies)
    again = promote(stage.store, NAME, now.version, _rule(stage), BY, ())
    stage.told["way_back"] = {
        "from": now.version, "to": back.version, "seconds": seconds, "requests": len(replies), "lost": lost,
        "again": again.promoted,
    }  # fmt: skip
    stage.tell(
        f"drill: back to {NAME}:{back.version} in {seconds:.2f} s, {lost} of {len(replies)} requests lost"
    )


def _version(url: str) -> str:
    return str(httpx.get(f"{url}/ready", timeout=30).json()["lineage"]["version"])
