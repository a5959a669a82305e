"""From documents to an aligned model in one tiny recipe: preferences, reward model, DPO, rollouts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from gyrocompass.core.errors import ConfigError
from gyrocompass.core.lineage import walk
from gyrocompass.core.store import Store
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.load import load_causal_lm
from gyrocompass.model.scalar_head import has_scalar_head
from gyrocompass.recipe.recipe import load_recipe, recipe_from
from gyrocompass.recipe.report import print_report
from gyrocompass.recipe.report_alignment import NOTHING, changes
from gyrocompass.recipe.run import read_run, run_recipe
from gyrocompass.recipe.stages.alignment import AlignmentStage
from gyrocompass.recipe.stages.train import TrainStage
from gyrocompass.recipe.verify import verify_recipe
from gyrocompass.recipe.verify_checks import partition
from tiny_recipe import write_recipe

LENGTH = 500
TRAIN = {"kind": "train", "model": "fine_tuned", "sequence_length": LENGTH, "rows_per_step": 4, "steps": 2}
TRAIN |= {"guard": {"spike_z": None}}
PREFERENCES = {"kind": "tokens", "tokenizer": "tokenizer", "max_tokens": LENGTH, "max_quarantined_share": 1.0}
SAMPLING = {"prompts": "train_pairs", "prompt_slices": ["chat/body"], "rewards": ["parses", "distinct"]}
ROLLOUTS = {"prompts_per_step": 2, "samples_per_prompt": 3, "max_new_tokens": 8}
STAGES: dict[str, Any] = {
    "held_out_pairs": {"kind": "pairs", "documents": "held_out_documents"},
    "train_preferences": {"kind": "preferences", "documents": "train_pairs"},
    "held_out_preferences": {"kind": "preferences", "documents": "held_out_pairs"},
    "preference_tokens": PREFERENCES | {"documents": "train_preferences"},
    "held_out_preference_tokens": PREFERENCES | {"documents": "held_out_preferences"},
    "reference": {
        "kind": "reference",
        "data": "preference_tokens",
        "model": "fine_tuned",
        "sequence_length": LENGTH,
    },
    "reward_model": TRAIN
    | {"scalar_head": True, "data": "preference_tokens", "objective": [{"reward_pairs": {"centring": 0.01}}]},
    "preferring": TRAIN | {"data": "reference", "objective": [{"dpo": {}}, {"chosen_nll": {"weight": 0.1}}]},
    "pair_reference": {
        "kind": "reference",
        "data": "train_pair_tokens",
        "model": "fine_tuned",
        "sequence_length": LENGTH,
    },
    "constrained": TRAIN
    | SAMPLING
    | {
        "data": "pair_reference",
        "rollouts": ROLLOUTS,
        "objective": [
            {"clipped_surrogate": {"of": "rollouts"}},
            {"excess_nll": {"name": "kept", "of": "data", "slices": ["chat/body"]}},
        ],
        "blend": {"lagrangian": {"objective": "kept", "bound": 0.02, "rate": 0.5}},
    },
    "reinforced": {key: value for key, value in TRAIN.items() if key != "rows_per_step"}
    | SAMPLING
    | {
        "model": "preferring",
        "reference": "fine_tuned",
        "objective": [{"clipped_surrogate": {}}, {"reference_kl": {"weight": 0.1}}],
        "rollouts": ROLLOUTS,
        "watch": {"gold": ["compiles"], "prompts": 3, "samples_per_prompt": 2},
        "watch_prompts": "held_out_pairs",
        "evaluate_every_steps": 1,
    },
}
JUDGED = {
    "kind": "alignment",
    "reference": "fine_tuned",
    "pairs": "held_out_preference_tokens",
    **SAMPLING,
    "prompts": "held_out_pairs",
    "max_new_tokens": 6,
    "max_prompts": 4,
    "sequence_length": LENGTH,
}
VERDICTS = ("above chance", "below chance", "chance not excluded")
REWARD_MODEL = {name: JUDGED[name] for name in ("kind", "pairs", "sequence_length")}
STAGES |= {"align_fine_tuned": JUDGED | {"model": "fine_tuned"}}
STAGES |= {"align_reward_model": REWARD_MODEL | {"model": "reward_model"}}
STAGES |= {f"align_{name}": JUDGED | {"model": name} for name in ("preferring", "reinforced")}
STAGES |= {
    f"score_{name}": {"kind": "score", "model": name, "data": ["held_out_tokens"], "sequence_length": 64}
    for name in ("fine_tuned", "preferring")
}


def changed(folder: Path, **stages: Any) -> dict[str, Any]:
    """The tiny recipe with the stages of alignment, some of them changed."""
    recipe: dict[str, Any] = yaml.safe_load(write_recipe(folder).read_text())
    for name in ("score_untrained", "score_fine_tuned", "completions"):
        del recipe["stages"][name]
    recipe["stages"]["untrained"]["config"]["max_position_embeddings"] = LENGTH
    recipe["stages"] |= STAGES | stages
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store in which it has run."""
    folder = tmp_path_factory.mktemp("aligned")
    recipe = recipe_from(changed(folder), [], "test")
    run_recipe(recipe, Store(folder / "store"), Console(quiet=True))
    return folder / "store"


