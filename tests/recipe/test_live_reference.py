"""A training stage asks its reference itself: a stage's model, a folder's, or its own without LoRA."""

from __future__ import annotations

import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from test_alignment_stages import STAGES, changed, folder_of

from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.core.lineage import walk
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.model.load import load_causal_lm
from gyrocompass.recipe.plan import Done, execute
from gyrocompass.recipe.recipe import load_recipe, recipe_from
from gyrocompass.recipe.run import read_run, run_recipe
from gyrocompass.recipe.stage import Stage
from gyrocompass.recipe.verify import all_passed, verify_recipe
from gyrocompass.train.distributed import World
from gyrocompass.train.metrics import read_metrics

NEEDED = ("held_out_pairs", "train_preferences", "preference_tokens", "reference", "preferring")
DPO = STAGES["preferring"] | {"data": "preference_tokens", "steps": 3, "rows_per_step": 2}
LORA = {"lora": {"rank": 2}, "optimizer": {"learning_rate": 0.01}}
SOFT = {"reference_update": {"kind": "soft", "alpha": 0.5, "every_steps": 1}}
LIVE: dict[str, Any] = {
    "preferring": STAGES["preferring"] | {"steps": 3, "rows_per_step": 2},
    "live": DPO | {"reference": "fine_tuned"},
    "lora_off": DPO | LORA | {"reference_without_lora": True},
    "lora_own": DPO | LORA | {"reference": "fine_tuned"},
    "followed": DPO | SOFT | {"reference": "fine_tuned"},
    "reinforced": STAGES["reinforced"]
    | LORA
    | {"reference": None, "reference_without_lora": True, "model": "fine_tuned"},
}


def recipe_with(folder: Path, **stages: Any) -> dict[str, Any]:
    """The tiny recipe up to its preferences, and these stages."""
    recipe = changed(folder)
    for name in STAGES:
        if name not in NEEDED:
            del recipe["stages"][name]
    recipe["stages"] |= stages
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("live")
    recipe = recipe_from(recipe_with(folder, **LIVE), [], "test")
    run_recipe(recipe, Store(folder / "store"), Console(quiet=True))
    return folder / "store"


def objectives(store: Path, stage: str) -> list[dict[str, float]]:
    return [row["objective"] for row in read_metrics(folder_of(Store(store), stage) / "metrics.jsonl")]


def run(recipe: dict[str, Any], store: Store) -> dict[str, Done]:
    stages: dict[str, Stage] = dict(recipe_from(recipe, [], "test").stages)
    return {done.name: done for done in execute(stages, store, Progress(quiet=True), World())}


