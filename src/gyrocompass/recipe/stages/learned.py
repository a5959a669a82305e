"""What a model has learned from, by lineage: its data, and that of every model it began as."""

from __future__ import annotations

from collections.abc import Iterator

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store

_LEARNED_FROM = {"data", "prompts"}
"""Roles of a model's parents that it learned from."""
_BEGAN_AS = {"model", "imported"}
"""Roles of the model that it was before."""
_READ = {"documents", "data"}
"""Roles of what tokens were made from."""


def learned_from(store: Store, model: Artifact) -> Iterator[Artifact]:
    """Tokens and documents that a model has learned from, each once, as far as the store has them."""
    seen: set[str] = set()

    def visit(artifact_id: str, learns: bool) -> Iterator[Artifact]:
        if artifact_id in seen:
            return
        seen.add(artifact_id)
        try:
            artifact = store.open(artifact_id, verify=False)
        except BadInput:
            return  # an ancestor that was deleted, or is of another store
        if learns:
            yield artifact
        kind = artifact.manifest.kind
        for role, parent in artifact.manifest.parents.items():
            name = role.partition(".")[0]
            if kind == "model" and name in _LEARNED_FROM:
                yield from visit(parent, True)
            elif kind == "model" and name in _BEGAN_AS:
                yield from visit(parent, False)
            elif learns and kind == "tokens" and name in _READ:
                yield from visit(parent, True)

    yield from visit(model.id, False)
