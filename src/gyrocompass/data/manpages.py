"""Manual pages set as text, by groff in its safe mode, which runs nothing that a page asks for.

roff source --set_page--> text      lines of 100 characters, not justified, not hyphenated, no marks
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache

_SECONDS = 20.0
_SAID = 160
_MDOC = re.compile(rb"^\.Dd\b", re.MULTILINE)


class NotSet(Exception):  # noqa: N818
    """A page that is left out by rule; str() is the reason."""


class Unsettable(Exception):  # noqa: N818
    """A page that no text came of; str() is the reason.

    Args:
        reason: why.
        said: what groff said.
    """

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(reason)
        self.said = said


def set_page(source: bytes) -> str:
    """The text of a manual page.

    Raises:
        NotSet: it only names another page, or groff is not installed.
        Unsettable: groff failed, or did not end.
    """
    if source.lstrip().startswith(b".so "):
        raise NotSet("a page that only names another")
    groff = shutil.which("groff")
    if groff is None:
        raise NotSet("groff, which sets manual pages, is not installed")
    macros, title = ("-mdoc", b"Dd") if _MDOC.search(source) else ("-man", b"TH")
    # The macros turn both on again with the title, so they are turned off in it.
    plain = b".am " + title + b"\n.na\n.nh\n..\n"
    try:
        run = subprocess.run(
            [groff, "-Kutf8", "-Tutf8", "-t", macros, "-P-cbou", "-rHY=0", "-rLL=100n"],
            input=plain + source,
            capture_output=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Unsettable(f"groff did not end within {_SECONDS:g} s") from None
    text = run.stdout.decode("utf-8", "replace").strip("\n")
    if run.returncode or not text.strip():
        raise Unsettable("groff made no text of it", run.stderr.decode("utf-8", "replace")[:_SAID])
    return text + "\n"


@cache
def groff_version() -> str | None:
    """What groff says of itself; None where there is none."""
    groff = shutil.which("groff")
    if groff is None:
        return None
    return subprocess.run([groff, "--version"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )[0]
