"""`gyro compare A B`: two recipes over some seeds, or two models on the same files, paired."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from gyrocompass.cli.model import model_folder
from gyrocompass.cli.score import read_files
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.measure.compare import ledger_differences
from gyrocompass.measure.ledger import Ledger
from gyrocompass.model.fit import check_fit
from gyrocompass.model.head import context_length
from gyrocompass.model.open import open_model
from gyrocompass.model.score import score_dataset
from gyrocompass.recipe.comparing import (
    Comparison,
    Cost,
    print_comparison,
    seeded,
    write_comparison,
    write_page,
)
from gyrocompass.recipe.comparing import (
    compare as compare_runs,
)
from gyrocompass.recipe.finetune import LONGEST_ROW
from gyrocompass.recipe.recipe import load_recipe
from gyrocompass.recipe.record import RunRecord
from gyrocompass.recipe.run import read_run, run_recipe


def compare(options: argparse.Namespace) -> int:
    """Models where files are given to compare them on, else recipes."""
    console = Console()
    found = _models(options) if options.data else _recipes(options, console)
    print_comparison(found, console)
    path = options.store / "comparisons" / f"{_plain(found.names[0])}-{_plain(found.names[1])}.json"
    write_comparison(found, path)
    write_page(found, path.with_suffix(".html"))
    console.print(f"As a page: {path.with_suffix('.html')}", highlight=False, soft_wrap=True)
    console.print(f"The same as JSON: {path}", highlight=False, soft_wrap=True)
    return 0


def _recipes(options: argparse.Namespace, console: Console) -> Comparison:
    recipes = [load_recipe(one, options.set, options.variant) for one in (options.a, options.b)]
    if recipes[0].name == recipes[1].name:
        raise BadInput(
            f"both recipes are called {recipes[0].name}, so their runs would take each other's place",
            where=f"{options.a}, {options.b}",
            fix="give one of them another `name`",
        )
    store = Store(options.store, options.store_url)
    records: list[list[RunRecord]] = [[], []]
    for seed in range(options.seeds):
        for own, recipe in zip(records, recipes, strict=True):
            one = seeded(recipe, seed)
            run_recipe(one, store, Console(quiet=True))
            console.print(f"ran {one.name}", highlight=False)
            own.append(read_run(store, one.name))
    return compare_runs(records[0], records[1], store)


def _models(options: argparse.Namespace) -> Comparison:
    ledgers: list[Ledger] = []
    for name in (options.a, options.b):
        folder = model_folder(argparse.Namespace(**vars(options) | {"model": name}))
        read = read_files(options.data, load_tokenizer(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = open_model(folder, dtype=torch.float32, device=device)
        length = min(context_length(model), LONGEST_ROW)
        check_fit(model, read.data, length, "gyro compare")
        ledgers.append(score_dataset(model, read.data, length=length, rows=8))
    found, by_seed = ledger_differences([(ledgers[0], ledgers[1])])
    return Comparison((options.a, options.b), found, by_seed, (Cost(0, 0), Cost(0, 0)), {})


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[-60:]
