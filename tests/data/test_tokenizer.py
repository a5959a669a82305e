import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizer_cases import SPECIALS, TRAINING_TEXTS, any_text

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokenizer import (
    END_OF_TEXT,
    PADDING,
    SMALLEST_VOCABULARY,
    load_tokenizer,
    parallel_tokenizers,
    train_tokenizer,
)


@settings(deadline=None, max_examples=150)
@given(text=any_text)
def test_every_text_comes_back(byte_level: Any, text: str) -> None:
    ids = byte_level(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert byte_level.decode(ids) == text


def test_auto_tokenizer_loads_it_with_its_template(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    assert len(tokenizer) == 600
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        END_OF_TEXT,
        END_OF_TEXT,
        PADDING,
    )
    assert tokenizer.convert_tokens_to_ids(SPECIALS) == list(range(len(SPECIALS)))
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a\n"}]
    out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    said = [id_ for id_, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == " a\n" + END_OF_TEXT
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|endoftext|><|user|>q<|assistant|>"


def test_training_is_deterministic(tokenizer_folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TRAINING_TEXTS), 600, tmp_path)
    for file in sorted(tokenizer_folder.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_literals_of_special_tokens_in_the_training_text_are_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["<|user|>" * 50], SMALLEST_VOCABULARY + 40, tmp_path)
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]) == len(SPECIALS)
    ids = tokenizer("<|user|>", split_special_tokens=True)["input_ids"]
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(SPECIALS))


def test_a_vocabulary_too_small(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot hold"):
        train_tokenizer(["x"], SMALLEST_VOCABULARY - 1, tmp_path)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("before", "during", "after"), [(None, "true", "false"), ("false", "false", "false")]
)
def test_parallelism(monkeypatch: pytest.MonkeyPatch, before: str | None, during: str, after: str) -> None:
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.setenv(name, "unset")  # so that the test's end restores what was there
    if before is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, before)
    with parallel_tokenizers():
        assert os.environ[name] == during
    assert os.environ[name] == after
