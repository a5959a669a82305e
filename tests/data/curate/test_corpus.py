from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.corpus import (
    CORPUS_SCHEMA,
    Corpus,
    CorpusWriter,
    annotation_path,
    batch_of,
    corpus_document,
    corpus_row,
)
from gyrocompass.data.curate.step import BATCH_SCHEMA, MemoryCorpus
from gyrocompass.data.document import Document, Message, Step

CHAT = Document(
    kind="chat",
    messages=(Message("user", "Hello?"), Message("assistant", "Hello.")),
    path="chats.jsonl:1",
    source="chats",
    slice="chat",
    licence="MIT",
    time=datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
    file_hash="0" * 64,
)
JUDGED = Document(
    kind="completion",
    prompt="1 + 1 =",
    text="It is 2.",
    path="a.jsonl:2",
    source="a",
    slice="maths",
    labels={"score": 0.5},
    steps=(Step(8, 1.0),),
    weight=2.0,
)


def text(number: int, length: int = 40) -> Document:
    return Document(
        kind="text", text=f"{number} " + "word " * length, path=f"{number}.txt", source="s", slice="text"
    )


def written(folder: Path, documents: list[Document], shard_bytes: int = 2000) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    writer = CorpusWriter(folder, shard_bytes=shard_bytes)
    for document in documents:
        writer.write(document)
    writer.close()
    return Corpus(folder, batch_rows=3)


@pytest.mark.parametrize("document", [CHAT, JUDGED, text(1)])
def test_a_row_gives_its_document_again(tmp_path: Path, document: Document) -> None:
    corpus = written(tmp_path, [document])
    (batch,) = corpus.batches(CORPUS_SCHEMA.names)
    (row,) = batch.to_pylist()
    assert corpus_document(row) == document == corpus_document(corpus_row(document))
    assert row["id"] == document.id and row["n_bytes"] == document.n_bytes
    assert row["text"] == "\n\n".join(document.texts)


def test_batches_are_all_documents_in_order_with_the_schema_of_steps(tmp_path: Path) -> None:
    documents = [text(number) for number in range(50)]
    corpus = written(tmp_path, documents)
    batches = list(corpus.batches())
    assert len(corpus.shards) > 3 and corpus.n_documents == 50
    assert [i for batch in batches for i in batch["id"].to_pylist()] == [d.id for d in documents]
    assert {batch.schema for batch in batches} == {BATCH_SCHEMA}
    assert max(batch.num_rows for batch in batches) <= 3


def test_taken_documents_come_in_the_order_asked_for(tmp_path: Path) -> None:
    documents = [text(number) for number in range(50)]
    corpus = written(tmp_path, documents)
    memory = MemoryCorpus([batch_of(documents[:20]), batch_of(documents[20:])])
    asked = [documents[n].id for n in (41, 3, 3, 0, 49)]
    for columns in (None, ["path", "n_bytes"]):
        taken = corpus.take(asked, columns)
        assert taken.equals(memory.take(asked, columns))
    assert corpus.take(asked)["path"].to_pylist() == ["41.txt", "3.txt", "3.txt", "0.txt", "49.txt"]
    assert corpus.take([]).num_rows == 0


def test_annotations_stand_beside_their_documents(tmp_path: Path) -> None:
    documents = [text(number) for number in range(30)]
    corpus = written(tmp_path / "corpus", documents)
    for shard in range(len(corpus.shards)):
        (tmp_path / "notes").mkdir(exist_ok=True)
        ids = [i for batch in corpus.shard_batches(shard, ["id"]) for i in batch["id"].to_pylist()]
        pq.write_table(
            pq.read_table(corpus.shards[shard], columns=["id"]).append_column(
                "number", [[int(i[:4], 16) for i in ids]]
            ),
            annotation_path(tmp_path / "notes", shard),
        )
    noted = Corpus(tmp_path / "corpus", {"notes": tmp_path / "notes"}, batch_rows=4)
    for batch in [
        *noted.batches(["id", "notes.number"]),
        noted.take([documents[7].id], ["id", "notes.number"]),
    ]:
        assert batch["notes.number"].to_pylist() == [int(i[:4], 16) for i in batch["id"].to_pylist()]


@given(st.integers(0, 59))
def test_one_document_more_changes_few_shards(tmp_path_factory: pytest.TempPathFactory, place: int) -> None:
    folder = tmp_path_factory.mktemp("corpora")
    documents = [text(number) for number in range(60)]
    before = written(folder / "before", documents)
    after = written(folder / "after", [*documents[:place], text(1000), *documents[place:]])
    had = {path.read_bytes() for path in before.shards}
    assert len([path for path in after.shards if path.read_bytes() not in had]) <= 3


def test_a_folder_without_shards_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no corpus here"):
        Corpus(tmp_path)
