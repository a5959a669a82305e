"""The process that extracts text from pages: run as a script, killed when a page takes too long.

    standard input   for each page 8 bytes of length, big-endian, and so many of the page in UTF-8
    standard output  for each page the same: b"\\x00" and the text, or b"\\x01" and why there is none

The first message on standard output says that the extractor could be imported. Nothing of the package is
imported here, so that it starts as fast as its extractor does.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable

Extract = Callable[[str], "str | None"]

_MEMORY_BYTES = 4 * 2**30


def extractor(name: str) -> Extract:
    """What a name stands for: `trafilatura` (the cleanest) or `resiliparse` (the fastest)."""
    if name == "trafilatura":
        import trafilatura

        return lambda html: trafilatura.extract(html, include_comments=False)
    from resiliparse.extract.html2text import extract_plain_text

    return lambda html: extract_plain_text(html, main_content=True)


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = sys.stdout.buffer
    with contextlib.redirect_stdout(sys.stderr):  # what a library prints is no answer
        try:
            extract = extractor(sys.argv[1])
        except ImportError as error:
            _say(output, b"\x01" + str(error).encode())
            return
        _say(output, b"\x00")
        while head := sys.stdin.buffer.read(8):
            page = sys.stdin.buffer.read(int.from_bytes(head))
            try:
                text = extract(page.decode())
                answer = b"\x00" + (text or "").encode()
            except Exception as error:
                answer = b"\x01" + f"{type(error).__name__}: {error}".encode(errors="replace")
            _say(output, answer)


def _say(output: object, message: bytes) -> None:
    output.write(len(message).to_bytes(8) + message)  # type: ignore[attr-defined]
    output.flush()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
