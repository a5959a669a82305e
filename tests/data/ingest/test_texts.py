from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.ingest.texts import MOST_REPAIRS, Undecodable, decode

Reader = Callable[..., Any]

RUSSIAN = "Привет, как дела? Это обычный русский текст, который никто не портил.\n" * 4
FRENCH = "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë.\n" * 4


@given(st.text())
def test_utf8_stays_what_it_is(text: str) -> None:
    plain = text.replace("\r\n", "\n")
    if text.startswith("\ufeff"):
        return
    assert (
        decode(text.encode("utf-8", "ignore"), repair=False, prose=True).text
        == plain.encode("utf-8", "ignore").decode()
    )


@pytest.mark.parametrize(("text", "charset"), [(RUSSIAN, "koi8-r"), (RUSSIAN, "cp1251"), (FRENCH, "cp1252")])
def test_other_charsets_are_recognised_and_noted(text: str, charset: str) -> None:
    found = decode(text.encode(charset), repair=True, prose=True)
    assert found.text == text
    (repair,) = found.repairs
    assert (repair.kind, repair.start, repair.end) == ("charset", 0, len(text))


def test_marks_and_declarations_go_before_guesses() -> None:
    assert decode(codecs.BOM_UTF8 + b"x\r\ny", repair=False, prose=True) == ("x\ny", ())
    assert decode("é".encode("utf-16"), repair=False, prose=True).text == "é"
    declared = decode("Größe".encode("iso8859-15"), declared="iso-8859-15", repair=True, prose=True)
    assert (declared.text, declared.repairs[0].detail) == ("Größe", "iso8859-15")


def test_mojibake_of_prose_is_mended_where_it_stands() -> None:
    text = "# plain\n" + "naïve café".encode().decode("cp1252") + "\nfine é “quoted” ﬁn\n"
    found = decode(text.encode(), repair=True, prose=True)
    assert found.text == "# plain\nnaïve café\nfine é “quoted” ﬁn\n"
    (repair,) = found.repairs
    assert repair.kind == "mojibake" and found.text[repair.start : repair.end] == "naïve café"
    assert "decode utf-8" in repair.detail
    assert decode(text.encode(), repair=True, prose=False).text == text
    assert decode(text.encode(), repair=False, prose=True).text == text


def test_control_characters_go_and_the_note_stays() -> None:
    found = decode(b"a\x07b\n\x1b[31mred\x1b[0m\nB\x08Bo\x08ol\x08ld _\x08u\n", repair=True, prose=True)
    assert found.text == "ab\nred\nBold u\n"
    assert [(r.kind, found.text[r.start : r.end]) for r in found.repairs] == [
        ("control", "ab"),
        ("control", "red"),
        ("control", "Bold u"),
    ]


def test_a_garbled_text_has_a_last_note_for_the_rest() -> None:
    found = decode("cafÃ©\n".encode() * (MOST_REPAIRS + 5), repair=True, prose=True)
    assert len(found.repairs) == MOST_REPAIRS + 1
    assert found.repairs[-1].detail == "5 more lines" and found.repairs[-1].end == len(found.text) - 1


@pytest.mark.parametrize(
    ("data", "repair", "reason", "offset"),
    [
        (b"ok \xff\xfe\n", False, "not UTF-8: invalid start byte", 3),
        (b"\xff\x00ELF\x00\x01\x02" * 50, True, "not a text: null bytes", 1),
        (bytes(range(128, 256)) * 5, True, "and no other charset fits", 0),
        (codecs.BOM_UTF16_LE + b"x", True, "not utf-16, as its mark says: truncated data", 2),
    ],
)
def test_what_is_no_text_says_why_and_where(data: bytes, repair: bool, reason: str, offset: int) -> None:
    with pytest.raises(Undecodable, match=reason) as caught:
        decode(data, repair=repair, prose=True)
    assert caught.value.offset == offset


def test_files_in_other_encodings_and_without(here: Path, read: Reader) -> None:
    (here / "a.txt").write_bytes(FRENCH.encode("cp1252"))
    (here / "b.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (here / "c.txt").write_bytes(b"\xff\x00\x01" * 100)
    records = read()
    a, b = records.documents
    assert a.text == FRENCH and a.provenance.repairs[0].kind == "charset"
    assert b.text.endswith("x = 'é'\n") and b.provenance.repairs[0].detail == "iso8859-1"
    (lost,) = records.quarantined
    assert (lost.path, lost.reason, lost.offset) == ("c.txt", "not a text: null bytes", 1)
    assert len(read(repair=False).quarantined) == 3
