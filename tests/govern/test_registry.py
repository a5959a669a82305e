"""Names and versions, promotions that need their proof, the way back, and a chain that shows changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import func, select, update

from databases import copied
from gyrocompass.core.acts import acts, check_chain
from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.core.lineage import walk
from gyrocompass.core.store import Store
from gyrocompass.core.tables import ListingRow
from gyrocompass.core.tables_serving import AdminAct
from gyrocompass.govern.card import learned_from, model_card
from gyrocompass.govern.mirror import mirror
from gyrocompass.govern.promote import PromotionRule, promote, scores_of
from gyrocompass.govern.registry import champion, drop_alias, point, register, resolve, roll_back, versions
from gyrocompass.measure.intervals import slice_scores
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe.run import read_run
from tiny_recipe import FinishedRun

Gyro = Callable[..., tuple[int, str, str]]


def rule_of(*clauses: dict[str, object]) -> PromotionRule:
    return parse(PromotionRule, {"name": "r", "clauses": list(clauses)}, "rule")


ANN = rule_of({"kind": "approval", "by": ["ann", "bob"]})


def artifact(store: Store, kind: str, text: str) -> str:
    with store.create(f"{kind}{text}", kind) as draft:
        (draft.path / "x").write_text(text)
    return draft.artifact.id


@pytest.fixture
def store(tmp_path: Path, store_url: str | None) -> Store:
    return Store(tmp_path / "store", store_url)


def test_versions_are_added_and_found(store: Store) -> None:
    ids = [artifact(store, "model", text) for text in "abc"]
    for number, one in enumerate(ids, 1):
        assert register(store, "assistant", one, "ann").version == number
    assert register(store, "assistant", ids[2], "ann").version == 3  # the same again
    point(store, "assistant", "shadow", 2, "ann")
    assert resolve(store, "assistant@shadow") == resolve(store, "assistant:2") == ids[1]
    assert resolve(store, "assistant") == ids[2]
    point(store, "assistant", "shadow", 1, "ann")
    assert resolve(store, "assistant@shadow") == ids[0]
    drop_alias(store, "assistant", "shadow", "ann")
    for reference, message in (
        ("assistant@shadow", "no alias 'shadow'"),
        ("assistant:9", "it has 1 to 3"),
        ("asistant", "did you mean assistant"),
    ):
        with pytest.raises(BadInput, match=message):
            resolve(store, reference)
    with pytest.raises(BadInput, match="assistant is a model, and"):
        register(store, "assistant", artifact(store, "policy", "p"), "ann")
    with pytest.raises(BadInput, match="is no name"):
        register(store, "As sistant", ids[0], "ann")
    with pytest.raises(BadInput, match="has no version 7"):
        point(store, "assistant", "x", 7, "ann")


def test_nobody_gets_around_the_rule(store: Store) -> None:
    for text in "ab":
        register(store, "m", artifact(store, "model", text), "ann")
    for act in (
        lambda: point(store, "m", "champion", 1, "ann"),
        lambda: drop_alias(store, "m", "champion", "ann"),
    ):
        with pytest.raises(BadInput, match="moved by a promotion alone"):
            act()
    refused = promote(store, "m", 1, ANN, "ann", ["eve"])
    assert not refused.promoted and champion(store, "m") is None
    assert "none of ann, bob has approved" in refused.clauses[0].why
    done = promote(store, "m", 1, ANN, "ann", ["bob"])
    assert done.promoted and done.artifact.manifest.kind == "decision"
    first = champion(store, "m")
    assert first is not None and first.version == 1
    with pytest.raises(BadInput, match="is champion already"):
        promote(store, "m", 1, ANN, "ann", ["bob"])
    told = json.loads((refused.artifact.path / "decision.json").read_text())
    assert told["promoted"] is False and told["clauses"][0]["holds"] is False
    with pytest.raises(BadInput, match="no champion before"):
        roll_back(store, "m", "ann")
    promote(store, "m", 2, ANN, "ann", ["ann"])
    assert roll_back(store, "m", "ann").version == 1
    moved = [act["act"] for act in acts(store.database) if "champion" in act["act"]]
    assert moved == ["champion moved", "champion moved", "champion rolled back"]


class History(RuleBasedStateMachine):
    """Promotions and ways back, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name) / "store")
        for text in "abcd":
            register(self.store, "m", artifact(self.store, "model", text), "ann")
        self.line: list[int] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(version=st.integers(1, 4))
    def promote(self, version: int) -> None:
        if self.line and self.line[-1] == version:
            return
        assert promote(self.store, "m", version, ANN, "ann", ["ann"]).promoted
        self.line.append(version)

    @rule()
    def back(self) -> None:
        if len(self.line) < 2:
            with pytest.raises(BadInput):
                roll_back(self.store, "m", "ann")
            return
        self.line.pop()
        assert roll_back(self.store, "m", "ann").version == self.line[-1]

    @invariant()
    def the_champion_is_the_last_of_the_line(self) -> None:
        found = champion(self.store, "m")
        assert (found.version if found else None) == (self.line[-1] if self.line else None)
        assert check_chain(self.store.database) is None


