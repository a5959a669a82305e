"""`gyro eval` and `gyro calibrate` from the command line, their artifacts and their pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from databases import copied
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.data.document import read_documents
from gyrocompass.measure.calibrate import load_calibrator
from gyrocompass.measure.calibration_metrics import calibration_error
from gyrocompass.measure.conformal import load_guarantee
from gyrocompass.recipe.run import read_run, run_folder
from gyrocompass.recipe.stages.calibration import CalibrationStage, Kept
from gyrocompass.recipe.stages.evaluation import OUTCOMES, check_not_trained_on, trained_on
from tiny_recipe import FinishedRun

TASKS = """\
tasks:
  - {kind: choice, name: sums, data: sums.jsonl, prompt: "{question}"}
  - kind: answer
    name: words
    data: words.jsonl
    metrics: [token_f1, {follows: {field: must}}]
    max_new_tokens: 6
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judging")
    (folder / "tasks.yaml").write_text(TASKS)
    sums = [
        {"question": f"add_{n} returns", "choices": [" total", " first"], "answer": n % 2} for n in range(160)
    ]
    words = [{"prompt": f"def add_{n}", "answer": "first", "must": {"most_words": 50}} for n in range(6)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    data = folder / "data"
    data.mkdir()
    for number in range(30):
        (data / f"new_{number}.txt").write_text(
            f"def take_{number}(first, second):\n    return second - {number}\n" * 4
        )
    return folder


@pytest.fixture(scope="module")
def model(finished_run: FinishedRun) -> Path:
    store = Store(finished_run.store)
    ids = {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}
    return store.open(ids["fine_tuned"]).path


@pytest.fixture(scope="module")
def calibrated(model: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    from gyrocompass.cli.main import main

    store = tmp_path_factory.mktemp("store")
    asked = ["calibrate", str(model), "--tasks", str(files / "tasks.yaml"), "--data", str(files / "data")]
    assert main([*asked, "--store", str(store)]) == 0
    return Store(store)


def artifact(store: Store, name: str) -> Path:
    ids = {stage.name: stage.artifact for stage in read_run(store, None).stages}
    return store.open(ids[name]).path


def test_eval_prints_tables_and_writes_a_page(
    model: Path, files: Path, tmp_path: Path, gyro: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = gyro("eval", model, "--tasks", files / "tasks.yaml", "--store", tmp_path / "store")
    assert code == 0 and "accuracy by bytes" in out and "token_f1" in out
    page = (tmp_path / "store" / "runs" / "eval" / "evaluation.html").read_text()
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "def add_0" in page
    again = gyro("eval", model, "--tasks", files / "tasks.yaml", "--store", tmp_path / "store")[1]
    assert "2 stages in" in again and "2 of them reused" in again


def test_changed_records_are_asked_anew(
    model: Path, files: Path, tmp_path: Path, gyro: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "tasks.yaml").write_text(TASKS)
    for name in ("sums.jsonl", "words.jsonl"):
        (tmp_path / name).write_text((files / name).read_text())
    asked = ("eval", model, "--tasks", tmp_path / "tasks.yaml", "--store", tmp_path / "store")
    assert gyro(*asked)[0] == 0
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"question": "more", "choices": ["a", "b"], "answer": 0}))
    assert "1 of them reused" in gyro(*asked)[1]


def test_outcomes_are_of_every_level(calibrated: Store) -> None:
    table = pq.read_table(artifact(calibrated, "evaluation") / OUTCOMES).to_pydict()
    kinds = set(zip(table["level"], table["signal"], strict=True))
    signals = {"sequence", "mean token", "least token", "entropy", "p(true)"}
    assert kinds == {
        ("token", "probability"),
        ("choice", "probability"),
        *(("answer", one) for one in signals),
    }
    assert all(0 <= one <= 1 for one in table["confidence"])


def test_the_page_and_its_json_say_the_same(calibrated: Store) -> None:
    folder = run_folder(calibrated, "calibrate")
    told = json.loads((folder / "calibration.json").read_text())
    by_kind = {(one["level"], one["signal"]): one for one in told["calibration"]}
    choice = by_kind["choice", "probability"]
    page = (folder / "calibration.html").read_text()
    assert f"{choice['after']['slices']['total']['value']:.3f}" in page
    assert page.count("<svg") >= 4 and "Held-out text" in page
    assert "too few" in by_kind["answer", "sequence"]["refused"]


