"""The command line as a user meets it: what it prints, what it reuses, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gyrocompass.cli.main import main
from gyrocompass.core.artifact import read_artifact
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe.record import RunRecord
from tiny_recipe import FinishedRun, write_recipe

Run = Callable[..., tuple[int, str, str]]


def record(run: FinishedRun) -> RunRecord:
    return RunRecord.model_validate_json((run.store / "runs" / "tiny" / "run.json").read_text())


def artifact(run: FinishedRun, stage: str) -> Path:
    id_ = next(entry.artifact for entry in record(run).stages if entry.name == stage)
    return run.store / "artifacts" / id_


def test_help_imports_nothing_heavy() -> None:
    """`gyro --help` answers at once because of this."""
    code = (
        "import sys; from gyrocompass.cli.main import parser; parser().format_help();"
        "heavy = {'torch', 'transformers', 'pydantic', 'sqlalchemy', 'rich', 'numpy', 'pyarrow'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_verb_shows_the_help(gyro: Run) -> None:
    code, out, _ = gyro()
    assert code == 2 and "lineage" in out


def test_a_run_leaves_whole_artifacts_and_a_report(finished_run: FinishedRun) -> None:
    stages = record(finished_run).stages
    assert len(stages) == 14 and not any(stage.reused for stage in stages)
    for stage in stages:
        read_artifact(finished_run.store / "artifacts" / stage.artifact)
    assert (finished_run.store / "runs" / "tiny" / "report.html").stat().st_size > 10_000
    assert {path.suffix for path in artifact(finished_run, "fine_tuned").iterdir()} >= {
        ".safetensors",
        ".json",
    }


def test_a_second_run_reuses_every_stage_and_says_so(finished_run: FinishedRun, gyro: Run) -> None:
    code, out, err = gyro("run", finished_run.recipe, "--store", finished_run.store)
    assert code == 0
    assert "14 of them reused" in out and (out + err).count(": reused") == 14


def test_a_changed_stage_reruns_it_and_what_follows(finished_run: FinishedRun, gyro: Run) -> None:
    change = "stages.fine_tuned.optimizer.learning_rate=1e-4"
    code, out, _ = gyro(
        "run", finished_run.recipe, "--store", finished_run.store, "--dry-run", "--set", change
    )
    lines = {line.split()[1]: "will run" in line for line in out.splitlines() if line.strip()}
    assert code == 0
    expected = {"fine_tuned", "score_fine_tuned", "completions"}
    assert {name for name, runs in lines.items() if runs} == expected


def test_accounting_over_the_whole_run(finished_run: FinishedRun) -> None:
    """Law 2: the trainer's and the scorer's counts are those of the manifests."""
    tokens = read_artifact(artifact(finished_run, "train_pair_tokens")).manifest.counts
    ledger = Ledger.load(artifact(finished_run, "fine_tuned") / "ledger.parquet")
    assert ledger.total.count == tokens["targets"]
    held_out = read_artifact(artifact(finished_run, "held_out_tokens")).manifest.counts
    scored = Ledger.load(artifact(finished_run, "score_untrained") / "ledger.parquet")
    assert scored.total.count == held_out["targets"] and scored.total.bytes == held_out["bytes"]
    assert sum(sums.count for _, sums in scored.items("slice")) == held_out["targets"]


def test_score_prints_what_the_score_stage_has(finished_run: FinishedRun, gyro: Run, tmp_path: Path) -> None:
    """Law 3: the same documents as a file, through the command, give the stage's numbers."""
    from gyrocompass.data.document import read_documents

    held_out = list(read_documents(artifact(finished_run, "held_out_documents")))
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps({"text": d.text, "slice": d.slice}) + "\n" for d in held_out))
    model = artifact(finished_run, "fine_tuned").name
    code, out, _ = gyro("score", model, file, "--store", finished_run.store, "--json", "--length", 64)
    total = json.loads(out)["slices"][-1]
    expected = Ledger.load(artifact(finished_run, "score_fine_tuned") / "ledger.parquet").total
    assert code == 0
    assert total["tokens"] == expected.count
    assert total["nats_per_token"] == pytest.approx(expected.value / expected.count, abs=1e-4)


