"""The errors a user can meet: each says what was wrong, where, and what to do.

    GyroError                   1  the work failed
     ├── BadInput               2  the user's input is wrong: config, records, files, names
     │    ├── ConfigError          a recipe or another YAML file, or a `--set` override
     │    └── MissingDependency    an extra is not installed; names the pip command
     ├── DamagedArtifact        1  bytes on disk are not what their manifest says
     ├── TrainingStopped        1  the guard stopped a step: a NaN or a loss spike
     └── Interrupted            1  the user stopped the work; everything is saved

The number is the exit code of `gyro`. Everything else that is raised is a bug of ours, so it keeps its
traceback; invariants are asserted, not dressed up as one of these.

This module imports almost nothing, because every command line starts by importing it.
"""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterable, Sequence


class GyroError(Exception):
    """Something a user can understand and act on.

    Args:
        what: one sentence that says what was wrong.
        where: the file, line, document or artifact it was found in.
        fix: what to do about it.

    >>> print(GyroError("the store is read-only", where="/data/store", fix="choose another with --store"))
    the store is read-only
      where: /data/store
      fix: choose another with --store
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.fix is not None:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class BadInput(GyroError):  # noqa: N818
    """What the user gave is wrong: a config, a record, a file, a name."""

    exit_code = 2


class ConfigError(BadInput):
    """A recipe, another YAML file or an override is wrong.

    Args:
        what: see `GyroError`.
        where: see `GyroError`.
        fix: see `GyroError`.
        mistakes: the same one by one, each with the path of its key.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        fix: str | None = None,
        mistakes: Sequence[tuple[tuple[str, ...], str]] = (),
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.mistakes = tuple(mistakes)


class MissingDependency(BadInput):
    """A package that an optional part needs is not installed.

    Args:
        package: the package that could not be imported.
        extra: the extra of `gyrocompass` that brings it.
        needed_for: what the user asked for.
    """

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package}, which is not installed",
            fix=f"pip install 'gyrocompass[{extra}]'",
        )
        self.package, self.extra, self.needed_for = package, extra, needed_for

    def __reduce__(self) -> tuple[object, ...]:
        return _missing_dependency, (self.package, self.extra, self.needed_for)


def _missing_dependency(package: str, extra: str, needed_for: str) -> MissingDependency:
    return MissingDependency(package, extra=extra, needed_for=needed_for)


class DamagedArtifact(GyroError):  # noqa: N818
    """An artifact is not what its manifest says: a file is missing, changed, cut short or half written."""


class TrainingStopped(GyroError):  # noqa: N818
    """The guard stopped the run: a NaN, an inf or a loss spike, with the documents that were in the step."""


class Interrupted(GyroError):  # noqa: N818
    """The user stopped the work (Ctrl-C, SIGTERM) and everything is saved: the same command goes on."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None if none is alike.

    >>> nearest("learning_rat", ["steps", "learning_rate"])
    'learning_rate'
    >>> nearest("zebra", ["steps", "learning_rate"]) is None
    True
    """
    by_fold = {candidate.casefold().replace("-", "_"): candidate for candidate in known}
    matches = difflib.get_close_matches(name.casefold().replace("-", "_"), by_fold, n=1, cutoff=0.5)
    return by_fold[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them if none is alike.

    >>> did_you_mean("nl", ["nll", "focal"])
    '; did you mean nll?'
    >>> did_you_mean("zebra", ["nll", "focal"])
    '; known: focal, nll'
    """
    names = sorted(known)
    best = nearest(name, names)
    if best is not None:
        return f"; did you mean {best}?"
    return f"; known: {', '.join(names)}" if names else ""


def refused_by_disk(error: Exception) -> GyroError | None:
    """What a file or a full disk refused, as an error for users; None: a bug of ours."""
    fix = "check that the place is there, writable and not full"
    safetensors = sys.modules.get("safetensors")
    if safetensors is not None and isinstance(error, safetensors.SafetensorError):
        # It names neither file nor errno: "I/O error: No space left on device (os error 28)".
        return GyroError(f"weights cannot be written: {error}", fix=fix) if "os error" in str(error) else None
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.filename is None and error.errno not in _DISK_ERRORS:
        return None
    return GyroError(error.strerror or str(error), where=error.filename2 or error.filename, fix=fix)


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""What a write says of its disk without naming the file."""
