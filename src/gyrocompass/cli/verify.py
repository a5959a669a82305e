"""`gyro verify`: proves a recipe on its own first batches."""

from __future__ import annotations

import argparse

from rich.console import Console

from gyrocompass.core.errors import GyroError
from gyrocompass.core.store import Store
from gyrocompass.recipe.recipe import load_recipe
from gyrocompass.recipe.verify import all_passed, verify_recipe


def verify(options: argparse.Namespace) -> int:
    """0 if every check passed, 1 if one failed."""
    recipe = load_recipe(options.recipe, options.set, options.variant)
    rows = verify_recipe(recipe, Store(options.store, options.store_url), Console())
    return 0 if all_passed(rows) else GyroError.exit_code
