from __future__ import annotations

import gzip
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.lines import bounded_lines

Reader = Callable[..., Any]


@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b""))), st.integers(1, 30), st.booleans()
)
def test_lines_are_whole_or_measured(lines: list[bytes], most: int, ended: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    found = list(bounded_lines(io.BytesIO(data), most))
    expected = [piece for piece in re.split(rb"(?<=\n)", data) if piece]
    assert [line.n_bytes for line in found] == [len(piece) for piece in expected]
    for line in found:
        assert line.is_too_long == (line.n_bytes > most)
        if not line.is_too_long:
            assert data[line.offset : line.offset + line.n_bytes] == line.data
        else:
            assert data[line.offset :].startswith(line.data)


def test_a_line_that_is_too_long_is_quarantined_with_its_place(here: Path, read: Reader) -> None:
    long = b'{"text": "' + b"x" * 5000 + b'"}'
    (here / "a.jsonl").write_bytes(b'{"text": "one"}\n' + long + b'\n{"text": "three"}\n')
    records = read("a.jsonl", limits={"line_bytes": 1000})
    assert records.texts == ["one", "three"]
    (lost,) = records.quarantined
    assert (lost.path, lost.line, lost.offset, lost.n_bytes) == ("a.jsonl", 2, 16, len(long) + 1)
    assert lost.reason == "a line of 5,013 bytes, which is too long"
    assert lost.excerpt.startswith('{"text": "xxx') and len(lost.excerpt) == 160


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_memory_stays_bounded_over_a_line_of_two_gigabytes(here: Path, packed: bool) -> None:
    """Really two gigabytes: of zeros, in a file with a hole, or as gzip. The peak is the process's own."""
    name = "a.jsonl.gz" if packed else "a.jsonl"
    if packed:
        piece = gzip.compress(bytes(2**27), 1)
        with (here / name).open("wb") as file:
            file.write(
                gzip.compress(b'{"text": "one"}\n') + piece * 16 + gzip.compress(b'\n{"text": "three"}\n')
            )
    else:
        with (here / name).open("wb") as file:
            file.write(b'{"text": "one"}\n')
            file.seek(2**31 + 16)
            file.write(b'\n{"text": "three"}\n')
    code = (
        "import resource, sys\n"
        "from gyrocompass.data.ingest.config import IngestSource\n"
        "from gyrocompass.data.ingest.read import read_ingest\n"
        "limits = {'line_bytes': 2**20, 'ratio': 10000.0}\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for record in read_ingest(IngestSource(path=sys.argv[1], limits=limits)):\n"
        "    print(getattr(record, 'text', None), getattr(record, 'n_bytes', None), record.path)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((after - before) // 1024, file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=True, cwd=here
    )
    assert run.stdout.splitlines() == [
        f"one 3 {name}:1",
        f"None {2**31 + 1} {name}",
        f"three 5 {name}:3",
    ]
    assert int(run.stderr) < 40, "more than 40 MiB over what the process began with"
