"""Debian documentation, in a planted tree of the same layout, and on this machine where it is Debian."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from gyrocompass.core.errors import BadInput
from gyrocompass.data.debian import DebianSource, fingerprint_debian, read_debian
from gyrocompass.data.document import Document, Quarantined, Record, Skipped
from gyrocompass.data.sources import Source, fingerprint, read_sources

DEP5 = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\n"
PAGE = """<html lang="{}"><head><title>{}</title></head><body><nav><a href="x">Next</a></nav>
<article><h1>{}</h1><p>{}</p></article></body></html>"""
LONG = {
    "en": "This chapter explains how to install the system, which choices there are, and how to undo them.",
    "de": "Dieses Kapitel erklärt, wie man das System einrichtet, welche Wahl man hat und was sie ändert.",
}
MAN = """.TH FROB 1 "2024-01-01"
.SH {}
frob \\- {}
.SH DESCRIPTION
.B frob
{}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The layout of packages as they are installed."""
    files: dict[str, bytes] = {
        "usr/share/doc/debian-handbook/copyright": (
            DEP5
            + "Files: *\nCopyright: A\nLicense: GPL-2+ or CC-BY-SA-3.0\n\nFiles: debian/*\nLicense: GPL-2+\n"
        ).encode(),
        "usr/share/doc/debian-handbook/changelog.Debian.gz": gzip.compress(b"handbook (1) ..."),
        "usr/share/doc/jargon-text/copyright": b"The Jargon File is in the public domain.\n",
        "usr/share/doc/jargon-text/jargon.txt.gz": gzip.compress(b"hacker: n. One who enjoys ...\n"),
        "usr/share/doc/frob/copyright": (
            DEP5 + "Files: *\nLicense: Expat\n\nFiles: doc/guide.md\nLicense: GFDL-1.3+\n"
        ).encode(),
        "usr/share/doc/frob/README": b"Frob the thing.\n",
        "usr/share/doc/frob/README.fr": "Frobez-le déjà.\n".encode(),
        "usr/share/doc/frob/guide.md.gz": gzip.compress(b"# Guide\n"),
        "usr/share/doc/frob/logo.png": b"\x89PNG",
        "usr/share/man/man1/frob.1.gz": gzip.compress(MAN.format("NAME", "frobs", "It frobs.").encode()),
        "usr/share/man/de/man1/frob.1.gz": gzip.compress(
            MAN.format("BEZEICHNUNG", "frobt", "Es frobt äußerst gründlich.").encode()
        ),
        "usr/share/man/man1/alias.1.gz": gzip.compress(b".so man1/frob.1\n"),
        "usr/share/games/fortunes/de/witze": "Kommt ein Pferd.\n%\nIn die Bar.\n\t-- Ã„sop\n%\n".encode(),
        "usr/share/games/fortunes/de/witze.dat": b"\0\0\0\2",
        "usr/share/doc/fortunes-de/copyright": (DEP5 + "Files: *\nLicense: GPL-3+\n").encode(),
        "var/lib/dpkg/info/frob.list": b"/usr/share/man/man1/frob.1.gz\n/usr/share/man/de/man1/frob.1.gz\n",
        "var/lib/dpkg/info/fortunes-de.list": b"/usr/share/games/fortunes/de/witze\n",
    }
    for language, code in (("en", "en-US"), ("de", "de-DE")):
        page = PAGE.format(code, "Install", "Install", LONG[language])
        files[f"usr/share/doc/debian-handbook/html/{code}/sect.install.html"] = page.encode()
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "usr/share/doc/frob-doc").symlink_to("frob")
    (tmp_path / "usr/share/games/fortunes/de/witze.u8").symlink_to("witze")
    return tmp_path


def read(root: Path, **options: object) -> list[Record]:
    return list(
        read_debian(DebianSource.model_validate({"root": str(root), "html": "resiliparse", **options}))
    )


def by_path(records: list[Record], root: Path) -> dict[str, Document]:
    base = f"{root}/usr/share/"
    return {r.path.removeprefix(base): r for r in records if isinstance(r, Document)}


needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="no groff here")


@needs_groff
def test_every_part_with_its_language_and_licence(root: Path) -> None:
    records = read(root)
    assert not [r for r in records if isinstance(r, Quarantined)]
    found = by_path(records, root)
    assert {path: (d.slice, d.language, d.licence) for path, d in found.items()} == {
        "doc/debian-handbook/html/de-DE/sect.install.html": (
            "debian/doc", "de", "GPL-2.0-or-later OR CC-BY-SA-3.0",
        ),
        "doc/debian-handbook/html/en-US/sect.install.html": (
            "debian/doc", "en", "GPL-2.0-or-later OR CC-BY-SA-3.0",
        ),
        "doc/frob/README": ("debian/doc", None, "MIT"),
        "doc/frob/README.fr": ("debian/doc", "fr", "MIT"),
        "doc/frob/guide.md.gz": ("debian/doc", None, "GFDL-1.3-or-later"),
        "doc/jargon-text/jargon.txt.gz": ("debian/doc", None, None),
        "man/de/man1/frob.1.gz": ("debian/man", "de", "MIT"),
        "man/man1/frob.1.gz": ("debian/man", "en", "MIT"),
        "games/fortunes/de/witze#1": ("debian/fortunes", "de", "GPL-3.0-or-later"),
        "games/fortunes/de/witze#2": ("debian/fortunes", "de", "GPL-3.0-or-later"),
    }  # fmt: skip
    assert found["games/fortunes/de/witze#2"].text == "In die Bar.\n\t-- Äsop"
    mended = found["games/fortunes/de/witze#2"].provenance
    assert mended is not None and [(r.kind, r.start, r.end) for r in mended.repairs] == [("mojibake", 12, 20)]
    guide = found["doc/frob/guide.md.gz"].provenance
    assert guide is not None
    assert guide.evidence == (("copyright", f"{root}/usr/share/doc/frob/copyright:6", "GFDL-1.3+"),)
    assert LONG["de"] in found["doc/debian-handbook/html/de-DE/sect.install.html"].text
    page = found["man/de/man1/frob.1.gz"].text
    assert "BEZEICHNUNG\n       frob - frobt" in page and "frob Es frobt äußerst gründlich." in page
    assert [(r.path.rpartition("/")[2], r.reason) for r in records if isinstance(r, Skipped)] == [
        ("alias.1.gz", "a page that only names another")
    ]


@needs_groff
def test_translations_are_of_one_group(root: Path) -> None:
    found = by_path(read(root), root)
    assert found["man/de/man1/frob.1.gz"].group == found["man/man1/frob.1.gz"].group
    pages = {d.group for path, d in found.items() if "handbook" in path}
    assert len(pages) == 1 and len({d.group for d in found.values()}) == 6
    assert found["doc/frob/README.fr"].group == found["doc/frob/README"].group == "doc:frob/README"


def test_choices(root: Path) -> None:
    def paths(**options: object) -> set[str]:
        return {path.rpartition("/")[2] for path in by_path(read(root, **options), root)}

    assert paths(packages=["jargon*"]) == {"jargon.txt.gz"}
    assert paths(parts=["fortunes"]) == {"witze#1", "witze#2"}
    assert paths(languages=["fr"]) == {"README.fr"}
    assert "changelog.Debian.gz" in paths(changelogs=True, parts=["doc"])
    few = by_path(read(root, parts=["doc"], most_documents=1), root)
    assert sorted(str(d.language) for d in few.values()) == ["None", "de", "en", "fr"]
    assert few == by_path(read(root, parts=["doc"], most_documents=1), root)


def test_one_package_alone_needs_no_lists_of_dpkg(root: Path) -> None:
    shutil.rmtree(root / "var")
    for package in ("frob", "jargon-text", "debian-handbook"):
        shutil.rmtree(root / "usr/share/doc" / package)
    (root / "usr/share/doc/frob-doc").unlink()
    (saying, _) = by_path(read(root, parts=["fortunes"]), root).values()
    assert saying.licence == "GPL-3.0-or-later"


def test_damage_is_quarantined(root: Path) -> None:
    page = root / "usr/share/man/man1/frob.1.gz"
    page.write_bytes(page.read_bytes()[:-12])
    text = root / "usr/share/doc/jargon-text/jargon.txt.gz"
    text.write_bytes(text.read_bytes()[:-12])
    lost = [r for r in read(root) if isinstance(r, Quarantined)]
    assert {r.path for r in lost} == {str(page), str(text)}
    assert all("cut short" in r.reason or "damaged" in r.reason for r in lost)


def test_as_a_source(root: Path, tmp_path: Path) -> None:
    source = Source.model_validate({"debian": {"root": str(root), "html": "resiliparse"}})
    before = fingerprint(source)
    assert before == fingerprint_debian(source.debian)  # type: ignore[arg-type]
    (root / "usr/share/doc/frob/copyright").write_text("changed")
    assert fingerprint(source) != before, "a licence that changed is another source"
    assert any(isinstance(r, Document) for r in read_sources([source], max_quarantined_share=0.0))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"(?s)no documentation.*packages \*.*apt-get install") as caught:
        read(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.skipif(not Path("/usr/share/doc/base-files/copyright").is_file(), reason="not a Debian system")
def test_this_machine() -> None:
    records = read(Path("/"), packages=["base-files", "dpkg", "apt"], parts=["doc"], html="skip")
    documents = [r for r in records if isinstance(r, Document)]
    assert documents and all(d.path.startswith("/usr/share/doc/") for d in documents)
    assert all(d.file_hash and d.provenance for d in documents)
