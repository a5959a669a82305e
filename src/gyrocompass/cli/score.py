"""`gyro score`: what a model says of texts, token by token summed per slice, with counts and intervals."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from gyrocompass.cli.model import model_folder
from gyrocompass.core.progress import Progress
from gyrocompass.data.document import Document, Quarantined
from gyrocompass.data.rows import token_rows
from gyrocompass.data.sources import FilesSource, Source, read_sources
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.measure.intervals import slice_scores
from gyrocompass.measure.table import print_scores
from gyrocompass.model.head import context_length
from gyrocompass.model.score import evaluating, score_dataset, scored_tokens
from gyrocompass.recipe.finetune import LONGEST_ROW
from gyrocompass.recipe.stages.model import open_model
from gyrocompass.train.config import PRECISIONS


def score(options: argparse.Namespace) -> int:
    """Print the table (or JSON), and every token where asked."""
    folder = model_folder(options)
    tokenizer = load_tokenizer(folder)
    data = _dataset(options.data, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(folder, dtype=PRECISIONS[options.precision], device=device)
    length = options.length or min(context_length(model), LONGEST_ROW)
    if options.tokens:
        _print_tokens(model, data, tokenizer, length)
    with Progress(quiet=options.json) as progress:
        task = progress.task("score", data.n_targets)
        ledger = score_dataset(model, data, length=length, on_tokens=task.advance)
        task.finish()
    rows = slice_scores(ledger)
    if options.json:
        print(json.dumps({"sequence_length": length, "slices": [row._asdict() for row in rows]}, indent=2))
    else:
        print_scores(rows, Console(), f"{options.model}, looking back at most {length} tokens")
    return 0


def _dataset(paths: list[Path], tokenizer: object) -> TokenDataset:
    """The documents of the files as tokens; what cannot be used is named on standard error."""
    sources = [Source(files=FilesSource(path=str(path))) for path in paths]
    records = read_sources(sources, max_quarantined_share=0.0)
    documents = [record for record in records if isinstance(record, Document)]
    rows: list[TokenRow] = []
    for made in token_rows(documents, tokenizer):
        if isinstance(made, Quarantined):
            _warn(made)
        else:
            rows += made
    return TokenDataset.of(rows)


def _warn(entry: Quarantined) -> None:
    print(f"left out {entry.path}: {entry.reason}", file=sys.stderr)


def _print_tokens(model: torch.nn.Module, data: TokenDataset, tokenizer: object, length: int) -> None:
    """One line per counted token, in the order of the documents."""
    scored: dict[int, tuple[float, int]] = {}
    with evaluating(model):
        for part in scored_tokens(model, data, length, rows=8):
            numbers = zip(part.logprob_K.tolist(), part.rank_K.tolist(), strict=True)
            scored.update(zip(part.index_K.tolist(), numbers, strict=True))
    console = Console(soft_wrap=True)
    for index, (log_prob, rank) in sorted(scored.items()):
        token = tokenizer.decode([int(data.id_N[index])])  # type: ignore[attr-defined]
        console.print(Text(f"{log_prob:9.4f} {rank:6}  {token!r}"))
