"""`gyro score`: what a model says of texts, token by token summed per slice, with counts and intervals."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from gyrocompass.cli.model import model_folder
from gyrocompass.core.errors import BadInput
from gyrocompass.core.progress import Progress
from gyrocompass.data.document import Document, Quarantined, Skipped
from gyrocompass.data.rows import token_rows
from gyrocompass.data.sources import FilesSource, Source, read_sources
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.data.windows import windowed
from gyrocompass.measure.intervals import slice_scores
from gyrocompass.measure.ledger import Ledger
from gyrocompass.measure.table import print_scores
from gyrocompass.model.fit import check_fit
from gyrocompass.model.head import context_length
from gyrocompass.model.open import open_model
from gyrocompass.model.score import ScoredTokens, add_scored, evaluating, scored_tokens
from gyrocompass.recipe.finetune import LONGEST_ROW
from gyrocompass.train.config import PRECISIONS

ROWS = 8
"""In a batch."""


def score(options: argparse.Namespace) -> int:
    """Print the table (or JSON), and every token where asked."""
    folder = model_folder(options)
    tokenizer = load_tokenizer(folder)
    read = read_files(options.data, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(folder, dtype=PRECISIONS[options.precision], device=device)
    length = options.length or min(context_length(model), LONGEST_ROW)
    check_fit(model, read.data, length, "gyro score --length")
    stride = options.stride or length
    if stride < length:
        read = read._replace(data=windowed(read.data, length, stride))
    ledger, tokens = Ledger(), list[_Token]()
    with evaluating(model), Progress(quiet=options.json) as progress:
        task = progress.task("score", read.data.n_targets)
        for part in scored_tokens(model, read.data, length, ROWS):
            add_scored(ledger, read.data, part)
            if options.tokens:
                tokens += _tokens(part, read, tokenizer)
            task.advance(len(part.index_K))
        task.finish()
    tokens.sort(key=lambda token: token.place)
    rows = slice_scores(ledger)
    if options.json:
        answer = {"sequence_length": length, "stride": stride, "slices": [row._asdict() for row in rows]}
        beside = {"tokens": [token._asdict() for token in tokens]} if options.tokens else {}
        print(json.dumps(answer | beside, indent=2, allow_nan=False))
        return 0
    _print_tokens(tokens, Console(soft_wrap=True))
    least = f", at least {length - stride}" if stride < length else ""
    print_scores(rows, Console(), f"{options.model}, looking back at most {length} tokens{least}")
    return 0


class Read(NamedTuple):
    """The documents of some files as tokens."""

    data: TokenDataset
    paths: Mapping[str, str]
    """By document id."""


class _Token(NamedTuple):
    """One scored token."""

    place: int
    """In the order of the documents, those that are context alone counted too."""
    path: str
    token_id: int
    token: str
    logprob: float
    rank: int


def read_files(paths: Sequence[Path], tokenizer: Any) -> Read:
    """Read files; what cannot be used is left out and named on standard error.

    Raises:
        BadInput: nothing is left.
    """
    documents: list[Document] = []
    sources = [Source(files=FilesSource(path=str(path))) for path in paths]
    for record in read_sources(sources, max_quarantined_share=None):
        if isinstance(record, Document):
            documents.append(record)
        else:
            _left_out(record)
    rows: list[TokenRow] = []
    for made in token_rows(documents, tokenizer):
        if isinstance(made, Quarantined):
            _left_out(made)
        else:
            rows += made
    if not rows:
        raise BadInput(
            "there is nothing to score", where=", ".join(map(str, paths)), fix="give files that hold text"
        )
    return Read(TokenDataset.of(rows), {document.id: document.path for document in documents})


def _left_out(record: Quarantined | Skipped) -> None:
    line = f":{record.line}" if isinstance(record, Quarantined) and record.line else ""
    print(f"left out {record.path}{line}: {record.reason}", file=sys.stderr)


def _tokens(part: ScoredTokens, read: Read, tokenizer: Any) -> Iterator[_Token]:
    numbers = (part.index_K, part.document_K, part.logprob_K, part.rank_K)
    for index, document, logprob, rank in zip(*(column.tolist() for column in numbers), strict=True):
        token_id, path = int(read.data.id_N[index]), read.paths[read.data.document_ids[document]]
        yield _Token(index, path, token_id, tokenizer.decode([token_id]), logprob, rank)


def _print_tokens(tokens: Sequence[_Token], console: Console) -> None:
    for token in tokens:
        console.print(Text(f"{token.logprob:9.4f} {token.rank:6}  {token.token!r}"))
