"""Rules: what becomes of a document, given what steps said of it.

    rules:
      - keep: {column: source, is_in: [handbook]}                   # whatever the rules after it say
      - drop: {column: quality.n_words, below: {prose: 50, code: 5, "*": 20}}
      - drop: {column: secrets.spans, min_score: 0.9}
      - keep_one: {column: near_duplicates.cluster, prefer: [{column: n_bytes, order: highest}]}
      - mask: {column: personal.spans, kinds: [email, phone], by: "[{kind}]"}

Rules are read in order, and the first one that keeps or drops a document decides. Those that ask which others
stay (`keep_one`, and `drop` of a step's `duplicate`) come after all the rest, wherever they stand: one of a
cluster stays even if another rule drops the one that was preferred. Masks of a document that stays add up. A
threshold may differ by slice: the name of the slice itself, else the longest name that it begins with
(`prose` for `prose/docs`), else `*`; where none fits, the rule says nothing. A null is compared with nothing.
Of lists, such as spans, the number of entries is compared.

    Condition.holds(rows) --> which rows, the value and the threshold of each
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Discriminator, Tag, model_validator

from gyrocompass.core.config import Config
from gyrocompass.core.errors import did_you_mean
from gyrocompass.data.curate.corpus import CORPUS_SCHEMA
from gyrocompass.data.curate.step import SPANS

ANY_SLICE = "*"

Action = Literal["keep", "drop", "keep_one", "mask", "pseudonymise"]

Threshold = Annotated[
    Annotated[float, Tag("number")] | Annotated[dict[str, float], Tag("by slice")],
    Discriminator(lambda value: "by slice" if isinstance(value, Mapping) else "number"),
]

Mask = npt.NDArray[np.bool_]

_NUMBERS = ("below", "above", "at_least", "at_most")
_COMPARED = {"below": np.less, "above": np.greater, "at_least": np.greater_equal, "at_most": np.less_equal}
_SIGNS = {"below": "<", "above": ">", "at_least": ">=", "at_most": "<="}


class Hits(NamedTuple):
    """Which rows a condition holds for, and why."""

    mask: Mask
    values: pa.Array
    """The value of each row, for those that it holds for."""
    thresholds: npt.NDArray[np.float64]
    """NaN where there is none."""


class Selected(Config):
    """A column, and the slices that it is looked at in."""

    column: str
    """`<step>.<column>`, or a column of documents: source, slice, licence, language, n_bytes, ..."""
    slices: tuple[str, ...] = ()
    """Slices, or what their names begin with up to a slash; empty: all."""

    def in_slices(self, slice_names: pa.Array) -> Mask:
        """The rows that are in its slices."""
        if not self.slices:
            return np.ones(len(slice_names), np.bool_)
        names = slice_names.to_pylist()
        inside = {name: any(_is_part(name, chosen) for chosen in self.slices) for name in set(names)}
        return np.array([inside[name] for name in names], np.bool_)


class Condition(Selected):
    """What has to be so: one comparison; without any, that a flag is true, that there is anything else."""

    below: Threshold | None = None
    above: Threshold | None = None
    at_least: Threshold | None = None
    at_most: Threshold | None = None
    is_in: tuple[str, ...] | None = None
    is_not_in: tuple[str, ...] | None = None
    """A null is not in it, and is not out of it either: see `is_null`."""
    is_null: bool | None = None
    kinds: tuple[str, ...] | None = None
    """Of spans: those that count. None: any."""
    min_score: float | None = None
    """Of spans: those that count."""
    partner: str | None = None
    """The column that names the document it lost against; by default the step's `partner`, if it has one."""

    @model_validator(mode="after")
    def _at_most_one(self) -> Condition:
        given = [
            name for name in (*_NUMBERS, "is_in", "is_not_in", "is_null") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"one comparison, not {' and '.join(given)}: write a rule for each")
        return self

    @property
    def comparison(self) -> str | None:
        """The name of its comparison of numbers."""
        return next((name for name in _NUMBERS if getattr(self, name) is not None), None)

    def holds(self, rows: pa.RecordBatch) -> Hits:
        """Compare.

        Args:
            rows: the columns `slice` and `self.column`, at least.
        """
        column = rows[self.column]
        inside = self.in_slices(rows["slice"])
        thresholds = np.full(rows.num_rows, math.nan)
        values: pa.Array = column
        if self.comparison:
            thresholds = _by_row(getattr(self, self.comparison), rows["slice"])
        if self.is_null is not None:
            found = pc.is_null(column).to_numpy(zero_copy_only=False) == self.is_null
        elif pa.types.is_list(column.type):
            counts = self._entries(column)
            values = pa.array(counts, pa.int64())
            found = _COMPARED[self.comparison](counts, thresholds) if self.comparison else counts > 0
            found = found & pc.is_valid(column).to_numpy(zero_copy_only=False)
        elif self.comparison:
            numbers = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
            found = _COMPARED[self.comparison](numbers, thresholds)  # a NaN compares with nothing
        else:
            found = self._of_names(column)
        return Hits(found & inside, values, thresholds)

    def _entries(self, column: pa.Array) -> npt.NDArray[np.int64]:
        """How many entries of each row's list count: spans by kind and score, names by what they are."""
        if column.type == SPANS:
            return spans_that_count(column, self.kinds, self.min_score)
        names = column.flatten()
        counts = np.ones(len(names), np.bool_)
        if self.is_in is not None or self.is_not_in is not None:
            counts = self._of_names(names)
        return _counted(column, counts)

    def _of_names(self, column: pa.Array) -> Mask:
        known = pc.is_valid(column).to_numpy(zero_copy_only=False)
        if self.is_in is not None or self.is_not_in is not None:
            chosen = pa.array(self.is_in if self.is_in is not None else self.is_not_in, column.type)
            within = pc.is_in(column, chosen).to_numpy(zero_copy_only=False)
            found: Mask = known & (within if self.is_in is not None else ~within)
            return found
        if pa.types.is_boolean(column.type):
            true: Mask = pc.fill_null(column, False).to_numpy(zero_copy_only=False)
            return true
        other: Mask = known.astype(np.bool_)
        return other

    def sentence(self) -> str:
        """The condition in words, as ledgers and tables show it."""
        said = self.column
        if self.kinds is not None:
            said += f"[{', '.join(self.kinds)}]"
        if self.comparison:
            threshold = getattr(self, self.comparison)
            shown = "its slice's" if isinstance(threshold, dict) else f"{threshold:g}"
            said += f" {_SIGNS[self.comparison]} {shown}"
        elif self.is_null is not None:
            said += " is unknown" if self.is_null else " is known"
        elif self.is_in is not None or self.is_not_in is not None:
            names = self.is_in if self.is_in is not None else self.is_not_in
            said += f" is {'' if self.is_in is not None else 'not '}in {', '.join(names or ())}"
        return said + (f" in {', '.join(self.slices)}" if self.slices else "")