History.TestCase.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)
TestHistory = History.TestCase


@pytest.fixture
def run_store(finished_run: FinishedRun, tmp_path: Path) -> tuple[Store, dict[str, str]]:
    copied(finished_run.store, tmp_path / "store")
    store = Store(tmp_path / "store")
    return store, {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}


def test_a_better_model_is_proved_and_a_worse_one_refused(run_store: tuple[Store, dict[str, str]]) -> None:
    store, ids = run_store
    for stage in ("untrained", "fine_tuned", "untrained"):
        register(store, "tiny", ids[stage], "ann")
    not_worse = rule_of({"kind": "likelihood", "margin": 0.0})
    assert promote(store, "tiny", 1, not_worse, "ann", []).promoted  # nobody to be worse than
    better = promote(store, "tiny", 2, not_worse, "ann", [])
    assert better.promoted, better.clauses
    assert len(better.clauses[0].by) == 2
    assert better.artifact.manifest.parents == {"candidate": ids["fine_tuned"], "champion": ids["untrained"]}
    worse = promote(store, "tiny", 3, not_worse, "ann", [])
    assert not worse.promoted and "nats per token" in worse.clauses[0].why
    assert promote(store, "tiny", 3, rule_of({"kind": "likelihood", "margin": 5.0}), "ann", []).promoted


def test_what_was_not_measured_does_not_hold(run_store: tuple[Store, dict[str, str]]) -> None:
    store, ids = run_store
    register(store, "tiny", ids["fine_tuned"], "ann")
    clauses = [
        {"kind": "calibration", "level": "answer", "at_most": 0.1},
        {"kind": "figure", "task": "sums", "measure": "exact_match", "at_least": 0.5},
        {"kind": "contamination", "at_most": 0.1},
        {"kind": "exposure", "at_most_bits": 5},
    ]
    found = promote(store, "tiny", 1, rule_of(*clauses), "ann", [])
    assert [one.holds for one in found.clauses] == [False] * 4
    assert champion(store, "tiny") is None