def test_what_is_saved_is_what_was_measured(calibrated: Store) -> None:
    """The after-figures can be had again from the outcomes and the saved calibrator."""
    folder = artifact(calibrated, "calibration")
    told = {one["level"]: one for one in json.loads((folder / "calibration.json").read_text())}
    calibrator = load_calibrator(folder / "calibrator-choice-probability.json")
    table = pq.read_table(artifact(calibrated, "evaluation") / OUTCOMES)
    from gyrocompass.recipe.stages.calibration import _halves, _kinds

    (kept,) = [one for one in _kinds(table) if one.level == "choice"]
    tested = kept.part(~_halves(kept.groups))
    after = calibrator.apply(tested.confidence_N, tested.beside())
    found = calibration_error(after, tested.correct_N, tested.groups)
    assert told["choice"]["after"]["slices"]["total"]["value"] == pytest.approx(found.value)
    assert not set(tested.groups) & set(kept.part(_halves(kept.groups)).groups)


def test_a_good_confidence_gets_a_promise(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    confidence = generator.beta(4, 1, 1200)
    correct = (generator.random(1200) < confidence**0.5).astype(float)
    kept = Kept(
        "choice",
        "probability",
        confidence,
        correct,
        ["one", "two"] * 600,
        [f"g{n}" for n in range(1200)],
        np.ones(1200),
        np.zeros(1200, np.int64),
    )
    stage = CalibrationStage(evaluation="x", risk=0.15)
    entry = stage._judge(kept, tmp_path)
    found = load_guarantee(tmp_path / "guarantee-choice-probability.json")
    assert entry["guarantee"] == found.model_dump(mode="json")
    assert set(found.thresholds) | set(found.refused) == {"one", "two"} and found.thresholds
    few = kept.part(np.arange(1200) < 100)
    assert "answers are too few" in stage._judge(few, tmp_path)["guarantee"]["refused"]
    certain = kept._replace(correct_N=np.ones(1200))
    assert "are right" in stage._judge(certain, tmp_path)["refused"]


def test_documents_that_were_learned_from_are_refused(finished_run: FinishedRun) -> None:
    store = Store(finished_run.store)
    ids = {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}
    model = store.open(ids["fine_tuned"])
    learned = list(read_documents(store.open(ids["train_documents"]).path))
    held_out = list(read_documents(store.open(ids["held_out_documents"]).path))
    pairs = list(read_documents(store.open(ids["train_pairs"]).path))
    assert {d.id for d in learned} | {d.id for d in pairs} <= trained_on(store, model)
    check_not_trained_on(store, model, held_out, "here")
    for documents in (learned, pairs):
        with pytest.raises(BadInput, match="are what the model learned from"):
            check_not_trained_on(store, model, documents, "here")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["eval", "MODEL"], "nothing to judge by"),
        (["eval", "/nowhere", "--tasks", "TASKS"], "no such model folder"),
        (["eval", "MODEL", "--tasks", "/nowhere.yaml"], "nowhere.yaml"),
        (
            ["calibrate", "MODEL", "--tasks", "TASKS", "--set", "stages.calibration.methods=[magic]"],
            "unknown method 'magic'",
        ),
        (["calibrate", "MODEL", "--tasks", "TASKS", "--set", "stages.calibration.risk=2"], "risk"),
    ],
)
def test_bad_input_is_told(
    model: Path,
    files: Path,
    tmp_path: Path,
    gyro: Callable[..., tuple[int, str, str]],
    asked: list[str],
    message: str,
) -> None:
    known: dict[str, Any] = {"MODEL": model, "TASKS": files / "tasks.yaml"}
    code, _, err = gyro(*[known.get(one, one) for one in asked], "--store", tmp_path / "store")
    assert code == 2 and message in err and "Traceback" not in err


