"""`gyro data inspect` and `gyro data export`: a data set to look at, and what goes along with it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from gyrocompass.core.errors import BadInput
from gyrocompass.core.folder import write_whole
from gyrocompass.core.store import Store
from gyrocompass.data.curate.attribution import attributed
from gyrocompass.data.curate.card import card_markdown, open_parts, read_card
from gyrocompass.data.curate.croissant import croissant
from gyrocompass.data.curate.inspection import inspect as look
from gyrocompass.data.curate.licence_policy import attribution_text
from gyrocompass.data.curate.training_summary import training_summary
from gyrocompass.data.curate.versions import open_dataset
from gyrocompass.recipe.data_report import print_inspection, write_data_report

REPORTS = "reports"


def inspect(options: argparse.Namespace) -> int:
    """Print the tables and samples of a data set, and write its HTML report."""
    store = Store(options.store, options.store_url, make=False)
    parts = open_parts(store, open_dataset(store, options.dataset))
    card = read_card(store, parts)
    seen = look(parts, samples=options.samples, reveal=options.reveal)
    path = options.out or store.root / REPORTS / f"{parts.dataset.id}.html"
    console = Console()
    print_inspection(parts, card, seen, console)
    write_data_report(parts, card, seen, path)
    console.print(f"\n{path}", highlight=False, soft_wrap=True)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a data set's card, Croissant metadata, summary of training content or attribution."""
    store = Store(options.store, options.store_url, make=False)
    parts = open_parts(store, open_dataset(store, options.dataset))
    if options.slices and options.format != "attribution":
        raise BadInput("--slices goes with --format attribution: the others describe the whole data set")
    if options.format == "attribution":
        _write(attribution_text(attributed(parts, options.slices)), options.out)
        return 0
    card = read_card(store, parts)
    if options.format == "croissant":
        text = json.dumps(croissant(card, parts.dataset, options.url), indent=2, ensure_ascii=False) + "\n"
    else:
        text = card_markdown(card) if options.format == "card" else training_summary(card)
    _write(text, options.out)
    return 0


def _write(text: str, path: Path | None) -> None:
    if path is None:
        print(text, end="")
    else:
        write_whole(path, text)
