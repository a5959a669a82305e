"""HTML and WARC: what is read, within which time, and what cannot be."""

from __future__ import annotations

import gzip
import io
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.ingest import page_worker
from gyrocompass.data.ingest.pages import NoText, PageReader
from gyrocompass.data.ingest.streams import Damaged
from gyrocompass.data.ingest.warc import captures

Reader = Callable[..., Any]

PROSE = (
    "The compass does not know where the harbour is. It knows one direction, and that is enough to find all "
    "others, as long as nobody puts iron beside it. Sailors learned this slowly and wrote it down at last."
)
PAGE = f"""<!doctype html><html lang="en-GB"><head><meta charset="utf-8"><title>Compasses</title></head><body>
<nav><a href="/">Home</a> <a href="/login">Log in</a> <a href="/basket">Basket (0)</a></nav>
<article><h1>Compasses</h1><p>{PROSE}</p><p>{PROSE.replace("compass", "gyrocompass")}</p></article>
<footer><a rel="license" href="https://creativecommons.org/licenses/by-sa/4.0/">CC</a> Cookies</footer>
</body></html>"""


@pytest.mark.parametrize("extractor", ["trafilatura", "resiliparse"])
def test_the_main_text_of_a_page(here: Path, read: Reader, extractor: str) -> None:
    pytest.importorskip(extractor)
    (here / "a.html").write_text(PAGE)
    (document,) = read("a.html", html=extractor).documents
    assert PROSE in document.text and "<p>" not in document.text and "Basket" not in document.text
    assert (document.slice, document.language, document.licence) == ("web", "en", "CC-BY-SA-4.0")
    assert document.provenance.evidence == (
        ("link", "a.html", "https://creativecommons.org/licenses/by-sa/4.0/"),
    )


def test_pages_declare_their_charset(here: Path, read: Reader) -> None:
    text = PAGE.replace("utf-8", "windows-1252").replace("at last", "très tôt")
    (here / "a.html").write_bytes(text.encode("cp1252"))
    (document,) = read("a.html").documents
    assert "très tôt" in document.text
    (repair,) = document.provenance.repairs
    assert (repair.kind, repair.detail, repair.end) == ("charset", "cp1252", len(document.text))


def test_pages_may_be_left_out_and_pages_without_text_are_quarantined(here: Path, read: Reader) -> None:
    (here / "a.html").write_text("<html><body><script>1</script></body></html>")
    assert [s.reason for s in read("a.html", html="skip").skipped] == ["a page, and html is skip"]
    assert [q.reason for q in read("a.html").quarantined] == ["no text was found in the page"]
    assert "a page of more" not in str(read("a.html").quarantined)
    assert read("a.html", limits={"html_bytes": 20}).quarantined[0].reason.startswith("more than 20 bytes")


# --- what never ends ---

ENDLESS = """
import sys
from gyrocompass.data.ingest import page_worker
def endless(html):
    while "endless" in html:
        pass
    if "crash" in html:
        import os
        os.abort()
    if "bug" in html:
        raise ValueError("a bug")
    return html.upper()
page_worker.extractor = lambda name: endless
page_worker.main()
"""


@pytest.fixture
def stubborn(here: Path) -> tuple[str, ...]:
    """The real worker around an extractor that runs for ever when it is told to."""
    (here / "worker.py").write_text(ENDLESS)
    return (str(here / "worker.py"),)


def test_a_page_that_never_ends_is_stopped_and_the_next_one_is_read(stubborn: tuple[str, ...]) -> None:
    with PageReader("trafilatura", 0.5, stubborn) as pages:
        assert pages.text("one") == "ONE"
        began = time.monotonic()
        with pytest.raises(NoText, match=r"not found within 0\.5 s"):
            pages.text("endless")
        assert time.monotonic() - began < 5
        assert pages.text("two") == "TWO"


def test_an_extractor_that_breaks_down_or_raises(stubborn: tuple[str, ...]) -> None:
    with PageReader("trafilatura", 10, stubborn) as pages:
        with pytest.raises(NoText, match="broke down"):
            pages.text("crash")
        with pytest.raises(NoText, match="the extractor failed: ValueError: a bug"):
            pages.text("bug")
        with pytest.raises(NoText, match="no text"):
            pages.text("   ")
        large = "x" * 3_000_000
        assert pages.text(large) == large.upper()


