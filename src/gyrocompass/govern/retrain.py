"""Models that have to be trained again, since what they learned from was forgotten: marks among the acts.

    mark(store, ids, why) --> an act     marked(store) --> ids     untouched(store, name) --> where to begin

A mark is never taken away: the model has learned what it has learned. It stops to matter when another version
is champion, one that was made from none of the marked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gyrocompass.core.acts import acts, note
from gyrocompass.core.store import Store
from gyrocompass.govern.registry import Version, versions

MARKED = "to be trained again"


def mark(
    store: Store, ids: Sequence[str], why: str, by: str, exposure_bits: Mapping[str, float] | None = None
) -> None:
    """Say that models have to be trained again; those that are marked already stay so.

    Args:
        store: of the models.
        ids: of them.
        why: a remark.
        by: who says so.
        exposure_bits: of what was forgotten, by each model, in the mean, where that was measured.
    """
    new = sorted(set(ids) - marked(store))
    if new:
        known = {name: bits for name, bits in (exposure_bits or {}).items() if name in new}
        with store.database.write() as connection:
            about = {"models": new, "why": why} | ({"exposure_bits": known} if known else {})
            note(connection, by, MARKED, about)


def marked(store: Store) -> set[str]:
    """Ids of models that have to be trained again."""
    return {one for act in acts(store.database) if act["act"] == MARKED for one in act["about"]["models"]}


def untouched(store: Store, name: str) -> Version | None:
    """The newest version of a name that is not marked; None: each of them is."""
    touched = marked(store)
    return next((one for one in reversed(versions(store, name)) if one.artifact_id not in touched), None)
