"""What a recipe's stages read: checked when it is read, each mistake with its line and the nearest stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from gyrocompass.core.errors import ConfigError
from gyrocompass.recipe.recipe import AnyStage, load_recipe
from gyrocompass.recipe.stage import Stage
from tiny_recipe import write_recipe

STAGES: tuple[type[Stage], ...] = get_args(get_args(AnyStage)[0])
MAKES = {stage.makes for stage in STAGES}
READS = [(stage, field) for stage in STAGES for field in stage.reference_fields()]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def line_of(recipe: Path, key: str) -> int:
    return next(n for n, row in enumerate(recipe.read_text().splitlines(), 1) if key in row)


def edited(recipe: Path, folder: Path, before: str, after: str) -> Path:
    text = recipe.read_text(encoding="utf-8")
    assert text.count(before) == 1
    (folder / "edited.yaml").write_text(text.replace(before, after), encoding="utf-8")
    return folder / "edited.yaml"


@pytest.mark.parametrize(("stage", "field"), READS, ids=lambda part: getattr(part, "__name__", part))
def test_every_reference_says_what_it_reads(stage: type[Stage], field: str) -> None:
    wanted = stage.reference_fields()[field].makes
    assert wanted and set(wanted) <= MAKES


REFERENCE = "{kind: reference, data: %s, model: %s}"
WRONG = [
    (
        "pretrained.data",
        "train_documents",
        "train_documents makes documents, and tokens is needed",
        "train_tokens",
    ),
    ("pretrained.held_out", "tokenizer", "tokens is needed", ""),
    ("pretrained.teacher", "train_tokens", "model is needed", ""),
    ("pretrained.model", "tokenizer", "model is needed", ""),
    ("score_fine_tuned.data.0", "held_out_documents", "tokens is needed", "held_out_tokens"),
    ("train_pairs.documents", "train_tokens", "documents is needed", "train_documents"),
    ("train_tokens.tokenizer", "documents", "tokenizer is needed", ""),
    ("more", "{kind: preferences, documents: train_tokens}", "documents is needed", "train_documents"),
    ("more", REFERENCE % ("train_documents", "pretrained"), "tokens is needed", "train_tokens"),
    ("more", REFERENCE % ("train_tokens", "train_tokens"), "model is needed", ""),
    ("pretrained.model", "m00", "there is no stage 'm00'", ""),
    ("pretrained.data", "train_tokns", "there is no stage 'train_tokns'", "train_tokens"),
]


@pytest.mark.parametrize(("key", "value", "message", "nearest"), WRONG)
def test_a_reference_to_the_wrong_stage(
    key: str, value: str, message: str, nearest: str, recipe: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(str(recipe), [f"stages.{key}={value}"])
    assert message in str(error.value) and f"stages.{key}" in str(error.value)
    assert not nearest or f"did you mean {nearest}?" in str(error.value)


def test_each_wrong_reference_has_its_line(recipe: Path, tmp_path: Path) -> None:
    both = edited(recipe, tmp_path, "data: train_tokens\n", "data: train_documents\n")
    both = edited(both, tmp_path, "model: untrained\n", "model: m00\n")
    with pytest.raises(ConfigError, match="2 mistakes") as error:
        load_recipe(str(both))
    assert f"{both}:{line_of(both, 'model: m00')}: stages.pretrained.model" in str(error.value)
    assert f"{both}:{line_of(both, 'data: train_documents')}: stages.pretrained.data" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "key", "message"),
    [
        (
            "{focal: {gama: 2}}",
            "focal",
            "stages.pretrained.objective.1.focal.gama: unknown key; did you mean gamma?",
        ),
        ("\n        focal:\n          weight: 1\n          gama: 2", "gama", "focal.gama: unknown key"),
        ("focla", "focla", "stages.pretrained.objective.1: unknown objective 'focla'; did you mean focal?"),
        ("nll", "objective:", "stages.pretrained.objective: two objectives are called nll"),
    ],
)
def test_a_mistake_in_an_objective_has_its_line(
    entry: str, key: str, message: str, recipe: Path, tmp_path: Path
) -> None:
    lines = f"    objective:\n      - nll\n      - {entry}\n    steps: 4\n"
    wrong = edited(recipe, tmp_path, "    steps: 4\n", lines)
    with pytest.raises(ConfigError) as error:
        load_recipe(str(wrong))
    assert f"{wrong}:{line_of(wrong, key)}: " in str(error.value) and message in str(error.value)


def test_a_wrong_reference_stops_a_dry_run(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    from gyrocompass.cli.main import main

    wrong = ["--set", "stages.pretrained.data=train_documents"]
    assert main(["run", str(recipe), "--dry-run", "--store", str(tmp_path), *wrong]) == 2
    assert "did you mean train_tokens?" in capsys.readouterr().err
