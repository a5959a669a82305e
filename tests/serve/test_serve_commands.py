"""The verbs around a server, as a user types them, and without the packages that a server alone needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import answered, asked, done

from gyrocompass.core.store import Store
from gyrocompass.serve.answer import Judgement
from gyrocompass.serve.events import EventLog, EventSettings
from gyrocompass.serve.review import Reviews, ReviewSettings, Verdict

Gyro = Callable[..., tuple[int, str, str]]
POLICY = """\
name: short
rules:
  - {when: {tokens_above: 2}, then: review}
  - {when: {prompt_matches: poem}, then: block, say: "No poems."}
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    log = EventLog(store.database, EventSettings())
    for text in ("one", "one two", "one two three"):
        log.record(asked(), answered(text), Judgement("answer"), 200)
    log.close()
    return store


def test_a_policy_is_checked_kept_and_tried(gyro: Gyro, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    code, out, _ = gyro("policy", "check", path, "--store", store.root)
    assert code == 0 and "review" in out and "prompt_matches poem" in out
    code, out, _ = gyro("policy", "save", path, "--store", store.root)
    assert code == 0 and store.open(out.split()[0]).manifest.kind == "policy"
    path.write_text(POLICY.replace('  - {when: {prompt_matches: poem}, then: block, say: "No poems."}\n', ""))
    code, out, _ = gyro("policy", "dry-run", path, "--store", store.root, "--json")
    told = json.loads(out)
    assert code == 0 and (told["judged"], told["unknown"]) == (3, 0)
    assert told["changed"] == [["answer", "review", 1]]
    code, _, err = gyro("policy", "dry-run", path, "--store", tmp_path / "empty")
    assert code == 2 and "no answer was logged in the last 7 days" in err
    path.write_text("name: x\nrules: [{then: maybe}]")
    code, _, err = gyro("policy", "check", path, "--store", store.root)
    assert code == 2 and "policy.yaml:2" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engine", "ctranslate2", "--precision", "bfloat16"), "ctranslate2 has float32 and int8 here"),
        (("--precision", "int8"), "the embedded engine has no int8"),
    ],
)
def test_what_an_engine_does_not_have_is_said(
    gyro: Gyro, store: Store, model_folder: Path, options: tuple[str, ...], said: str
) -> None:
    code, _, err = gyro("serve", model_folder, *options, "--store", store.root)
    assert code == 2 and said in err and "fix: --" in err


def test_keys_are_made_shown_and_revoked(gyro: Gyro, store: Store) -> None:
    code, key, _ = gyro("keys", "create", "ann", "--scopes", "review", "--store", store.root)
    assert code == 0 and key.startswith("gyro_")
    listed = json.loads(gyro("keys", "list", "--json", "--store", store.root)[1])
    assert [one["name"] for one in listed] == ["ann"] and key.strip() not in str(listed)
    assert gyro("keys", "revoke", listed[0]["id"], "--store", store.root)[0] == 0
    code, _, err = gyro("keys", "revoke", listed[0]["id"], "--store", store.root)
    assert code == 2 and "no key" in err


def test_feedback_is_exported(gyro: Gyro, store: Store, tmp_path: Path) -> None:
    code, _, err = gyro("feedback", "export", "--store", store.root)
    assert code == 2 and "nothing is decided yet" in err
    reviews = Reviews(store.database, ReviewSettings(double_share=0.0))
    for number, consent in enumerate((True, False)):
        name = done(reviews.put(asked(consent=consent), answered(), ["doubt"], None, 1.0))
        reviews.claim_one(name, "ann")
        reviews.decide(name, "ann", Verdict(str(number), "approve"))
    code, out, _ = gyro("feedback", "export", "--store", store.root, "--out", tmp_path / "out")
    assert code == 0 and "the texts of 1 reviews" in out
    assert len((tmp_path / "out" / "sft.jsonl").read_text().splitlines()) == 1


def test_bad_input_is_told(gyro: Gyro, tmp_path: Path) -> None:
    code, _, err = gyro("serve", "--store", tmp_path)
    assert code == 2 and "give a model, or --upstream URL" in err
    code, _, err = gyro("serve", tmp_path / "none", "--store", tmp_path)
    assert code == 2 and "no such model folder" in err
    code, _, err = gyro("serve", "--upstream", "http://x", "--host", "0.0.0.0", "--store", tmp_path / "s")
    assert code == 2 and "gyro keys create" in err
    code, _, err = gyro("doctor", "http://127.0.0.1:9")
    assert code == 1 and "cannot be asked" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--upstream", "http://x"], "gyrocompass[serve]"),
        (["doctor", "http://127.0.0.1:9"], "gyrocompass[serve]"),
        (["keys", "list"], "gyrocompass[serve]"),
        (["policy", "check", "policy.yaml"], "short-"),
        (["policy", "dry-run", "policy.yaml"], "no answer was logged"),
        (["feedback", "export"], "nothing is decided"),
    ],
)
def test_without_the_extra_it_says_what_is_missing(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    Store(tmp_path / "gyro-store")
    block = "import sys; sys.modules |= dict.fromkeys(('fastapi', 'uvicorn', 'httpx', 'argon2', 'starlette'))"
    run = f"{block}\nfrom gyrocompass.cli.main import main\nsys.exit(main({arguments!r}))"
    ended = subprocess.run(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"GYRO_STORE": "gyro-store"},
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    assert said in ended.stdout + ended.stderr
