"""A reward model of one stage rewards the rollouts of another: trained, calibrated, saved, asked, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from test_alignment_stages import JUDGED, STAGES, changed, folder_of
from test_training_stages import InterruptedAt

from databases import copied
from gyrocompass.core.artifact import read_artifact
from gyrocompass.core.errors import BadInput, ConfigError, GyroError, Interrupted
from gyrocompass.core.lineage import walk
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.alignment import calibration, expected_calibration_error, places
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.reward_calibration import FILE, load_calibration
from gyrocompass.model.columns import score_rewards
from gyrocompass.model.open import open_model
from gyrocompass.model.reward_model import RewardModel
from gyrocompass.recipe.plan import Done, execute
from gyrocompass.recipe.recipe import Recipe, load_recipe, recipe_from
from gyrocompass.recipe.report_training import trainings
from gyrocompass.recipe.run import read_run, run_recipe
from gyrocompass.recipe.stage import Stage, Workplace
from gyrocompass.recipe.stages.pairs import check_halves, groups_of, margins
from gyrocompass.recipe.stages.rollouts import read_prompts
from gyrocompass.train.distributed import World
from gyrocompass.train.metrics import read_metrics

LENGTH = 500
JUDGE = STAGES["reward_model"] | {
    "held_out_pairs": "held_out_preference_tokens",
    "steps": 6,
    "optimizer": {"learning_rate": 0.01, "schedule": {"shape": "constant"}},
}
REWARD = {"reward_model": {"model": "judge", "low": -50.0, "high": 50.0}}
JUDGED_ROLLOUTS = STAGES["reinforced"] | {
    "model": "fine_tuned",
    "rewards": ["parses", REWARD],
    "watch": {"gold": [REWARD], "prompts": 3, "samples_per_prompt": 2},
    "optimizer": {"learning_rate": 0.05, "schedule": {"shape": "constant"}},
}
ADDED: dict[str, Any] = {
    "judge": JUDGE,
    "uncalibrated": STAGES["reward_model"],
    "judged": JUDGED_ROLLOUTS,
    "align_judge": {key: value for key, value in JUDGED.items() if key not in ("rewards", "prompts")}
    | {"model": "judge", "prompt_slices": None},
    "align_judged": JUDGED | {"model": "judged", "rewards": [REWARD]},
}


def by(**changes: Any) -> list[dict[str, Any]]:
    return [{"reward_model": REWARD["reward_model"] | changes}]


NEEDED = (
    "held_out_pairs",
    "train_preferences",
    "held_out_preferences",
    "preference_tokens",
    "held_out_preference_tokens",
)


class Made(NamedTuple):
    """The tiny recipe with the stages above, and a store in which it has run."""

    stages: dict[str, Any]
    store: Path

    def recipe(self, **more: Any) -> Recipe:
        return recipe_from(
            {"name": "tiny", "tracking": {"mlflow": None}, "stages": self.stages | more}, [], "test"
        )

    def run(self, folder: Path, progress: Progress | None = None, **more: Any) -> dict[str, Done]:
        """Some more stages, in a copy of the store."""
        if not folder.exists():
            copied(self.store, folder)
        stages: dict[str, Stage] = dict(self.recipe(**more).stages)
        progress = progress or Progress(quiet=True)
        return {done.name: done for done in execute(stages, Store(folder), progress, World())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("judged")
    stages: dict[str, Any] = changed(folder)["stages"]
    kept = {name: stage for name, stage in stages.items() if name not in STAGES or name in NEEDED}
    return Made(kept | ADDED, folder / "store")


@pytest.fixture(scope="module")
def finished(made: Made) -> Path:
    torch.set_num_threads(1)
    run_recipe(made.recipe(), Store(made.store), Console(quiet=True))
    return made.store


def judge_of(store: Path) -> RewardModel:
    folder = folder_of(Store(store), "judge")
    return RewardModel(open_model(folder, dtype=None, device=torch.device("cpu")), load_calibration(folder))


def held_out(store: Path) -> TokenDataset:
    return TokenDataset.open(folder_of(Store(store), "held_out_preference_tokens"))


def test_a_reward_model_is_saved_with_what_held_out_pairs_say_of_it(finished: Path) -> None:
    saved = judge_of(finished).calibration
    assert saved is not None
    data = held_out(finished)
    margin_P = margins(data, score_rewards(judge_of(finished).model, LENGTH, 8, data))
    assert saved.pairs == len(margin_P) and saved.accuracy == pytest.approx(np.mean(margin_P > 0))
    assert saved.accuracy_low is not None and saved.accuracy_low <= saved.accuracy
    expected = calibration(margin_P, groups_of(data))
    assert expected is not None
    assert saved.temperature == pytest.approx(expected.temperature, rel=1e-4)
    other_P = margin_P[places(groups_of(data)) >= saved.split]
    assert saved.calibration_pairs == len(other_P) < len(margin_P)
    assert saved.ece_before == pytest.approx(expected_calibration_error(other_P), abs=1e-4)
    assert saved.ece_after == pytest.approx(expected_calibration_error(other_P / saved.temperature), abs=1e-4)


def test_its_file_has_a_hash_and_goes_where_the_model_goes(
    made: Made, finished: Path, tmp_path: Path
) -> None:
    store = Store(finished)
    folder = folder_of(store, "judge")
    assert FILE in read_artifact(folder).manifest.files
    assert load_calibration(folder_of(store, "uncalibrated")) is None
    copied = {"kind": "imported_model", "folder": str(folder)}
    copy = made.run(tmp_path / "store", copied=copied)["copied"].artifact.path
    assert load_calibration(copy) == load_calibration(folder) is not None


def test_counts_and_report_say_how_good_it_is(finished: Path) -> None:
    store = Store(finished)
    saved = judge_of(finished).calibration
    assert saved is not None
    counts = read_artifact(folder_of(store, "judge")).manifest.counts
    assert counts["held_out_pairs"] == saved.pairs
    assert counts["accuracy"] == round(saved.accuracy, 4)
    assert counts["temperature"] == round(saved.temperature, 4)
    by_name = {training.stage: training for training in trainings(read_run(store, "tiny"), store)}
    assert by_name["judge"].calibration == saved and by_name["uncalibrated"].calibration is None
    page = (finished / "runs" / "tiny" / "report.html").read_text()
    assert page.count("A reward model: of") == 1 and "that it was not fitted on" in page


def test_alignment_measures_the_temperature_that_was_saved(finished: Path) -> None:
    found = json.loads((folder_of(Store(finished), "align_judge") / "alignment.json").read_text())
    saved = judge_of(finished).calibration
    assert saved is not None
    assert found["calibration"]["temperature"] == saved.temperature
    assert found["calibration"]["pairs"] == saved.calibration_pairs
    assert found["calibration"]["ece_after"] == pytest.approx(saved.ece_after, abs=1e-4)


def test_rollouts_are_rewarded_by_it(finished: Path) -> None:
    store = Store(finished)
    folder = folder_of(store, "judged")
    rows = read_metrics(folder / "metrics.jsonl")
    for row in rows:
        parts = [row["rollout"][f"reward/{name}"] for name in ("parses", "reward_model")]
        assert row["rollout"]["reward"] == pytest.approx(sum(parts)) and parts[1] != 0
    looks = [json.loads(line) for line in (folder / "watch.jsonl").read_text().splitlines()]
    assert len({look["gold"]["value"] for look in looks}) > 1
    figures = json.loads((folder_of(store, "align_judged") / "alignment.json").read_text())["figures"]
    assert "sample: reward_model" in {figure["name"] for figure in figures}


def test_a_sample_is_read_as_pairs_are(made: Made, finished: Path, tmp_path: Path) -> None:
    """Token in, token out: an answer of the held-out pairs has the reward that it has as a sample."""
    store = Store(finished)
    data, judge = held_out(finished), judge_of(finished)
    samples = []
    for start, end in zip(data.offset_D[:-1], data.offset_D[1:], strict=True):
        written = int(np.argmax(data.weight_N[start:end] > 0))
        ids = data.id_N[start:end].tolist()
        samples.append(Sample("", "", prompt_ids=ids[:written], token_ids=ids[written:]))
    artifacts = {
        role: store.open(next(s.artifact for s in read_run(store, "tiny").stages if s.name == name))
        for role, name in {"model": "fine_tuned", "rewards.1.reward_model.model": "judge"}.items()
    }
    stage = made.recipe().stages["judged"].model_copy(update={"watch": None})
    workplace = Workplace("judged", artifacts, tmp_path, store, Progress(quiet=True), World())
    tools = stage.tools(workplace, dtype=torch.float32, length=LENGTH, rows=3)  # type: ignore[union-attr]
    expected_D = score_rewards(judge.model, LENGTH, 8, data) / judge.temperature
    np.testing.assert_allclose(tools.scorers["judge"](samples), expected_D, rtol=1e-4, atol=1e-5)
    assert tools.scorers["judge"]([]) == []
    tokenizer = load_tokenizer(folder_of(store, "fine_tuned"))
    prompts = read_prompts(folder_of(store, "held_out_pairs"), tokenizer, LENGTH)
    assert tuple(samples[0].prompt_ids) in {prompt.ids for prompt in prompts}


def test_it_is_a_parent_by_its_content_and_its_name_is_not_in_the_key(
    made: Made, finished: Path, tmp_path: Path
) -> None:
    store = Store(finished)
    ids = {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}
    manifest = store.open(ids["judged"]).manifest
    roles = {"rewards.1.reward_model.model", "watch.gold.0.reward_model.model"}
    assert {role for role, parent in manifest.parents.items() if parent == ids["judge"]} == roles
    assert manifest.recipe["rewards"] == ["parses", {"reward_model": {"low": -50.0, "high": 50.0}}]
    assert ids["preference_tokens"] in str(walk(store, ids["judged"]).artifact)
    renamed = json.loads(json.dumps(made.stages).replace('"judge"', '"critic"'))
    done = made._replace(stages=renamed).run(tmp_path / "store")
    assert "critic" in done and all(one.reused for one in done.values())


def test_an_interrupted_run_goes_on_with_the_same_rewards(made: Made, finished: Path, tmp_path: Path) -> None:
    """Stopped in the middle of the judged rollouts, in a store where all before is done."""
    longer = JUDGED_ROLLOUTS | {"steps": 4, "checkpoint_every_steps": 2}
    whole = made.run(tmp_path / "whole", longer=longer)["longer"].artifact
    with pytest.raises(Interrupted):
        made.run(tmp_path / "stopped", InterruptedAt(3), longer=longer)
    done = made.run(tmp_path / "stopped", longer=longer)["longer"]
    assert not done.reused and done.artifact.id == whole.id
    rows = [
        [[row["loss"], row["rollout"]] for row in read_metrics(path / "metrics.jsonl")]
        for path in (whole.path, done.artifact.path)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


UNWATCHED = JUDGED_ROLLOUTS | {"watch": None, "watch_prompts": None, "evaluate_every_steps": None}


def test_a_reward_outside_its_range_ends_the_run_unless_clipped(
    made: Made, finished: Path, tmp_path: Path
) -> None:
    stage = UNWATCHED | {"rewards": by(low=49.0, high=50.0), "steps": 1}
    with pytest.raises(GyroError, match=r"the reward reward_model is .* outside its range \[49\.0, 50\.0\]"):
        made.run(tmp_path / "store", narrow=stage)
    stage |= {"rewards": by(low=49.0, high=50.0, clip=True)}
    done = made.run(tmp_path / "store", clipped=stage)["clipped"].artifact
    assert read_metrics(done.path / "metrics.jsonl")[0]["rollout"]["reward"] == 49.0


def test_a_judge_of_another_vocabulary_is_refused(made: Made, finished: Path, tmp_path: Path) -> None:
    others = {
        "other_tokenizer": {"kind": "tokenizer", "documents": "train_pairs", "vocabulary_size": 300},
        "other_tokens": STAGES["preference_tokens"] | {"tokenizer": "other_tokenizer"},
        "other": made.stages["untrained"] | {"tokenizer": "other_tokenizer"},
        "other_judge": STAGES["reward_model"] | {"model": "other", "data": "other_tokens", "steps": 1},
    }
    wrong = UNWATCHED | {"rewards": by(model="other_judge")}
    with pytest.raises(BadInput, match="tokenizer is not that of the one that is trained") as raised:
        made.run(tmp_path / "store", **others, wrong=wrong)
    assert raised.value.where == "stages.wrong.rewards.0.reward_model.model"


def test_a_model_that_is_no_reward_model_is_refused_where_the_recipe_cannot_tell(
    made: Made, finished: Path, tmp_path: Path
) -> None:
    """The folder has a head when the recipe is read, and none when the stage begins."""
    folder = Path(shutil.copytree(folder_of(Store(finished), "judge"), tmp_path / "model"))
    for name in ("manifest.json", FILE):
        (folder / name).unlink()
    stages = {
        "headless": {"kind": "imported_model", "folder": str(folder)},
        "wrong": UNWATCHED | {"rewards": by(model="headless")},
    }
    recipe = made.recipe(**stages)
    (folder / "scalar_head.safetensors").unlink()
    store = Store(copied(finished, tmp_path / "store"))
    known: dict[str, Stage] = dict(recipe.stages)
    with pytest.raises(BadInput, match="this model has no scalar head, so it is no reward model"):
        list(execute(known, store, Progress(quiet=True), World()))


def test_too_few_pairs_are_refused_before_training(finished: Path) -> None:
    data = held_out(finished)
    chosen = [row._replace(group="one") for row in data.rows()]
    with pytest.raises(BadInput, match="held-out pairs are of 1 document"):
        check_halves(TokenDataset.of(chosen), "here")


def judged_with(model: str) -> dict[str, Any]:
    return JUDGED_ROLLOUTS | {"rewards": by(model=model)}


MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    (judged_with("jugde"), "rewards.0.reward_model.model", "there is no stage 'jugde'; did you mean judge?"),
    (judged_with("tokenizer"), "rewards.0.reward_model.model", "makes tokenizer, and model is needed here"),
    (
        judged_with("fine_tuned"),
        "rewards.0.reward_model.model",
        "makes a model without a scalar head, which is no reward model",
    ),
    (
        JUDGED_ROLLOUTS | {"watch": {"gold": by(model="pretrained")}},
        "watch.gold.0.reward_model.model",
        "without a scalar head",
    ),
    (
        JUDGED | {"model": "judged", "rewards": by(model="nobody")},
        "rewards.0.reward_model.model",
        "there is no stage 'nobody'",
    ),
    (
        JUDGED_ROLLOUTS | {"rewards": by(modle="judge")},
        "rewards.0.reward_model.modle",
        "unknown key; did you mean model?",
    ),
    (judged_with("wrong") | {"scalar_head": True}, "", "stages wait for each other"),
]


@pytest.mark.parametrize(("stage", "key", "message"), MISTAKES, ids=lambda part: str(part)[:30])
def test_mistakes_have_their_line(
    stage: dict[str, Any], key: str, message: str, made: Made, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    wrong = {"name": "wrong", "stages": made.stages | {"wrong": stage}}
    path.write_text(yaml.safe_dump(wrong, sort_keys=False))
    with pytest.raises(ConfigError) as raised:
        read = load_recipe(str(path))
        list(execute(dict(read.stages), Store(tmp_path / "store"), Progress(quiet=True), World()))
    assert message in str(raised.value)
    if key:
        lines = enumerate(path.read_text().splitlines(), 1)
        found = [number for number, line in lines if f"{key.split('.')[-1]}:" in line]
        assert f"stages.wrong.{key}" in str(raised.value)
        assert any(f"{path}:{number}: stages.wrong" in str(raised.value) for number in found)


def test_held_out_pairs_are_for_reward_models(made: Made) -> None:
    with pytest.raises(ConfigError, match="held_out_pairs are for reward models: set `scalar_head: true`"):
        made.recipe(wrong=JUDGE | {"scalar_head": False, "objective": ["nll"]})


def test_a_damaged_calibration_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"temperature": -1}')
    with pytest.raises(BadInput, match="the reward model's calibration cannot be read"):
        load_calibration(tmp_path)
