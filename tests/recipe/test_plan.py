"""The plan: order, keys, reuse, what a change reruns, and what an interrupted stage leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.artifact import Draft
from gyrocompass.core.errors import ConfigError, DamagedArtifact, GyroError
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.recipe.mistakes import reference_mistakes
from gyrocompass.recipe.plan import Done, execute, order, plan
from gyrocompass.recipe.stage import OptionalStageName, Stage, StageName, StageNames, Workplace
from gyrocompass.train.distributed import World

RUNS: list[str] = []


class Number(Stage):
    """A stage that writes a number, for tests."""

    kind: Literal["number"] = "number"
    makes: ClassVar[str] = "number"
    value: int
    state_of_the_world: ClassVar[int] = 0

    def outside(self) -> Any:
        return self.state_of_the_world

    def run(self, workplace: Workplace, draft: Draft) -> None:
        RUNS.append(workplace.name)
        (draft.path / "value").write_text(str(self.value), encoding="utf-8")


class Total(Stage):
    """A stage that adds up what others wrote, for tests."""

    kind: Literal["total"] = "total"
    makes: ClassVar[str] = "total"
    first: StageName
    second: OptionalStageName = None
    rest: StageNames = ()
    plus: int = 0

    def run(self, workplace: Workplace, draft: Draft) -> None:
        RUNS.append(workplace.name)
        values = [int((artifact.path / "value").read_text()) for artifact in workplace.inputs.values()]
        (draft.path / "value").write_text(str(sum(values) + self.plus), encoding="utf-8")


class Failing(Number):
    """A stage that fails after it has written something, for tests."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        (workplace.work / "progress").write_text("half", encoding="utf-8")
        super().run(workplace, draft)
        raise KeyboardInterrupt


STAGES: dict[str, Stage] = {
    "sum": Total(first="a", second="b", rest=("c",)),
    "a": Number(value=1),
    "b": Number(value=2),
    "c": Total(first="b", plus=10),
}


def run(stages: dict[str, Stage], store: Store) -> dict[str, Done]:
    RUNS.clear()
    return {done.name: done for done in execute(stages, store, Progress(quiet=True), World())}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def value(done: Done) -> int:
    return int((done.artifact.path / "value").read_text())


def test_inputs_come_before_what_reads_them() -> None:
    names = order(STAGES)
    assert sorted(names) == sorted(STAGES)
    for name, stage in STAGES.items():
        assert all(names.index(used) < names.index(name) for used in stage.references().values())


def test_roles_are_the_names_of_the_fields() -> None:
    assert STAGES["sum"].references() == {"first": "a", "second": "b", "rest.0": "c"}
    assert STAGES["sum"].settings() == {"kind": "total", "plus": 0}


@given(
    edges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20),
)
@settings(deadline=None, max_examples=60)
def test_a_circle_is_refused_and_everything_else_is_ordered(edges: list[tuple[int, int]]) -> None:
    stages: dict[str, Stage] = {
        f"s{node}": Total(first="base", rest=tuple(f"s{b}" for a, b in edges if a == node))
        for node in range(10)
    }
    stages["base"] = Number(value=1)
    forward = {node: {b for a, b in edges if a == node} for node in range(10)}
    reached = {node: set(direct) for node, direct in forward.items()}
    for _ in range(10):
        for node in reached:
            reached[node] |= {far for near in reached[node] for far in forward[near]}
    if any(node in far for node, far in reached.items()):
        with pytest.raises(ConfigError, match="wait for each other"):
            order(stages)
    else:
        names = order(stages)
        assert all(names.index(f"s{b}") < names.index(f"s{a}") for a, b in edges)


def test_an_unknown_stage_is_named_with_the_nearest() -> None:
    ((path, message),) = reference_mistakes({"number": Number(value=1), "x": Total(first="numbr")})
    assert path == ("x", "first") and message == "there is no stage 'numbr'; did you mean number?"


