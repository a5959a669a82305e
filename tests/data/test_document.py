from datetime import UTC
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import any_text

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import (
    Document,
    Evidence,
    Message,
    Provenance,
    Quarantined,
    Record,
    Repair,
    Skipped,
    read_documents,
    read_quarantined,
    write_documents,
    write_records,
)

optional_text = st.none() | any_text
numbers = st.none() | st.integers(0, 2**62)
labels = {
    "path": any_text,
    "source": st.sampled_from(["s", "t"]),
    "slice": st.sampled_from(["a", "b"]),
    "licence": optional_text,
    "language": optional_text,
    "origin_ids": st.lists(any_text, max_size=2).map(tuple),
    "weight": st.floats(0.001, 100),
    "group": optional_text,
    "time": st.none() | st.datetimes(timezones=st.just(UTC)),
    "file_hash": optional_text,
    "provenance": st.none()
    | st.builds(
        Provenance,
        any_text,
        st.lists(st.builds(Evidence, any_text, any_text, any_text), max_size=2).map(tuple),
        st.lists(
            st.builds(Repair, any_text, st.integers(0, 10**6), st.integers(0, 10**6), any_text), max_size=2
        ).map(tuple),
    ),
}
messages = st.lists(st.builds(Message, any_text, any_text), max_size=3).map(tuple)
documents = st.one_of(
    st.builds(Document, kind=st.just("text"), text=any_text, **labels),
    st.builds(Document, kind=st.just("completion"), prompt=any_text, text=any_text, **labels),
    st.builds(Document, kind=st.just("chat"), messages=messages, **labels),
)
quarantined = st.builds(
    Quarantined,
    any_text,
    st.none() | st.integers(1, 10**6),
    any_text,
    any_text,
    st.just("s"),
    optional_text,
    offset=numbers,
    n_bytes=numbers,
)
records = st.lists(
    st.one_of(documents, quarantined, st.builds(Skipped, any_text, st.sampled_from(["empty file", "limit"])))
)


@settings(deadline=None, max_examples=60)
@given(records=records)
def test_records_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record]
) -> None:
    folder = tmp_path_factory.mktemp("documents")
    tally = write_records(folder, iter(records))
    kept = [record for record in records if isinstance(record, Document)]
    assert list(read_documents(folder)) == kept
    assert list(read_quarantined(folder)) == [r for r in records if isinstance(r, Quarantined)]
    assert tally.documents.total() == len(kept)
    assert tally.bytes.total() == sum(document.n_bytes for document in kept)
    assert tally.quarantined.total() + tally.skipped.total() == len(records) - len(kept)


def test_many_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr("gyrocompass.data.document._ROW_GROUP_BYTES", 10)
    written = [Document("text", str(k), "s", "a", text="four") for k in range(10)]
    write_documents(tmp_path, written)
    assert list(read_documents(tmp_path)) == written
    with pq.ParquetFile(tmp_path / "documents.parquet") as file:
        assert file.num_row_groups == 4


def test_a_folder_without_documents(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no documents\.parquet here"):
        next(read_documents(tmp_path))


def test_identity() -> None:
    one = Document("text", "a", "s", "x", text="hello")
    assert Document("text", "a", "s", "y", text="hello", weight=2.0).id == one.id
    assert Document("text", "b", "s", "x", text="hello").content_hash == one.content_hash
    others = [
        Document("text", "b", "s", "x", text="hello"),
        Document("text", "a", "t", "x", text="hello"),
        Document("text", "a", "s", "x", text="hello."),
        Document("completion", "a", "s", "x", text="hello"),
        Document("chat", "a", "s", "x", messages=(Message("user", "hello"),)),
    ]
    assert len({one.id, *(other.id for other in others)}) == 6
    joined = [Document("completion", "a", "s", "x", prompt=p, text=t) for p, t in [("ab", "c"), ("a", "bc")]]
    assert joined[0].content_hash != joined[1].content_hash