def test_score_prints_every_token_when_asked(finished_run: FinishedRun, gyro: Run, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("def [bold]x[/bold]", encoding="utf-8")
    model = artifact(finished_run, "fine_tuned")
    code, out, _ = gyro("score", model, file, "--store", finished_run.store, "--tokens")
    assert code == 0 and "'['" in out and "nats/token" in out


def test_generate_gives_tokens_with_log_probabilities(finished_run: FinishedRun, gyro: Run) -> None:
    model = artifact(finished_run, "fine_tuned")
    code, out, _ = gyro("generate", model, "def f", "--max-new-tokens", 3, "--json")
    (completion,) = json.loads(out)
    assert code == 0 and len(completion["logprobs"]) == len(completion["tokens"]) <= 3
    assert all(value <= 0 for value in completion["logprobs"])
    assert gyro("generate", model, "def f", "--max-new-tokens", 3)[1].startswith("def f")


def test_lineage_goes_both_ways(finished_run: FinishedRun, gyro: Run) -> None:
    """Law 5: from the model to the documents' stage, and from a held-out document to what measured it."""
    model = artifact(finished_run, "fine_tuned").name
    _, up, _ = gyro("lineage", model, "--store", finished_run.store)
    assert artifact(finished_run, "documents").name in up and "recipe" in up
    from gyrocompass.data.document import read_documents

    document = next(iter(read_documents(artifact(finished_run, "held_out_documents"))))
    _, down, _ = gyro("lineage", document.id, "--store", finished_run.store)
    assert artifact(finished_run, "score_untrained").name in down
    assert artifact(finished_run, "train_tokens").name not in down


def test_report_is_made_again_from_the_store(finished_run: FinishedRun, gyro: Run) -> None:
    code, out, _ = gyro("report", "--store", finished_run.store)
    assert code == 0 and "nats/token" in out and "report.html" in out
    code, _, err = gyro("report", "tinny", "--store", finished_run.store)
    assert code == 2 and "did you mean tiny" in err


class Remembering:
    """A tracker that keeps what it was told; MLflow itself is tested where it is called."""

    def __init__(self, *_: object) -> None:
        self.told: list[int] = []
        TRACKERS.append(self)

    def log(self, rows: list[dict[str, Any]]) -> None:
        self.told += [row["step"] for row in rows]

    def last_step(self) -> int:
        return max(self.told, default=0)

    def close(self) -> None:
        pass


TRACKERS: list[Remembering] = []


def test_train_makes_a_model_that_transformers_loads(
    finished_run: FinishedRun, gyro: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gyrocompass.recipe.stages.train.MlflowTracker", Remembering)
    data = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"yes {n}"}]}
        for n in range(60)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    model = artifact(finished_run, "fine_tuned")
    code, _, err = gyro("train", model, data, "--store", tmp_path / "store", "--out", out)
    assert code == 0, err
    assert [bool(tracker.told) for tracker in TRACKERS] == [True], "tracked where mlflow is installed"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == len(
        AutoTokenizer.from_pretrained(out)
    )


