"""Decisions: which documents stay, and for each that does not, the rule, value, threshold and partner.

    corpus with annotations, rules --decide--> Verdicts (what stays, the ledger)

Texts are not read: a decision is as cheap as its columns, however long the scan took. Memory is three bytes a
document, and the ledger's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gyrocompass.data.curate.corpus import Corpus
from gyrocompass.data.curate.rules import Condition, KeepOne, Preference, Rule, copies_of, partner_column
from gyrocompass.data.curate.step import join_batches

LEDGER_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("source", pa.string()),
        ("slice", pa.string()),
        ("licence", pa.string()),
        ("language", pa.string()),
        ("content_hash", pa.string()),
        ("n_bytes", pa.int64()),
        ("rule", pa.int16()),  # its number in the build; FAILED where a step could not read the document
        ("title", pa.string()),
        ("column", pa.string()),
        ("value", pa.string()),
        ("number", pa.float64()),  # the value, where it is a number
        ("threshold", pa.float64()),
        ("partner", pa.string()),
    ]
)
"""Why each document that is not there is not."""

FAILED = -2
"""The rule's number of documents that a step failed on."""
FAILURES = "failed.parquet"
FAILURE_SCHEMA = pa.schema([("id", pa.string()), ("path", pa.string()), ("reason", pa.string())])
"""Documents that a step failed on, in its annotations."""

_UNDECIDED = -1
_OF_DOCUMENTS = LEDGER_SCHEMA.names[:8]


class Verdicts(NamedTuple):
    """What was decided, in the order of the corpus."""

    kept_D: npt.NDArray[np.bool_]
    rule_D: npt.NDArray[np.int16]
    """The rule that decided; -1 where none did, and the document stays."""
    ledger: pa.Table
    """`LEDGER_SCHEMA`, a row for each document that goes."""


def decide(corpus: Corpus, rules: Sequence[Rule], known: Mapping[str, pa.DataType]) -> Verdicts:
    """Apply rules in order.

    Args:
        corpus: with the annotations of every step that rules read.
        rules: checked against `known`.
        known: the types of all steps' columns.
    """
    return _Judge(corpus, rules, known).verdicts()