def test_an_extractor_that_is_not_installed(here: Path) -> None:
    (here / "worker.py").write_text("raise ImportError")
    missing = pytest.raises(MissingDependency, match=r"(?s)resiliparse.*pip install 'gyrocompass\[ingest\]'")
    with PageReader("resiliparse", 10, (str(here / "worker.py"),)) as pages, missing:
        pages.text("x")


def test_deeply_nested_html_comes_to_an_end_within_its_limit(here: Path, read: Reader) -> None:
    (here / "deep.html").write_text("<html><body>" + "<div><b>" * 200_000 + "x")
    (here / "z.html").write_text(PAGE)
    began = time.monotonic()
    records = read(limits={"html_seconds": 3.0})
    assert time.monotonic() - began < 30
    assert len(records.documents) + len(records.quarantined) == 2
    assert PROSE in records.texts[-1]


def test_the_worker_imports_nothing_of_the_package() -> None:
    assert "gyrocompass" not in Path(page_worker.__file__).read_text().split('"""')[2]


# --- WARC ---

warcio = pytest.importorskip("warcio")


def warc(*records: tuple[str, str, bytes], status: str = "200 OK", gzipped: bool = True) -> bytes:
    """Records as warcio itself writes them: (url, content type, body)."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=gzipped)
    writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "test"}))
    for url, kind, body in records:
        headers = [("Content-Type", kind)]
        if kind.startswith("packed "):
            kind, body = kind.removeprefix("packed "), gzip.compress(body)
            headers = [("Content-Type", kind), ("Content-Encoding", "gzip")]
        http = StatusAndHeaders(status, headers, protocol="HTTP/1.1")
        record = writer.create_warc_record(
            url,
            "response",
            payload=io.BytesIO(body),
            length=len(body),
            http_headers=http,
            warc_headers_dict={"WARC-Date": "2024-02-29T12:00:00Z"},
        )
        writer.write_record(record)
    return buffer.getvalue()


RECORDS = (
    ("https://example.org/a", "text/html; charset=utf-8", PAGE.encode()),
    ("https://example.org/b.txt", "text/plain", b"plain text"),
    ("https://example.org/c.png", "image/png", b"\x89PNG"),
    ("https://example.org/d", "packed text/plain; charset=koi8-r", "по-русски".encode("koi8-r")),
)


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_captures_become_documents(here: Path, read: Reader, name: str) -> None:
    (here / name).write_bytes(warc(*RECORDS, gzipped=name.endswith("gz")))
    records = read(name)
    assert not records.quarantined
    page, plain, russian = records.documents
    assert (page.path, page.slice) == (f"{name}#https://example.org/a", "web")
    assert PROSE in page.text and page.licence == "CC-BY-SA-4.0"
    assert page.time == datetime(2024, 2, 29, 12, tzinfo=UTC)
    assert plain.text == "plain text" and russian.text == "по-русски"
    assert russian.provenance.repairs[0].detail == "koi8-r"
    assert [s.reason for s in records.skipped] == ["a warcinfo record", "no text but image/png"]


def test_other_statuses_are_left_out(here: Path, read: Reader) -> None:
    (here / "a.warc").write_bytes(warc(*RECORDS[:1], status="404 Not Found", gzipped=False))
    assert [s.reason for s in read("a.warc").skipped] == ["a warcinfo record", "the status 404"]


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_warc_gives_what_stands_before_the_break(
    here: Path, read: Reader, gzipped: bool, share: float
) -> None:
    many = [(f"https://example.org/{k}", "text/plain", f"text {k} ".encode() * 50) for k in range(20)]
    data = warc(*many, gzipped=gzipped)
    name = "a.warc.gz" if gzipped else "a.warc"
    (here / name).write_bytes(data[: int(len(data) * share)])
    records = read(name)
    assert 20 * share - 3 <= len(records.documents) <= 20 * share + 1
    assert any(
        q.offset and ("cut short" in q.reason or "not as long" in q.reason) for q in records.quarantined
    )


def test_what_is_no_warc() -> None:
    with pytest.raises(Damaged, match="not a record of a WARC file"):
        list(captures(io.BytesIO(b"<html>not a warc</html>\n" * 10), 1000))


def test_a_body_that_is_too_long_is_not_held(here: Path, read: Reader) -> None:
    (here / "a.warc").write_bytes(
        warc(("https://example.org/a", "text/plain", b"x" * 9999), RECORDS[1], gzipped=False)
    )
    records = read("a.warc", limits={"html_bytes": 5000})
    assert records.texts == ["plain text"]
    (lost,) = records.quarantined
    assert lost.reason == "a page of more than 5,000 bytes" and lost.offset
