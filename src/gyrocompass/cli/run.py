"""`gyro demo`, `run`, `train` and `report`: recipes, built in, written by the user or put together here."""

from __future__ import annotations

import argparse
import os

from rich.console import Console

from gyrocompass.core.errors import MissingDependency
from gyrocompass.core.store import Store
from gyrocompass.recipe.finetune import check_free, export_model, finetune_recipe
from gyrocompass.recipe.recipe import Recipe, load_recipe
from gyrocompass.recipe.run import read_run, run_recipe, show, show_plan


def demo(options: argparse.Namespace) -> int:
    """The built-in recipe `stdlib`, and then the life of what it made."""
    recipe = load_recipe("stdlib", options.set, "small" if options.small else None)
    status = _run(recipe, options)
    if not options.dry_run and _is_first_rank():
        try:
            from gyrocompass.recipe.life.play import live
        except ImportError as error:
            raise MissingDependency(error.name or "fastapi", extra="serve", needed_for="gyro demo") from error
        live(recipe, Store(options.store, options.store_url), Console(), small=options.small)
    return status


def run(options: argparse.Namespace) -> int:
    """Any recipe."""
    return _run(load_recipe(options.recipe, options.set, options.variant), options)


def train(options: argparse.Namespace) -> int:
    """A recipe around one training stage."""
    if options.out:
        check_free(options.out)
    status = _run(finetune_recipe(options.model, options.data, options.set), options)
    if options.out and not options.dry_run and _is_first_rank():
        export_model(Store(options.store, options.store_url), options.out)
        Console(stderr=True).print(f"model written to {options.out}", highlight=False, soft_wrap=True)
    return status


def report(options: argparse.Namespace) -> int:
    """The last run's table and HTML again."""
    store = Store(options.store, options.store_url, make=False)
    show(read_run(store, options.recipe), store, Console())
    return 0


def _run(recipe: Recipe, options: argparse.Namespace) -> int:
    if not options.dry_run:
        run_recipe(recipe, Store(options.store, options.store_url), Console())
    elif _is_first_rank():
        store = Store(options.store, options.store_url) if options.store.is_dir() else None
        show_plan(recipe, store, Console())
    return 0


def _is_first_rank() -> bool:
    """Whether this process writes and talks: under `torchrun`, one of several does."""
    return os.environ.get("RANK", "0") == "0"
