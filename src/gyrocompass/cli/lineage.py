"""`gyro lineage`: from an artifact to its documents, from a document to everything that saw it.

With `--token`, from a position of a training step to the bytes of the document that stood there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.errors import BadInput
from gyrocompass.core.lineage import render, walk
from gyrocompass.core.store import Store


def lineage(options: argparse.Namespace) -> int:
    """Print both ways as a tree, or what one token was."""
    if (options.id is None) == (options.token is None):
        raise BadInput("give an id, or --token MODEL STEP POSITION", fix="gyro lineage --help")
    store, console = Store(options.store, options.store_url, make=False), Console()
    if options.id is not None:
        console.print(render(walk(store, options.id)))
        return 0
    model, step, position = options.token
    for line in _token_lines(store, store.open(model, verify=False), _number(step), _number(position)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _number(text: str) -> int:
    if not text.isdecimal():
        raise BadInput(f"{text!r} is not a whole number", fix="give a step from 1 and a position from 0")
    return int(text)


def _token_lines(store: Store, model: Artifact, step: int, position: int) -> Iterator[str]:
    """What stood at a position of a step of a training stage, and where it came from."""
    from gyrocompass.data.trace import TRACE, find_piece, read_token

    if not (model.path / TRACE).is_file():
        raise BadInput(
            f"{model.id} keeps no trace: it is no model that a training stage made from stored tokens",
            where=model.path,
            fix="give the model artifact of a training stage with `data`",
        )
    length = int(model.manifest.recipe["sequence_length"])
    place = f"step {step}, position {position} (row {position // length}, column {position % length})"
    piece = find_piece(model.path / TRACE, step, position)
    if piece is None:
        yield f"{place}: padding, or no row of stored tokens"
        return
    tokens = store.open(model.manifest.parents["data"], verify=False)
    token = read_token(tokens.path, piece)
    read, target = (_shown(model.path, number) for number in (token.id, token.target_id))
    learned = f"weight {token.target_weight:g}" if token.target_weight else "context, not learned"
    yield f"{place} of {model.id}"
    yield f"  read      {read}, {_bytes(token.bytes)}"
    yield f"  predicted {target}, {_bytes(token.target_bytes)}, {learned}"
    yield f"  token {token.token} of {token.n_tokens} of document {token.document_id} in {tokens.id}"
    facts = walk(store, token.document_id).document
    yield f"  {facts.path if facts else '(unlisted)'}, source {token.source}, slice {token.slice}"
    for origin in facts.origins if facts else ():
        yield f"    derived from {origin.id} {origin.path}"


def _bytes(span: tuple[int, int]) -> str:
    return f"bytes {span[0]} to {span[1]}" if span[0] < span[1] else "no bytes of the text"


def _shown(model: Path, number: int) -> str:
    """A token as its id and its text."""
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(model / "tokenizer.json")).decode([number], skip_special_tokens=False)
    return f"{number} {text!r}"
