"""Artifacts: folders with a manifest that says what is in them and where they came from.

    <target>/
      manifest.json     kind, content hash, parents, recipe, code version, counts, every file's hash and size
      ...               the files

    content_hash = sha256(canonical JSON of {kind, hash of each file that is no record, parents, recipe})
    id           = <kind>-<first 16 hex digits of content_hash>

The same work on the same parents that gives the same bytes is the same artifact, whenever and wherever it
was made: time, code version and counts are recorded, not hashed into the id, and so are the files that its
maker calls records (logs with times and rates in them). `seal` covers the manifest itself, so that a changed
count or record is noticed too.

An artifact is written to a staged folder, synced and renamed (`folder.py`), its manifest last: a half-written
artifact does not exist. Reading checks names and sizes always, and hashes unless told otherwise; whatever is
missing, changed or added is named.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

import gyrocompass
from gyrocompass.core.config import Config, canonical_json, config_hash
from gyrocompass.core.errors import BadInput, DamagedArtifact
from gyrocompass.core.folder import land, staging, sync

ArtifactId = str
"""`<kind>-<first 16 hex digits of the content hash>`."""

MANIFEST = "manifest.json"
FORMAT = 1


class FileEntry(Config):
    """What a file must be: sha256 of its bytes (64 hex digits), and how many there are."""

    sha256: str
    bytes: int
    record: bool = False
    """Whether it says how the work went, not what came of it: it is no part of the artifact's id."""


class Manifest(Config):
    """What an artifact is, what it was made from, by which code, and what it holds."""

    format: int = FORMAT
    kind: str
    content_hash: str
    parents: dict[str, ArtifactId]
    """What it was made from, by the role each played: `{"train": "tokens-0123456789abcdef"}`."""
    recipe: dict[str, Any]
    """The config of the stage that made it."""
    code_version: str
    counts: dict[str, int | float]
    """How much of what it holds: documents, tokens, steps."""
    files: dict[str, FileEntry]
    """By path relative to the artifact, with forward slashes."""
    created_at: str
    """UTC, ISO 8601."""

    @property
    def id(self) -> ArtifactId:
        """`<kind>-<first 16 hex digits of the content hash>`."""
        return f"{self.kind}-{self.content_hash[:16]}"


class Artifact(NamedTuple):
    """A folder and the manifest that was read from it or written to it."""

    path: Path
    manifest: Manifest

    @property
    def id(self) -> ArtifactId:
        """The manifest's id."""
        return self.manifest.id


class DocumentRow(NamedTuple):
    """One document in an artifact's listing, for lineage."""

    document_id: str
    path: str
    source: str
    slice: str
    status: str = "kept"
    """`kept`, or why it is not in the artifact: `quarantined`, `dropped`, ..."""
    origin_ids: tuple[str, ...] = ()
    """What it was derived from; and what that was derived from, where no artifact lists that."""


@dataclass
class Draft:
    """An artifact in the making: write files below `path`, fill `counts`, and leave the `with` block."""

    path: Path
    kind: str
    parents: dict[str, ArtifactId]
    recipe: dict[str, Any]
    counts: dict[str, int | float] = field(default_factory=dict)
    records: set[str] = field(default_factory=set)
    """Files that are different each time the same work is done, since they hold times: no part of the id."""
    documents: Iterable[DocumentRow] | None = None
    """In a store: the documents the artifact holds. None says nothing about documents, and whatever the
    parents hold is taken to be used; an empty list says that it holds none."""
    _artifact: Artifact | None = None

    def __post_init__(self) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", self.kind), f"not a kind: {self.kind!r}"
        self.recipe = json.loads(canonical_json(self.recipe))

    @property
    def artifact(self) -> Artifact:
        """The finished artifact, after the `with` block."""
        assert self._artifact is not None, "a draft becomes an artifact at the end of its with block"
        return self._artifact

    @artifact.setter
    def artifact(self, artifact: Artifact) -> None:
        self._artifact = artifact


