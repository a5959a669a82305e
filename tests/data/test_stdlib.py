import ast
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data import python_code, stdlib
from gyrocompass.data.document import Document, Quarantined, Record, Skipped
from gyrocompass.data.sources import Source, read_sources
from gyrocompass.data.split import side
from gyrocompass.data.stdlib import Limit, StdlibSource, pairs, read_stdlib

LONG = " ".join(["word"] * 60)
MODULE = f'''"""What the module does. {LONG}"""


class Shape(object):
    """A shape."""

    @property
    def area(self, *, unit="m") -> float:
        """The area of the shape, in square units.

        Of any shape.
        """
        # the longer side first

        return self.width * self.height * factor(unit)

    def _private(self):
        """Not to be documented here."""
        return None


class Client:
    async def fetch(self, address, /, retries=3):
        """Fetch what is at the address, trying again."""
        text = """
left of the function"""
        return await get(address, retries, text)


async def walk(tree):
    r"""Walk the \\\\tree, and say \'\'\' and nothing else."""
    async for node in tree:
        yield node, "something that is long enough"


def stub():
    """Does nothing at all, at length."""
'''
TOPICS = "# generated\ntopics = {'assert': 'The assert statement.\\n', 'with': 'The with statement.\\n'}\n"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(folder: Path, **limits: Limit) -> list[Record]:
    return list(read_stdlib(StdlibSource(limits=limits), folder))


def documents(records: list[Record]) -> dict[str, Document]:
    return {record.path: record for record in records if isinstance(record, Document)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(
        tmp_path,
        {
            "shapes.py": MODULE,
            "latin.py": "# -*- coding: latin-1 -*-\nname = 'é'\r\n".encode("latin-1"),
            "empty/__init__.py": "\n",
            "empty/test/test_shapes.py": "def test():\n    assert True\n",
            "idlelib/idle_test/test_x.py": "x = 1\n",
            "test/broken.py": "def (:\n",
            "test/undecodable.py": b"x = 1\n\n\ny = '\xff'\n",
            "test/unknown.py": "# coding: klingon\n",
            "test/null.py": "x = 1\x00\n",
            "pydoc_data/topics.py": TOPICS,
            "site-packages/other.py": "x = 1",
            "lib2to3/tests/data/bom.py": "not python",
            "__pycache__/x.py": "x = 1",
            "_sysconfigdata_linux.py": "x = 1",
            "data.txt": "not python",
        },
    )


def test_slices_and_labels(small: Path) -> None:
    found = documents(read(small))
    assert {path: document.slice for path, document in found.items()} == {
        "shapes.py": "code/library",
        "latin.py": "code/library",
        "empty/test/test_shapes.py": "code/tests",
        "idlelib/idle_test/test_x.py": "code/tests",
        "shapes.py#docstrings": "prose/docs",
        "pydoc_data/topics.py#assert": "prose/docs",
        "pydoc_data/topics.py#with": "prose/docs",
    }
    assert {(d.slice.split("/")[0], d.language, d.licence) for d in found.values()} == {
        ("code", "python", "PSF-2.0"),
        ("prose", "en", "PSF-2.0"),
    }
    assert found["latin.py"].text == "# -*- coding: latin-1 -*-\nname = 'é'\n"
    assert found["pydoc_data/topics.py#with"].text == "The with statement.\n"


def test_what_cannot_be_used_is_named(small: Path) -> None:
    records = read(small)
    quarantined = {r.path: (r.line, r.reason) for r in records if isinstance(r, Quarantined)}
    assert quarantined.pop("test/broken.py")[0] == 1
    assert "can't decode byte 0xff" in quarantined.pop("test/undecodable.py")[1]
    assert "unknown encoding: klingon" in quarantined.pop("test/unknown.py")[1]
    assert "null bytes" in quarantined.pop("test/null.py")[1]
    assert not quarantined
    assert Counter(r.reason for r in records if isinstance(r, Skipped)) == {
        "empty file": 1,
        "read topic by topic instead": 1,
    }


def test_docstrings_of_a_module(small: Path) -> None:
    found = documents(read(small))
    gathered, module = found["shapes.py#docstrings"], found["shapes.py"]
    assert gathered.text.startswith(
        f"shapes\n\nWhat the module does. {LONG}\n\nShape\n\nA shape.\n\nShape.area(self"
    )
    assert "Of any shape." in gathered.text and "Not to be documented" not in gathered.text
    assert gathered.origin_ids == (module.id,)
    for salt in map(str, range(40)):
        assert side(gathered, 0.5, salt) == side(module, 0.5, salt)


def test_a_distribution_without_tests_and_topics(tmp_path: Path) -> None:
    records = read(write(tmp_path, {"a.py": "x = 1\n"}))
    assert [type(record) for record in records] == [Skipped, Skipped, Document]
    assert [record.reason for record in records if isinstance(record, Skipped)] == [
        "this distribution ships no tests",
        "this distribution ships no help topics as source",
    ]


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    for folder in (tmp_path / "python311.zip", write(tmp_path, {"test/a.py": "x = 1"})):
        with pytest.raises(BadInput, match="not here as Python files"):
            read(folder)


def test_topics_of_a_zipped_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stdlib, "_stdlib_folder", lambda: write(tmp_path, {"a.py": "x = 1\n"}))
    found = [record for record in read_stdlib(StdlibSource()) if record.path.startswith(stdlib.TOPICS + "#")]
    assert len(found) > 50  # through the loader of pydoc_data.topics, wherever it is