def test_items_that_were_read_and_canaries_are_told(
    finished_run: FinishedRun, tmp_path: Path, gyro: Callable[..., tuple[int, str, str]]
) -> None:
    copied(finished_run.store, tmp_path / "store")
    store = Store(tmp_path / "store")
    ids = {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}
    texts = [
        " ".join(document.texts[0].split()[:20])
        for document in read_documents(store.open(ids["train_documents"]).path)
    ]
    new = [
        "a question of so many words that nobody has ever put into any text before, has he, " + n
        for n in "ab"
    ]
    records = [{"question": text, "choices": [" a", " b"], "answer": 0} for text in [*texts[:3], *new]]
    (tmp_path / "read.jsonl").write_text("\n".join(map(json.dumps, records)))
    task = '{kind: choice, name: read, data: read.jsonl, prompt: "{question}"}'
    (tmp_path / "tasks.yaml").write_text(f"tasks: [{task}]")
    canaries = [{"context": "my number is", "canary": " 4417-ab"}, {"context": "", "canary": "Qx 7"}]
    (tmp_path / "canaries.jsonl").write_text("\n".join(map(json.dumps, canaries)))
    asked = ("eval", ids["fine_tuned"], "--tasks", tmp_path / "tasks.yaml", "--store", store.root)
    code, _, error = gyro(*asked, "--set", f"stages.evaluation.canaries={tmp_path / 'canaries.jsonl'}")
    assert code == 0, error
    told = json.loads((artifact(store, "evaluation") / "evaluation.json").read_text())
    (row,) = told["contamination"]
    assert (row["items"], row["read"], row["accuracy_read"]["items"]) == (5, 3, 3)
    assert row["low"] < 0.6 < row["high"] and row["documents"] >= len(texts)
    assert [one["canary"] for one in told["canaries"]] == [" 4417-ab", "Qx 7"]
    assert all(0 <= one["bits"] <= one["most"] == 8.0 for one in told["canaries"])
    page = (store.root / "runs" / "eval" / "evaluation.html").read_text()
    assert "Items that it may have read" in page and "<code> 4417-ab</code>" in page
    (tmp_path / "canaries.jsonl").write_text('{"context": "x"}')
    code, _, error = gyro(*asked, "--set", f"stages.evaluation.canaries={tmp_path / 'canaries.jsonl'}")
    assert code == 2 and "canaries.jsonl:1" in error


def test_settings_of_sampling_are_swept(
    model: Path, files: Path, tmp_path: Path, gyro: Callable[..., tuple[int, str, str]]
) -> None:
    settings = "{settings: [{temperature: 0.3}, {temperature: 2.0, top_p: 0.9}], samples: 3}"
    asked = ("eval", model, "--tasks", files / "tasks.yaml", "--store", tmp_path / "store")
    code, _, error = gyro(*asked, "--set", f"stages.evaluation.sweep={settings}")
    assert code == 0, error
    told = json.loads((artifact(Store(tmp_path / "store"), "evaluation") / "evaluation.json").read_text())
    cold, warm = told["sweep"]
    assert (cold["task"], cold["setting"], warm["setting"]) == ("words", "T 0.3", "T 2, top-p 0.9")
    assert cold["metric"] == "token_f1" and cold["items"] == 6
    for row in (cold, warm):
        for name, figure in row["figures"].items():
            assert figure["low"] <= figure["value"] <= figure["high"], name
    assert warm["figures"]["self-BLEU"]["value"] < cold["figures"]["self-BLEU"]["value"]
    page = (tmp_path / "store" / "runs" / "eval" / "evaluation.html").read_text()
    assert "Quality against diversity" in page and "T 2, top-p 0.9" in page


def test_exposure_is_told_side_by_side(
    model: Path, gyro: Callable[..., tuple[int, str, str]], tmp_path: Path, finished_run: FinishedRun
) -> None:
    lines = [{"context": f"key {n}:", "canary": f" {n}47-ab"} for n in range(4)]
    (tmp_path / "canaries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = ("exposure", model, model, "--canaries", tmp_path / "canaries.jsonl", "--candidates", 32)
    code, out, _ = gyro(*asked, "--store", finished_run.store)
    assert code == 0 and "from the first model to the last: +0.00 bits [+0.00, +0.00], 4 canaries" in out
    code, out, _ = gyro(*asked, "--store", finished_run.store, "--json")
    told = json.loads(out)
    assert len(told["canaries"]) == 4 and told["canaries"][0]["most"] == 5.0
    (tmp_path / "canaries.jsonl").write_text('{"context": "x"}')
    code, _, err = gyro(*asked, "--store", finished_run.store)
    assert code == 2 and "canaries.jsonl:1" in err
