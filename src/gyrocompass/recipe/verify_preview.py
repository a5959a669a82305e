"""What a stage will learn, shown token by token: counted tokens bright, masked ones dim.

Text comes from data, so nothing in it reaches the terminal as markup or as a control character. A console
without colour shows counted tokens in double brackets: `[[so]]`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from gyrocompass.data.pack import Int64Array, Packed
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.recipe.verify_subject import Finding, Subject, segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECES = 3
"""Pieces that are shown."""
TOKENS_SHOWN = 120
TOKENS_BEFORE = 40
"""Tokens shown before the first counted one, at most."""

COUNTED, MASKED = "bold green", "dim"


class Run(NamedTuple):
    """Neighbouring tokens that are all counted, or all masked."""

    text: str
    counted: bool


def preview(subject: Subject) -> Finding:
    """Print the first pieces of the first window that count; fails where a piece counts nothing."""
    window = subject.window
    tokenizer = load_tokenizer(subject.model.path)
    pieces = list(segments(window))
    counted_P = np.array([np.count_nonzero(window.weight_T[position_S] > 0) for position_S in pieces])
    console = subject.progress.console
    for piece in np.flatnonzero(counted_P)[:PIECES]:
        position_S = pieces[piece]
        console.print(_heading(subject, position_S, int(counted_P[piece])), soft_wrap=True)
        console.print(render(list(runs(window, position_S, tokenizer)), console), soft_wrap=True)
    idle = int((counted_P == 0).sum())
    total = sum(len(position_S) for position_S in pieces)
    return Finding(
        bool(len(counted_P)) and idle == 0,
        f"{int(counted_P.sum()):,} tokens, {idle} idle pieces",
        "0 idle pieces",
        f"counted of {total:,} tokens in {len(pieces)} pieces",
        "the weights of the tokens stage: a chat template without {% generation %} marks, or a mask over all",
    )


def _heading(subject: Subject, position_S: Int64Array, counted: int) -> Text:
    data = subject.data
    document = int(subject.window.document_T[position_S[0]])
    names = (data.slice_names[data.slice_D[document]], data.document_ids[document])
    slice_name, document_id = (visible(name) for name in names)
    count = f"{counted} of {len(position_S)} tokens counted"
    return Text(f"{subject.name}: {slice_name}, document {document_id}, {count}", style="bold")


def runs(window: Packed, position_S: Int64Array, tokenizer: PreTrainedTokenizerFast) -> Iterator[Run]:
    """A piece's text in runs, shortened to what is around its first counted token.

    A run is decoded as a whole: a character of several tokens is whole where they are all of one run.
    """
    counted = [False, *(window.weight_T[position_S] > 0).tolist()]
    last = int(window.target_T[position_S[-1]])
    ids = [*window.token_T[position_S].tolist(), max(last, 0)]
    tokens = list(zip(ids, counted, strict=True))[: None if last >= 0 else -1]
    first = max(0, counted.index(True) - TOKENS_BEFORE)
    if first:
        yield Run("... ", False)
    for is_counted, group in groupby(tokens[first : first + TOKENS_SHOWN], key=lambda token: token[1]):
        text = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        yield Run(text, is_counted)
    if len(tokens) > first + TOKENS_SHOWN:
        yield Run(" ...", False)


def render(found: list[Run], console: Console) -> Text:
    """Runs for a console: in colours, or with brackets around what is counted."""
    brackets = console.color_system is None or console.no_color
    text = Text()
    for run in found:
        shown = visible(run.text).encode(console.encoding, "backslashreplace").decode(console.encoding)
        text.append(f"[[{shown}]]" if brackets and run.counted else shown, COUNTED if run.counted else MASKED)
    return text


def visible(text: str) -> str:
    r"""Text with its control and direction characters spelled out; line ends and tabs stay.

    >>> visible("a\x1b[31m\u202eb\n")
    'a\\x1b[31m\\u202eb\n'
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t"
        else character
        for character in text
    )
