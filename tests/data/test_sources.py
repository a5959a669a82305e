import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gyrocompass.core.config import Config, parse
from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.data.document import Document, Message, Quarantined, Record, Skipped, write_records
from gyrocompass.data.sources import Source, fingerprint, read_sources

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(share: float = 1.0, **source: Any) -> list[Record]:
    return list(read_sources([Source.model_validate(source)], max_quarantined_share=share))


def documents(records: list[Record]) -> list[Document]:
    return [record for record in records if isinstance(record, Document)]


def quarantined(records: list[Record]) -> list[Quarantined]:
    return [record for record in records if isinstance(record, Quarantined)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(here: Path, *lines: Any, name: str = "a.jsonl") -> str:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    data = b"\n".join(encoded) + b"\n"
    (here / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return name


# --- JSON lines ---------------------------------------------------------------------------------------------


def test_kinds_of_records(here: Path) -> None:
    path = jsonl(
        here,
        {"text": "one", "url": "ignored", "score": [1, 2]},
        {
            "messages": CHAT,
            "slice": "help",
            "source": "forum",
            "licence": "MIT",
            "language": "en",
            "weight": 2,
        },
        {"prompt": "p", "completion": "c", "id": 17, "group": "g", "weight": 0.5, "text": None},
    )
    text, chat, completion = documents(read(jsonl={"path": path, "weight": 3.0, "licence": "CC0-1.0"}))
    assert text == Document("text", "a.jsonl:1", "a.jsonl", "text", text="one", licence="CC0-1.0", weight=3.0)
    assert chat == Document(
        "chat",
        "a.jsonl:2",
        "forum",
        "help",
        messages=(Message("user", "q"), Message("assistant", "a")),
        licence="MIT",
        language="en",
        weight=6.0,
    )
    assert (completion.path, completion.prompt, completion.text) == ("a.jsonl#17", "p", "c")
    assert (completion.group, completion.weight, completion.slice) == ("g", 1.5, "completion")


MALFORMED: list[tuple[Any, str]] = [
    (b"{", "not JSON: Expecting property name"),
    (b'{"text": "x"} trailing', "not JSON: Extra data"),
    (b'{"text": "\xff\xfe"}', "not UTF-8: invalid start byte at byte 10"),
    (b"[" * 100_000, "not JSON: maximum recursion depth"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    (["text"], "not an object with fields but a list"),
    (None, "not an object with fields but null"),
    (
        {},
        "prompt + completion, prompt + steps, prompt + chosen + rejected; fields: none",
    ),
    (
        {"content": "x"},
        "prompt + completion, prompt + steps, prompt + chosen + rejected; fields: content",
    ),
    ({"text": 3}, "text is not a text but a int"),
    ({"text": " \n"}, "text is empty"),
    ({"text": "x", "messages": CHAT}, "more than one content: messages, text"),
    ({"prompt": "x"}, "one is missing"),
    ({"prompt": "x", "completion": ""}, "completion is empty"),
    ({"prompt": CHAT, "completion": CHAT}, "completion is not one message of the assistant"),
    (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ({"messages": []}, "messages is not a list of messages"),
    ({"messages": "hi"}, "messages is not a list of messages but a text"),
    ({"messages": ["hi"]}, r"messages[0] is not an object but a text"),
    ({"messages": CHAT[:1]}, "no assistant message"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "no assistant message"),
    (
        {"messages": [*CHAT, {"role": "wizard", "content": "x"}]},
        "role is 'wizard'; known: system",
    ),
    ({"messages": [*CHAT, {"content": "x"}]}, "messages[2].role is None"),
    ({"messages": [*CHAT, {"role": ["user"], "content": "x"}]}, "messages[2].role is ['user']"),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
        "messages[1].content is not a text but null",
    ),
    ({"messages": [*CHAT, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls tools"),
    ({"text": "x", "weight": "2"}, "weight is not a number but a text"),
    ({"text": "x", "weight": True}, "weight is not a number but true or false"),
    ({"text": "x", "weight": 0}, "weight is 0; it must be finite and above 0"),
    (b'{"text": "x", "weight": NaN}', "weight is nan"),
    (b'{"text": "x", "weight": 1e999}', "weight is inf"),
    ({"text": "x", "weight": 10**400}, "it must be finite"),
    ({"text": "x", "slice": 3}, "slice is not a text but a int"),
    ({"text": "x", "slice": ""}, "slice is empty"),
    ({"text": "x", "slice": "total"}, 'slice is "total", a name that is kept'),
    ({"text": "x", "weight": 1e-50}, "weight is 1e-50; in float32 it must be from 1.175e-38 to 3.403e+38"),
    ({"text": "x", "weight": 1e39}, "weight is 1e+39; in float32 it must be from"),
    ({"text": "x", "id": True}, "id is not a text but true or false"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_malformed_records_are_quarantined_with_their_place(here: Path, line: Any, reason: str) -> None:
    path = jsonl(here, {"text": "before"}, line, {"text": "after"})
    records = read(jsonl={"path": path, "name": "export"})
    assert [document.text for document in documents(records)] == ["before", "after"]
    (record,) = quarantined(records)
    assert reason in record.reason
    assert (record.path, record.line, record.source) == ("a.jsonl", 2, "export")
    assert record.excerpt and len(record.excerpt) <= 160


def test_compressed_lines_a_byte_order_mark_and_empty_lines(here: Path) -> None:
    path = jsonl(here, b'\xef\xbb\xbf{"text": "one"}', b"  ", {"text": "two\r\n"}, name="a.jsonl.gz")
    records = read(jsonl={"path": path})
    assert [document.text for document in documents(records)] == ["one", "two\r\n"]
    assert [record for record in records if isinstance(record, Skipped)] == [
        Skipped("a.jsonl.gz:2", "empty line", "a.jsonl.gz")
    ]


def test_a_compressed_file_cut_short_fails(here: Path) -> None:
    path = jsonl(here, *({"text": f"{k} {k**9}"} for k in range(5000)), name="a.jsonl.gz")
    data = (here / path).read_bytes()
    (here / path).write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match=r"damaged.*\n.*after line \d\d+"):
        read(jsonl={"path": path})
    (here / path).write_bytes(b"plain text")
    with pytest.raises(BadInput, match="Not a gzipped file"):
        read(jsonl={"path": path})


def test_other_field_names(here: Path) -> None:
    path = jsonl(here, {"content": "x", "text": 3})
    (document,) = documents(read(jsonl={"path": path, "fields": {"text": "content"}}))
    assert document.text == "x"


def test_folders_and_patterns_in_order(here: Path) -> None:
    (here / "in" / "deep").mkdir(parents=True)
    for name in ("in/b.jsonl", "in/deep/a.jsonl", "in/a.ndjson"):
        jsonl(here, {"text": name}, name=name)
    (here / "in/other.txt").write_text("not read")
    found = [document.path for document in documents(read(jsonl={"path": "in"}))]
    assert found == ["in/a.ndjson:1", "in/b.jsonl:1", "in/deep/a.jsonl:1"]
    assert len(read(jsonl={"path": "in/*.jsonl"})) == 1
    assert len(read(jsonl={"path": str(here / "in/**/*.jsonl")})) == 2


# --- tables -------------------------------------------------------------------------------------------------


def test_parquet(here: Path) -> None:
    pq.write_table(
        pa.table({"text": ["one", None, "three"], "messages": [None, CHAT, None]}), here / "t.parquet"
    )
    one, two, three = documents(read(parquet={"path": "t.parquet"}))
    assert (one.text, two.messages[1].content, three.path) == ("one", "a", "t.parquet:3")


def test_rows_of_parquet_are_counted_over_batches(here: Path) -> None:
    pq.write_table(pa.table({"text": [str(k) for k in range(1, 2501)]}), here / "t.parquet")
    assert all(d.path == f"t.parquet:{d.text}" for d in documents(read(parquet={"path": "t.parquet"})))


def test_parquet_with_bad_rows(here: Path) -> None:
    raw = pa.array([b"one", b"\xff\xfe", b"three", b" "]).view(pa.string())
    pq.write_table(pa.table({"text": raw}), here / "t.parquet")
    records = read(parquet={"path": "t.parquet"})
    assert [document.text for document in documents(records)] == ["one", "three"]
    assert [(q.line, q.reason) for q in quarantined(records)] == [
        (2, "not UTF-8: invalid start byte"),
        (4, "text is empty"),
    ]


def test_parquet_that_cannot_be_read(here: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), here / "t.parquet")
    with pytest.raises(BadInput, match="columns text, messages, prompt, completion, chosen; there are: body"):
        read(parquet={"path": "t.parquet"})
    assert len(documents(read(parquet={"path": "t.parquet", "fields": {"text": "body"}}))) == 1
    data = (here / "t.parquet").read_bytes()
    (here / "t.parquet").write_bytes(data[:-20])
    with pytest.raises(BadInput, match="Parquet file cannot be read"):
        read(parquet={"path": "t.parquet"})


@pytest.fixture
def saved(here: Path) -> Callable[..., Any]:
    """`datasets` itself writes what is read."""
    datasets = pytest.importorskip("datasets")

    def save(rows: list[dict[str, Any]], **options: Any) -> Any:
        dataset = datasets.Dataset.from_list(rows)
        dataset.save_to_disk(str(here / "saved"), **options)
        return dataset

    return save


def test_a_saved_dataset_reads_as_datasets_reads_it(here: Path, saved: Callable[..., Any]) -> None:
    rows = [{"text": f"row {k} é", "slice": "ab"[k % 2], "score": k / 2} for k in range(50)]
    dataset = saved(rows, num_shards=3)
    assert len(list((here / "saved").glob("*.arrow"))) == 3
    found = documents(read(datasets={"path": "saved"}))
    assert [(document.text, document.slice) for document in found] == [
        (r["text"], r["slice"]) for r in dataset
    ]
    assert [document.path for document in found] == [f"saved:{k}" for k in range(1, 51)]
    assert documents(read(files={"path": "saved"})) == found


def test_a_saved_selection_and_chats(here: Path, saved: Callable[..., Any]) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(
        [{"messages": [CHAT[0], {"role": "assistant", "content": str(k)}]} for k in range(9)]
    )
    selection = dataset.select([7, 2, 5]).filter(lambda row: row["messages"][1]["content"] != "2")
    selection.save_to_disk(str(here / "saved"))
    found = documents(read(datasets={"path": "saved"}))
    assert [document.messages[1].content for document in found] == ["7", "5"]


def test_splits(here: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(here / "saved"))
    with pytest.raises(BadInput, match="several splits: train, test"):
        read(datasets={"path": "saved"})
    with pytest.raises(BadInput, match="no split tran; did you mean train"):
        read(datasets={"path": "saved", "split": "tran"})
    (document,) = documents(read(datasets={"path": "saved", "split": "test"}))
    assert document.text == "test"
    with pytest.raises(BadInput, match="without a split test"):
        read(datasets={"path": "saved/test", "split": "test"})


def test_a_weight_is_checked_after_the_source_has_multiplied_it(here: Path) -> None:
    path = jsonl(here, {"text": "x", "weight": 1e-20}, {"text": "y", "weight": 1.0})
    (record,) = quarantined(read(jsonl={"path": path, "weight": 1e-20}))
    assert record.line == 1 and "weight is 1e-20 times the source's 1e-20; in float32" in record.reason


def arrow_folder(folder: Path, state: Any) -> None:
    folder.mkdir(parents=True)
    table = pa.table({"text": ["secret"]})
    with pa.OSFile(str(folder / "s.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("name", ["{here}/other/s.arrow", "../other/s.arrow", "..", "", None, 3, "a\\\\b"])
def test_a_saved_dataset_reads_no_file_outside_its_folder(here: Path, name: Any) -> None:
    arrow_folder(here / "other", {"_data_files": [{"filename": "s.arrow"}]})
    assert [document.text for document in documents(read(datasets={"path": "other"}))] == ["secret"]
    named = name.format(here=here) if isinstance(name, str) else name
    arrow_folder(here / "saved", {"_data_files": [{"filename": named}]})
    with pytest.raises(BadInput, match="not a file of this folder"):
        read(datasets={"path": "saved"})


@pytest.mark.parametrize("state", [{}, [], 3, "x", {"_data_files": 3}, {"_data_files": [3]}])
def test_a_state_that_datasets_does_not_write(here: Path, state: Any) -> None:
    arrow_folder(here / "saved", state)
    with pytest.raises(BadInput, match=r"no JSON object|no list _data_files|not a file of this folder"):
        read(datasets={"path": "saved"})
    (here / "saved/state.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read as JSON"):
        read(datasets={"path": "saved"})


@pytest.mark.parametrize("splits", [{}, [], {"splits": "train"}, {"splits": ["../other"]}])
def test_a_dict_of_splits_that_datasets_does_not_write(here: Path, splits: Any) -> None:
    arrow_folder(here / "other", {"_data_files": [{"filename": "s.arrow"}]})
    (here / "saved").mkdir()
    (here / "saved/dataset_dict.json").write_text(json.dumps(splits))
    with pytest.raises(BadInput, match=r"no JSON object|no list of splits"):
        read(datasets={"path": "saved", "split": "../other"})


def test_folders_that_are_no_saved_dataset(here: Path, saved: Callable[..., Any]) -> None:
    (here / "plain").mkdir()
    with pytest.raises(BadInput, match="not a folder that save_to_disk"):
        read(datasets={"path": "plain"})
    saved([{"text": "x"}])
    (arrow,) = (here / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(BadInput, match="Arrow file cannot be read"):
        read(datasets={"path": "saved"})
    arrow.unlink()
    with pytest.raises(BadInput, match="Arrow file cannot be read"):
        read(datasets={"path": "saved"})
    state = json.loads((here / "saved/state.json").read_text())
    (here / "saved/state.json").write_text(
        json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]})
    )
    with pytest.raises(BadInput, match="flatten_indices"):
        read(datasets={"path": "saved"})


# --- files --------------------------------------------------------------------------------------------------


def test_files_by_suffix(here: Path) -> None:
    folder = here / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "x.py").write_text("hidden = 1")
    (folder / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    (folder / "b.md").write_text("# é")
    (folder / "c.rs").write_bytes(b"ok\n\n\xff\n")
    (folder / "d.png").write_bytes(b"\x89PNG")
    (folder / "e.txt").write_text(" \n")
    jsonl(here, {"text": "record"}, name="in/f.jsonl")
    records = read(files={"path": "in", "licence": "MIT"})
    a, b, f = documents(records)
    assert a == Document("text", "in/a.py", "in", "code", text="x = 1\n", licence="MIT", language="python")
    assert (b.slice, b.language, b.text) == ("text", None, "# é")
    assert (f.path, f.licence, f.slice) == ("in/f.jsonl:1", "MIT", "text")
    assert [(q.path, q.line, q.reason) for q in quarantined(records)] == [
        ("in/c.rs", 3, "not UTF-8: invalid start byte")
    ]
    assert [r for r in records if isinstance(r, Skipped)] == [
        Skipped("in/d.png", "not a suffix of text or code: .png", "in"),
        Skipped("in/e.txt", "empty file", "in"),
    ]


def test_single_files_and_included_ones_have_any_suffix(here: Path) -> None:
    (here / "in").mkdir()
    (here / "in/notes.log").write_text("log")
    (here / "in/a.md").write_text("md")
    assert [d.text for d in documents(read(files={"path": "in/notes.log"}))] == ["log"]
    assert [d.text for d in documents(read(files={"path": "in", "include": ["**/*.log"], "slice": "s"}))] == [
        "log"
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"files": {"path": "missing"}}, "no such file or folder"),
        ({"jsonl": {"path": "missing.jsonl"}}, "no such file or folder"),
        ({"jsonl": {"path": "*.jsonl"}}, "no file matches"),
        ({"files": {"path": "empty"}}, "no file matches"),
        ({"files": {"path": "empty", "include": ["*.md"]}}, "no file matches"),
        ({"parquet": {"path": "empty"}}, "no file matches"),
        ({"datasets": {"path": "missing"}}, "not a folder that save_to_disk"),
        ({"files": {"path": "blank.md"}}, "the source holds no document"),
    ],
)
def test_sources_without_anything_to_read(here: Path, source: dict[str, Any], message: str) -> None:
    (here / "empty").mkdir()
    (here / "blank.md").write_text("")
    with pytest.raises(BadInput, match=message) as caught:
        read(**source)
    assert caught.value.where and caught.value.fix


def test_too_many_malformed_records_fail(here: Path) -> None:
    path = jsonl(here, *({"text": "ok"} for _ in range(96)), *({"txt": k} for k in range(4)))
    assert len(quarantined(read(share=0.04, jsonl={"path": path}))) == 4
    with pytest.raises(BadInput) as caught:
        read(share=0.039, jsonl={"path": path})
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 of 100 records cannot be used (4.0%, at most 3.9% may); the first of them:"
    assert [line.split(": ")[0].strip() for line in lines[1:4]] == ["a.jsonl:97", "a.jsonl:98", "a.jsonl:99"]
    assert lines[4] == "  where: a.jsonl"


def test_the_share_is_of_each_source(here: Path) -> None:
    good = jsonl(here, *({"text": "ok"} for _ in range(99)), name="good.jsonl")
    bad = jsonl(here, {"text": "ok"}, {}, name="bad.jsonl")
    sources = [Source.model_validate({"jsonl": {"path": path}}) for path in (good, bad)]
    with pytest.raises(BadInput, match="1 of 2 records"):
        list(read_sources(sources, max_quarantined_share=0.1))


# --- config and fingerprint ---------------------------------------------------------------------------------


class Recipe(Config):
    sources: tuple[Source, ...]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"jsnl": {"path": "x"}}, "did you mean jsonl"),
        ({"jsonl": {"path": "x", "licens": "MIT"}}, "did you mean licence"),
        ({"jsonl": {"path": "x"}, "stdlib": {}}, "found stdlib, jsonl"),
        (
            {},
            "one key of stdlib, files, jsonl, parquet, datasets, dataset, ingest, debian; found none",
        ),
        ({"stdlib": {"limits": {"code/libary": {"bytes": 3}}}}, "code/library"),
        ({"files": {"path": "x", "weight": -1}}, "greater than 0"),
        ({"files": {"path": "x", "weight": 1e-50}}, "in float32 it must be from"),
        ({"files": {"path": "x", "weight": 1e39}}, "in float32 it must be from"),
        ({"files": {"path": "x", "weight": float("inf")}}, "finite number"),
        ({"files": {"path": "x", "slice": "total"}}, "kept for the sum of all slices"),
        ({"files": {"path": "x", "slice": ""}}, "kept for the sum of all slices"),
        ({"jsonl": {"path": "x", "fields": {"txt": "content"}}}, "text"),
    ],
)
def test_config_mistakes_are_named(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Recipe, {"sources": [source]}, "recipe.yaml")


