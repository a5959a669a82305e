"""The recipe behind `gyro train`: files and a model in, a trained model out, scored before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.measure.reward_calibration import copy_calibration
from gyrocompass.recipe.recipe import Recipe, recipe_from
from gyrocompass.recipe.run import read_run
from gyrocompass.recipe.stages.model import copy_model, folder_context

NAME = "train"
LONGEST_ROW = 1024


def finetune_recipe(model: Path, data: Sequence[Path], overrides: Sequence[str]) -> Recipe:
    """Documents, a split, tokens, one training stage, and scores around it.

    Args:
        model: a Hugging Face folder.
        data: files or folders; every `--set` path of the recipe is open.
        overrides: such as `stages.trained.steps=200`.
    """
    length = min(LONGEST_ROW, folder_context(model) or LONGEST_ROW)
    stages: dict[str, Any] = {
        "model": {"kind": "imported_model", "folder": str(model)},
        "tokenizer": {"kind": "tokenizer_of", "model": "model"},
        "documents": {"kind": "documents", "sources": [{"files": {"path": str(path)}} for path in data]},
        "train_documents": {"kind": "split", "documents": "documents", "side": "train"},
        "held_out_documents": {"kind": "split", "documents": "documents", "side": "held_out"},
        "train_tokens": {"kind": "tokens", "documents": "train_documents", "tokenizer": "tokenizer"},
        "held_out_tokens": {"kind": "tokens", "documents": "held_out_documents", "tokenizer": "tokenizer"},
        "trained": {
            "kind": "train",
            "model": "model",
            "data": "train_tokens",
            "held_out": "held_out_tokens",
            "epochs": 1,
            "sequence_length": length,
            "optimizer": {"learning_rate": 2e-5, "weight_decay": 0.0, "schedule": {"warmup_steps": 10}},
        },
        "score_before": {
            "kind": "score",
            "model": "model",
            "data": ["held_out_tokens"],
            "sequence_length": length,
        },
        "score_after": {
            "kind": "score",
            "model": "trained",
            "data": ["held_out_tokens"],
            "sequence_length": length,
        },
    }
    return recipe_from({"name": NAME, "stages": stages}, overrides, "gyro train")


def check_free(target: Path) -> None:
    """Refuse a folder for the trained model that is taken or cannot be written, before any work is done.

    Raises:
        BadInput: there is something at `target` already, or nothing can be.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("there is something here already", where=target, fix="choose another --out")
    try:
        nearest = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise BadInput(
            f"the model cannot be written here: {error.strerror}", where=target, fix="choose another --out"
        ) from error


def export_model(store: Store, target: Path) -> None:
    """Write the last trained model, in Hugging Face format, to a folder; a LoRA update is merged in."""
    record = read_run(store, NAME)
    trained = next(stage for stage in record.stages if stage.name == "trained")
    folder = store.open(trained.artifact).path
    copy_model(folder, target)
    copy_calibration(folder, target)
