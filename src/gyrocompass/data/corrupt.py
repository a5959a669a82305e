"""Worse code from good code: preferences whose right answer is known, without a person.

    a conversation that ends in code --preferences--> chosen: the code; rejected: the code with one change

A change is made to one token of the text, so that nothing else (layout, comments) tells the two apart:

    broken   a bracket or a colon is gone, so that the code no longer parses
    wrong    an operator or a constant is turned into another, so that it parses and says something else

Which token is decided by the hash of the code. That the first kind no longer parses, and that the second
still does, is checked; that the second does something else when it runs is not.
"""

from __future__ import annotations

import hashlib
import io
import keyword
import random
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from gyrocompass.data import python_code
from gyrocompass.data.document import Document

Fault = Literal["broken", "wrong"]
FAULTS: tuple[Fault, ...] = ("broken", "wrong")

TURNED = {
    "==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">", "+": "-", "-": "+", "*": "+",
    "and": "or", "or": "and", "True": "False", "False": "True", "0": "1", "1": "0",
}  # fmt: skip
"""What each token is turned into in code that is wrong."""

_BRACKETS = frozenset("()[]{}:")


class _Token(NamedTuple):
    """A token and its place in the text, in characters."""

    text: str
    start: int


def preferences(documents: Iterable[Document]) -> Iterator[Document]:
    """For each conversation that ends in Python code, a preference of that code over each kind of worse code.

    Derived documents belong to the group of their origin: they stay on its side of a split.
    """
    for document in documents:
        if document.kind != "chat" or document.messages[-1].role != "assistant":
            continue
        code = document.messages[-1].content
        for fault in FAULTS:
            worse = corrupted(code, fault)
            if worse is not None:
                yield replace(
                    document,
                    kind="preference",
                    messages=document.messages[:-1],
                    text=code,
                    rejected=worse,
                    slice=f"pair/{fault}",
                    path=f"{document.path}!{fault}",
                    origin_ids=(document.id,),
                    group=document.split_key,
                )


def corrupted(code: str, fault: Fault) -> str | None:
    """The code with one token changed; None where it is no Python, or no change has the effect.

    >>> corrupted("def f(x):\\n    return x + 1", "wrong")
    'def f(x):\\n    return x + 0'
    """
    if not _parses(code):
        return None
    change: Callable[[str, _Token], str | None] = _without if fault == "broken" else _turned
    try:
        tokens = _tokens(code)
    except tokenize.TokenError:  # what the parser forgives: a backslash at the very end
        return None
    random.Random(hashlib.sha256(f"{fault}\0{code}".encode()).digest()).shuffle(tokens)
    for token in tokens:
        worse = change(code, token)
        if worse is not None and _parses(worse) == (fault == "wrong"):
            return worse
    return None


def _without(code: str, token: _Token) -> str | None:
    if token.text not in _BRACKETS:
        return None
    return code[: token.start] + code[token.start + len(token.text) :]


def _turned(code: str, token: _Token) -> str | None:
    if token.text not in TURNED:
        return None
    return code[: token.start] + TURNED[token.text] + code[token.start + len(token.text) :]


def _tokens(code: str) -> list[_Token]:
    """Operators, numbers and keywords."""
    starts = [0]
    for line in code.split("\n"):  # as the tokenizer counts them; splitlines() also splits at form feeds
        starts.append(starts[-1] + len(line) + 1)
    return [
        _Token(token.string, starts[token.start[0] - 1] + token.start[1])
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type in (tokenize.OP, tokenize.NUMBER)
        or (token.type == tokenize.NAME and keyword.iskeyword(token.string))
    ]


def _parses(code: str) -> bool:
    try:
        python_code.parse(code)
    except python_code.NOT_PYTHON:
        return False
    return True
