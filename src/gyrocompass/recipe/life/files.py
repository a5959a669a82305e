"""The files that the demo's life works by: tasks, a policy, a rule, plans, a challenger's recipe, a loop.

They are what a user would write, with what the run knows filled in, and they stay beside the story: a reader
can run the same commands on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import yaml

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.recipe.life.users import MAX_TOKENS, Question, first_word
from gyrocompass.recipe.recipe import Recipe
from gyrocompass.recipe.stages.evaluation import OUTCOMES
from gyrocompass.serve.confidence import SIGNALS, open_calibrated
from gyrocompass.serve.policy import Policy, load_policy

NAME = "assistant"
TASK = "the next word"
RIGHT = "regex"
"""Its measure."""
BASE = "pretrained"
"""The stage that makes the first champion."""
REVIEWED = 0.2
"""Share of answers like the task's whose confidence is below what is answered without a person."""
MOST_ERROR = 0.35
"""Debiased calibration error that a version may have, by its interval's upper end: of a hundred answers."""
RARE = 0.95
"""Quantile of the task's entropies above which a question is taken for a foreign one."""


class Files(NamedTuple):
    """Where they are."""

    folder: Path

    @property
    def tasks(self) -> Path:
        """The task that confidence is calibrated on."""
        return self.folder / "tasks.yaml"

    @property
    def rule(self) -> Path:
        """Of promotion."""
        return self.folder / "rule.yaml"

    @property
    def policy(self) -> Path:
        """Of the gate."""
        return self.folder / "policy.yaml"

    @property
    def loop(self) -> Path:
        """Of continuous learning."""
        return self.folder / "loop.yaml"


def write_tasks(files: Files, asked: Sequence[Question]) -> None:
    """Lines to complete; right is what begins with the real word."""
    lines = [
        json.dumps({"prompt": one.text, "group": one.group, "pattern": _begins_with(first_word(one.answer))})
        for one in asked
    ]
    (files.folder / "lines.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = {
        "kind": "answer", "name": TASK, "data": "lines.jsonl", "prompt": "{prompt}", "metrics": ["regex"],
        "stop": ["\n"], "max_new_tokens": MAX_TOKENS,
    }  # fmt: skip
    _write(files.tasks, {"tasks": [task]})


def _begins_with(word: str) -> str:
    return rf"^\s*{re.escape(word)}" + (r"(?!\w)" if word[-1:].isidentifier() else "")


def judged(files: Files, recipe: Recipe) -> dict[str, Any]:
    """A recipe that judges the run's pretrained model on the task, and calibrates it."""
    stages = _closure(recipe, [BASE]) | _judging(files, BASE)
    return {"name": "life-champion", "tracking": {"mlflow": None}, "stages": stages}


def write_policy(files: Files, store: Store, calibration: str, evaluation: Path) -> Policy:
    """The gate's rules, with thresholds from what the model did on the task."""
    rules: list[dict[str, Any]] = [
        {"when": {"flag": "input.unsafe"}, "then": "block", "say": "I do not help with that."}
    ]
    policy: dict[str, Any] = {
        "name": "careful",
        "scorers": [
            {
                "kind": "patterns",
                "name": "unsafe",
                "deny": [r"\bmalware\b", r"\bbomb\b", r"\bsteals? the password\b"],
                "sides": ["input"],
            }
        ],
        "mask": {"personal": True, "secrets": True},
        "audit_share": 0.1,
    }
    columns = pq.read_table(evaluation / OUTCOMES).to_pylist()
    entropies = [-np.log(one["confidence"]) for one in columns if one["signal"] == "entropy"]
    if entropies:
        limit = round(float(np.quantile(entropies, RARE)), 3)
        rules.append({"when": {"mean_entropy_above": limit}, "then": "abstain"})
    try:
        calibrated = open_calibrated(store.open(calibration).path, "answer")
    except BadInput:  # too few right answers, or too few wrong ones: nothing is promised
        least = [np.log(one["confidence"]) for one in columns if one["signal"] == "least token"]
        limit = round(float(np.quantile(least, REVIEWED)), 3)
        rules.append({"when": {"least_logprob_below": limit}, "then": "review"})
    else:
        assert calibrated.signal in SIGNALS
        told = [
            calibrated.of_raw(one["confidence"], one["slice"], one["length"]).probability
            for one in columns
            if one["signal"] == calibrated.signal
        ]
        policy["calibrator"] = calibration
        below = round(float(np.quantile(told, REVIEWED)) + 1e-6, 6)
        rules.append({"when": {"confidence_below": below}, "then": "review"})
    _write(files.policy, policy | {"rules": rules})
    return load_policy(files.policy)


