"""A training stage asks its reference itself: a stage's model, a folder's, or its own without LoRA."""

from __future__ import annotations

import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from rich.console import Console
from test_alignment_stages import STAGES, changed, folder_of
from test_verify import forked

from databases import copied
from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.core.lineage import walk
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.model.load import load_causal_lm
from gyrocompass.recipe import verify_resume
from gyrocompass.recipe.plan import Done, execute
from gyrocompass.recipe.recipe import Recipe, load_recipe, recipe_from
from gyrocompass.recipe.run import read_run, run_recipe
from gyrocompass.recipe.stage import Stage
from gyrocompass.recipe.verify import verify_recipe
from gyrocompass.recipe.verify_checks import partition
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
    | {"reference": None, "reference_without_lora": True, "model": "fine_tuned"}
    | {"rewards": [{"regex": {"pattern": "(?s).*[a-m]"}}, "distinct"], "seed": 1},
}


class Made(NamedTuple):
    """The tiny recipe up to its preferences, and a store in which it has run with the stages above."""

    stages: dict[str, Any]
    store: Path

    def recipe(self, **more: Any) -> Recipe:
        return recipe_from(
            {"name": "tiny", "tracking": {"mlflow": None}, "stages": self.stages | more}, [], "test"
        )

    def run(self, folder: Path, **more: Any) -> dict[str, Done]:
        """Some more stages, in a copy of the store."""
        if not folder.exists():
            copied(self.store, folder)
        stages: dict[str, Stage] = dict(self.recipe(**more).stages)
        return {done.name: done for done in execute(stages, Store(folder), Progress(quiet=True), World())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("live")
    stages: dict[str, Any] = changed(folder)["stages"]
    kept = {name: stage for name, stage in stages.items() if name not in STAGES or name in NEEDED}
    return Made(kept, folder / "store")


@pytest.fixture(scope="module")
def finished(made: Made) -> Path:
    pytest.importorskip("peft")
    torch.set_num_threads(1)
    run_recipe(made.recipe(**LIVE), Store(made.store), Console(quiet=True))
    return made.store


def objectives(store: Path, stage: str) -> list[dict[str, float]]:
    return [row["objective"] for row in read_metrics(folder_of(Store(store), stage) / "metrics.jsonl")]


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


def test_a_folder_is_a_reference_too(made: Made, finished: Path, tmp_path: Path) -> None:
    """Outside the recipe; where it is an artifact, lineage goes through it."""
    own = Path(shutil.copytree(folder_of(Store(finished), "fine_tuned"), tmp_path / "model"))
    outside = DPO | {"reference_folder": str(own)}
    done = made.run(tmp_path / "store", outside=outside)["outside"].artifact
    rows = [row["objective"] for row in read_metrics(done.path / "metrics.jsonl")]
    for ours, theirs in zip(rows, objectives(finished, "live"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    ids = {stage.name: stage.artifact for stage in read_run(Store(finished), "tiny").stages}
    assert done.manifest.parents["reference"] == ids["fine_tuned"]
    assert ids["fine_tuned"] in str(walk(Store(tmp_path / "store"), done.id).artifact)
    before = made.recipe(outside=outside).stages["outside"]
    key = before.key({})
    (own / "config.json").touch()
    assert before.key({}) != key
    with pytest.raises(BadInput, match="there is no such model folder"):
        made.run(tmp_path / "store", outside=DPO | {"reference_folder": str(tmp_path / "no")})


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"documents": "train_pairs", "vocabulary_size": 300}, "tokens have another number"),
        ({"documents": "train_documents", "vocabulary_size": 280}, "280 tokens of vocabulary"),
    ],
)
def test_a_reference_of_another_vocabulary_is_refused(
    tokenizer: dict[str, Any], message: str, made: Made, finished: Path, tmp_path: Path
) -> None:
    """As many tokens, but others: the numbers would be nonsense without any error."""
    other = {
        "other_tokenizer": {"kind": "tokenizer"} | tokenizer,
        "other": made.stages["untrained"] | {"tokenizer": "other_tokenizer"},
    }
    with pytest.raises(BadInput, match=message) as raised:
        made.run(tmp_path / "store", **other, wrong=DPO | {"reference": "other"})
    assert raised.value.where == "stages.wrong.reference" and raised.value.exit_code == 2


def test_a_reference_of_too_short_a_context_is_refused(made: Made, finished: Path, tmp_path: Path) -> None:
    config = made.stages["untrained"]["config"] | {"max_position_embeddings": 64}
    short = made.stages["untrained"] | {"config": config}
    with pytest.raises(BadInput, match="context is 64 tokens"):
        made.run(tmp_path / "store", short=short, wrong=DPO | {"reference": "short"})


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
def test_mistakes_have_their_line(
    stage: dict[str, Any], at: str, message: str, made: Made, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    wrong = {"name": "wrong", "stages": made.stages | {"wrong": stage}}
    path.write_text(yaml.safe_dump(wrong, sort_keys=False))
    with pytest.raises(ConfigError) as raised:
        load_recipe(str(path))
    lines = path.read_text().splitlines()
    last = max(number for number, line in enumerate(lines, 1) if at in line)
    assert message in str(raised.value) and f"{path}:{last}: stages.wrong" in str(raised.value)


def test_a_column_behind_a_teacher_is_found_too(made: Made) -> None:
    taught = {"kind": "teacher_top_k", "data": "reference", "teacher": "fine_tuned", "k": 2}
    with pytest.raises(ConfigError, match="from reference: train on preference_tokens"):
        made.recipe(taught=taught, wrong=DPO | {"data": "taught", "reference": "fine_tuned"})


def test_live_references_are_verified(
    made: Made, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gyro verify` asks them as training will; a killed run goes on with the reference that it had."""
    monkeypatch.setattr(verify_resume, "_run", forked("nothing", tmp_path / "said"))
    store = Store(copied(finished, tmp_path / "store"))
    needed = {name: stage for name, stage in made.stages.items() if name not in ("preferring", "reference")}
    stages = {name: LIVE[name] for name in ("lora_off", "followed")}
    recipe = made._replace(stages=needed).recipe(**stages)
    checks = {"partition": partition, "kill and resume": verify_resume.resume}
    rows = verify_recipe(recipe, store, Console(file=StringIO()), checks)
    about = [row for row in rows if row.stage in stages]
    assert len(about) == 4 and all(row.finding.passed for row in about), about


def test_the_policy_itself_is_what_is_saved(finished: Path) -> None:
    """The reference leaves nothing in the artifact."""
    folder = folder_of(Store(finished), "followed")
    assert not list(folder.glob("reference*"))
    assert load_causal_lm(folder).config.model_type == "llama"
