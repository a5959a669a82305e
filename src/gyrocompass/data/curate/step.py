"""Steps: what looks at documents and says what it sees, and the names they go by.

    documents --RecordStep.annotate--> annotations                          each document by itself
    documents --GlobalStep.signatures--> signatures --resolve--> annotations        all documents together

A step is a frozen config. It is a pure function of documents: the same documents give the same annotations,
however they are batched, in whatever order, by however many workers. It never drops and never changes a text:
it adds columns, which rules read by the name `<step>.<column>`.

Columns are known before anything runs, because an empty batch is a batch: annotating no documents gives no
rows, with the names and types that any other batch would have.

Left out: state between batches, and steps that change what a later step reads. All offsets are those of one
text, the document's own.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import ClassVar, Protocol, TypeVar

import pyarrow as pa

import gyrocompass.data.curate as package
from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput, did_you_mean

SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("kind", pa.string()), ("score", pa.float32())])
SPANS = pa.list_(SPAN)
"""Places in a text, in characters; `kind` says what is there ("email", "duplicate"), `score` how surely."""

BATCH_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("content_hash", pa.string()),
        ("text", pa.large_string()),
        ("path", pa.string()),
        ("source", pa.string()),
        ("slice", pa.string()),
        ("licence", pa.string()),
        ("language", pa.string()),
        ("n_bytes", pa.int64()),
        ("time", pa.timestamp("us", tz="UTC")),
    ]
)
"""What a step sees of a document, at least. `text` is all it says: the parts of a conversation, or of a
prompt and its answers, joined by a blank line."""


class CorpusAccess(Protocol):
    """The documents of a corpus, as often as they are asked for, always in the same order."""

    @property
    def n_documents(self) -> int:
        """How many there are."""

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All documents.

        Args:
            columns: names of `BATCH_SCHEMA`, and of earlier steps' columns if the step said that it `reads`
                them; None: those of `BATCH_SCHEMA`.
        """

    def take(self, ids: Iterable[str], columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """These documents, in this order.

        Args:
            ids: document ids; each is in the corpus.
            columns: see `batches`.
        """


class Step(Config, ABC):
    """What every step has; a step is a `RecordStep` or a `GlobalStep`."""

    name: ClassVar[str]
    """How YAML asks for it, in small letters and underscores."""
    version: ClassVar[int] = 1
    """Goes up when the same config would give other annotations: older ones are then made again."""

    def reads(self) -> tuple[str, ...]:
        """Columns of earlier steps that it is given besides `BATCH_SCHEMA`, such as `language.label`."""
        return ()


class RecordStep(Step):
    """A step that needs one document to say what it has to say about it."""

    @abstractmethod
    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """What it sees: one row for each document, in their order.

        Args:
            documents: `BATCH_SCHEMA`, and the columns that it reads.

        Returns:
            The column `id`, then the step's own: scores as floats, flags as booleans, labels as strings,
            places as `SPANS`. A null says that nothing is known; no rule's comparison holds for it.
        """


class GlobalStep(Step):
    """A step that needs all documents: duplicates, clusters.

    What finds duplicates gives `cluster`, the smallest id of those that are alike (null: alone), `partner`,
    the document it was found to be most like, and `similarity`. Who survives is a decision: the rule
    `keep_one` on `<step>.cluster` chooses among those that earlier rules left. A step may also decide by
    itself, from what it `reads`, and give a flag; then `partner` is the survivor. The ledger names the
    partner either way.
    """

    @abstractmethod
    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """What is needed of each document later: the column `id`, then whatever `resolve` reads."""

    @abstractmethod
    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """What it sees: the column `id`, then the step's own.

        Rows are of any documents in any order; a document without a row has nulls. Which documents belong
        together must not depend on their order.

        Args:
            signatures: those of all documents, in the order of the corpus.
            corpus: the documents themselves.
        """


S = TypeVar("S", bound=type[Step])

_STEPS: dict[str, type[Step]] = {}


def register(step: S) -> S:
    """Let YAML ask for a step by its name; a class decorator."""
    assert step.name not in _STEPS or _STEPS[step.name].__qualname__ == step.__qualname__, step.name
    _STEPS[step.name] = step
    return step


def step_types() -> dict[str, type[Step]]:
    """Every step by name: importing the modules of `data/curate/` registers what they define."""
    _import_all()
    return dict(sorted(_STEPS.items()))


@cache
def _import_all() -> None:
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def columns_of(step: Step, known: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
    """The columns a step adds to `id`, by name, found by giving it no documents.

    Args:
        step: any step.
        known: the types of earlier steps' columns, by `<step>.<column>`.

    Raises:
        BadInput: it reads a column that no earlier step makes.
    """
    for name in step.reads():
        if name not in known:
            raise BadInput(
                f"{step.name} reads {name}, a column of no step before it{did_you_mean(name, known)}",
                fix=f"list the step {name.partition('.')[0]} before it",
            )
    schema = pa.schema([*BATCH_SCHEMA, *((name, known[name]) for name in step.reads())])
    nothing = pa.RecordBatch.from_pylist([], schema)
    if isinstance(step, RecordStep):
        added = step.annotate(nothing).schema
    else:
        assert isinstance(step, GlobalStep), f"{step.name} is neither a RecordStep nor a GlobalStep"
        added = step.resolve(iter([step.signatures(nothing)]), MemoryCorpus([nothing])).schema
    assert added.names[:1] == ["id"], f"{step.name}: the first column is id"
    return dict(zip(added.names[1:], added.types[1:], strict=True))


def join_batches(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """Batches as one."""
    joined = pa.Table.from_batches(batches, schema).combine_chunks().to_batches()
    return joined[0] if joined else pa.RecordBatch.from_pylist([], schema)


class MemoryCorpus:
    """A corpus of batches in memory, for tests and for small data."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = list(batches)

    @property
    def n_documents(self) -> int:
        """See `CorpusAccess`."""
        return sum(batch.num_rows for batch in self._batches)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """See `CorpusAccess`."""
        for batch in self._batches:
            yield batch.select(list(columns or BATCH_SCHEMA.names))

    def take(self, ids: Iterable[str], columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """See `CorpusAccess`."""
        found = list(self.batches(columns if columns is None else ["id", *columns]))
        whole = join_batches(found, found[0].schema)
        place = {document_id: row for row, document_id in enumerate(whole["id"].to_pylist())}
        taken = whole.take(pa.array([place[document_id] for document_id in ids], pa.int64()))
        return taken if columns is None else taken.select(range(1, taken.num_columns))
