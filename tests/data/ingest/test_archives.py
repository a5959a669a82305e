"""Archives: what is in them, and what damaged and hostile ones do."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Quarantined, write_records
from gyrocompass.data.ingest import streams
from gyrocompass.data.ingest.config import IngestSource
from gyrocompass.data.ingest.read import read_ingest

Reader = Callable[..., Any]

FILES = {"a/one.txt": b"first\n", "a/two.py": b"x = 1\n", "b/three.md": "# drei, 三\n".encode()}
TIME = 1_700_000_000


def tar(files: Mapping[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), TIME
            archive.addfile(member, io.BytesIO(data))
        for member in extra:
            archive.addfile(member)
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2023, 11, 14, 22, 13, 20)), data, compression)
    return buffer.getvalue()


PACKED = {
    "d.tar": tar(FILES),
    "d.tar.gz": gzip.compress(tar(FILES)),
    "d.tgz": gzip.compress(tar(FILES)),
    "d.tar.bz2": bz2.compress(tar(FILES)),
    "d.tar.xz": lzma.compress(tar(FILES)),
    "d.zip": zipped(FILES),
}


@pytest.mark.parametrize("name", PACKED)
def test_every_kind_of_archive_gives_the_same_documents(here: Path, read: Reader, name: str) -> None:
    (here / name).write_bytes(PACKED[name])
    records = read(name)
    assert [(d.path, d.text, d.slice, d.language) for d in records.documents] == [
        (f"{name}!/a/one.txt", "first\n", "text", None),
        (f"{name}!/a/two.py", "x = 1\n", "code", "python"),
        (f"{name}!/b/three.md", "# drei, 三\n", "text", None),
    ]
    assert not records.quarantined
    first = records.documents[0]
    assert first.provenance.sha256 == hashlib.sha256(b"first\n").hexdigest()
    assert first.file_hash == hashlib.sha256(PACKED[name]).hexdigest()
    assert first.time == datetime.fromtimestamp(TIME, UTC)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_single_compressed_files_keep_their_own_name(here: Path, read: Reader, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    (here / f"a.jsonl{suffix}").write_bytes(pack(b'{"text": "one"}\n{"text": "two"}\n'))
    (here / f"b.txt{suffix}").write_bytes(pack(b"three"))
    documents = read().documents
    assert [(d.path, d.text) for d in documents] == [
        (f"a.jsonl{suffix}:1", "one"),
        (f"a.jsonl{suffix}:2", "two"),
        (f"b.txt{suffix}", "three"),
    ]


def test_archives_in_archives_up_to_a_depth(here: Path, read: Reader) -> None:
    inner = gzip.compress(tar({"in.txt": b"deep"}))
    (here / "o.zip").write_bytes(zipped({"x.txt": b"top", "m/inner.tar.gz": inner}))
    assert [d.path for d in read("o.zip").documents] == ["o.zip!/x.txt", "o.zip!/m/inner.tar.gz!/in.txt"]
    records = read("o.zip", limits={"depth": 1})
    assert records.texts == ["top"]
    assert [(q.path, q.reason) for q in records.quarantined] == [
        ("o.zip!/m/inner.tar.gz", "archives in archives, more than 1 deep")
    ]


def test_licence_files_of_an_archive_are_evidence_wherever_they_stand(here: Path, read: Reader) -> None:
    files = {"p/src/a.py": b"x = 1\n", "q/b.py": b"y = 2\n", "p/LICENSE": b"\nMIT License\n\nPermission ..."}
    for name, data in (("d.tar.gz", gzip.compress(tar(files))), ("d.zip", zipped(files))):
        (here / name).write_bytes(data)
        found = {d.path: d.provenance.evidence for d in read(name).documents}
        (evidence,) = found[f"{name}!/p/src/a.py"]
        assert evidence == ("file", f"{name}!/p/LICENSE", "MIT License")
        assert found[f"{name}!/q/b.py"] == ()


# --- hostile members ---


@pytest.mark.parametrize(
    "name", ["../out.txt", "a/../../out.txt", "/etc/out.txt", "C:/out.txt", "..\\out.txt"]
)
def test_paths_that_lead_out_are_quarantined(here: Path, read: Reader, name: str) -> None:
    (here / "d.tar").write_bytes(tar({"ok.txt": b"ok", name: b"bad"}))
    (here / "d.zip").write_bytes(zipped({"ok.txt": b"ok", name: b"bad"}))
    records = read()
    assert records.texts == ["ok", "ok"]
    assert {(q.reason, q.n_bytes) for q in records.quarantined} == {("its path leads out of the archive", 3)}
    assert len(records.quarantined) == 2
    assert all(q.offset is not None for q in records.quarantined)
    assert not (here.parent / "out.txt").exists()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_links_are_never_followed(here: Path, read: Reader) -> None:
    (here / "secret.txt").write_text("secret")
    links = [
        link("in/ok", "../a.txt"),
        link("hard", "a.txt", tarfile.LNKTYPE),
        link("in/out.txt", "../../secret.txt"),
        link("abs.txt", "/etc/passwd"),
        link("hard.txt", "../secret.txt", tarfile.LNKTYPE),
        link("device", "", tarfile.CHRTYPE),
    ]
    (here / "d.tar").write_bytes(tar({"a.txt": b"text"}, *links))
    records = read("d.tar")
    assert records.texts == ["text"]
    assert [s.path for s in records.skipped] == ["d.tar!/in/ok", "d.tar!/hard"]
    assert [(q.path, q.reason) for q in records.quarantined] == [
        ("d.tar!/in/out.txt", "a link out of the archive"),
        ("d.tar!/abs.txt", "a link out of the archive"),
        ("d.tar!/hard.txt", "a link out of the archive"),
        ("d.tar!/device", "not a plain file: sparse, a device or a pipe"),
    ]
    symlink = zipfile.ZipInfo("l.txt")
    symlink.create_system, symlink.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(here / "l.zip", "w") as archive:
        archive.writestr(symlink, "/etc/passwd")
    assert [s.reason for s in read("l.zip").skipped] == ["a link in an archive, which is not followed"]


def test_encrypted_members_are_quarantined(here: Path, read: Reader) -> None:
    data = bytearray(zipped({"a.txt": b"text"}, zipfile.ZIP_STORED))
    for at in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        data[at] |= 1
    (here / "d.zip").write_bytes(data)
    assert [q.reason for q in read("d.zip").quarantined] == ["encrypted"]


# --- bombs ---

SMALL = {"free_bytes": 100_000, "ratio": 50}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("b.tar.gz", gzip.compress(tar({"a.txt": b"start", "b.txt": bytes(2_000_000), "c.txt": b"end"}))),
        ("b.txt.gz", gzip.compress(b"a" * 2_000_000)),
        ("b.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 200_000)),
        ("b.zip", zipped({"a.txt": b"start", "b.txt": b"a" * 2_000_000})),
        ("b.zip", zipped({"n.zip": zipped({"m.zip": zipped({"z.txt": b"a" * 2_000_000})})})),
    ],
    ids=["tar", "gzip", "xz lines", "zip", "nested zip"],
)
def test_bombs_are_known_by_their_ratio(here: Path, read: Reader, name: str, data: bytes) -> None:
    (here / name).write_bytes(data)
    (here / "z.txt").write_text("the next file")
    records = read(limits=SMALL)
    assert records.texts[-1] == "the next file"
    bombs = [q for q in records.quarantined if "as bombs do" in q.reason]
    assert bombs and all(q.path.startswith(name) for q in bombs)


def test_overlapping_members_count_each_time(here: Path, read: Reader) -> None:
    """A directory that names one member's bytes a thousand times over: the ratio is that of all of them."""
    one = zipped({"m000.txt": b"a" * 50_000})
    directory = one[one.index(b"PK\1\2") : one.index(b"PK\5\6")]
    entries = b"".join(directory.replace(b"m000", f"m{k:03}".encode()) for k in range(400))
    body = one[: one.index(b"PK\1\2")]
    end = b"PK\5\6" + bytes(4) + (400).to_bytes(2, "little") * 2
    end += len(entries).to_bytes(4, "little") + len(body).to_bytes(4, "little") + bytes(2)
    (here / "o.zip").write_bytes(body + entries + end)
    records = read("o.zip", limits={"free_bytes": 100_000, "ratio": 5})
    assert len(records.documents) < 20
    assert records.quarantined


