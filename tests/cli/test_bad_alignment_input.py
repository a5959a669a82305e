"""What is wrong with preferences, rewards, references and engines, as a user of the command is told it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from databases import copied
from tiny_recipe import FinishedRun

Run = Callable[..., tuple[int, str, str]]

TOKENS = {"kind": "tokens", "tokenizer": "tokenizer", "max_quarantined_share": 1.0}
TRAIN = {"kind": "train", "model": "fine_tuned", "steps": 1, "sequence_length": 100, "rows_per_step": 4}
ROLLOUTS = {
    **TRAIN,
    "prompts": "train_pairs",
    "rewards": ["parses"],
    "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
    "objective": ["clipped_surrogate"],
}
ROLLOUTS.pop("rows_per_step")
BROKEN = [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message that says something"),
    ({"prompt": "a", "completion": "b", "label": 2}, "label is 2; it is true (desirable) or false"),
    (
        {"prompt": "a", "completion": "b", "tests": []},
        "tests is not a text or a list of texts but an empty list",
    ),
]


@pytest.fixture(scope="module")
def store(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store in which the tiny recipe has run, to go on from."""
    return copied(finished_run.store, tmp_path_factory.mktemp("bad") / "store")


@pytest.fixture
def go(
    finished_run: FinishedRun, store: Path, tmp_path: Path, gyro: Run
) -> Callable[..., tuple[int, str, str]]:
    """Run the tiny recipe's first stages with more stages behind them."""

    def run(**stages: Any) -> tuple[int, str, str]:
        recipe = yaml.safe_load(finished_run.recipe.read_text())
        for name in ("score_untrained", "score_fine_tuned", "completions"):
            del recipe["stages"][name]
        recipe["stages"] |= stages
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return gyro("run", str(path), "--store", str(store))

    return run


def lines(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A documents stage on a JSONL file of records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"kind": "documents", "sources": [{"jsonl": {"path": str(path)}}]}


def preferences(folder: Path) -> dict[str, Any]:
    records = [{"prompt": f"{n} + 1 = ", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(8)]
    made = lines(folder / "pairs.jsonl", records)
    return {"asked": made, "pair_tokens": {**TOKENS, "documents": "asked"}}


def test_records_that_say_nothing_are_an_error_that_names_each(go: Run, tmp_path: Path) -> None:
    code, _, err = go(broken=lines(tmp_path / "broken.jsonl", [record for record, _ in BROKEN]))
    assert code == 2 and "Traceback" not in err
    assert "broken.jsonl" in err and BROKEN[0][1] in err and "max_quarantined_share" in err


def test_or_they_are_counted_and_named(go: Run, store: Path, tmp_path: Path) -> None:
    good = [{"prompt": "a", "completion": "b"}]
    made = lines(tmp_path / "broken.jsonl", good + [record for record, _ in BROKEN])
    code, out, err = go(broken={**made, "max_quarantined_share": 1.0})
    assert code == 0, err
    assert f"{len(BROKEN)} quarantined" in out + err
    page = (store / "runs" / "tiny" / "report.html").read_text()
    for number, (_, reason) in enumerate(BROKEN, 2):
        assert reason in page and f"broken.jsonl:{number}" in page


CASES: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "no reference column": (
        {**TRAIN, "data": "pair_tokens", "objective": ["dpo"]},
        2,
        ("reference_logprob", "a stage of kind reference", "stages.bad"),
    ),
    "no pairs": (
        {**TRAIN, "data": "train_pair_tokens", "objective": ["simpo"]},
        2,
        ("'side'", "preference records", "stages.bad"),
    ),
    "no labels": (
        {**TRAIN, "data": "pair_tokens", "objective": ["reward_regression"], "scalar_head": True},
        2,
        ("'score'", "stages.bad"),
    ),
    "a reward without its scalar head": (
        {**TRAIN, "data": "pair_tokens", "objective": ["reward_pairs"]},
        2,
        ("scalar_head: true",),
    ),
    "a group of one": (
        {**ROLLOUTS, "rollouts": {"samples_per_prompt": 1, "max_new_tokens": 4}},
        2,
        ("set rollouts.samples_per_prompt to 2",),
    ),
    "a list of one": (
        {**TRAIN, "data": "pair_tokens", "objective": ["listmle"]},
        2,
        ("'relevance'", "stages.bad"),
    ),
    "rollouts without a reference": (
        {**ROLLOUTS, "objective": ["clipped_surrogate", "reference_kl"]},
        2,
        ("reference_logprob", "stages.bad"),
    ),
    "no prompt of the slice": (
        {**ROLLOUTS, "prompt_slices": ["chat/bdy"]},
        2,
        ("no document here has a prompt", "chat/bdy"),
    ),
    "a reward whose field is not there": (
        {**ROLLOUTS, "rewards": [{"exact_match": {"field": "solution"}}]},
        2,
        ("needs the field 'solution'", "this one has: answer"),
    ),
    "tests that are not there": (
        {**ROLLOUTS, "rewards": ["unit_tests"]},
        2,
        ("needs the field 'tests'",),
    ),
    "a reward with an empty range": (
        {
            **ROLLOUTS,
            "rewards": [
                {"judge": {"server": {"url": "http://localhost:1/v1", "model": "m"}, "low": 3, "high": 3}}
            ],
        },
        2,
        ("the range of judge is empty: [3.0, 3.0]",),
    ),
    "an engine that is not there": (
        {**ROLLOUTS, "engine": {"url": "http://127.0.0.1:9", "model": "m", "attempts": 2}},
        1,
        ("the engine failed 2 times in a row", "refused", "run the same command"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_says_what_where_and_what_to_do(go: Run, tmp_path: Path, case: str) -> None:
    stage, status, messages = CASES[case]
    code, _, err = go(**preferences(tmp_path), bad=stage)
    assert code == status, err
    assert "Traceback" not in err and "error: " in err
    for message in messages:
        assert message in err


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_an_engine_that_never_answers_ends_the_run(go: Run, silent_server: str) -> None:
    engine = {"url": silent_server, "model": "m", "attempts": 2, "timeout_s": 0.2}
    code, _, err = go(bad={**ROLLOUTS, "engine": engine})
    assert code == 1
    assert "the engine failed 2 times in a row: timed out" in err and silent_server in err
