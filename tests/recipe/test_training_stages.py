"""Stages around training: what is refused before it, and where an imported model came from."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from databases import copied
from gyrocompass.core.artifact import MANIFEST
from gyrocompass.core.errors import BadInput, DamagedArtifact, Interrupted
from gyrocompass.core.lineage import walk
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.document import read_documents
from gyrocompass.data.mixture import PLANNED
from gyrocompass.measure.ledger import Ledger
from gyrocompass.model.future_heads import attach_future_heads
from gyrocompass.model.open import ADAPTER, open_model
from gyrocompass.recipe.plan import Done, execute, order
from gyrocompass.recipe.recipe import load_recipe, recipe_from
from gyrocompass.recipe.run import read_run, run_recipe
from gyrocompass.recipe.stage import Stage
from gyrocompass.recipe.stages.corpus import PairsStage
from gyrocompass.recipe.stages.model import ImportedModelStage
from gyrocompass.train.distributed import World
from gyrocompass.train.metrics import read_metrics
from tiny_recipe import FinishedRun

SHORT = {"epochs": 1, "sequence_length": 64, "rows_per_step": 4}


@pytest.fixture
def store(finished_run: FinishedRun, tmp_path: Path) -> Store:
    """A copy of the finished run's store, to be written to."""
    copied(finished_run.store, tmp_path / "store")
    return Store(tmp_path / "store")


def made(store: Store, stage: str) -> Path:
    record = read_run(store, "tiny")
    return store.open(next(entry.artifact for entry in record.stages if entry.name == stage)).path


def run(stages: dict[str, Any], store: Store) -> dict[str, Done]:
    recipe = recipe_from({"name": "other", "stages": stages}, [], "test")
    known: dict[str, Stage] = dict(recipe.stages)
    return {done.name: done for done in execute(known, store, Progress(quiet=True), World())}


def imported(folder: Path) -> dict[str, Any]:
    return {"model": {"kind": "imported_model", "folder": str(folder)}}