def test_other_limits(here: Path, read: Reader) -> None:
    (here / "d.tar").write_bytes(tar({f"{k}.txt": b"x" * 100 for k in range(20)}))
    records = read("d.tar", limits={"members": 5})
    assert len(records.documents) == 5
    assert records.quarantined[-1].reason == "it holds more than 5 files"
    records = read("d.tar", limits={"unpacked_bytes": 5000})
    assert "unpacks to more than 5,000 bytes" in records.quarantined[-1].reason
    records = read("d.tar", limits={"document_bytes": 99})
    assert not records.documents
    assert {q.reason for q in records.quarantined} == {
        "more than 99 bytes, which is too long for one document"
    }
    assert len(records.quarantined) == 20


def test_a_header_cannot_fill_the_memory(here: Path, read: Reader) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**40
    (here / "d.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    assert "a tar header of 1,099,511,627,776 bytes" in read("d.tar").quarantined[0].reason


def test_a_sparse_member_of_an_exabyte_is_not_read(here: Path, read: Reader) -> None:
    member = tarfile.TarInfo("s.jsonl")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.size": str(2**60), "GNU.sparse.numblocks": "0"}
    member.pax_headers["GNU.sparse.map"] = "0,0"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    (here / "d.tar").write_bytes(buffer.getvalue())
    assert "sparse" in read("d.tar").quarantined[0].reason


# --- damage ---


def lines(n: int) -> bytes:
    return b"".join(
        b'{"text": "%d %s"}\n' % (k, hashlib.sha256(b"%d" % k).hexdigest().encode()) for k in range(n)
    )


def test_a_truncated_gzip_gives_what_stands_before_the_break(here: Path, read: Reader) -> None:
    data = gzip.compress(lines(5000))
    (here / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    (here / "b.txt").write_text("next")
    records = read()
    assert 1000 < len(records.documents) < 4000 and records.texts[-1] == "next"
    (lost,) = [q for q in records.quarantined if "cut short" in q.reason]
    assert lost.path == "a.jsonl.gz" and lost.offset is not None and 50_000 < lost.offset < 400_000
    with pytest.raises(BadInput, match=r"cut short.*\n.*a.jsonl.gz, byte [\d,]+\n.*on_damage") as caught:
        read(on_damage="refuse")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", PACKED)
@given(share=st.floats(0.02, 0.98))
@settings(max_examples=12, deadline=None)
def test_an_archive_cut_anywhere_is_noticed_and_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, name: str, share: float
) -> None:
    files = {f"{k}.txt": hashlib.sha256(b"%d" % k).hexdigest().encode() * 40 for k in range(12)}
    plain = tar(files)
    data = {
        "d.tar": plain,
        "d.tar.gz": gzip.compress(plain),
        "d.tgz": gzip.compress(plain),
        "d.tar.bz2": bz2.compress(plain),
        "d.tar.xz": lzma.compress(plain),
        "d.zip": zipped(files),
    }[name]
    if name == "d.tar":  # what pads it after the end mark is no loss
        data = data[: len(files) * (512 + 2560) + 512]
    folder = tmp_path_factory.mktemp("cut")
    (folder / name).write_bytes(data[: int(len(data) * share)])
    records = list(read_ingest(IngestSource(path=str(folder / name), repair=False)))
    assert any(isinstance(record, Quarantined) for record in records)
    assert len(records) <= len(files) + 2


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_flipped_bytes_are_never_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(PACKED)))
    packed = bytearray(PACKED[name])
    for _ in range(data.draw(st.integers(1, 8))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("flipped")
    (folder / name).write_bytes(packed)
    for record in read_ingest(IngestSource(path=str(folder / name), repair=False)):
        assert record.path


def test_damage_inside_a_zip_names_the_member_and_its_offset(here: Path, read: Reader) -> None:
    data = bytearray(zipped({"a.txt": b"a" * 500, "b.txt": b"b" * 500, "c.txt": b"c"}, zipfile.ZIP_STORED))
    at = data.index(b"b" * 500)
    data[at] ^= 1
    (here / "d.zip").write_bytes(data)
    records = read("d.zip")
    assert [t[:1] for t in records.texts] == ["a", "c"]
    (lost,) = records.quarantined
    assert lost.path == "d.zip!/b.txt" and "CRC" in lost.reason


# --- the disk ---


def test_a_full_disk_under_a_nested_archive_is_an_error_for_users(here: Path) -> None:
    """Really full: the process may write no more than a megabyte into any file."""
    noise = os.urandom(12 * 2**20)
    (here / "o.tar").write_bytes(tar({"i.zip": zipped({"a.bin": noise}, zipfile.ZIP_STORED)}))
    code = (
        "import resource, signal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from gyrocompass.core.errors import GyroError\n"
        "from gyrocompass.data.ingest.config import IngestSource\n"
        "from gyrocompass.data.ingest.read import read_ingest\n"
        "try:\n"
        "    print(list(read_ingest(IngestSource(path='o.tar'))))\n"
        "except GyroError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    assert "cannot be copied: File too large" in run.stdout
    assert "o.tar!/i.zip" in run.stdout and "TMPDIR" in run.stdout


def test_a_full_disk_under_the_records_is_an_os_error_that_the_command_line_explains(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out/documents.parquet").symlink_to("/dev/full")
    (here / "a.txt").write_bytes(os.urandom(3_000_000).hex().encode())
    with pytest.raises(OSError) as caught:
        write_records(here / "out", read_ingest(IngestSource(path="a.txt", repair=False)))
    assert "No space left" in str(caught.value)


def test_zstd(here: Path, read: Reader) -> None:
    with pa.OSFile(str(here / "a.txt.zst"), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(b"packed")
    assert read("a.txt.zst").texts == ["packed"]
    data = (here / "a.txt.zst").read_bytes()
    with pa.OSFile(str(here / "b.tar.zst"), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(tar(FILES))
    assert len(read("b.tar.zst").documents) == 3
    (here / "a.txt.zst").write_bytes(data[: len(data) - 4])
    assert read("a.txt.zst").quarantined


def test_the_budget_is_one_for_all_levels() -> None:
    budget = streams.Budget(streams.IngestLimits(free_bytes=10, ratio=2.0), packed_bytes=100)
    budget.take(200)
    with pytest.raises(streams.Refused, match="2 times its 100 bytes"):
        budget.take(1)
