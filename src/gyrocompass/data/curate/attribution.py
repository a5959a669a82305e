"""The attribution of a data set, or of the slices of it that a mixture reads.

    data set --attributed--> Attributed, ... --attribution_text--> a file to give along

Licence and holders of copyright are those that a step `licences` found, where the build has one, and else
what the source states.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.data.curate.card import Parts, kept_ids
from gyrocompass.data.curate.licence_policy import Attributed
from gyrocompass.data.curate.licences import Licences


def attributed(parts: Parts, slices: Collection[str] = ()) -> Iterator[Attributed]:
    """What an attribution needs of each document that stays.

    Args:
        parts: the data set, its corpus and its annotations.
        slices: those that are read; empty: all.

    Raises:
        BadInput: no document that stays is of one of these slices.
    """
    kept = kept_ids(parts.dataset.path)
    labels = [named.label for named in parts.config.steps if isinstance(named.step, Licences)]
    found = [f"{label}.{column}" for label in labels[:1] for column in ("expression", "copyrights")]
    missing, seen = set(slices), set()
    for batch in parts.corpus.batches(["id", "source", "path", "slice", "licence", *found]):
        for row in batch.to_pylist():
            if row["id"] not in kept:
                continue
            seen.add(row["slice"])
            missing.discard(row["slice"])
            if slices and row["slice"] not in slices:
                continue
            expression, copyrights = (row[name] for name in found) if found else (None, None)
            yield Attributed(
                row["source"], row["path"], expression or row["licence"], tuple(copyrights or ())
            )
    if missing:
        name = min(missing)
        raise BadInput(
            f"no document of slice {name}{did_you_mean(name, seen)}", fix=f"name some of {sorted(seen)}"
        )