@contextmanager
def writing(
    target: Path,
    kind: str,
    *,
    parents: Mapping[str, ArtifactId] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Iterator[Draft]:
    """Write an artifact to a path of the caller's choice; an older artifact there is replaced.

    On an error inside the block, or a kill at any moment, `target` is as it was.

    Args:
        target: the artifact's folder.
        kind: what it is, in small letters, digits and underscores: `dataset`, `model`.
        parents: the ids of what it is made from, by role.
        recipe: the config of the stage that makes it.

    Raises:
        BadInput: `target` is something else than an artifact or an empty folder, so it is not replaced.
    """
    _check_replaceable(target)
    with staging(target.absolute().parent) as folder:
        draft = Draft(folder, kind, dict(parents or {}), dict(recipe or {}))
        yield draft
        manifest = seal(draft)
        land(folder, target.absolute(), replace=True)
        draft.artifact = Artifact(target, manifest)


def seal(draft: Draft) -> Manifest:
    """Hash a draft's files, write its manifest and sync it all to the disk."""
    files = {name: _entry(path, name in draft.records) for name, path in _files(draft.path).items()}
    manifest = Manifest(
        kind=draft.kind,
        content_hash=_content_hash(draft.kind, files, draft.parents, draft.recipe),
        parents=draft.parents,
        recipe=draft.recipe,
        code_version=code_version(),
        counts=draft.counts,
        files=files,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    assert MANIFEST not in files, f"{MANIFEST} is the name of the manifest itself"
    (draft.path / MANIFEST).write_text(_render(manifest.model_dump(mode="json")), encoding="utf-8")
    sync(draft.path)
    return manifest


def read_artifact(path: Path, *, kind: str | None = None, verify: bool = True) -> Artifact:
    """Read an artifact and check that it is whole.

    Args:
        path: the artifact's folder.
        kind: the kind it must be.
        verify: whether to hash every file; names and sizes are checked in any case.

    Raises:
        BadInput: there is no folder, it is of another kind, or from a newer version of Gyrocompass.
        DamagedArtifact: a file is missing, changed, cut short or added, or the manifest is.
    """
    if not path.is_dir():
        raise BadInput("there is no artifact here", where=path)
    manifest = _read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise BadInput(f"this artifact is of the kind {manifest.kind}; a {kind} is needed", where=path)
    found = _files(path)
    found.pop(MANIFEST)
    for name in sorted({*manifest.files, *found}):
        _check_file(path / name, manifest.files.get(name), present=name in found, verify=verify)
    return Artifact(path, manifest)


@functools.cache
def code_version() -> str:
    """The version of this package: `0.1.0+g<commit>` from a git checkout, `.dirty` if changed since."""
    package = Path(gyrocompass.__file__).parent
    try:
        # A package installed into a folder that some other project tracks is not of that checkout.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "--short=12", "HEAD")
        dirty = _git(package, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return gyrocompass.__version__
    return f"{gyrocompass.__version__}+g{commit}" + (".dirty" if dirty else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _content_hash(
    kind: str, files: Mapping[str, FileEntry], parents: Mapping[str, str], recipe: Mapping[str, Any]
) -> str:
    hashes = {name: entry.sha256 for name, entry in files.items() if not entry.record}
    return config_hash({"kind": kind, "files": hashes, "parents": parents, "recipe": recipe})


def _render(fields: Mapping[str, Any]) -> str:
    """The text of a manifest: its fields and their seal. There is one text for one manifest."""
    sealed = {**fields, "seal": config_hash(fields)}
    return json.dumps(sealed, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        text = file.read_bytes().decode("utf-8")
        fields = json.loads(text)
        # Not only the same meaning but the same bytes, so that no change at all goes unnoticed.
        fields.pop("seal")
        intact = _render(fields) == text
    except FileNotFoundError as error:
        raise _damaged(file, f"{MANIFEST} is missing: this is no artifact, or half of one") from error
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, f"{MANIFEST} cannot be read ({error})") from error
    if not intact:
        raise _damaged(file, f"{MANIFEST} was changed after it was written")
    if fields.get("format") != FORMAT:
        raise BadInput(
            f"this artifact has format {fields.get('format')}; this version of Gyrocompass reads {FORMAT}",
            where=path,
            fix="use the version that wrote it, or make it again",
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise _damaged(file, f"{MANIFEST} has wrong fields ({error.error_count()})") from error
    if manifest.content_hash != _content_hash(
        manifest.kind, manifest.files, manifest.parents, manifest.recipe
    ):
        raise _damaged(file, f"the content hash in {MANIFEST} is not that of its contents")
    return manifest


def _check_file(path: Path, entry: FileEntry | None, *, present: bool, verify: bool) -> None:
    if entry is None:
        raise _damaged(path, f"the file {path.name} was added after the artifact was written")
    if not present:
        raise _damaged(path, f"the file {path.name} is missing")
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise _damaged(path, f"the file {path.name} has {size} bytes where {entry.bytes} were written")
        if verify and _entry(path, entry.record) != entry:
            raise _damaged(path, f"the file {path.name} was changed after it was written")
    except OSError as error:
        raise _damaged(path, f"the file {path.name} cannot be read ({error.strerror})") from error


def _damaged(file: Path, what: str) -> DamagedArtifact:
    return DamagedArtifact(what, where=file, fix="delete the artifact's folder and make it again")


def _files(folder: Path) -> dict[str, Path]:
    """Every file below, by relative path; links and devices are refused, as their contents are elsewhere."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise DamagedArtifact(
                f"{name} is a link or a special file", where=path, fix="put the file itself here"
            )
        if path.is_file():
            files[name] = path
    return files


def _entry(path: Path, record: bool) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(sha256=digest.hexdigest(), bytes=file.tell(), record=record)


def _check_replaceable(target: Path) -> None:
    if (
        not target.is_symlink()
        and target.is_dir()
        and (not any(target.iterdir()) or (target / MANIFEST).is_file())
    ):
        return
    if target.exists() or target.is_symlink():
        raise BadInput(
            "there is something here that is not an artifact, so it is not replaced",
            where=target,
            fix="choose another path, or delete it first",
        )
