"""The conformance suite of stores: every test runs on SQLite, and on PostgreSQL where a server is named."""

import shutil

import pytest

from databases import IN_A_FILE
from gyrocompass.core.artifact import DocumentRow, writing
from gyrocompass.core.errors import BadInput, DamagedArtifact, GyroError, MissingDependency
from gyrocompass.core.store import Store


def create(store: Store, key: str, content: str = "x", kind: str = "dataset", **options):
    with store.create(key, kind, **options) as draft:
        (draft.path / "file").write_text(content)
        draft.counts["bytes"] = len(content)
    return draft.artifact


def test_what_a_stage_made_is_found_by_its_key(store):
    assert store.find("key") is None
    made = create(store, "key", recipe={"a": 1})
    assert store.find("key") == made
    assert made.path == store.root / "artifacts" / made.id
    assert store.find("other") is None


def test_it_is_found_by_another_process(store, store_url):
    made = create(store, "key")
    assert Store(store.root, store_url).find("key") == made


def test_the_same_content_again_is_the_same_artifact(store):
    first = create(store, "one", recipe={"a": 1})
    second = create(store, "two", recipe={"a": 1})
    assert first == second, "the first manifest stays, with its time"
    assert store.find("one") == store.find("two") == first
    assert len(store.artifacts()) == 1


def test_a_key_may_come_to_mean_another_artifact(store):
    create(store, "key", "first")
    second = create(store, "key", "second")
    assert store.find("key") == second
    assert len(store.artifacts()) == 2


def test_an_error_inside_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError), store.create("key", "dataset") as draft:
        (draft.path / "file").write_text("half")
        _ = 1 / 0
    assert store.find("key") is None
    assert store.artifacts() == []
    assert list((store.root / "artifacts").iterdir()) == []


def test_an_error_while_documents_are_listed_registers_nothing(store):
    def rows():
        yield DocumentRow("d1", "a.py", "stdlib", "code")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), store.create("key", "dataset") as draft:
        draft.documents = rows()
    assert store.find("key") is None
    assert store.artifacts() == []
    made = create(store, "key", "")
    assert list(store.documents(made.id)) == []


def test_a_damaged_artifact_says_what_to_do(store):
    made = create(store, "key")
    (made.path / "file").write_text("y")
    with pytest.raises(DamagedArtifact) as caught:
        store.find("key")
    assert made.id in caught.value.what
    assert "file was changed" in caught.value.what
    assert caught.value.fix == f"delete {made.path}; the stage that made it then runs again"
    assert store.find("key", verify=False) is not None
    shutil.rmtree(made.path)
    assert store.find("key") is None
    assert create(store, "key").id == made.id


def test_a_damaged_artifact_is_mended_by_making_it_again(store):
    made = create(store, "key")
    (made.path / "file").unlink()
    assert create(store, "key").id == made.id
    assert store.find("key").id == made.id


def test_an_artifact_under_another_name_is_damage(store):
    one, two = create(store, "one", "1"), create(store, "two", "2")
    shutil.rmtree(one.path)
    shutil.copytree(two.path, one.path)
    with pytest.raises(DamagedArtifact, match=f"this folder holds the artifact {two.id}"):
        store.find("one")


def test_open_by_id_prefix_and_hash(store):
    data = create(store, "one", kind="dataset")
    model = create(store, "two", kind="model")
    for name in (
        model.id,
        "mod",
        model.id[:12],
        model.manifest.content_hash[:8],
        model.manifest.content_hash,
    ):
        assert store.open(name) == model
    with pytest.raises(BadInput, match="any of 2 artifacts") as caught:
        store.open("")
    assert data.id in str(caught.value)
    with pytest.raises(BadInput, match=f"the nearest: .*{model.id}"):
        store.open("modle-" + model.id[6:10])
    with pytest.raises(BadInput, match="no artifact '%'"):
        store.open("%")
    shutil.rmtree(model.path)
    with pytest.raises(BadInput, match="its folder is gone"):
        store.open(model.id)
    assert [summary.present for summary in store.artifacts()] == [
        summary.id == data.id for summary in store.artifacts()
    ]


def test_documents_are_listed_and_read_back(store):
    rows = [
        DocumentRow("d2", "b é.py", "stdlib", "code/library", "quarantined"),
        DocumentRow("d1", "a.py", "stdlib", "code/library"),
        DocumentRow("d3", "b.py", "pairs", "chat", "kept", ("d1", "d2")),
    ]
    with store.create("key", "dataset") as draft:
        draft.documents = iter(rows)
    assert list(store.documents(draft.artifact.id)) == sorted(rows)
    store.record_documents(draft.artifact.id, [rows[0]._replace(status="kept", slice="code")])
    assert {row.document_id: (row.status, row.slice) for row in store.documents(draft.artifact.id)} == {
        "d1": ("kept", "code/library"),
        "d2": ("kept", "code"),
        "d3": ("kept", "chat"),
    }
    with pytest.raises(BadInput, match="no artifact"):
        store.record_documents("dataset-0", rows)


def test_listings_longer_than_a_page(store, monkeypatch):
    monkeypatch.setattr("gyrocompass.core.store._PAGE_ROWS", 7)
    made = create(store, "key")
    for count in (7, 14, 20):
        rows = [DocumentRow(f"d{n:04d}", f"{n}.py", "s", "code", "kept", (f"o{n}",)) for n in range(count)]
        store.record_documents(made.id, reversed(rows))
        assert list(store.documents(made.id)) == rows


def test_parents_from_elsewhere_are_known_from_their_manifests(store, tmp_path):
    with writing(tmp_path / "elsewhere", "model", parents={"train": "tokens-0000000000000000"}) as draft:
        pass
    child = create(store, "key", parents={"init": draft.artifact})
    assert child.manifest.parents == {"init": draft.artifact.id}
    assert {summary.id: summary.present for summary in store.artifacts()} == {
        child.id: True,
        draft.artifact.id: False,
    }


def test_work_folders(store):
    folder = store.work_dir("abc123")
    (folder / "checkpoint").write_text("half")
    assert (store.work_dir("abc123") / "checkpoint").read_text() == "half"
    store.forget_work("abc123")
    store.forget_work("abc123")
    assert list(store.work_dir("abc123").iterdir()) == []
    with pytest.raises(AssertionError):
        store.work_dir("../outside")


def test_writers_wait_for_each_other_and_readers_do_not_fail(store):
    with store.database.write():
        assert store.artifacts() == []


@pytest.mark.parametrize("url", ["mysql://localhost/x", "sqlite://", "nonsense", "sqlite+aiosqlite:///x"])
def test_other_databases_are_refused(tmp_path, url):
    with pytest.raises(BadInput, match="database"):
        Store(tmp_path, url)


@IN_A_FILE
def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "store.sqlite").write_bytes(b"years of other work" * 100)
    with pytest.raises(GyroError, match="not a database"):
        Store(tmp_path)


def test_a_server_that_is_not_there_hides_the_password(tmp_path):
    with pytest.raises(GyroError, match="does not work") as caught:
        Store(tmp_path, f"postgresql://me:secret@/x?host={tmp_path}&connect_timeout=2")
    assert "secret" not in str(caught.value)


def test_postgresql_without_its_driver_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(MissingDependency, match=r"PostgreSQL needs the package psycopg") as caught:
        Store(tmp_path, "postgresql://localhost/x")
    assert "gyrocompass[postgres]" in str(caught.value)
