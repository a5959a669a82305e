"""The documentation of Debian packages, in many languages, with a licence from each package's copyright file.

    /usr/share/doc/PACKAGE/            manuals, guides, books (debian-handbook, python3-doc, jargon-text, ...)
    /usr/share/man/[LANGUAGE/]man*/    manual pages
    /usr/share/games/fortunes/         sayings, one document each

Read is what is there: on a Debian system what is installed, or below another `root` what was unpacked with
`dpkg -x`. dpkg's own lists say which package a file belongs to; without them it is the folder's name below
doc/, and for all else the one package that is there, if it is one.

Languages stand in paths (`man/de/`, `html/pt-BR/`, `README.fr`) and in packages' names (`fortunes-de`). A
manual page without one is English, as the system is then; it is set by groff, which cannot run anything that
the page asks for (its safe mode). Where groff is missing, pages are left out and that is said.

Translations of one page are of one group, so that a split keeps them on one side. Left out: copyright files
(they are read as evidence), changelogs unless asked for, and links, as what they lead to is read itself.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import filterfalse
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

from pydantic import Field, PositiveInt

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.data.debian_packages import Packages
from gyrocompass.data.document import Document, Provenance, Quarantined, Record, Repair, Skipped
from gyrocompass.data.ingest.config import IngestSource
from gyrocompass.data.ingest.evidence import LicenceFiles
from gyrocompass.data.ingest.pages import Extractor, PageReader
from gyrocompass.data.ingest.read import HTML_SUFFIXES, Reader
from gyrocompass.data.manpages import NotSet, Unsettable, groff_version, set_page
from gyrocompass.data.paths import is_unnamed, unnamed

SOURCE = "debian"
Part = Literal["doc", "man", "fortunes"]

_FOLDERS: dict[Part, str] = {
    "doc": "usr/share/doc",
    "man": "usr/share/man",
    "fortunes": "usr/share/games/fortunes",
}
_LEFT_OUT = re.compile(r"(copyright|changelog.*|NEWS\.Debian.*|buildinfo.*|.*\.(dat|u8))$")
_PROSE = re.compile(
    r"(readme|news|faq|todo|authors|thanks|notes|manual|tutorial|howto|hacking|install|liesmich)", re.I
)
_PROSE_SUFFIXES = (".txt", ".md", ".rst", *HTML_SUFFIXES)
_PAGE = re.compile(r"(?P<name>.+)\.[1-9][a-z0-9]*(\.gz)?$")
_CODES = """
    af am ar az be bg bn bs ca cs cy da de el en eo es et eu fa fi fr ga gl gu he hi hr hu hy id is it
    ja ka kk km kn ko ku ky lt lv mk ml mn mr ms nb ne nl nn no pa pl pt ro ru si sk sl sq sr sv ta te
    tg th tl tr ug uk ur uz vi wo xh zh zu
"""
_LANGUAGES = frozenset(_CODES.split())
_LOCALE = re.compile(r"([a-z]{2,3})(?:[-_][A-Za-z]{2,4})?(?:\.[A-Za-z0-9-]+)?(?:@[a-z]+)?$")


class DebianSource(Config):
    """Documentation of Debian packages."""

    root: str = Field(default="/", min_length=1)
    """The folder that holds `usr/share`."""
    packages: tuple[str, ...] = ("*",)
    """Patterns of packages' names."""
    parts: tuple[Part, ...] = get_args(Part)
    languages: tuple[str, ...] = ()
    """Two-letter codes of what is read; empty: all, and what has none."""
    changelogs: bool = False
    """Whether upstream's and Debian's changelogs are read."""
    most_documents: PositiveInt | None = None
    """Of each slice and language; which ones is decided by the hashes of their paths, so it is stable."""
    html: Extractor | Literal["skip"] = "trafilatura"
    repair: bool = True


def read_debian(config: DebianSource) -> Iterator[Record]:
    """Read the documentation.

    Raises:
        BadInput: there is none below the root, or none of such packages.
        MissingDependency: what HTML or a repair needs is not installed.
    """
    packages = Packages(Path(config.root), _FOLDERS.values())
    options = IngestSource(
        path=config.root, name=SOURCE, html=config.html, repair=config.repair, include=("*",)
    )
    with PageReader("resiliparse" if config.html == "resiliparse" else "trafilatura", 10.0) as pages:
        reader = Reader(options, pages)
        for file in _chosen(_files(config, packages), config.most_documents):
            if is_unnamed(file.path):
                yield unnamed(file.path, SOURCE)
            else:
                yield from _read(file, reader, packages, config)


def fingerprint_debian(config: DebianSource) -> str:
    """A hash of all that would be read, paths, contents and copyright files."""
    packages = Packages(Path(config.root), _FOLDERS.values())
    digest = hashlib.sha256(f"{groff_version()}\0".encode())
    for file in _chosen(_files(config, packages), config.most_documents):
        for path in filter(None, (file.path, packages.copyright_file(file.package))):
            digest.update(f"{path}\0".encode(errors="surrogateescape"))
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class _File(NamedTuple):
    path: Path
    part: Part
    relative: str
    """Below the folder of its part; of doc, below that of its package."""
    package: str | None
    language: str | None


def _files(config: DebianSource, packages: Packages) -> list[_File]:
    """The files that are read, in a stable order.

    Raises:
        BadInput: there are none.
    """
    root = Path(config.root)
    found = [
        file
        for part in config.parts
        for file in _part(root, part, packages, config.changelogs)
        if any(fnmatch.fnmatch(file.package or "", pattern) for pattern in config.packages)
        and (not config.languages or file.language in config.languages)
    ]
    if not found:
        raise BadInput(
            "no documentation of such Debian packages is here",
            where=f"{root / 'usr/share'}, packages {' '.join(config.packages)}",
            fix="install some (apt-get install debian-handbook fortunes manpages), or name another root",
        )
    return found