def test_fingerprint_follows_names_and_contents(here: Path) -> None:
    source = Source.model_validate({"files": {"path": "in"}})
    (here / "in").mkdir()
    (here / "in/a.md").write_text("one")
    first = fingerprint(source)
    assert fingerprint(source) == first
    (here / "in/a.md").write_text("two")
    second = fingerprint(source)
    (here / "in/a.md").rename(here / "in/b.md")
    third = fingerprint(source)
    assert len({first, second, third}) == 3
    with pytest.raises(BadInput):
        fingerprint(Source.model_validate({"jsonl": {"path": "in"}}))
    stdlib = Source.model_validate({"stdlib": {}})
    assert fingerprint(stdlib) == fingerprint(stdlib)


# --- the same record again, and names that are no text ---


def test_a_file_that_two_sources_have_in_common_is_read_once(here: Path) -> None:
    (here / "notes").mkdir()
    for name in ("a.txt", "b.txt"):
        (here / "notes" / name).write_text(name)
    given = [{"path": "notes"}, {"path": "notes/a.txt", "slice": "more"}, {"path": str(here / "notes/b.txt")}]
    sources = [Source.model_validate({"files": files}) for files in given]
    records = list(read_sources(sources, max_quarantined_share=0.0))
    assert [document.path for document in documents(records)] == ["notes/a.txt", "notes/b.txt"]
    again = [record for record in records if isinstance(record, Skipped)]
    assert [record.reason for record in again] == ["listed twice, read before"] * 2


def test_copies_and_equal_lines_stay(here: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (here / name).write_text("the same")
    path = jsonl(here, {"text": "one"}, {"text": "one"}, name="c.jsonl")
    records = read(files={"path": "*.txt"}) + read(jsonl={"path": path})
    assert len(documents(records)) == 4


@pytest.mark.parametrize("kind", ["files", "jsonl"])
def test_a_file_whose_name_is_not_utf_8_is_quarantined(kind: str, here: Path) -> None:
    folder = here / "latin"
    folder.mkdir()
    for name in (b"caf\xe9.jsonl", b"good.jsonl"):
        (folder / os.fsdecode(name)).write_text('{"text": "x"}\n')
    records = read(**{kind: {"path": "latin"}})
    (bad,) = quarantined(records)
    assert bad.path == r"latin/caf\xe9.jsonl" and bad.reason == "the file's name is not UTF-8"
    assert len(documents(records)) == 1
    assert write_records(here, records).quarantined == {"latin": 1}
    before = fingerprint(Source.model_validate({kind: {"path": "latin"}}))
    (folder / os.fsdecode(b"caf\xe9.jsonl")).unlink()
    assert fingerprint(Source.model_validate({kind: {"path": "latin"}})) != before
