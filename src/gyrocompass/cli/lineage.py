"""`gyro lineage`: from an artifact to its documents, from a document to everything that saw it."""

from __future__ import annotations

import argparse

from rich.console import Console

from gyrocompass.core.lineage import render, walk
from gyrocompass.core.store import Store


def lineage(options: argparse.Namespace) -> int:
    """Print both ways as a tree."""
    store = Store(options.store, options.store_url, make=False)
    Console().print(render(walk(store, options.id)))
    return 0
