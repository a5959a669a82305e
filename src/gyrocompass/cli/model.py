"""Where a command finds the model it is given: a folder, an artifact, or a stage of the last run."""

from __future__ import annotations

import argparse
from pathlib import Path

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store


def model_folder(options: argparse.Namespace) -> Path:
    """The folder of `options.model`: a path, the id of a model artifact, NAME:VERSION or NAME@ALIAS.

    Raises:
        BadInput: it is neither.
    """
    path = Path(options.model)
    if path.is_dir():
        return path
    if "/" in options.model or not options.store.is_dir():
        raise BadInput(
            "there is no such model folder", where=path, fix="give a folder, or an id with --store"
        )
    from gyrocompass.govern.registry import artifact_named

    store = Store(options.store, options.store_url, make=False)
    artifact = store.open(artifact_named(store, options.model))
    if artifact.manifest.kind != "model":
        raise BadInput(
            f"{artifact.id} is of the kind {artifact.manifest.kind}, not a model", where=artifact.path
        )
    return artifact.path