def with_adapter(store: Store, target: Path) -> Path:
    """The pretrained model with a LoRA update beside its weights."""
    from gyrocompass.model.lora import LoraSettings, apply_lora, save_adapter

    shutil.copytree(made(store, "pretrained"), target)
    (target / MANIFEST).unlink()
    adapted = apply_lora(
        open_model(target, dtype=None, device=torch.device("cpu")), LoraSettings(rank=2), seed=0
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_adapter(adapted, target / ADAPTER)
    return target


def test_an_adapter_beside_imported_weights_is_merged(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = with_adapter(store, tmp_path / "adapted")
    done = run(imported(folder), store)["model"]
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(done.artifact.path / "model.safetensors"),
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_changed_adapter_is_another_import(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = with_adapter(store, tmp_path / "adapted")
    before = ImportedModelStage(folder=folder).key({})
    (folder / ADAPTER / "adapter_model.safetensors").touch()
    assert ImportedModelStage(folder=folder).key({}) != before


def test_lineage_goes_on_through_an_imported_model(store: Store) -> None:
    """Law 5: a document of the first run reaches the model that a second recipe trained."""
    first = made(store, "pretrained")
    stages = {
        **imported(first),
        "tokenizer": {"kind": "tokenizer_of", "model": "model"},
        "documents": {"kind": "documents", "sources": [{"files": {"path": str(Path(__file__))}}]},
        "tokens": {"kind": "tokens", "documents": "documents", "tokenizer": "tokenizer"},
        "trained": {"kind": "train", "model": "model", "data": "tokens", **SHORT},
    }
    trained = run(stages, store)
    assert trained["model"].artifact.manifest.parents == {"imported": first.name}
    document = next(iter(read_documents(made(store, "train_documents"))))
    held_out = next(iter(read_documents(made(store, "held_out_documents"))))
    assert trained["trained"].artifact.id in walk(store, document.id).learned
    assert trained["trained"].artifact.id not in walk(store, held_out.id).learned
    assert trained["trained"].artifact.id in walk(store, held_out.id).saw


def test_future_heads_are_trained_and_stay_with_the_model(store: Store) -> None:
    stages = {
        **imported(made(store, "pretrained")),
        "tokenizer": {"kind": "tokenizer_of", "model": "model"},
        "documents": {"kind": "documents", "sources": [{"files": {"path": str(Path(__file__))}}]},
        "tokens": {"kind": "tokens", "documents": "documents", "tokenizer": "tokenizer"},
        "trained": {
            "kind": "train", "model": "model", "data": "tokens", **SHORT,
            "future_heads": 2, "objective": ["nll", {"multi_token": {"weight": 0.3}}],
        },
    }  # fmt: skip
    folder = run(stages, store)["trained"].artifact.path
    heads = load_file(folder / "future_heads.safetensors")
    assert set(heads) == {"0.weight", "0.bias", "1.weight", "1.bias"} and all(h.any() for h in heads.values())
    assert not any("future" in name for name in load_file(folder / "model.safetensors"))
    model = open_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    assert len(attach_future_heads(model, 2)) == 2


def test_a_trained_model_says_which_mixture_was_planned(store: Store) -> None:
    planned = json.loads((made(store, "pretrained") / PLANNED).read_text())
    ledger = Ledger.load(made(store, "pretrained") / "ledger.parquet")
    assert set(planned) == {name for name, _ in ledger.items("slice")} and len(planned) > 0
    assert sum(planned.values()) == pytest.approx(1)


def test_a_damaged_artifact_is_not_imported(store: Store, tmp_path: Path) -> None:
    shutil.copytree(made(store, "pretrained"), tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DamagedArtifact, match=r"config\.json"):
        run(imported(tmp_path / "copy"), store)


@pytest.mark.parametrize("key", ["salt=x", "held_out_share=0.6"])
def test_held_out_documents_are_not_trained_on(key: str, finished_run: FinishedRun, store: Store) -> None:
    """The split's settings stand on two stages: one that was changed alone lets documents over."""
    recipe = load_recipe(str(finished_run.recipe), [f"stages.held_out_documents.{key}"])
    with pytest.raises(BadInput, match=r"held-out documents are in the training data too: \w{16}, ") as error:
        run_recipe(recipe, store, Console(quiet=True))
    assert error.value.where == "stages.pretrained.held_out"
    assert not any((store.root / "work").glob("*/checkpoints"))


class InterruptedAt(Progress):
    """Presses Ctrl-C when a training stage has taken so many steps."""

    def __init__(self, step: int) -> None:
        super().__init__(quiet=True)
        self.left = step

    def task(self, label: str, *arguments: Any, **options: Any) -> Any:
        task = super().task(label, *arguments, **options)
        if options.get("unit") == "step":
            advance = task.advance

            def counted(number: float = 1, **numbers: float) -> None:
                advance(number, **numbers)
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGINT)

            task.advance = counted  # type: ignore[method-assign]
        return task


def test_an_interrupted_stage_makes_the_same_artifact(finished_run: FinishedRun, tmp_path: Path) -> None:
    """Same work, same bytes, same id: what it took is recorded beside them."""
    stages: dict[str, Stage] = dict(load_recipe(str(finished_run.recipe)).stages)
    stages = {name: stages[name] for name in order(stages) if name not in ("fine_tuned", "completions")}
    stages.pop("score_fine_tuned")
    store = Store(tmp_path / "store")
    with pytest.raises(Interrupted):
        list(execute(stages, store, InterruptedAt(3), World()))
    done = {done.name: done.artifact for done in execute(stages, store, Progress(quiet=True), World())}
    whole = {stage.name: stage.artifact for stage in read_run(Store(finished_run.store), "tiny").stages}
    assert {name: artifact.id for name, artifact in done.items()} == {name: whole[name] for name in done}
    rows = read_metrics(done["pretrained"].path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all("tokens_per_second" in row for row in rows)


def test_early_stopping_needs_held_out() -> None:
    train = {"kind": "train", "model": "m", "data": "d", **SHORT, "evaluate_every_steps": 2}
    with pytest.raises(BadInput, match="early_stopping needs held_out"):
        recipe_from({"name": "x", "stages": {"t": {**train, "early_stopping": {}}}}, [], "test")


@pytest.mark.parametrize("stage", ["fine_tuned", "score_fine_tuned"])
def test_too_long_rows_are_noticed_before_anything_runs(
    stage: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    store = Store(tmp_path / "empty")
    recipe = load_recipe(str(finished_run.recipe), [f"stages.{stage}.sequence_length=129"])
    with pytest.raises(BadInput, match="sequence_length is 129, and the model's context is 128") as error:
        run_recipe(recipe, store, Console(quiet=True))
    assert error.value.where == f"stages.{stage}"
    assert store.artifacts() == []


def test_too_long_rows_for_an_imported_model(store: Store) -> None:
    stages = {
        **imported(made(store, "pretrained")),
        "documents": {"kind": "documents", "sources": [{"files": {"path": str(Path(__file__))}}]},
        "tokens": {"kind": "tokens", "documents": "documents", "tokenizer": "model"},
        "score": {"kind": "score", "model": "model", "data": ["tokens"], "sequence_length": 200},
    }
    before = len(store.artifacts())
    with pytest.raises(BadInput, match="context is 128"):
        run(stages, store)
    assert len(store.artifacts()) == before


def test_pairs_are_made_anew_by_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = PairsStage(documents="d")
    before = pairs.key({"documents": "x"})
    monkeypatch.setattr("sys.version_info", (4, 0, 0, "final", 0))
    assert pairs.key({"documents": "x"}) != before
