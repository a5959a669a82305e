"""The standard library of the running interpreter as documents, and instruction pairs from its functions.

    sysconfig.get_paths()["stdlib"] --read_stdlib--> code/library, code/tests, prose/docs
    Python documents                --pairs-------> chat/docstring, chat/body

Every Python has this data, so a demo needs no download and the repository ships no text. A file is read with
its declared encoding; one that does not decode or parse is quarantined. prose/docs holds each topic of
`pydoc_data/topics.py`, and for each library module that is read the docstrings of its public parts; these
belong to the group of the module's file, so that a split never holds out a docstring it trains on as code.

A distribution may leave out the tests or the topics; then a skipped record says so. Not read: site-packages,
the deliberately broken fixtures of lib2to3, and `_sysconfigdata*.py`, which describes the machine that Python
was built on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from pydantic import Field, PositiveInt

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.data import python_code
from gyrocompass.data.document import EXCERPT_LENGTH, Document, Message, Quarantined, Record, Skipped

SOURCE = "python-stdlib"
LICENCE = "PSF-2.0"
LIBRARY: Slice = "code/library"
TESTS: Slice = "code/tests"
DOCS: Slice = "prose/docs"
TOPICS = "pydoc_data/topics.py"

Slice = Literal["code/library", "code/tests", "prose/docs"]

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_LEFT_OUT = ("lib2to3/tests/data/", "_sysconfigdata")
_SHORTEST_DOCSTRINGS = 200  # characters of a module's gathered docstrings


class Limit(Config):
    """How much of a slice is taken; which documents is decided by their content hash, so it is stable."""

    documents: PositiveInt | None = None
    bytes: PositiveInt | None = None


class StdlibSource(Config):
    """The standard library of the running interpreter."""

    limits: dict[Slice, Limit] = Field(default_factory=dict)


def read_stdlib(config: StdlibSource, folder: Path | None = None) -> Iterator[Record]:
    """Read the standard library.

    Args:
        config: the limits.
        folder: where it is; None for the running interpreter's.

    Raises:
        BadInput: there is no Python source in the folder.
    """
    folder = folder or _stdlib_folder()
    paths = _paths(folder)
    if not any(not _is_test(path) for path in paths):
        raise BadInput(
            "the standard library is not here as Python files (it may be zipped or compiled)",
            where=folder,
            fix="use a Python that ships its library's source, or another source",
        )
    found: dict[Slice, list[Document]] = {LIBRARY: [], TESTS: []}
    for path in paths:
        record = _read(folder, path)
        if isinstance(record, Document):
            found[TESTS if record.slice == TESTS else LIBRARY].append(record)
        else:
            yield record
    if not found[TESTS]:
        yield Skipped("test/", "this distribution ships no tests", SOURCE)
    docs: list[Document] = []
    for record in _topics(folder):
        if isinstance(record, Document):
            docs.append(record)
        else:
            yield record
    for slice_name, documents in found.items():
        for record in _limited(documents, config.limits.get(slice_name)):
            if isinstance(record, Document):
                record, docstrings = _parsed(record)
                docs += docstrings
            yield record
    yield from _limited(docs, config.limits.get(DOCS))


def fingerprint_stdlib() -> str:
    """A hash of all that is read, paths and contents, and of the Python version, whose `ast` parses it."""
    folder = _stdlib_folder()
    digest = hashlib.sha256(f"{tuple(sys.version_info[:2])}\0".encode())
    for path in _paths(folder):
        digest.update(f"{path}\0".encode())
        digest.update(hashlib.sha256((folder / path).read_bytes()).digest())
    digest.update((_topics_source(folder) or "").encode())  # they may come from a zip, which is no path above
    return digest.hexdigest()


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _paths(folder: Path) -> list[str]:
    """The Python files below the folder, with slashes, sorted."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS]
        relative = Path(parent).relative_to(folder)
        found += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(path for path in found if not path.startswith(_LEFT_OUT))


def _is_test(path: str) -> bool:
    return not _TEST_FOLDERS.isdisjoint(PurePosixPath(path).parts[:-1])


def _read(folder: Path, path: str) -> Record:
    data = (folder / path).read_bytes()
    if not data.strip():
        return Skipped(path, "empty file", SOURCE)
    if path == TOPICS:
        return Skipped(path, "read topic by topic instead", SOURCE)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
    except (SyntaxError, ValueError) as error:
        excerpt = data[:EXCERPT_LENGTH].decode("utf-8", "replace")
        return Quarantined(path, None, f"does not decode: {error}", excerpt, SOURCE)
    return Document(
        kind="text",
        text=text,
        path=path,
        source=SOURCE,
        slice=TESTS if _is_test(path) else LIBRARY,
        licence=LICENCE,
        language="python",
    )