class Preference(Config):
    """What makes a document better than another: a higher or lower value, or an earlier one. Nulls last."""

    column: str
    order: Literal["highest", "lowest"] | tuple[str, ...]


class KeepOne(Selected):
    """Of the documents with one value of a column, such as a cluster, one stays."""

    prefer: tuple[Preference, ...] = (Preference(column="time", order="lowest"),)
    """Which one, the first preference first; at last the one with the smallest id, whatever their order."""

    def sentence(self) -> str:
        """The rule in words."""
        return f"another one of its {self.column}"


class Covering(Selected):
    """Spans that are covered."""

    kinds: tuple[str, ...] | None = None
    """None: any."""
    min_score: float | None = None

    def sentence(self) -> str:
        """The rule in words."""
        return self.column + (f"[{', '.join(self.kinds)}]" if self.kinds is not None else "")


class Masking(Covering):
    """Spans that are replaced by one text for all."""

    by: str = "[{kind}]"
    """`{kind}` is the span's kind."""


class Pseudonymising(Covering):
    """Spans that are replaced by a pseudonym: the same for the same text, and reversible with the key."""

    key_file: str
    """A file that `pseudonym.new_key` made; it is read and never stored."""


class Rule(Config):
    """One rule; exactly one of the keys beside `name`."""

    name: str | None = None
    """How ledgers and tables call it; None: by what it says."""
    keep: Condition | None = None
    drop: Condition | None = None
    keep_one: KeepOne | None = None
    mask: Masking | None = None
    pseudonymise: Pseudonymising | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Rule:
        known = [name for name in type(self).model_fields if name != "name"]
        given = [name for name in known if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a rule has one key of {', '.join(known)}; found {', '.join(given) or 'none'}")
        return self

    @property
    def action(self) -> Action:
        """What it does."""
        actions: tuple[Action, ...] = ("keep", "drop", "keep_one", "mask", "pseudonymise")
        return next(action for action in actions if getattr(self, action) is not None)

    @property
    def selected(self) -> Condition | KeepOne | Masking | Pseudonymising:
        """What it is about."""
        found = getattr(self, self.action)
        assert isinstance(found, Condition | KeepOne | Masking | Pseudonymising)
        return found

    @property
    def title(self) -> str:
        """Its name, or what it says."""
        return self.name or self.selected.sentence()

    def columns(self, known: Mapping[str, pa.DataType]) -> list[str]:
        """The columns it reads."""
        chosen = self.selected
        read = [chosen.column]
        if isinstance(chosen, KeepOne):
            read += [preference.column for preference in chosen.prefer]
        partner = partner_column(chosen, known)
        copies = copies_of(self, known)
        return read + ([partner] if partner else []) + ([copies, "time"] if copies else [])

    def is_relative(self, known: Mapping[str, pa.DataType]) -> bool:
        """Whether what it says of a document depends on which others stay: `keep_one`, and copies that go."""
        return self.keep_one is not None or copies_of(self, known) is not None


def copies_of(rule: Rule, known: Mapping[str, pa.DataType]) -> str | None:
    """The column of clusters, where a rule drops what a step calls a duplicate in one."""
    step, _, column = rule.drop.column.rpartition(".") if rule.drop else ("", "", "")
    cluster = f"{step}.cluster"
    return cluster if column == "duplicate" and cluster in known else None


def partner_column(chosen: Selected, known: Mapping[str, pa.DataType]) -> str | None:
    """The column that names the partner in what a condition is about."""
    if not isinstance(chosen, Condition):
        return None
    default = f"{chosen.column.partition('.')[0]}.partner"
    return chosen.partner or (default if default in known else None)


def rule_mistakes(
    rules: Sequence[Rule], known: Mapping[str, pa.DataType]
) -> list[tuple[tuple[str, ...], str]]:
    """Columns that are not there, with the nearest that is, and columns that cannot be compared so.

    Args:
        rules: of a build.
        known: the types of all steps' columns, by `<step>.<column>`.

    Returns:
        For each mistake the path of its key, and what is wrong.
    """
    own = {field.name: field.type for field in CORPUS_SCHEMA if not pa.types.is_nested(field.type)}
    types = own | dict(known)
    return [
        ((str(number), rule.action), fault)
        for number, rule in enumerate(rules)
        for fault in _faults(rule, types, known)
    ]


def _faults(rule: Rule, types: Mapping[str, Any], known: Mapping[str, pa.DataType]) -> list[str]:
    missing = [name for name in rule.columns(known) if name not in types]
    if missing:
        return [f"there is no column {name}{did_you_mean(name, types)}" for name in missing]
    chosen, kind = rule.selected, types[rule.selected.column]
    if isinstance(chosen, Covering) and kind != SPANS:
        return [f"{chosen.column} holds no spans, and what is covered is spans"]
    if not isinstance(chosen, Condition):
        return []
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if chosen.comparison and not (is_number or pa.types.is_list(kind)):
        return [f"{chosen.column} is no number, so {chosen.comparison} says nothing about it"]
    named = chosen.is_in is not None or chosen.is_not_in is not None
    entry = kind.value_type if pa.types.is_list(kind) else kind
    if named and not (pa.types.is_string(entry) or pa.types.is_large_string(entry)):
        return [f"{chosen.column} holds no names, so is_in and is_not_in say nothing about it"]
    if (chosen.kinds is not None or chosen.min_score is not None) and kind != SPANS:
        return [f"{chosen.column} holds no spans, so kinds and min_score say nothing about it"]
    return []


def spans_that_count(
    column: pa.Array, kinds: tuple[str, ...] | None, min_score: float | None
) -> npt.NDArray[np.int64]:
    """How many spans of each row are of these kinds and score so high."""
    spans = column.flatten()
    counts = np.ones(len(spans), np.bool_)
    if kinds is not None:
        counts &= pc.is_in(spans.field("kind"), pa.array(kinds, pa.string())).to_numpy(zero_copy_only=False)
    if min_score is not None:
        scores = pc.fill_null(spans.field("score"), math.inf).to_numpy(zero_copy_only=False)
        counts &= scores >= np.float32(min_score)
    return _counted(column, counts)


def _counted(column: pa.Array, counts: Mask) -> npt.NDArray[np.int64]:
    """How many of each row's entries are marked in `counts`, which is over the entries of all rows."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(lengths)
    total = np.concatenate([[0], np.cumsum(counts)])
    counted: npt.NDArray[np.int64] = (total[ends] - total[ends - lengths]).astype(np.int64)
    return counted


def threshold_of(threshold: float | Mapping[str, float], slice_name: str) -> float:
    """The threshold of a slice; NaN where there is none.

    >>> threshold_of({"prose": 50.0, "*": 20.0}, "prose/docs"), threshold_of({"prose": 50.0}, "code")
    (50.0, nan)
    """
    if not isinstance(threshold, Mapping):
        return threshold
    fitting = [name for name in threshold if name == ANY_SLICE or _is_part(slice_name, name)]
    best = max(fitting, key=lambda name: (name != ANY_SLICE, len(name)), default=None)
    return math.nan if best is None else threshold[best]


def _by_row(threshold: float | Mapping[str, float], slice_names: pa.Array) -> npt.NDArray[np.float64]:
    if not isinstance(threshold, Mapping):
        return np.full(len(slice_names), threshold)
    names = slice_names.to_pylist()
    known = {name: threshold_of(threshold, name) for name in set(names)}
    return np.array([known[name] for name in names], np.float64)


def _is_part(slice_name: str, chosen: str) -> bool:
    """Whether a slice is another or a part of it."""
    return slice_name == chosen or slice_name.startswith(f"{chosen}/")