def _part(root: Path, part: Part, packages: Packages, changelogs: bool) -> Iterator[_File]:
    top = root / _FOLDERS[part]
    for parent, folders, names in os.walk(top):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_symlink() or not path.is_file() or not _is_read(name, part, changelogs):
                continue
            below = path.relative_to(top).as_posix()
            folder, _, relative = below.partition("/")
            if part == "doc" and not relative:
                continue
            package = packages.owner(path) or (folder if part == "doc" else packages.only)
            relative = relative if part == "doc" else below
            yield _File(path, part, relative, package, _language(relative, package, part))


def _is_read(name: str, part: Part, changelogs: bool) -> bool:
    if part == "man":
        return bool(_PAGE.match(name))
    if changelogs and name.startswith("changelog"):
        return True
    if _LEFT_OUT.match(name):
        return False
    bare = name.removesuffix(".gz").lower()
    return part == "fortunes" or bare.endswith(_PROSE_SUFFIXES) or bool(_PROSE.match(bare))


def _language(relative: str, package: str | None, part: Part) -> str | None:
    """The language that a path or a package's name says; of a manual page that says none, English."""
    path = PurePosixPath(relative.removesuffix(".gz"))
    words = [*path.parts[:-1], *path.name.split(".")[1:]]
    if package and part != "man":
        words.append(package.rpartition("-")[2])
    for word in words:
        if _is_language(word):
            return re.split(r"[-_.@]", word)[0]
    return "en" if part == "man" else None


def _chosen(files: list[_File], most: int | None) -> list[_File]:
    if most is None:
        return files
    left: dict[tuple[str, str | None], int] = {}
    taken = set()
    for file in sorted(
        files, key=lambda file: hashlib.sha256(file.relative.encode(errors="replace")).digest()
    ):
        kind = file.part, file.language
        if left.setdefault(kind, most):
            left[kind] -= 1
            taken.add(file.path)
    return [file for file in files if file.path in taken]


def _read(file: _File, reader: Reader, packages: Packages, config: DebianSource) -> Iterator[Record]:
    noted = packages.copyright(file.package)
    licence, said = noted.of(file.relative) if noted else (None, ())
    records = _page(file) if file.part == "man" else reader.file(file.path, SOURCE, LicenceFiles())
    for record in records:
        if not isinstance(record, Document):
            yield record
            continue
        assert record.provenance is not None
        provenance = record.provenance._replace(evidence=(*record.provenance.evidence, *said))
        document = replace(
            record,
            slice=f"debian/{file.part}",
            licence=record.licence or licence,
            language=file.language or record.language,
            provenance=provenance,
            group=_untranslated(file),
        )
        yield from _sayings(document) if file.part == "fortunes" else [document]


def _untranslated(file: _File) -> str:
    """A file's place without its language: the same for all translations of it."""
    *folders, name = PurePosixPath(file.relative.removesuffix(".gz")).parts
    stem, *suffixes = name.split(".")
    kept = [*filterfalse(_is_language, folders), ".".join([stem, *filterfalse(_is_language, suffixes)])]
    if file.part == "doc" and file.package:
        kept.insert(0, "-".join(filterfalse(_is_language, file.package.split("-"))))
    return f"{file.part}:{'/'.join(kept)}"


def _is_language(word: str) -> bool:
    match = _LOCALE.match(word)
    return match is not None and match[1] in _LANGUAGES


def _sayings(document: Document) -> Iterator[Record]:
    """A fortune file's sayings: what stands between lines with nothing but a percent sign."""
    noted, at = document.provenance, 0
    assert noted is not None
    for number, piece in enumerate(re.split(r"^%(?:\n|\Z)", document.text, flags=re.MULTILINE), 1):
        saying = piece.strip("\n")
        start = at + len(piece) - len(piece.lstrip("\n"))
        at += len(piece) + 2
        if saying.strip():
            repairs = _within(noted.repairs, start, start + len(saying))
            provenance = noted._replace(repairs=repairs)
            yield replace(document, text=saying, path=f"{document.path}#{number}", provenance=provenance)


def _within(repairs: tuple[Repair, ...], start: int, end: int) -> tuple[Repair, ...]:
    """Those of a part of a text, in characters of the part."""
    return tuple(
        each._replace(start=max(each.start, start) - start, end=min(each.end, end) - start)
        for each in repairs
        if each.start < end and each.end > start
    )


def _page(file: _File) -> Iterator[Record]:
    """A manual page, set for a terminal without any marks."""
    name, data = file.path.as_posix(), file.path.read_bytes()
    try:
        page = gzip.decompress(data) if file.path.suffix == ".gz" else data
        text = set_page(page)
    except NotSet as reason:
        yield Skipped(name, str(reason), SOURCE)
        return
    except (EOFError, OSError, zlib.error) as error:
        damage = f"the compressed page is damaged ({error})"
        yield Quarantined(name, None, damage, "", SOURCE, offset=0, n_bytes=len(data))
        return
    except Unsettable as error:
        yield Quarantined(name, None, str(error), error.said, SOURCE, n_bytes=len(data))
        return
    yield Document(
        kind="text",
        text=text,
        path=name,
        source=SOURCE,
        slice="debian/man",
        file_hash=hashlib.sha256(data).hexdigest(),
        provenance=Provenance(hashlib.sha256(page).hexdigest()),
    )
