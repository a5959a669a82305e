"""Data sets by name: where a build leaves word of what it made, and how one is found again.

    root/datasets/<name>.json   {"name", "dataset": id, "root"} of the last build of that name

A data set may be given by its artifact's id or a beginning of it, by its folder, or by the name of its build,
which means the last one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gyrocompass.core.artifact import MANIFEST, Artifact, read_artifact
from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.core.folder import write_whole

if TYPE_CHECKING:
    from gyrocompass.core.store import Store

DATASET_KIND = "dataset"
"""The kind of artifact."""
DATASET = "dataset.json"
"""What a data set says of itself: name, root, counts."""

_POINTERS = "datasets"


def read_facts(folder: Path) -> dict[str, Any]:
    """What a data set says of itself: name, root, counts."""
    facts: dict[str, Any] = json.loads((folder / DATASET).read_text("utf-8"))
    return facts


def remember(store: Store, dataset: Artifact) -> None:
    """Leave word of the last build of a name."""
    facts = read_facts(dataset.path)
    folder = store.root / _POINTERS
    folder.mkdir(parents=True, exist_ok=True)
    pointer = {"name": facts["name"], "dataset": dataset.id, "root": facts["root"]}
    write_whole(folder / f"{facts['name']}.json", json.dumps(pointer, indent=2) + "\n")


def find_dataset(path: Path, *, verify: bool = False) -> Artifact:
    """A data set by its folder, or by the word that the last build of a name left in its store.

    Raises:
        BadInput: there is none there.
        DamagedArtifact: it is not as it was written.
    """
    if path.suffix == ".json" and path.is_file():
        try:
            name = str(json.loads(path.read_text("utf-8"))["dataset"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput("the file names no data set", where=path, fix="build it again") from error
        path = path.parent.parent / "artifacts" / name
    if not path.is_dir():
        raise BadInput(
            "there is no data set here",
            where=path,
            fix="give the folder of one, or STORE/datasets/NAME.json; `gyro data build` makes them",
        )
    return read_artifact(path, kind=DATASET_KIND, verify=verify)


def open_dataset(store: Store, name: str | None = None, *, verify: bool = False) -> Artifact:
    """A data set.

    Args:
        store: where it is, unless `name` is a folder.
        name: its id or a beginning of it, its folder, or its build's name; None: the last one built.
        verify: whether to hash every file.

    Raises:
        BadInput: there is none, or the artifact is something else.
        DamagedArtifact: it is not as it was written.
    """
    pointers = {path.stem: path for path in (store.root / _POINTERS).glob("*.json")}
    if name is None:
        if not pointers:
            raise BadInput(
                "no data set was built in this store",
                where=store.root,
                fix="gyro data build FILE, or --store",
            )
        name = max(pointers, key=lambda known: pointers[known].stat().st_mtime_ns)
    if (Path(name) / MANIFEST).is_file():
        return read_artifact(Path(name), kind=DATASET_KIND, verify=verify)
    if name in pointers:
        name = str(json.loads(pointers[name].read_text("utf-8"))["dataset"])
    elif not any(folder.name.startswith((name, f"{DATASET_KIND}-{name}")) for folder in store.folders("*")):
        known = [*pointers, *(folder.name for folder in store.folders(DATASET_KIND))]
        raise BadInput(
            f"there is no data set {name!r}{did_you_mean(name, known)}",
            where=store.root,
            fix="give its id, its folder, or the name of its build",
        )
    found = store.open(name, verify=verify)
    if found.manifest.kind != DATASET_KIND:
        raise BadInput(
            f"{found.id} is of the kind {found.manifest.kind}; a {DATASET_KIND} is needed", where=found.path
        )
    return found
