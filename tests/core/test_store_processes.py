"""Stores under several processes, and under a kill at every step of `create`."""

import os
import signal
from pathlib import Path
from unittest import mock

import pytest

from gyrocompass.core.artifact import DocumentRow, read_artifact, writing
from gyrocompass.core.folder import land, staging, sweep
from gyrocompass.core.store import Store
from processes import PROCESSES, run, run_together


def create(store: Store, key: str, content: str) -> None:
    with store.create(key, "dataset", recipe={"content": content}) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "a").write_text(content)
        (draft.path / "b").write_text(content)
        draft.documents = [DocumentRow(f"d{n}", f"{n}.py", "s", "code") for n in range(20)]


def run_through_gate(count, target, *arguments) -> None:
    gate = PROCESSES.Barrier(count)
    assert run_together([(target, gate, *arguments)] * count) == [0] * count


def kill_at(step: int):
    """Patches that kill the process instead of taking its nth step on the disk."""
    taken = iter(range(10**6))

    def counted(real):
        def call(*arguments, **options):
            if next(taken) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    steps = [
        (os, "fsync"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "unlink"),
        (os, "open"),
    ]
    return [mock.patch.object(owner, name, counted(getattr(owner, name))) for owner, name in steps]


def create_and_die(root: Path, url: str | None, key: str, content: str, step: int) -> None:
    store = Store(root, url)
    for patch in kill_at(step):
        patch.start()
    create(store, key, content)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_step_of_create_leaves_all_or_nothing(tmp_path, damaged):
    root = tmp_path / "store"
    killed = 0
    for step in range(100):
        if damaged:
            create(Store(root), "key", "same")
            (Store(root).find("key").path / "b").write_text("damage")
        content = "same" if damaged else f"content {step}"
        ended = run(create_and_die, root, None, "key" if damaged else f"key {step}", content, step)
        visible = [entry for entry in (root / "artifacts").iterdir() if not entry.name.startswith(".")]
        for entry in visible:
            if not damaged:
                assert read_artifact(entry).id == entry.name
        store = Store(root)
        assert not [entry.name for entry in (root / "artifacts").iterdir() if entry.name.startswith(".")]
        if not damaged:
            found = store.find(f"key {step}")
            assert found is None or len(list(store.documents(found.id))) == 20
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        killed += 1
    assert killed > 10, "the steps were counted"
    assert ended == 0
    create(store, "key", "same")
    assert store.find("key") is not None


def replace_and_die(target: Path, step: int) -> None:
    for patch in kill_at(step):
        patch.start()
    with writing(target, "model") as draft:
        (draft.path / "file").write_text("new")


def test_a_kill_while_replacing_leaves_the_old_or_the_new(tmp_path):
    target = tmp_path / "here" / "model"
    ids = set()
    for step in range(100):
        with writing(target, "model") as draft:
            (draft.path / "file").write_text("old")
        ended = run(replace_and_die, target, step)
        sweep(target.parent)
        assert [entry.name for entry in target.parent.iterdir()] == ["model"]
        ids.add(read_artifact(target).id)
        if ended == 0:
            break
    assert step > 10
    assert ended == 0
    assert len(ids) == 2


def create_at_once(gate, root: Path, url: str | None) -> None:
    store = Store(root, url)
    for turn in range(5):
        gate.wait(30)
        create(store, "key", f"turn {turn}")
        assert store.find("key") is not None


def test_processes_may_create_the_same_artifact_at_once(tmp_path, store_url):
    root = tmp_path / "store"
    run_through_gate(3, create_at_once, root, store_url)
    store = Store(root, store_url)
    assert len(store.artifacts()) == 5
    assert all(summary.present for summary in store.artifacts())
    assert len(list((root / "artifacts").iterdir())) == 5


def open_at_once(gate, root: Path, url: str | None) -> None:
    gate.wait(30)
    assert Store(root, url).artifacts() == []


def test_processes_may_open_a_new_store_at_once(tmp_path, store_url):
    run_through_gate(4, open_at_once, tmp_path / "store", store_url)


def test_a_writer_that_lives_is_left_alone(tmp_path):
    with staging(tmp_path) as folder:
        (folder / "file").write_text("in the making")
        sweep(tmp_path)
        with staging(tmp_path) as second:
            assert second != folder
        assert (folder / "file").exists()
    assert list(tmp_path.iterdir()) == []


def test_landing_on_another_keeps_or_replaces_it(tmp_path):
    for replace, expected in ((False, "first"), (True, "third")):
        for content in ("first", "second", "third"):
            with staging(tmp_path) as folder:
                (folder / "file").write_text(content)
                landed = land(folder, tmp_path / f"target {replace}", replace=replace)
                assert landed == (replace or content == "first")
        assert (tmp_path / f"target {replace}" / "file").read_text() == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_without_a_lock_are_removed(tmp_path):
    (tmp_path / ".gyro-staged-0123").mkdir()
    (tmp_path / ".gyro-staged-4567.lock").touch()
    (tmp_path / ".hidden").mkdir()
    sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [".hidden"]