def test_the_fingerprint_covers_topics_from_a_zip_and_the_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stdlib, "_stdlib_folder", lambda: write(tmp_path, {"a.py": "x = 1\n"}))
    monkeypatch.setattr(stdlib, "_topics_source", lambda folder: "topics = {'a': 'one'}")
    first = stdlib.fingerprint_stdlib()
    assert stdlib.fingerprint_stdlib() == first
    monkeypatch.setattr(stdlib.sys, "version_info", (3, 99, 0))
    other_version = stdlib.fingerprint_stdlib()
    monkeypatch.setattr(stdlib, "_topics_source", lambda folder: "topics = {'a': 'two'}")
    assert len({first, other_version, stdlib.fingerprint_stdlib()}) == 3


@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 11))
def test_limits_choose_by_content(n_documents: int, n_bytes: int, added: int) -> None:
    files = [Document("text", f"{k}.py", "s", "code/library", text="x" * (k + 1)) for k in range(12)]
    for limit in (
        Limit(documents=n_documents),
        Limit(bytes=n_bytes),
        Limit(documents=n_documents, bytes=n_bytes),
    ):
        records = list(stdlib._limited(files, limit))
        chosen = [record for record in records if isinstance(record, Document)]
        assert [record.path for record in records] == [document.path for document in files]
        assert len(chosen) <= (limit.documents or 12)
        assert sum(document.n_bytes for document in chosen) <= (limit.bytes or 10**9)
    by_count = {
        d.path for d in stdlib._limited(files, Limit(documents=n_documents)) if isinstance(d, Document)
    }
    without = files[:added] + files[added + 1 :]
    kept = {d.path for d in stdlib._limited(without, Limit(documents=n_documents)) if isinstance(d, Document)}
    assert len(by_count - kept) <= 1, "one document less changes one place"


def test_limits_do_not_depend_on_names() -> None:
    texts = [str(k) for k in range(20)]
    files = [Document("text", f"{k:02}.py", "s", "a", text=text) for k, text in enumerate(texts)]
    renamed = [Document("text", f"{k:02}.py", "s", "a", text=text) for k, text in enumerate(reversed(texts))]
    chosen, again = (
        {record.text for record in stdlib._limited(each, Limit(documents=7)) if isinstance(record, Document)}
        for each in (files, renamed)
    )
    assert chosen == again


def test_the_running_interpreter() -> None:
    limits = {
        "code/library": Limit(documents=20),
        "code/tests": Limit(bytes=20_000),
        "prose/docs": Limit(bytes=100_000),
    }
    source = Source(stdlib=StdlibSource(limits=limits))
    records = list(read_sources([source], max_quarantined_share=0.05))
    assert records == list(read_sources([source], max_quarantined_share=0.05))
    found = documents(records)
    count = Counter(document.slice for document in found.values())
    assert 18 <= count["code/library"] <= 20 and count["prose/docs"] >= 5
    assert sum(d.n_bytes for d in found.values() if d.slice == "prose/docs") <= 100_000
    assert len({document.id for document in found.values()}) == len(found)
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path, document in found.items():
        if document.slice.startswith("code/"):
            ast.parse(document.text)
            assert (folder / path).is_file() and not path.startswith("/")
    derived = list(pairs(found.values()))
    assert len(derived) >= 20
    for pair in derived:
        if pair.slice == "chat/body":
            ast.parse(pair.messages[1].content)


def test_pairs(small: Path) -> None:
    module = documents(read(small))["shapes.py"]
    derived = {(pair.path, pair.slice): pair for pair in pairs([module])}
    assert set(derived) == {
        (f"shapes.py#{name}", slice_name)
        for name in ("Shape.area", "walk")  # fetch has a string left of it, stub no body
        for slice_name in ("chat/docstring", "chat/body")
    }
    described, written = (derived["shapes.py#Shape.area", name] for name in ("chat/docstring", "chat/body"))
    asked, answered = described.messages
    assert (asked.role, answered.role) == ("user", "assistant")
    assert "method of the class Shape" in asked.content
    assert asked.content.endswith("\n\ndef area(self, *, unit='m') -> float:")
    assert answered.content == "The area of the shape, in square units.\n\nOf any shape."
    asked, answered = written.messages
    assert asked.content.endswith(
        '''def area(self, *, unit='m') -> float:
    """The area of the shape, in square units.

    Of any shape."""'''
    )
    assert answered.content == (
        "def area(self, *, unit='m') -> float:\n"
        "    # the longer side first\n\n"
        "    return self.width * self.height * factor(unit)"
    )
    for pair in derived.values():
        assert pair.origin_ids == (module.id,) and pair.licence == "PSF-2.0" and pair.language == "python"
        assert pair.split_key == module.split_key


def test_asked_bodies_show_the_docstring_that_python_reads(small: Path) -> None:
    module = documents(read(small))["shapes.py"]
    (function,) = (f for f in python_code.functions(module.text, ast.parse(module.text)) if f.owner is None)
    (pair,) = (p for p in pairs([module]) if p.path.endswith("#walk") and p.slice == "chat/body")
    shown = pair.messages[0].content.split("\n\n", 1)[1]
    assert ast.get_docstring(ast.parse(shown).body[0]) == function.docstring  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [{"slice": "code/tests"}, {"language": "rust"}, {"text": "def (:"}, {"kind": "completion"}],
)
def test_what_pairs_are_not_derived_from(small: Path, changed: dict[str, str]) -> None:
    from dataclasses import replace

    module = documents(read(small))["shapes.py"]
    assert not list(pairs([replace(module, **changed)]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("characters", "n_pairs"), [(19, 0), (20, 2), (600, 2), (601, 0)])
def test_lengths_of_pairs(characters: int, n_pairs: int) -> None:
    text = f'def f():\n    """{"x" * characters}"""\n    return "long enough to be a body of code"\n'
    document = Document("text", "a.py", "s", "code", text=text, language="python")
    assert len(list(pairs([document]))) == n_pairs