def test_train_writes_out_what_lora_has_learned(
    finished_run: FinishedRun, gyro: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is kept beside the weights is merged in what is written out."""
    pytest.importorskip("peft")
    model, out = artifact(finished_run, "fine_tuned"), tmp_path / "out"
    lora = "stages.trained.lora={rank: 2, merge_on_save: false}"
    rate = "stages.trained.optimizer={learning_rate: 0.05, schedule: {warmup_steps: 0}}"
    held_out = [f"stages.{side}_documents.held_out_share=0.25" for side in ("train", "held_out")]
    sets = [word for change in (lora, rate, "tracking.mlflow=null", *held_out) for word in ("--set", change)]
    command = ["train", model, finished_run.recipe.parent / "data", "--store", tmp_path / "store", *sets]
    code, _, err = gyro(*command, "--out", out)
    assert code == 0, err
    import torch
    from safetensors.torch import load_file

    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not {path.name for path in out.iterdir()} & {"manifest.json", "adapter"}
    monkeypatch.setenv("RANK", "1")
    code, printed, err = gyro(*command, "--out", tmp_path / "second", "--dry-run")
    assert code == 0 and not printed, "the first rank alone talks"


def test_train_looks_at_out_before_it_runs(finished_run: FinishedRun, gyro: Run, tmp_path: Path) -> None:
    model = artifact(finished_run, "fine_tuned")
    code, _, err = gyro("train", model, model, "--store", tmp_path / "store", "--out", finished_run.store)
    assert code == 2 and "something here already" in err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_writes_out(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gyrocompass.cli import run

    written: list[Path] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(run, "finetune_recipe", lambda *_: None)
    monkeypatch.setattr(run, "run_recipe", lambda *_: None)
    monkeypatch.setattr(run, "export_model", lambda _, out: written.append(out))
    out, store = str(tmp_path / "out"), str(tmp_path / "store")
    assert main(["train", "m", "d", "--out", out, "--store", store]) == 0
    assert len(written) == (rank == 0)


def test_train_with_nothing_held_out_says_so(finished_run: FinishedRun, gyro: Run, tmp_path: Path) -> None:
    data = tmp_path / "one.txt"
    data.write_text("The only document, on one side of any split. " * 5, encoding="utf-8")
    salt = ["--set", "stages.train_documents.salt=a", "--set", "stages.held_out_documents.salt=a"]
    model = artifact(finished_run, "fine_tuned")
    code, _, err = gyro("train", model, data, "--store", tmp_path / "store", *salt)
    assert code == 2 and "nothing is held out" in err and "held_out_share=" in err, err


@pytest.mark.parametrize("config", ["[]", "{"])
def test_train_on_a_config_that_is_none(config: str, gyro: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    code, _, err = gyro("train", tmp_path, tmp_path, "--store", tmp_path / "store")
    assert code == 2 and "config.json" in err and "Traceback" not in err


@pytest.mark.parametrize("below", ["", "store"])
def test_a_store_that_cannot_be_made(below: str, gyro: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    recipe = write_recipe(tmp_path / "recipe")
    code, _, err = gyro("run", recipe, "--store", tmp_path / "file" / below)
    assert code == 2 and "no store can be here" in err and "--store" in err


def test_a_store_in_which_nothing_has_run(gyro: Run, tmp_path: Path) -> None:
    code, _, err = gyro("report", "--store", tmp_path)
    assert code == 2 and "nothing has run" in err
    code, _, err = gyro("lineage", "model-123", "--store", tmp_path)
    assert code == 2 and "model-123" in err


# --- bad input: what, where, what to do; never a traceback ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.pretrained.step=3", "did you mean steps"),
        ("stages.pretrained.optimizer.learning_rat=1", "did you mean learning_rate"),
        ("stages.pretrained.objective=[nil]", "did you mean nll"),
        ("stages.pretrained.model=untraned", "did you mean untrained"),
        ("stages.pretrained.epochs=1", "exactly one of steps and epochs"),
        ("stages.pretrained.kind=trian", "train"),
        ("stages.tokenizer.vocabulary_size=10", "262"),
        ("stages.documents.sources=[{files: {path: /nowhere}}]", "no such file"),
        ("stages.documents.sources=[{fils: {path: x}}]", "did you mean files"),
        ("stages.untrained.config.hiden_size=8", "did you mean hidden_size"),
        ("stages.pretrained.sequence_length=4096", "context"),
        ("stages.pretrained.slice_weights={code: -1}", "slice_weights.code"),
        ("stages.pretrained.held_out=null", "evaluate_every_steps needs held_out"),
        ("stages.fine_tuned.held_out_documents=3", "held_out_documents needs held_out"),
        ("nonsense", "a.b=value"),
    ],
)
def test_a_mistake_in_a_recipe_is_explained(
    override: str, message: str, finished_run: FinishedRun, gyro: Run
) -> None:
    code, out, err = gyro("run", finished_run.recipe, "--store", finished_run.store, "--set", override)
    assert code == 2, out + err
    assert message in err and "Traceback" not in err


def test_a_mistake_names_file_and_line(gyro: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    text = recipe.read_text(encoding="utf-8").replace("rows_per_step: 4", "rows_per_stpe: 4")
    recipe.write_text(text, encoding="utf-8")
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "rows_per_stpe" in row)
    code, _, err = gyro("run", recipe, "--store", tmp_path / "store")
    assert code == 2 and f"{recipe}:{line}" in err and "did you mean rows_per_step" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "missing.yaml"),
        (["run", "stdlbi"], "did you mean stdlib"),
        (["run", "stdlib", "--variant", "smal"], "did you mean small"),
        (["score", "no/such/model", "x.txt"], "no such model"),
        (["generate", "no/such/model", "x"], "no such model"),
        (["lineage", "model-123"], "no store here"),
        (["report"], "no store here"),
        (["train", "no/such/model", "x.jsonl"], "no/such/model"),
        (["generate", "m", "x", "--max-new-tokens", "0"], "from 1 up"),
        (["generate", "m", "x", "--top-p", "2"], "above 0 to 1"),
        (["generate", "m", "x", "--top-p", "0"], "above 0 to 1"),
        (["generate", "m", "x", "--temperature", "-1"], "from 0 up"),
        (["generate", "m", "x", "--temperature", "nan"], "from 0 up"),
        (["scroe", "m", "x"], "invalid choice"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(
    arguments: list[str], message: str, gyro: Run, tmp_path: Path
) -> None:
    verb = arguments[0] in ("run", "score", "generate", "lineage", "report", "train")
    code, _, err = gyro(*arguments, *(["--store", tmp_path / "store"] if verb else []))
    assert code == 2 and message in err and "Traceback" not in err


def test_too_many_malformed_records_fail_and_are_named(gyro: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "data" / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    code, _, err = gyro("run", recipe, "--store", tmp_path / "store")
    assert code == 2 and "broken.jsonl:2" in err and "max_quarantined_share" in err


def test_a_damaged_artifact_is_named_and_made_again(gyro: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    only = [
        "--set",
        "stages={documents: {kind: documents, sources: [{files: {path: %s}}]}}" % (tmp_path / "data"),
    ]
    assert gyro("run", recipe, "--store", tmp_path / "store", *only)[0] == 0
    (file,) = (tmp_path / "store" / "artifacts").glob("*/documents.parquet")
    file.write_bytes(file.read_bytes()[:-3])
    code, _, err = gyro("run", recipe, "--store", tmp_path / "store", *only, "--dry-run")
    assert code == 1 and str(file) in err and "Traceback" not in err
    code, out, err = gyro("run", recipe, "--store", tmp_path / "store", *only)
    told = " ".join((out + err).split())
    assert code == 0 and "documents.parquet" in told and "made again" in told
    assert gyro("run", recipe, "--store", tmp_path / "store", *only, "--dry-run")[0] == 0


def test_tokens_of_another_vocabulary_are_refused(finished_run: FinishedRun, gyro: Run) -> None:
    wrong = "stages.untrained.config.vocab_size=40"
    code, _, err = gyro("run", finished_run.recipe, "--store", finished_run.store, "--set", wrong)
    assert code == 2 and "a vocabulary of 40" in err and "stages.pretrained" in err