def test_figures_of_its_own_evaluation_decide(
    run_store: tuple[Store, dict[str, str]], tmp_path: Path, gyro: Gyro
) -> None:
    store, ids = run_store
    rows = [{"prompt": f"say {n}", "answer": "no", "id": f"{n}", "group": f"{n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks.yaml").write_text(
        "tasks: [{kind: answer, name: t, data: rows.jsonl, metrics: [exact_match], max_new_tokens: 3}]"
    )
    assert gyro("eval", ids["fine_tuned"], "--tasks", tmp_path / "tasks.yaml", "--store", store.root)[0] == 0
    register(store, "tiny", ids["fine_tuned"], "ann")
    high = {"kind": "figure", "task": "t", "measure": "exact_match", "at_least": 0.5}
    low = {"kind": "figure", "task": "t", "measure": "exact_match", "at_most": 0.5}
    read = {"kind": "contamination", "at_most": 0.5}
    found = promote(store, "tiny", 1, rule_of(high, low, read), "ann", [])
    assert [one.holds for one in found.clauses] == [False, True, True]
    assert "at least 0.5 has to be shown" in found.clauses[0].why
    assert found.clauses[1].by[0].startswith("evaluation-")


def test_a_card_says_what_is_known_and_what_is_not(
    run_store: tuple[Store, dict[str, str]], tmp_path: Path, gyro: Gyro
) -> None:
    store, ids = run_store
    tuned = store.open(ids["fine_tuned"])
    data = tuned.manifest.parents["data"]
    with store.database.read() as connection:
        kept = ListingRow.artifact_id == data, ListingRow.status == "kept"
        documents = connection.scalar(select(func.count()).select_from(ListingRow).where(*kept))
    card = model_card(store, tuned.id)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and "gyrocompass" in front["tags"]
    line = [part for part in card.split("\n") if part.startswith("| `model-")]
    assert line[-1].startswith(f"| `{tuned.id}` | train | nll") and len(line) >= 2
    learned = card.split("## What it learned from")[1].split("\n## ")[0]
    counts = [int(row.split("|")[-2].replace(",", "")) for row in learned.strip().split("\n")[2:]]
    base = store.open(tuned.manifest.parents["model"], verify=False)
    up = walk(store, base.id).artifact
    assert up is not None
    assert sum(counts) == documents + sum(learned_from(store, up).documents.values())
    scored = next(iter(scores_of(store, tuned.id).values()))
    total = slice_scores(Ledger.load(scored.path / "ledger.parquet"))[-1]
    assert f"| total | {total.tokens:,} | {total.documents:,} | {total.nats_per_token:.4f} (" in card
    assert "Nobody has stated one" in card and "Nobody has looked for test items" in card
    register(store, "tiny", tuned.id, "ann")
    (tmp_path / "use.md").write_text("For tests | of this.\n")
    at = ("--store", store.root)
    code, out, _ = gyro("card", "tiny:1", "--intended-use", tmp_path / "use.md", *at)
    assert (
        code == 0 and "# tiny:1" in out and "For tests | of this." in out and "Nobody has stated" not in out
    )
    assert gyro("card", tuned.id, "--out", tmp_path / "README.md", *at)[0] == 0
    assert (tmp_path / "README.md").read_text().endswith("\n")
    for wrong, message in (
        ((data,), "not a model"),
        (("tiny@none",), "no alias 'none'"),
        ((tuned.id, "--intended-use", tmp_path / "nowhere.md"), "cannot be read"),
        ((tuned.id, "--out", tmp_path / "no" / "README.md"), "cannot be written"),
    ):
        code, _, err = gyro("card", *wrong, *at)
        assert code == 2 and message in err


def test_from_the_command_line(run_store: tuple[Store, dict[str, str]], tmp_path: Path, gyro: Gyro) -> None:
    store, ids = run_store
    at = ("--store", store.root)
    assert gyro("registry", "add", "tiny", ids["untrained"], *at)[1].startswith("tiny:1")
    assert gyro("registry", "add", "tiny", ids["fine_tuned"], "--by", "ann", *at)[0] == 0
    path = tmp_path / "rule.yaml"
    path.write_text("name: r\nclauses:\n  - {kind: approval, by: [ann]}\n  - {kind: likelihood}\n")
    assert gyro("promote", "tiny", 1, "--rule", path, "--approve", "ann", *at)[0] == 0
    code, out, _ = gyro("promote", "tiny", 2, "--rule", path, *at)
    assert code == 1 and "is refused" in out and "has approved" in out
    code, out, _ = gyro("promote", "tiny", 2, "--rule", path, "--approve", "ann", *at, "--json")
    assert code == 0 and json.loads(out)["promoted"]
    assert gyro("score", "tiny@champion", path, *at)[0] == 0
    code, out, _ = gyro("rollback", "tiny", *at)
    assert code == 0 and "tiny:1 is champion again" in out
    assert "champion" in gyro("registry", "list", *at)[1]
    code, out, _ = gyro("audit", *at)
    assert code == 0 and "each follows from those before it" in out
    with store.database.write() as connection:
        connection.execute(update(AdminAct).where(AdminAct.number == 1).values(by="eve"))
    code, out, _ = gyro("audit", *at)
    assert code == 1 and "act 1 of" in out
    code, _, err = gyro("registry", "alias", "tiny", "champion", 2, *at)
    assert code == 2 and "gyro promote tiny 2" in err
    path.write_text("name: r\nclauses: [{kind: likelyhood}]")
    code, _, err = gyro("promote", "tiny", 2, "--rule", path, *at)
    assert code == 2 and "rule.yaml:2" in err and "did you mean likelihood" in err
    assert len(versions(store, "tiny")) == 2


def test_a_rule_says_something() -> None:
    with pytest.raises(ConfigError):
        rule_of()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own use of SQLAlchemy
def test_mlflow_shows_the_same(store: Store, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    policy = artifact(store, "policy", "p")
    register(store, "m", artifact(store, "model", "a"), "ann")
    register(store, "m", artifact(store, "model", "b"), "ann", policy)
    point(store, "m", "shadow", 2, "ann")
    promote(store, "m", 1, ANN, "ann", ["ann"])
    assert mirror(store, uri)[1:] == (1, 2, 2) and mirror(store, uri)[1:] == (0, 0, 0)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    there = client.get_registered_model("m").aliases
    assert {alias: int(number) for alias, number in there.items()} == {"champion": 1, "shadow": 2}
    second = client.get_model_version("m", "2")
    assert second.tags["gyro.artifact"] == versions(store, "m")[1].artifact_id
    assert second.tags["gyro.policy"] == policy
    drop_alias(store, "m", "shadow", "ann")
    promote(store, "m", 2, ANN, "ann", ["ann"])
    assert mirror(store, uri)[1:] == (0, 0, 2)
    there = client.get_registered_model("m").aliases
    assert {alias: int(number) for alias, number in there.items()} == {"champion": 2}
    other = Store(tmp_path / "other")
    register(other, "m", artifact(other, "model", "z"), "ann")
    with pytest.raises(BadInput, match="MLflow has another m:1"):
        mirror(other, uri)


def test_a_policy_moves_with_its_model(store: Store) -> None:
    model, policy = artifact(store, "model", "a"), artifact(store, "policy", "p")
    assert register(store, "m", model, "ann").policy_id is None
    assert register(store, "m", model, "ann", policy).version == 2  # another version: it answers otherwise
    assert register(store, "m", model, "ann", policy).version == 2
    with pytest.raises(BadInput, match="not a policy"):
        register(store, "m", model, "ann", model)
    with pytest.raises(BadInput, match="a model has a policy"):
        register(store, "p", policy, "ann", policy)