def _parsed(document: Document) -> tuple[Document | Quarantined, list[Document]]:
    """The document if it is Python, and for a library module the gathered docstrings of its public parts."""
    try:
        tree = python_code.parse(document.text)
    except python_code.NOT_PYTHON as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        excerpt = document.text[:EXCERPT_LENGTH]
        reason = f"does not parse: {error}"
        return Quarantined(document.path, line, reason, excerpt, SOURCE, document.id), []
    if document.slice == TESTS:
        return document, []
    name = document.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    text = python_code.docstrings(name, tree)
    if len(text) < _SHORTEST_DOCSTRINGS:
        return document, []
    return document, [_prose(text, f"{document.path}#docstrings", document)]


def _topics(folder: Path) -> Iterator[Document | Skipped]:
    """Each topic of `help()` as a document."""
    text = _topics_source(folder)
    if text is None:
        yield Skipped(TOPICS, "this distribution ships no help topics as source", SOURCE)
        return
    for node in python_code.parse(text).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="topics")]):
                topics: dict[str, str] = ast.literal_eval(node.value)
                for name, topic in topics.items():
                    yield _prose(topic, f"{TOPICS}#{name}")


def _topics_source(folder: Path) -> str | None:
    """The topics' source from the folder, or from a zip file that the running interpreter imports from."""
    if (folder / TOPICS).is_file():
        return (folder / TOPICS).read_text("utf-8")
    if folder != _stdlib_folder():
        return None
    try:
        found = importlib.util.find_spec("pydoc_data.topics")
    except ModuleNotFoundError:
        return None
    get_source = getattr(found.loader, "get_source", None) if found else None
    return get_source("pydoc_data.topics") if get_source else None


def _prose(text: str, path: str, origin: Document | None = None) -> Document:
    return Document(
        kind="text",
        text=text,
        path=path,
        source=SOURCE,
        slice=DOCS,
        licence=LICENCE,
        language="en",
        origin_ids=(origin.id,) if origin else (),
        group=origin.split_key if origin else None,
    )


def _limited(documents: list[Document], limit: Limit | None) -> Iterator[Record]:
    """The documents within the limit, chosen in the order of content hashes, given in their own order."""
    limit = limit or Limit()
    left_documents = limit.documents or len(documents)
    left_bytes = limit.bytes or sum(document.n_bytes for document in documents)
    taken = set()
    for document in sorted(documents, key=lambda document: (document.content_hash, document.path)):
        if left_documents and document.n_bytes <= left_bytes:
            left_documents -= 1
            left_bytes -= document.n_bytes
            taken.add(document.path)
    for document in documents:
        if document.path in taken:
            yield document
        else:
            yield Skipped(document.path, f"over the limit of {document.slice}", SOURCE)


class _Lengths(NamedTuple):
    shortest: int
    longest: int

    def hold(self, text: str) -> bool:
        return self.shortest <= len(text) <= self.longest


DOCSTRING_CHARACTERS = _Lengths(20, 600)
CODE_CHARACTERS = _Lengths(40, 1500)

_ASK_DOCSTRING = (
    "Write the docstring of this {kind}.",
    "Document this {kind}.",
    "What does this {kind} do? Answer with its docstring.",
)
_ASK_BODY = (
    "Write the body of this {kind}.",
    "Implement this {kind}.",
    "Complete this {kind}.",
)


def pairs(documents: Iterable[Document]) -> Iterator[Document]:
    """Instruction pairs from Python documents that are not tests: signature -> docstring, docstring -> code.

    Each public function with a docstring and a body of sensible length gives one conversation of each slice.
    They belong to the origin's group; derived from the documents of one side of a split, they stay there.
    """
    for document in documents:
        if document.kind != "text" or document.language != "python" or document.slice == TESTS:
            continue
        try:
            tree = python_code.parse(document.text)
        except python_code.NOT_PYTHON:
            continue  # Python files of other sources need not be of the running version
        for function in python_code.functions(document.text, tree):
            if DOCSTRING_CHARACTERS.hold(function.docstring) and CODE_CHARACTERS.hold(function.code):
                yield from _pair(document, function)


def _pair(document: Document, function: python_code.Function) -> Iterator[Document]:
    kind = f"method of the class {function.owner}" if function.owner else "function"
    place = f"{document.path}#{function.qualified_name}"
    phrase = int(hashlib.sha256(place.encode()).hexdigest(), 16) % len(_ASK_BODY)
    quoted = function.docstring.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    indented = "\n".join(f"    {line}".rstrip() for line in f'"""{quoted}"""'.split("\n"))
    asked_docstring = f"{_ASK_DOCSTRING[phrase].format(kind=kind)}\n\n{function.signature}"
    asked_body = f"{_ASK_BODY[phrase].format(kind=kind)}\n\n{function.signature}\n{indented}"
    for slice_name, asked, answer in (
        ("chat/docstring", asked_docstring, function.docstring),
        ("chat/body", asked_body, function.code),
    ):
        yield Document(
            kind="chat",
            messages=(Message("user", asked), Message("assistant", answer)),
            path=place,
            source=document.source,
            slice=slice_name,
            licence=document.licence,
            language=document.language,
            origin_ids=(document.id,),
            group=document.split_key,
        )