def write_rules(files: Files, recipe: Recipe, *, calibrated: bool, verdicts: int, steps: int) -> None:
    """What a version has to pass, how it is tried, the challenger's recipe, and the loop around them."""
    clauses: list[dict[str, Any]] = [{"kind": "likelihood", "margin": 0.1}]
    if calibrated:
        clauses.append({"kind": "calibration", "level": "answer", "at_most": MOST_ERROR})
    clauses.append({"kind": "rollout", "modes": ["ab"]})
    _write(files.rule, {"name": "no worse", "clauses": clauses})
    guardrails = [
        {"measure": "not_answered", "margin": 0.3},
        {"measure": "thumbs_down", "margin": 0.3},
    ]
    trial = {"mode": "ab", "share": 0.5, "guardrails": guardrails, "most_users": 150}
    _write(files.folder / "ab.yaml", trial)
    canary = [{"measure": "not_answered", "margin": 0.2}]
    _write(files.folder / "canary.yaml", {"mode": "canary", "share": 0.4, "guardrails": canary})
    _write(files.folder / "challenger.yaml", _challenger(files, recipe, steps))
    loop = {
        "name": NAME, "recipe": "challenger.yaml", "model": "tuned", "policy": "policy.yaml",
        "rule": "rule.yaml", "rollout": "ab.yaml", "trigger": {"verdicts": verdicts},
    }  # fmt: skip
    if calibrated:
        loop["calibration"] = "calibrated_answers"
    _write(files.loop, loop)


def _challenger(files: Files, recipe: Recipe, steps: int) -> dict[str, Any]:
    """The champion, tuned on what people said, with old documents replayed; scored and judged as it was."""
    stages = _closure(recipe, ["train_documents", *recipe.stages[f"score_{BASE}"].references().values()])
    score, base = _stage(recipe, f"score_{BASE}"), _stage(recipe, BASE)
    stages |= {
        "champion": {"kind": "imported_model", "folder": "${champion}"},
        "feedback": {
            "kind": "curated",
            "build": {
                "name": "feedback",
                "sources": [{"jsonl": {"path": "${feedback}/sft.jsonl"}}],
                "steps": ["exact_duplicates", "personal"],
                "rules": [
                    {"drop": {"column": "exact_duplicates.duplicate"}},
                    {"mask": {"column": "personal.spans", "min_score": 0.8}},
                ],
            },
        },
        "learned": {"kind": "together", "documents": ["feedback", "train_documents"]},
        "learned_tokens": {"kind": "tokens", "documents": "learned", "tokenizer": "champion"},
        "tuned": base
        | {
            "model": "champion",
            "data": "learned_tokens",
            "steps": steps,
            "slice_weights": {"code": 0.2, "code/library": 0.5, "code/tests": 0.2, "prose/docs": 0.1},
            "evaluate_every_steps": max(1, steps // 4),
            "checkpoint_every_steps": max(1, steps // 2),
            "optimizer": {"learning_rate": 3e-4, "weight_decay": 0.0, "schedule": {"shape": "cosine"}},
        },
        "score_tuned": score | {"model": "tuned"},
    } | _judging(files, "tuned")
    return {"name": "challenger", "tracking": {"mlflow": None}, "stages": stages}


def _judging(files: Files, model: str) -> dict[str, Any]:
    tasks = [str(files.tasks.resolve())]
    return {
        "judged_answers": {"kind": "evaluation", "model": model, "tasks": tasks},
        "calibrated_answers": {"kind": "calibration", "evaluation": "judged_answers"},
    }


def _closure(recipe: Recipe, wanted: Sequence[str]) -> dict[str, Any]:
    """Stages, and all that they are made from, as a recipe has them: what is finished is found again."""
    found: dict[str, Any] = {}
    waiting = [*wanted]
    while waiting:
        name = waiting.pop()
        if name not in found:
            stage = recipe.stages[name]
            found[name] = _stage(recipe, name)
            waiting += stage.references().values()
    return found


def _stage(recipe: Recipe, name: str) -> dict[str, Any]:
    stage = recipe.stages[name]
    return {"kind": stage.kind} | stage.model_dump(mode="json", exclude_defaults=True)


def _write(path: Path, data: Any) -> None:
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
