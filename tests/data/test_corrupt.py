"""Worse code: one token apart, with the effect that its name says."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap

import pytest

from gyrocompass.data.corrupt import FAULTS, Fault, corrupted, preferences
from gyrocompass.data.document import Document, Message

CODES = [
    textwrap.dedent(inspect.getsource(function))
    for function in (textwrap.dedent, json.loads, inspect.cleandoc)
]


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("code", CODES)
def test_one_token_apart_with_the_effect(code: str, fault: Fault) -> None:
    worse = corrupted(code, fault)
    assert worse is not None and worse != code and abs(len(worse) - len(code)) <= 4
    assert parses(worse) == (fault == "wrong")
    if fault == "wrong":
        assert ast.dump(ast.parse(worse)) != ast.dump(ast.parse(code))
    assert corrupted(code, fault) == worse


def test_what_is_no_code_has_no_worse_code() -> None:
    assert corrupted("Returns the value.", "broken") is None
    assert corrupted("x = y", "wrong") is None
    assert corrupted("x = 1\\\n", "broken") is None  # the parser forgives what the tokenizer does not


def test_preferences_stay_with_their_origin() -> None:
    origin = Document(
        kind="chat",
        messages=(Message("user", "Write it."), Message("assistant", CODES[0])),
        path="a.py#f",
        source="s",
        slice="chat/body",
    )
    made = list(preferences([origin]))
    assert [document.slice for document in made] == ["pair/broken", "pair/wrong"]
    for document in made:
        assert document.text == CODES[0] != document.rejected
        assert document.messages == origin.messages[:1]
        assert document.split_key == origin.split_key and document.origin_ids == (origin.id,)