class _Judge:
    def __init__(self, corpus: Corpus, rules: Sequence[Rule], known: Mapping[str, pa.DataType]) -> None:
        self.corpus, self.rules, self.known = corpus, rules, known
        self.begins = np.concatenate([[0], np.cumsum(corpus.rows)]).astype(np.int64)
        self.rule_D = np.full(corpus.n_documents, _UNDECIDED, np.int16)
        self.kept_D = np.ones(corpus.n_documents, np.bool_)
        self.entries: list[tuple[npt.NDArray[np.int64], pa.RecordBatch]] = []

    def verdicts(self) -> Verdicts:
        self._drop_failed()
        numbered = [pair for pair in enumerate(self.rules) if pair[1].action in ("keep", "drop", "keep_one")]
        self._compare([pair for pair in numbered if not pair[1].is_relative(self.known)])
        for number, rule in numbered:
            if rule.keep_one is not None:
                self._keep_one(number, rule)
            elif cluster := copies_of(rule, self.known):
                self._drop_copies(number, rule, cluster)
        places = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in self.entries)])
        ledger = pa.Table.from_batches([batch for _, batch in self.entries], LEDGER_SCHEMA)
        return Verdicts(self.kept_D, self.rule_D, ledger.take(pa.array(np.argsort(places, kind="stable"))))

    def _shards(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Each shard's rows, with the place of the first."""
        names = list(dict.fromkeys([*_OF_DOCUMENTS, *columns]))
        for shard, begin in enumerate(self.begins[:-1].tolist()):
            batches = list(self.corpus.shard_batches(shard, names))
            yield begin, join_batches(batches, batches[0].schema)

    def _drop_failed(self) -> None:
        for label, folder in self.corpus.annotations.items():
            failed = pq.read_table(folder / FAILURES) if (folder / FAILURES).is_file() else None
            if failed is None or not failed.num_rows:
                continue
            reasons = dict(zip(failed["id"].to_pylist(), failed["reason"].to_pylist(), strict=True))
            for begin, rows in self._shards([]):
                values = pa.array([reasons.get(name) for name in rows["id"].to_pylist()], pa.string())
                mask = pc.is_valid(values).to_numpy(zero_copy_only=False)
                mask &= self.rule_D[begin : begin + len(mask)] == _UNDECIDED
                self._drop(FAILED, f"{label} failed", label, begin, rows, mask, values)

    def _compare(self, numbered: Sequence[tuple[int, Rule]]) -> None:
        """Rules that look at one document at a time."""
        if not numbered:
            return
        columns = [name for _, rule in numbered for name in rule.columns(self.known)]
        for begin, rows in self._shards(columns):
            state = self.rule_D[begin : begin + rows.num_rows]
            for number, rule in numbered:
                chosen = rule.selected
                assert isinstance(chosen, Condition)
                hits = chosen.holds(rows)
                mask = hits.mask & (state == _UNDECIDED)
                if rule.keep is not None:
                    state[mask] = number
                    continue
                partner = partner_column(chosen, self.known)
                self._drop(
                    number,
                    rule.title,
                    chosen.column,
                    begin,
                    rows,
                    mask,
                    hits.values,
                    hits.thresholds,
                    None if partner is None else rows[partner],
                )

    def _drop_copies(self, number: int, rule: Rule, cluster: str) -> None:
        """Duplicates go; of a cluster in which nothing else is left, the oldest stays, or the smallest id."""
        chosen, columns = rule.drop, rule.columns(self.known)
        assert chosen is not None
        hit_D = np.zeros(len(self.rule_D), np.bool_)
        left = []
        for begin, rows in self._shards(columns):
            own = slice(begin, begin + rows.num_rows)
            hit_D[own] = chosen.holds(rows).mask & (self.rule_D[own] == _UNDECIDED)
            arrays = [rows[cluster], pa.array(hit_D[own]), rows["time"], rows["id"]]
            names = ["value", "copy", "time", "id"]
            left.append(pa.RecordBatch.from_arrays(arrays, names).filter(pa.array(self.kept_D[own])))
        members = pa.Table.from_batches(left).filter(pc.field("value").is_valid())
        best = _first_of_each(members, [("copy", "ascending"), ("time", "ascending"), ("id", "ascending")])
        elected = best.filter(pc.field("copy"))
        partner_name = partner_column(chosen, self.known)
        for begin, rows in self._shards(columns):
            own = slice(begin, begin + rows.num_rows)
            survivor = elected["id"].combine_chunks().take(pc.index_in(rows[cluster], elected["value"]))
            stays = pc.fill_null(pc.equal(survivor, rows["id"]), False).to_numpy(zero_copy_only=False)
            known = rows[partner_name] if partner_name else pa.nulls(rows.num_rows, pa.string())
            partner = pc.coalesce(survivor, known.cast(pa.string()))
            mask = hit_D[own] & ~stays
            self._drop(
                number, rule.title, chosen.column, begin, rows, mask, rows[chosen.column], partner=partner
            )

    def _keep_one(self, number: int, rule: Rule) -> None:
        """Of what is left of each cluster, the best stays."""
        chosen = rule.keep_one
        assert chosen is not None
        columns = rule.columns(self.known)
        members = pa.Table.from_batches(
            [self._members(begin, rows, chosen) for begin, rows in self._shards(columns)]
        )
        best = self._best(members, chosen)
        for begin, rows in self._shards(columns):
            values = rows[chosen.column]
            at = pc.index_in(values, best["value"])
            partner = best["id"].combine_chunks().take(at)
            lost = pc.fill_null(pc.not_equal(partner, rows["id"]), False).to_numpy(zero_copy_only=False)
            mask = lost & chosen.in_slices(rows["slice"])
            mask &= self.rule_D[begin : begin + rows.num_rows] == _UNDECIDED
            self._drop(number, rule.title, chosen.column, begin, rows, mask, values, partner=partner)

    def _members(self, begin: int, rows: pa.RecordBatch, chosen: KeepOne) -> pa.RecordBatch:
        """The documents of a shard that are in a cluster and have not been dropped."""
        own = slice(begin, begin + rows.num_rows)
        mask = pc.is_valid(rows[chosen.column]).to_numpy(zero_copy_only=False)
        mask = mask & chosen.in_slices(rows["slice"]) & self.kept_D[own]
        arrays = [
            rows[chosen.column],
            pa.array(self.rule_D[own] == _UNDECIDED),
            rows["id"],
            *(_comparable(rows[preference.column], preference) for preference in chosen.prefer),
        ]
        names = ["value", "not yet kept", "id", *(f"preference {n}" for n in range(len(chosen.prefer)))]
        return pa.RecordBatch.from_arrays(arrays, names).filter(pa.array(mask))

    def _best(self, members: pa.Table, chosen: KeepOne) -> pa.Table:
        """The survivor of each cluster: `value`, `id`."""
        keys = [("not yet kept", "ascending")]
        for number, preference in enumerate(chosen.prefer):
            order = "descending" if preference.order == "highest" else "ascending"
            keys.append((f"preference {number}", order))
        return _first_of_each(members, [*keys, ("id", "ascending")])

    def _drop(
        self,
        number: int,
        title: str,
        column: str,
        begin: int,
        rows: pa.RecordBatch,
        mask: npt.NDArray[np.bool_],
        values: pa.Array,
        thresholds: npt.NDArray[np.float64] | None = None,
        partner: pa.Array | None = None,
    ) -> None:
        places = np.flatnonzero(mask)
        if not len(places):
            return
        self.rule_D[begin + places] = number
        self.kept_D[begin + places] = False
        at = pa.array(places)
        n, chosen = len(places), values.take(at)
        is_number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
        arrays = [rows[name].take(at) for name in _OF_DOCUMENTS]
        arrays += [pa.array([number] * n, pa.int16()), pa.array([title] * n), pa.array([column] * n)]
        arrays.append(chosen.cast(pa.string()))
        arrays.append(chosen.cast(pa.float64()) if is_number else pa.nulls(n, pa.float64()))
        limits = np.full(n, np.nan) if thresholds is None else thresholds[places]
        arrays.append(pa.array(limits, pa.float64(), mask=np.isnan(limits)))
        arrays.append(pa.nulls(n, pa.string()) if partner is None else partner.take(at).cast(pa.string()))
        self.entries.append((begin + places, pa.RecordBatch.from_arrays(arrays, schema=LEDGER_SCHEMA)))


def _first_of_each(members: pa.Table, keys: Sequence[tuple[str, str]]) -> pa.Table:
    """The row of each `value` that comes first by these keys."""
    members = members.take(pc.sort_indices(members, sort_keys=[("value", "ascending"), *keys]))
    codes = members["value"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return members.take(pa.array(np.flatnonzero(np.diff(codes, prepend=-1))))


def _comparable(column: pa.Array, preference: Preference) -> pa.Array:
    """A column as something that can be sorted: by itself, or by its place in a list."""
    if isinstance(preference.order, str):
        return column
    return pc.index_in(column, pa.array(preference.order, column.type))


def failed_documents(folder: Any) -> int:
    """How many documents a step failed on."""
    return int(pq.read_metadata(folder / FAILURES).num_rows)