def folder_of(store: Store, stage: str) -> Path:
    record = read_run(store, "tiny")
    return store.open(next(one.artifact for one in record.stages if one.name == stage)).path


def test_the_reference_is_a_column_and_a_parent(finished: Path) -> None:
    store = Store(finished)
    data = TokenDataset.open(folder_of(store, "reference"))
    reference_N = data.columns["reference_logprob"]
    np.testing.assert_array_equal(np.isfinite(reference_N), data.weight_N > 0)
    record = {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}
    parents = store.open(record["reference"]).manifest.parents
    assert parents == {"data": record["preference_tokens"], "model": record["fine_tuned"]}


def test_preferring_begins_at_ln_2(finished: Path) -> None:
    rows = (folder_of(Store(finished), "preferring") / "metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[0])["objective"]
    assert first["dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["chosen_nll"] > 0


def test_a_reward_model_keeps_its_head(finished: Path) -> None:
    model = load_causal_lm(folder_of(Store(finished), "reward_model"))
    assert has_scalar_head(model)
    assert not has_scalar_head(load_causal_lm(folder_of(Store(finished), "preferring")))


def test_rollouts_and_the_watch_leave_their_rows(finished: Path) -> None:
    folder = folder_of(Store(finished), "reinforced")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout"]["samples"] for row in rows] == [6, 6]
    assert all(row["rollout"]["largest_gap_nats"] < 1e-4 for row in rows)
    assert rows[0]["objective"]["reference_kl"] >= 0
    looks = [json.loads(line) for line in (folder / "watch.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 1, 2] and looks[0]["samples"] == 6


def test_a_stage_reads_data_and_rollouts_in_one_window(finished: Path) -> None:
    folder = folder_of(Store(finished), "constrained")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert {"chat/body", "rollouts/chat/body"} <= set(row["nll_nats"])
        assert row["rollout"]["samples"] == 6 and set(row["objective"]) == {"clipped_surrogate", "kept"}
    assert rows[0]["objective"]["kept"] == pytest.approx(0, abs=1e-5)  # the model begins as its reference
    assert rows[0]["objective_weights"]["kept"] == 1.0
    assert rows[1]["objective_weights"]["kept"] == pytest.approx(0.99, abs=1e-4)
    page = (finished / "runs" / "tiny" / "report.html").read_text()
    assert "pair_reference and its own samples of train_pairs" in page and "rollouts/chat/body" in page


def test_its_data_is_verified_without_its_rollouts(tmp_path: Path) -> None:
    recipe = changed(tmp_path)
    later = ("preferring", "reinforced", "reward_model", "align_", "score_preferring")
    stages = {name: stage for name, stage in recipe["stages"].items() if not name.startswith(later)}
    checked = recipe_from(recipe | {"stages": stages}, [], "test")
    store, console = Store(tmp_path / "store"), Console(quiet=True)
    rows = verify_recipe(checked, store, console, {"partition": partition})
    assert [row.finding.passed for row in rows if row.stage == "constrained"] == [True]
    stage = checked.stages["constrained"]
    assert isinstance(stage, TrainStage)
    of_data = TrainStage.model_validate_json(stage.of_data().model_dump_json())  # how `resume` reads it
    assert of_data.objective == (STAGES["constrained"]["objective"][1],)
    assert of_data.rollouts is None and of_data.blend is None and of_data.data == stage.data


def test_the_report_compares_the_models(finished: Path) -> None:
    store = Store(finished)
    found = {one.model: one for one in changes(read_run(store, "tiny"), store)}
    assert [*found] == ["fine_tuned", "reward_model", "preferring", "reinforced"]
    bases = {"reward_model": "fine_tuned", "preferring": "fine_tuned", "reinforced": "preferring"}
    assert {name: one.base for name, one in found.items()} == {"fine_tuned": "pretrained", **bases}
    lines = {(name, line.measure): line for name, one in found.items() for line in one.lines}
    assert lines["reward_model", "preferred by reward model"].verdict in VERDICTS
    assert lines["reinforced", "parses"].change is not None
    assert ("fine_tuned", "KL from reference, nats") not in lines
    distance = lines["preferring", "KL from reference, nats"]
    assert distance.before is not None and distance.before.value == 0 and distance.verdict == ""
    ratio = lines["preferring", "preferred by ratio to reference"]
    assert ratio.before == (0.5, 0.5, 0.5), "the reference is tied with itself"
    nll = lines["preferring", "nats per token (total)"]
    assert nll.change is not None and nll.change.value == pytest.approx(nll.after.value - nll.before.value)
    page = (finished / "runs" / "tiny" / "report.html").read_text()
    assert "What each stage changed" in page and "its own samples of train_pairs" in page
    assert "preferring, which began as fine_tuned" in page
    assert "Watch against gamed rewards" in page


def test_a_stage_that_does_not_help_is_said_not_to(finished: Path) -> None:
    """Two steps of a model of 16 dimensions write nothing that parses: 0 before, 0 now, in every group."""
    store = Store(finished)
    found = {one.model: one for one in changes(read_run(store, "tiny"), store)}
    line = next(line for line in found["reinforced"].lines if line.measure == "parses")
    assert line.after.value == 0 and line.after.high is not None and line.after.high > 0.5
    assert line.verdict == NOTHING
    better = [line.measure for line in found["reinforced"].lines if line.verdict == "better"]
    said = found["reinforced"].summary
    assert ("reinforced is better by no measure here" in said) == (not better)
    assert NOTHING in said


def test_the_terminal_says_what_each_stage_changed(finished: Path) -> None:
    store = Store(finished)
    for width in (80, 160):
        file = io.StringIO()
        print_report(read_run(store, "tiny"), store, Console(file=file, width=width))
        text = file.getvalue()
        assert "preferring, which began as fine_tuned" in text
        assert "reinforced, watched for gamed rewards" in text
        table = text[text.index("preferring, which began") : text.index("reinforced, which began")]
        lines = [line for line in table.splitlines() if "better" not in line and ":" not in line]
        assert max(map(len, lines)) <= width and "\N{HORIZONTAL ELLIPSIS}" not in table


def test_optional_rewards_are_left_out_where_their_tool_is_not(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = AlignmentStage.model_validate(
        JUDGED
        | {"model": "m", "optional_rewards": [{"secure": {"name": "safe"}}, "distinct"]}
        | {"rewards": ["parses"]}
    )
    with_tool = stage.key({})
    monkeypatch.setattr("gyrocompass.measure.rewards.registry.find_spec", lambda name: None)
    assert stage.outside() == {"safe": "bandit is not installed: pip install 'gyrocompass[rewards]'"}
    assert stage.key({}) != with_tool, "a machine with the tool measures it"


def test_a_sample_leads_back_to_its_documents(finished: Path) -> None:
    store = Store(finished)
    record = {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}
    seen = str(walk(store, record["reinforced"]).artifact)
    assert record["train_pairs"] in seen and record["documents"] in seen


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("reinforced", {"rewards": ["parse"]}, "unknown reward 'parse'; did you mean parses"),
        ("reinforced", {"rollouts": None}, "give one of data and rollouts"),
        ("reinforced", {"steps": None, "epochs": 1}, "rollouts need prompts, rewards and steps"),
        ("reinforced", {"rollouts": {"samples_per_prompt": 1}}, "set rollouts.samples_per_prompt to 2"),
        ("reinforced", {"rollouts": {"advantage": {"kind": "gae"}}}, "need `scalar_head: true`"),
        ("reinforced", {"engine": {"url": "here", "model": "m"}}, "valid URL"),
        ("reinforced", {"rows_per_step": 4}, "with rollouts alone: a step of rollouts is .*, here 6"),
        ("reinforced", {"slice_weights": {"chat/body": 1}}, "goes with data, not with rollouts alone"),
        (
            "constrained",
            {"objective": ["nll"], "blend": None},
            "say which it is about, `of: data` or `of: ro",
        ),
        ("constrained", {"objective": [{"reinforce": {"of": "rollouts"}}], "blend": None}, "is of data"),
        ("constrained", {"objective": [{"nll": {"of": "texts"}}]}, "unknown choice 'texts'"),
        ("preferring", {"objective": [{"dpo": {"of": "rollouts"}}]}, "the stage has only data"),
        ("preferring", {"objective": ["dppo"]}, "unknown objective 'dppo'"),
        ("align_preferring", {"rewards": []}, "prompts and rewards go together"),
        ("align_preferring", {"optional_rewards": ["lint"]}, "unknown reward 'lint'; did you mean linted"),
        ("align_preferring", {"optional_rewards": ["parses"]}, "two rewards are called parses"),
    ],
)
def test_mistakes_are_said_before_any_work(
    tmp_path: Path, stage: str, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(changed(tmp_path / "d", **{stage: STAGES[stage] | changes})))
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


def test_a_mistake_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    objective = [{"clipped_surrogate": {"of": "rollouts"}}, {"excess_nll": {"name": "kept"}}]
    path.write_text(
        yaml.safe_dump(changed(tmp_path / "d", constrained=STAGES["constrained"] | {"objective": objective}))
    )
    lines = path.read_text().splitlines()
    line = next(
        n for n, text in enumerate(lines, 1) if text.strip() == "- excess_nll:" and "of" not in lines[n]
    )
    with pytest.raises(
        ConfigError, match=rf"wrong.yaml:{line}: stages.constrained.objective.1: the stage has data"
    ):
        load_recipe(str(path))


def test_a_multiplier_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    kept = {"excess_nll": {"name": "kept", "of": "data", "weight": 0.0}}
    changes = {"objective": [{"clipped_surrogate": {"of": "rollouts"}}, kept]}
    path.write_text(yaml.safe_dump(changed(tmp_path / "d", constrained=STAGES["constrained"] | changes)))
    with pytest.raises(ConfigError, match=r"objective\.1: its weight is 0, and so is 0 times the multiplier"):
        load_recipe(str(path))