def test_a_second_run_reuses_everything(store: Store) -> None:
    first = run(STAGES, store)
    assert RUNS == ["a", "b", "c", "sum"] and value(first["sum"]) == 15
    second = run(STAGES, store)
    assert RUNS == [] and all(done.reused for done in second.values())
    assert [done.artifact.id for done in second.values()] == [done.artifact.id for done in first.values()]


def test_a_change_reruns_its_stage_and_what_follows(store: Store) -> None:
    run(STAGES, store)
    changed = run(STAGES | {"a": Number(value=5)}, store)
    assert RUNS == ["a", "sum"] and value(changed["sum"]) == 19
    run(STAGES, store)
    assert RUNS == []


def test_names_of_stages_are_not_part_of_the_key(store: Store) -> None:
    run(STAGES, store)
    renamed: dict[str, Stage] = {"x": Number(value=1), "y": Total(first="x")}
    run(renamed, store)
    assert RUNS == ["y"]


def test_a_change_outside_reruns(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(STAGES, store)
    monkeypatch.setattr(Number, "state_of_the_world", 1)
    run(STAGES, store)
    assert "a" in RUNS and "b" in RUNS


def test_the_plan_tells_what_is_cached(store: Store) -> None:
    assert [step.artifact for step in plan(STAGES, store)] == [None] * 4
    run(STAGES, store)
    assert all(step.artifact for step in plan(STAGES, store))
    steps = {step.name: step for step in plan(STAGES | {"b": Number(value=7)}, store)}
    assert steps["a"].artifact is not None
    assert steps["b"].artifact is None and steps["b"].key is not None
    assert steps["c"].key is None and steps["sum"].key is None


def test_an_interrupted_stage_leaves_its_work_and_no_artifact(store: Store) -> None:
    stages: dict[str, Stage] = {"a": Failing(value=1)}
    with pytest.raises(KeyboardInterrupt):
        run(stages, store)
    (step,) = plan(stages, store)
    assert step.artifact is None and step.key is not None
    assert (store.work_dir(step.key) / "progress").read_text() == "half"
    assert not [path for path in (store.root / "artifacts").iterdir() if path.name.startswith("number")]


def test_a_finished_stage_forgets_its_work(store: Store) -> None:
    done = run(STAGES, store)
    assert not any((store.root / "work").glob("*")), done


def test_a_damaged_artifact_is_named_set_aside_and_made_again(store: Store) -> None:
    done = run(STAGES, store)
    (done["a"].artifact.path / "value").write_text("8", encoding="utf-8")
    with pytest.raises(DamagedArtifact, match="value"):
        plan(STAGES, store)
    told: list[str] = []
    progress = Progress(quiet=True)
    progress.note = told.append  # type: ignore[method-assign]
    again = {one.name: one for one in execute(STAGES, store, progress, World())}
    assert not again["a"].reused and again["a"].artifact.id == done["a"].artifact.id
    assert (again["a"].artifact.path / "value").read_text() != "8"
    assert all(again[name].reused for name in STAGES if name != "a")  # what was made from it stays
    assert "a: " in told[0] and "value" in told[0] and "made again" in told[0]
    (aside,) = (store.root / "damaged").iterdir()
    assert (aside / "value").read_text() == "8"


def test_a_stage_that_another_process_runs_is_left_to_it(store: Store) -> None:
    (step,) = plan({"a": Number(value=1)}, store)
    assert step.key is not None
    # The lock belongs to an open file, not to a process, so that one process can show what two would meet.
    with store.locked_work(step.key, "elsewhere"), pytest.raises(GyroError, match="another process") as error:
        run({"a": Number(value=1)}, store)
    assert RUNS == [] and error.value.where == "stages.a" and "run again" in str(error.value)
    run({"a": Number(value=1)}, store)
    assert RUNS == ["a"]


def test_a_stage_keeps_its_work_folder_locked(store: Store) -> None:
    class Nosy(Number):
        def run(self, workplace: Workplace, draft: Draft) -> None:
            with pytest.raises(GyroError), store.locked_work(workplace.work.name, "x"):
                pass
            super().run(workplace, draft)

    run({"a": Nosy(value=1)}, store)
    assert RUNS == ["a"] and not any((store.root / "work").iterdir())