def test_asked_while_training_it_says_what_stands_in_the_column(finished: Path) -> None:
    live, column = objectives(finished, "live"), objectives(finished, "preferring")
    assert len(live) == 3
    for ours, theirs in zip(live, column, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert live[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5) != live[2]["dpo"]


def test_the_policy_without_lora_is_the_model_that_it_began_with(finished: Path) -> None:
    for ours, theirs in zip(objectives(finished, "lora_off"), objectives(finished, "lora_own"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert objectives(finished, "lora_off")[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_followed_policy_is_another_run(finished: Path) -> None:
    live, followed = objectives(finished, "live"), objectives(finished, "followed")
    assert live[0] == pytest.approx(followed[0], rel=1e-6)
    assert abs(followed[2]["dpo"] - math.log(2)) < abs(live[2]["dpo"] - math.log(2))


def test_rollouts_ask_the_policy_without_lora(finished: Path) -> None:
    folder = folder_of(Store(finished), "reinforced")
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[0]["objective"]["reference_kl"] == pytest.approx(0, abs=1e-6)
    looks = [json.loads(line) for line in (folder / "watch.jsonl").read_text().splitlines()]
    assert looks[0]["kl_nats"] == pytest.approx(0, abs=1e-5) and looks[-1]["kl_nats"] != 0


def test_a_reference_is_a_parent(finished: Path) -> None:
    store = Store(finished)
    ids = {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}
    parents = store.open(ids["live"]).manifest.parents
    assert parents["reference"] == ids["fine_tuned"]


def test_a_folder_is_a_reference_too(finished: Path, tmp_path: Path) -> None:
    """Outside the recipe; where it is an artifact, lineage goes through it."""
    store = Store(shutil.copytree(finished, tmp_path / "store"))
    own = folder_of(store, "fine_tuned")
    outside = {"reference_folder": str(own)}
    done = run(recipe_with(tmp_path / "more", outside=DPO | outside), store)["outside"].artifact
    rows = [row["objective"] for row in read_metrics(done.path / "metrics.jsonl")]
    for ours, theirs in zip(rows, objectives(finished, "live"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert done.manifest.parents["reference"] == own.name
    assert own.name in str(walk(store, done.id).artifact)
    before = recipe_from(recipe_with(tmp_path / "same", outside=DPO | outside), [], "test")
    key = before.stages["outside"].key({})
    (own / "config.json").touch()
    assert before.stages["outside"].key({}) != key
    missing = recipe_with(tmp_path / "missing", outside=DPO | {"reference_folder": str(tmp_path / "no")})
    with pytest.raises(BadInput, match="there is no such model folder"):
        run(missing, store)


def test_a_reference_of_another_vocabulary_is_refused(finished: Path, tmp_path: Path) -> None:
    """As many tokens, but others: the numbers would be nonsense without any error."""
    store = Store(shutil.copytree(finished, tmp_path / "store"))
    other = {
        "other_tokenizer": {"kind": "tokenizer", "documents": "train_pairs", "vocabulary_size": 300},
        "other": changed(tmp_path / "x")["stages"]["untrained"] | {"tokenizer": "other_tokenizer"},
        "smaller_tokenizer": {"kind": "tokenizer", "documents": "train_documents", "vocabulary_size": 280},
        "smaller": changed(tmp_path / "y")["stages"]["untrained"] | {"tokenizer": "smaller_tokenizer"},
    }
    said = {"other": "tokens have another number", "smaller": "280 tokens of vocabulary"}
    for name, message in said.items():
        recipe = recipe_with(tmp_path / name, **other, wrong=DPO | {"reference": name})
        with pytest.raises(BadInput, match=message) as raised:
            run(recipe, store)
        assert raised.value.where == "stages.wrong.reference" and raised.value.exit_code == 2


def test_a_reference_of_too_short_a_context_is_refused(finished: Path, tmp_path: Path) -> None:
    store = Store(shutil.copytree(finished, tmp_path / "store"))
    short: dict[str, Any] = changed(tmp_path / "x")["stages"]["untrained"]
    short["config"] |= {"max_position_embeddings": 64}
    recipe = recipe_with(tmp_path / "short", short=short, wrong=DPO | {"reference": "short"})
    with pytest.raises(BadInput, match="context is 64 tokens"):
        run(recipe, store)


MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    (DPO | {"data": "reference", "reference": "fine_tuned"}, "data: reference", "a reference already"),
    (DPO | {"reference": "fine_tund"}, "fine_tund", "did you mean fine_tuned?"),
    (DPO | {"reference": "preference_tokens"}, "reference: preference_tokens", "model is needed"),
    (
        DPO | {"reference": "fine_tuned", "reference_folder": "models"},
        "wrong:",
        "give one of reference and reference_folder",
    ),
    (DPO | {"reference_without_lora": True}, "wrong:", "reference_without_lora needs lora"),
    (DPO | SOFT, "wrong:", "reference_update needs a reference"),
    (DPO | LORA | SOFT | {"reference_without_lora": True}, "wrong:", "with weights of its own"),
    (
        DPO | {"reference": "fine_tuned", "reference_update": {"kind": "soft", "every_steps": 1}},
        "reference_update:",
        "alpha is given with `kind: soft`",
    ),
    (
        STAGES["reinforced"] | {"reference_update": {"kind": "hard", "every_steps": 1}},
        "wrong:",
        "watch measures from a reference that stays",
    ),
]


@pytest.mark.parametrize(("stage", "at", "message"), MISTAKES, ids=lambda part: str(part)[:20])
def test_mistakes_have_their_line(stage: dict[str, Any], at: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(recipe_with(tmp_path / "d", wrong=stage), sort_keys=False))
    with pytest.raises(ConfigError) as raised:
        load_recipe(str(path))
    lines = path.read_text().splitlines()
    last = max(number for number, line in enumerate(lines, 1) if at in line)
    assert message in str(raised.value) and f"{path}:{last}: stages.wrong" in str(raised.value)


def test_a_column_behind_a_teacher_is_found_too(tmp_path: Path) -> None:
    taught = {"kind": "teacher_top_k", "data": "reference", "teacher": "fine_tuned", "k": 2}
    wrong = recipe_with(tmp_path, taught=taught, wrong=DPO | {"data": "taught", "reference": "fine_tuned"})
    with pytest.raises(ConfigError, match="from reference: train on preference_tokens"):
        recipe_from(wrong, [], "test")


def test_live_references_are_verified(finished: Path, tmp_path: Path) -> None:
    """`gyro verify` asks them as training will; a killed run goes on with the reference that it had."""
    store = Store(shutil.copytree(finished, tmp_path / "store"))
    stages = {name: LIVE[name] for name in ("lora_off", "followed")}
    recipe = recipe_from(recipe_with(tmp_path / "verified", **stages), [], "test")
    rows = verify_recipe(recipe, store, Console(file=StringIO()))
    about = [row for row in rows if row.stage in stages]
    assert len(about) >= 12 and all_passed(about), [row for row in about if row.finding.passed is False]


def test_the_policy_itself_is_what_is_saved(finished: Path) -> None:
    """The reference leaves nothing in the artifact."""
    folder = folder_of(Store(finished), "followed")
    assert not list(folder.glob("reference*"))
    assert load_causal_lm(folder).config.model_type == "llama"
