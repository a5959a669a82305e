"""Pages become text, each within a time limit that really ends.

    with PageReader("trafilatura", seconds=10) as pages:
        pages.text(html)        its main text | NoText

A parser in C that runs for ever cannot be stopped from inside its process. So the extractor runs in a process
of its own (`page_worker`), which is killed when a page takes too long and started again for the next one.

trafilatura finds the main text best, at about 1 MB/s; resiliparse is some 15 times faster and keeps more of
what surrounds it.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Literal, Self

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.ingest import page_worker

Extractor = Literal["trafilatura", "resiliparse"]

_START_SECONDS = 60.0
_CHARSET = re.compile(rb"<meta\b[^>]*?\bcharset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})", re.IGNORECASE)
_LANGUAGE = re.compile(r"<html\b[^>]*?\blang\s*=\s*[\"']?([A-Za-z]{2,3})\b", re.IGNORECASE)
_HEAD = 4096


class NoText(Exception):  # noqa: N818
    """A page that no text came of; str() is the reason."""


class PageReader:
    """Extracts the text of pages in a process of its own, which starts with the first page.

    Args:
        extractor: which library.
        seconds: for one page.
        command: what runs as the process, for tests of what never ends.
    """

    def __init__(
        self, extractor: Extractor, seconds: float, command: tuple[str, ...] = (str(page_worker.__file__),)
    ) -> None:
        self._extractor, self._seconds, self._command = extractor, seconds, command
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def text(self, html: str) -> str:
        """The main text of a page.

        Raises:
            NoText: the time was over, the extractor failed, or it found no text.
            MissingDependency: the extractor is not installed.
        """
        process = self._process or self._start()
        page = html.encode(errors="replace")
        try:
            text = self._asked(process, len(page).to_bytes(8) + page, self._seconds)
        except TimeoutError:
            self._end()
            raise NoText(f"its text was not found within {self._seconds:g} s") from None
        except (EOFError, BrokenPipeError):
            self._end()
            raise NoText("the extractor broke down over it") from None
        if text[:1] != b"\0":
            raise NoText(f"the extractor failed: {text[1:].decode()}")
        if not text[1:].strip():
            raise NoText("no text was found in the page")
        return text[1:].decode()

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._process = subprocess.Popen(
            [sys.executable, "-P", *self._command, self._extractor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            ready = self._asked(process, b"", _START_SECONDS)
        except (TimeoutError, EOFError):
            ready = b"\1"
        if ready != b"\0":
            self._end()
            raise MissingDependency(
                self._extractor, extra="ingest", needed_for=f"ingest.html: {self._extractor}"
            )
        return process

    def _asked(self, process: subprocess.Popen[bytes], message: bytes, seconds: float) -> bytes:
        """What the process answers.

        Raises:
            TimeoutError: not in time.
            EOFError: it has ended.
            BrokenPipeError: it has ended.
        """
        assert process.stdin is not None and process.stdout is not None
        until_s = time.monotonic() + seconds
        writing = process.stdin.fileno()
        os.set_blocking(writing, False)
        left = memoryview(message)
        while left:
            _wait([], [writing], until_s)
            left = left[os.write(writing, left) :]
        length = int.from_bytes(_read(process.stdout.fileno(), 8, until_s))
        return _read(process.stdout.fileno(), length, until_s)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _wait(reading: list[int], writing: list[int], until_s: float) -> None:
    ready = select.select(reading, writing, [], max(0.0, until_s - time.monotonic()))
    if not any(ready):
        raise TimeoutError


def _read(descriptor: int, n_bytes: int, until_s: float) -> bytes:
    pieces = bytearray()
    while len(pieces) < n_bytes:
        _wait([descriptor], [], until_s)
        piece = os.read(descriptor, min(n_bytes - len(pieces), 2**20))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)


def declared_charset(page: bytes) -> str | None:
    """The charset that a page's head declares.

    >>> declared_charset(b'<html><head><meta charset="koi8-r">')
    'koi8-r'
    """
    match = _CHARSET.search(page[:_HEAD])
    return match[1].decode() if match else None


def declared_language(html: str) -> str | None:
    """The language that a page declares, by its first subtag.

    >>> declared_language('<!doctype html><html lang="pt-BR">')
    'pt'
    """
    match = _LANGUAGE.search(html[:_HEAD])
    return match[1].lower() if match else None
