"""Task files of lm-evaluation-harness ask here what they ask there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.score import TokenScores
from gyrocompass.measure.tasks.run import ask
from gyrocompass.measure.tasks.task import AnswerTask, ChoiceTask, read_items, read_tasks
from gyrocompass.model.write import continuation_scorer, writer

CHOICE = """\
include: base.yaml
task: adding
doc_to_text: "{{a}} plus {{b}} is"
doc_to_target: right
doc_to_choice: "{{[(a + b) | string, a | string, b | string]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
BASE = """\
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/test.jsonl, shots: DATA/shots.jsonl}}
test_split: test
fewshot_split: shots
output_type: multiple_choice
num_fewshot: 2
fewshot_config: {sampler: first_n}
description: "Sums.\\n\\n"
"""
WRITING = """\
task: naming
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/test.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "def {{name}}("
doc_to_target: name
generation_kwargs: {until: ["\\n", ")"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, numbers: range) -> None:
        rows = [{"a": n, "b": n % 3 + 1, "right": 0, "name": f"f{n}"} for n in numbers]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))

    write("test.jsonl", range(3, 27))
    write("shots.jsonl", range(30, 35))
    for name, text in (("choice", CHOICE), ("base", BASE), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(tmp_path)))
    return tmp_path


def test_records_are_rendered(folder: Path) -> None:
    (task,) = read_tasks(folder / "choice.yaml")
    assert isinstance(task, ChoiceTask)
    item = read_items(task)[0]
    assert item.prompt == "Sums.\n\n30 plus 1 is 31\n\n31 plus 2 is 33\n\n3 plus 1 is"
    assert (item.choices, item.right) == (("4", "3", "1"), 0)
    assert set(task.reads()) == {folder / name for name in ("test.jsonl", "shots.jsonl", "base.yaml")}
    (writing,) = read_tasks(folder / "writing.yaml")
    assert isinstance(writing, AnswerTask)
    assert (writing.stop, writing.max_new_tokens, writing.temperature) == (("\n", ")"), 8, 0.0)
    assert read_items(writing)[0].record["answer"] == "f3"


def test_the_harness_finds_the_same(folder: Path, speaking: tuple[Any, Any], model_folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from gyrocompass.model.lm_eval_adapter import GyroLM

    theirs = lm_eval.simple_evaluate(
        model=GyroLM(pretrained=str(model_folder)),
        tasks=["adding", "naming"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    score = continuation_scorer(*speaking, length=256)
    (task,) = read_tasks(folder / "choice.yaml")
    items = read_items(task)
    samples = theirs["samples"]["adding"]
    assert [one["arguments"][0][0] for one in samples] == [item.prompt for item in items]
    found = {
        tuple(pair[:2]): float(reply[0][0])
        for one in samples
        for pair, reply in zip(one["arguments"], one["resps"], strict=True)
    }

    def told(pairs: Iterable[tuple[str, str]], chat: bool = False) -> Iterator[TokenScores]:
        """The harness's own log-probabilities: with and without BOS, near ties fall differently."""
        for pair in pairs:
            nothing = np.zeros(1, np.int64)
            logprob = np.array([found.get(pair, 0.0)])
            yield TokenScores(nothing, nothing, logprob, np.zeros(1), nothing)

    ours = ask(task, items, told, writer(*speaking))
    figures = {figure.name: figure.value for figure in ours.figures if figure.slice == "total"}
    results = theirs["results"]["adding"]
    assert figures["accuracy"] == pytest.approx(results["acc,none"], abs=1e-4)
    assert figures["accuracy by bytes"] == pytest.approx(results["acc_norm,none"], abs=1e-4)
    (writing,) = read_tasks(folder / "writing.yaml")
    asked = read_items(writing)
    written = ask(writing, asked, score, writer(*speaking))
    # The harness puts no BOS before a text, and ours do: what is asked is the same, not each token written.
    put = [one["arguments"][0] for one in theirs["samples"]["naming"]]
    assert [prompt for prompt, _ in put] == [item.prompt for item in asked]
    assert put[0][1]["until"] == list(writing.stop) and put[0][1]["max_gen_toks"] == writing.max_new_tokens
    exact = next(figure.value for figure in written.figures if figure.name == "exact_match")
    assert exact == pytest.approx(theirs["results"]["naming"]["exact_match,none"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('doc_to_text: "{{a}} plus {{b}} is"', "doc_to_text: !function utils.text"),
            "choice.yaml:3|!function runs code",
        ),
        (("output_type", "outputtype"), "'outputtype' is not read here"),
        (
            ("multiple_choice", "loglikelihood_rolling"),
            "output_type 'loglikelihood_rolling' is not read here",
        ),
        (("dataset_path: json", "dataset_path: gsm8k"), "would be downloaded"),
        (("sampler: first_n", "sampler: random"), "few-shot examples at random"),
        (("test_split: test", "test_split: exam"), "no split 'exam'"),
        (("/test.jsonl", "/gone.jsonl"), "there is no file"),
        (("metric: acc,", "metric: bleu,"), "the metric 'bleu'"),
        (("{{a}} plus", "{{c}} plus"), "'c' is undefined"),
        (("doc_to_target: right", "doc_to_target: name"), "is none of the choices"),
        (("task: adding", "task: adding\nfilter_list: []"), "'filter_list' is not read here"),
    ],
)
def test_what_is_not_done_is_said(folder: Path, change: tuple[str, str], message: str) -> None:
    for name in ("choice", "base"):
        path = folder / f"{name}.yaml"
        path.write_text(path.read_text().replace(*change))
    with pytest.raises(BadInput, match=message):
        read_items(read_tasks(folder / "choice.yaml")[0])


def test_templates_cannot_reach_out(folder: Path) -> None:
    path = folder / "choice.yaml"
    path.write_text(
        path.read_text().replace("{{a}} plus", "{{ ''.__class__.__mro__[1].__subclasses__() }} plus")
    )
    with pytest.raises(BadInput, match="unsafe"):
        read_items(read_tasks(path)[0])
