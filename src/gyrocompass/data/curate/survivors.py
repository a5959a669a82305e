"""Which of several documents stays: best licence, then quality, then oldest, then the smallest id.

    documents --standings--> one row each     licence_rank, quality, time
    standings, ids --survival_order--> order_D

The order is total and is one of the documents themselves, so whatever keeps the first of a group keeps the
same one however the documents came. Duplicate steps number documents by their place in it: the smallest
number stays.

Licences are ranked by patterns, best first; what is not named comes after all that is, no licence comes last.
In an SPDX expression the user may choose one side of OR, and is bound by both sides of AND.

Shape legend: D documents.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gyrocompass.core.config import Config
from gyrocompass.data.curate.columns import column, numbers

STANDING = pa.schema([("licence_rank", pa.int16()), ("quality", pa.float32()), ("time", pa.int64())])
"""What decides who stays, as columns of a step's signatures; time in microseconds, null where it is not
known."""

LICENCES = (
    "CC0-1.0|Unlicense|0BSD|LicenseRef-public-domain",
    "MIT*|BSD-*|ISC|Apache-*|PSF-*|Python-*|Zlib|BSL-1.0",
    "CC-BY-[0-9]*",
    "MPL-*|LGPL-*|EPL-*",
    "CC-BY-SA-*|GFDL-*|GPL-*|AGPL-*",
)
"""Public domain, permissive, attribution, weak copyleft, copyleft."""


class SurvivorRule(Config):
    """The order in which documents are preferred.

    Args:
        licences: patterns of SPDX identifiers, best first; `|` between patterns that are equally good.
        quality: a score of an earlier step, such as `quality.score`: higher is better, null is lowest.
    """

    licences: tuple[str, ...] = LICENCES
    quality: str | None = None

    def licence_rank(self, licence: str | None) -> int:
        """0 for the best; for one that no pattern fits, their number; for none, one more.

        >>> rule = SurvivorRule(licences=("CC0-1.0", "MIT|Apache-*", "GPL-*"))
        >>> [rule.licence_rank(name) for name in ("MIT", "GPL-3.0-only OR MIT", "MIT AND GPL-2.0-only")]
        [1, 1, 2]
        >>> [rule.licence_rank(name) for name in ("Proprietary", None)]
        [3, 4]
        """
        if not licence:
            return len(self.licences) + 1
        choices = re.split(r"\s+OR\s+", licence)
        return min(max(map(self._rank_one, re.split(r"\s+AND\s+", choice))) for choice in choices)

    def standings(self, documents: pa.RecordBatch) -> list[pa.Array]:
        """The columns of `STANDING` for a batch; columns that it lacks count as not known."""
        empty = pa.nulls(documents.num_rows)
        known = documents.schema.names
        licences = documents["licence"] if "licence" in known else empty
        ranks = {name: self.licence_rank(name) for name in licences.unique().to_pylist()}
        quality = documents[self.quality] if self.quality in known else empty
        time = documents["time"] if "time" in known else empty
        if pa.types.is_timestamp(time.type):
            time = time.cast(pa.timestamp("us", time.type.tz))
        return [
            column(np.array([ranks[name] for name in licences.to_pylist()], np.int16)),
            quality.cast(pa.float32()),
            time.cast(pa.int64()),
        ]

    def _rank_one(self, identifier: str) -> int:
        identifier = identifier.strip("() ")
        for rank, patterns in enumerate(self.licences):
            if any(fnmatchcase(identifier, pattern) for pattern in patterns.split("|")):
                return rank
        return len(self.licences)


def survival_order(ids: pa.Array, standings: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """The documents from the one that is preferred to all others to the one that is to none: [D].

    Args:
        ids: strings, each different.
        standings: the columns of `STANDING`.
    """
    quality = numbers(standings["quality"], np.nan)
    time = numbers(standings["time"], 2**63 - 1)
    rank = numbers(standings["licence_rank"])
    worst = np.where(np.isnan(quality), np.float32(np.inf), -quality)
    by_id = numbers(pc.sort_indices(ids)).astype(np.int64)
    place = np.empty(len(by_id), np.int64)
    place[by_id] = np.arange(len(by_id))
    return np.lexsort((place, time, worst, rank))
