"""`gyro eval` and `gyro calibrate`: what a model scores, and how far its confidence can be trusted.

Both are recipes put together here, so that what is finished is found again, and lineage knows of it.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from gyrocompass.cli.model import model_folder
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.recipe.recipe import Recipe, recipe_from
from gyrocompass.recipe.run import run_recipe


def eval(options: argparse.Namespace) -> int:
    """Evaluate on tasks and held-out files."""
    recipe = judging_recipe("eval", _judged(options), options.tasks, options.data, options.set)
    run_recipe(recipe, Store(options.store, options.store_url), Console())
    return 0


def calibrate(options: argparse.Namespace) -> int:
    """Evaluate, then calibrate on what came of it."""
    recipe = judging_recipe(
        "calibrate", _judged(options), options.tasks, options.data, options.set, calibrated=True
    )
    run_recipe(recipe, Store(options.store, options.store_url), Console())
    return 0


def _judged(options: argparse.Namespace) -> Path | str:
    """A model's folder, or the URL of a server."""
    if options.model.startswith(("http://", "https://")):
        return str(options.model)
    return model_folder(options)


def judging_recipe(
    name: str,
    model: Path | str,
    tasks: list[Path],
    data: list[Path],
    overrides: list[str],
    *,
    calibrated: bool = False,
) -> Recipe:
    """A recipe that judges one model, or what a server answers.

    Args:
        name: of the run.
        model: its folder; or the URL of a server, which is asked anew each time.
        tasks: files of tasks.
        data: files that it was not trained on: texts to score, conversations to choose answers in.
        overrides: such as `stages.evaluation.most_items=50`.
        calibrated: whether a calibration follows.

    Raises:
        BadInput: there is nothing to judge by.
    """
    if not tasks and not data:
        raise BadInput("there is nothing to judge by", fix="give --tasks FILE or --data FILE")
    stages: dict[str, Any] = {}
    evaluation: dict[str, Any] = {"kind": "evaluation", "tasks": [str(path) for path in tasks]}
    if isinstance(model, str):
        asked_at = datetime.now(UTC).isoformat(timespec="seconds")
        evaluation |= {"server": {"url": model}, "asked_at": asked_at}
    else:
        stages["model"] = {"kind": "imported_model", "folder": str(model)}
        evaluation["model"] = "model"
    if data:
        stages["documents"] = {
            "kind": "documents",
            "sources": [{"files": {"path": str(path)}} for path in data],
        }
        evaluation["answers"] = "documents"
    if data and isinstance(model, str):
        evaluation["texts"] = "documents"
    elif data:
        stages |= {
            "tokenizer": {"kind": "tokenizer_of", "model": "model"},
            "tokens": {"kind": "tokens", "documents": "documents", "tokenizer": "tokenizer"},
        }
        evaluation["held_out"] = "tokens"
    stages["evaluation"] = evaluation
    if calibrated:
        stages["calibration"] = {"kind": "calibration", "evaluation": "evaluation"}
    return recipe_from({"name": name, "stages": stages}, overrides, f"gyro {name}")
