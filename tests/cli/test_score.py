"""`gyro score` and `gyro generate`: what they refuse, what they leave out, and that no NaN gets through."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gyrocompass.model import score as model_score
from tiny_recipe import FinishedRun

Run = Callable[..., tuple[int, str, str]]
TEXT = "def add(first, second):\n    return first + second\n"


@pytest.fixture
def model(finished_run: FinishedRun) -> Path:
    record = json.loads((finished_run.store / "runs" / "tiny" / "run.json").read_text())
    id_ = next(stage["artifact"] for stage in record["stages"] if stage["name"] == "fine_tuned")
    return finished_run.store / "artifacts" / id_


def changed(
    model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
) -> Path:
    """A copy of a model with other weights and config."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def smaller_vocabulary(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["vocab_size"] = 40
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:40].clone()


def broken_head(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.norm.weight"][3] = torch.nan


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_a_vocabulary_smaller_than_the_tokenizers(verb: str, model: Path, gyro: Run, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXT)
    folder = changed(model, tmp_path / "model", smaller_vocabulary)
    code, _, err = gyro(verb, folder, tmp_path / "x.txt" if verb == "score" else TEXT)
    assert code == 2 and "a vocabulary of 40" in err and "Traceback" not in err


@pytest.mark.parametrize("options", [(), ("--json",), ("--temperature", "1")])
def test_a_nan_names_prompt_and_token(
    options: tuple[str, ...], model: Path, gyro: Run, tmp_path: Path
) -> None:
    folder = changed(model, tmp_path / "model", broken_head)
    code, out, err = gyro("generate", folder, "x", "y", *options)
    assert code == 1 and not out and "is nan" in err and "prompt 0, token 0" in err


def test_generate_and_score_count_nats_with_one_sign(model: Path, gyro: Run) -> None:
    _, out, _ = gyro("generate", model, TEXT, "--max-new-tokens", 3)
    figure = out.split(" nats per token")[0].split()[-1]
    assert float(figure) > 0


def test_every_token_in_the_json_of_one_pass(
    model: Path, gyro: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text(TEXT)
    passes = []
    monkeypatch.setattr(
        model_score,
        "log_probs",
        lambda *a, right=model_score.log_probs, **k: passes.append(1) or right(*a, **k),
    )
    code, out, _ = gyro("score", model, tmp_path / "x.txt", "--tokens", "--json")
    answer = json.loads(out)
    total = answer["slices"][-1]
    assert code == 0 and len(passes) == 1 and len(answer["tokens"]) == total["tokens"]
    assert {token["path"] for token in answer["tokens"]} == {(tmp_path / "x.txt").as_posix()}
    assert "".join(token["token"] for token in answer["tokens"]).startswith(TEXT)
    mean = -sum(token["logprob"] for token in answer["tokens"]) / total["tokens"]
    assert mean == pytest.approx(total["nats_per_token"], rel=1e-6)


def test_a_bad_record_is_left_out_and_named(model: Path, gyro: Run, tmp_path: Path) -> None:
    lines = [json.dumps({"text": TEXT}), '{"text": ', json.dumps({"text": TEXT + "# more\n"})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    code, out, err = gyro("score", model, tmp_path / "x.jsonl", "--json")
    assert code == 0 and json.loads(out)["slices"][-1]["documents"] == 2
    assert "x.jsonl:2: not JSON" in err and "max_quarantined_share" not in err
    (tmp_path / "x.jsonl").write_text('{"text": ')
    code, _, err = gyro("score", model, tmp_path / "x.jsonl")
    assert code == 2 and "nothing to score" in err


def test_a_file_listed_twice_is_scored_once(
    model: Path, gyro: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text(TEXT)
    once = json.loads(gyro("score", model, tmp_path / "x.txt", "--json")[1])
    monkeypatch.chdir(tmp_path)
    code, out, err = gyro("score", model, tmp_path / "x.txt", "./x.txt", tmp_path, "--json")
    assert code == 0 and json.loads(out)["slices"][-1]["tokens"] == once["slices"][-1]["tokens"]
    assert err.count("listed twice") == 2


def test_looking_back_further_than_the_context(model: Path, gyro: Run, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXT)
    code, _, err = gyro("score", model, tmp_path / "x.txt", "--length", 100_000)
    assert code == 2 and "the model's context is 128" in err


def test_a_name_that_is_not_utf_8_is_refused(model: Path, gyro: Run, tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    file.write_text(TEXT)
    for command in (("score", model, file), ("train", model, file, "--store", tmp_path / "store")):
        code, _, err = gyro(*command)
        assert code == 2 and "is not UTF-8" in err and "Traceback" not in err
    (tmp_path / "good.txt").write_text(TEXT)
    code, out, err = gyro("score", model, tmp_path, "--json")
    assert code == 0 and json.loads(out)["slices"][-1]["documents"] == 1 and r"caf\xe9.txt" in err
