"""Folders that appear whole or not at all.

    staging(parent)  a hidden folder to write into; gone again unless it was landed
    sync(folder)     its files and folders are on the disk, not in a cache
    land(...)        one rename gives it its name
    sweep(parent)    removes what killed writers left behind
    locked(folder)   whether this process, and no other, works in a folder that stays
    write_whole(...) the same for one file of text

A staged folder is guarded by a lock file beside it, held with `flock` as long as its writer lives. The
kernel drops the lock when a process dies, however it dies, so that a leftover is told from work in progress
without trusting process numbers, which are reused. Folders that a writer forked into are kept until the
last of its children ends.

Replacing an existing folder takes two renames (POSIX has no exchange of non-empty folders that Python can
reach). A reader may find nothing for the instant between them, never a mixture; a crash there leaves the
old folder under a hidden name and `sweep` puts it back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STAGED = ".gyro-staged-"
_REPLACED = ".gyro-replaced-"
_LOCK = ".lock"


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A new hidden folder in `parent` to write into; removed on leaving unless it was landed.

    Args:
        parent: the folder it will be landed in (made if needed): a rename must not cross file systems.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    folder, lock = _locked_name(parent)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock file; False if another process holds it. The folder itself need not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _take(_lock_of(folder))
    try:
        yield lock is not None
    finally:
        if lock is not None:
            _lock_of(folder).unlink(missing_ok=True)
            os.close(lock)


def sync(folder: Path) -> None:
    """Force every file and folder below (and the folder itself) to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync_one(Path(root) / name)
        _sync_one(Path(root))


def land(staged: Path, target: Path, *, replace: bool) -> bool:
    """Give a staged, synced folder its final name; True if it got it.

    Args:
        staged: the folder from `staging`.
        target: its final name, in the same parent.
        replace: whether an existing folder of that name gives way. If not, the first one stays, and the
            staged folder is left to be removed.
    """
    while True:
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not replace:
                return False
            # Another process may land or move the same target in between: then try again.
            with suppress(FileNotFoundError):
                target.rename(target.parent / f"{_REPLACED}{secrets.token_hex(4)}-{target.name}")
            continue
        _sync_one(target.parent)
        sweep(target.parent)
        return True


def write_whole(path: Path, text: str) -> None:
    """Write a file of text, in place of an older one, so that it is never seen half written."""
    staged = path.with_name(f"{_STAGED}{secrets.token_hex(8)}")
    try:
        staged.write_text(text, encoding="utf-8")
        _sync_one(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    _sync_one(path.parent)


def sweep(parent: Path) -> None:
    """Remove staged folders whose writers are gone; put back folders whose replacement was cut short."""
    for entry in sorted(parent.iterdir()):
        if entry.name.startswith(_REPLACED):
            _settle_replaced(entry)
        elif entry.name.startswith(_STAGED):
            _remove_if_abandoned(entry if entry.suffix != _LOCK else entry.with_suffix(""))


def _locked_name(parent: Path) -> tuple[Path, int]:
    """A fresh name for a staged folder, and the descriptor that holds its lock."""
    while True:
        folder = parent / f"{_STAGED}{secrets.token_hex(8)}"
        lock = _take(_lock_of(folder))
        if lock is not None:
            return folder, lock


def _take(path: Path) -> int | None:
    """Make and lock a lock file: the descriptor that holds it, or None if somebody else was first."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder, or a sweep, may have unlinked it between opening and locking.
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a staged folder, then its lock file, if nobody holds the lock."""
    lock_path = _lock_of(folder)
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # The lock is made before the folder and removed after it: no writer is left, or all is gone already.
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _settle_replaced(aside: Path) -> None:
    """Delete a folder that was replaced; or give it its name back if its successor never arrived."""
    target = aside.parent / aside.name.removeprefix(_REPLACED).split("-", 1)[1]
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        return
    # The successor may arrive this instant: then the rename fails, and a later sweep deletes this one.
    with suppress(OSError):
        aside.rename(target)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
