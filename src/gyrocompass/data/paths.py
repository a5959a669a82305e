"""The files that a source names: one, a folder of them, or a pattern; which names are not UTF-8."""

from __future__ import annotations

import os
from pathlib import Path

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Quarantined


def matched(path: str, include: tuple[str, ...]) -> list[Path]:
    """A file itself; a folder's files, or those of them that match `include`; or what a pattern matches.

    Returns:
        Files, each once, sorted.

    Raises:
        BadInput: there are none.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [file for pattern in include for file in place.glob(pattern)] if include else _below(place)
        fix = (
            "give patterns that match files below the folder, such as **/*.txt"
            if include
            else "put files there"
        )
    elif any(character in path for character in "*?["):
        start = Path(place.anchor)
        found = list(start.glob(place.relative_to(start).as_posix()))
        fix = "check the pattern; ** stands for any folders, a relative pattern starts in the current folder"
    else:
        raise BadInput("no such file or folder", where=path, fix=f"a relative path starts in {Path.cwd()}")
    files = sorted({file for file in found if file.is_file()})
    if not files:
        raise BadInput("no file matches", where=f"{path} {' '.join(include)}".strip(), fix=fix)
    return files


def _below(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return found


def is_unnamed(path: Path) -> bool:
    """Whether the path is not UTF-8: Python holds its odd bytes as lone surrogates, which are no text."""
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        return True
    return False


def unnamed(path: Path, source: str) -> Quarantined:
    """Such a path as a record that cannot be used."""
    shown = path.as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")
    return Quarantined(shown, None, "the file's name is not UTF-8", "", source)
