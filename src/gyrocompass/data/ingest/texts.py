"""Bytes become text: which characters they are, and what somebody before decoded wrongly.

    bytes --decode--> Text(text, repairs) | Undecodable

    1  a byte-order mark             says it
    2  UTF-8                         if they are
    3  what the source declares      an HTTP header, <meta charset>, a Python coding line; if it decodes them
    4  charset_normalizer            what they look like, if that is sure enough
    5  ftfy, line by line            prose that was UTF-8 once and was read as something else since

Whatever is not plain UTF-8 is noted as a `Repair` with its place. ftfy mends encodings and takes out control
characters (with what a backspace strikes out) here, nothing else: quotation marks, ligatures, entities and
widths are the author's. Code is not mended, as it may hold such texts on purpose. Windows line ends become
plain ones without a note, as everywhere else.

Source: ftfy (Speer, 2019), https://ftfy.readthedocs.io.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.document import Repair

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

MOST_REPAIRS = 1000
"""Repairs of one text that are noted one by one; a text with more is garbled, and the last note says so."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE_BYTES = 64 * 2**10
_MOST_CHAOS = 0.2
"""charset_normalizer's measure of mess, 0 to 1, above which its best guess is no better than none."""
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]")
_CONTROL_STEPS = {"out", "remove_control_chars", "remove_terminal_escapes"}
_OVERSTRUCK = re.compile("[^\x08]\x08")
"""What typewriters and terminals write bold and underlined text with."""
_MENDABLE = re.compile("[^\x00-\x7f]")


class Text(NamedTuple):
    """A text, and where it is not what its bytes say as UTF-8."""

    text: str
    repairs: tuple[Repair, ...] = ()


class Undecodable(Exception):  # noqa: N818
    """The bytes are no text; str() is the reason.

    Args:
        reason: why not.
        offset: of the first byte that shows it.
    """

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


def decode(data: bytes, *, declared: str | None = None, repair: bool, prose: bool) -> Text:
    """The text of a file.

    Args:
        data: its bytes.
        declared: the charset that its source declares.
        repair: whether bytes that are not UTF-8 may be read as another charset, and prose be mended.
        prose: whether it is something else than code.

    Raises:
        Undecodable: the bytes are no text in any charset that fits, or not UTF-8 and `repair` is off.
        MissingDependency: `repair` is on and what it needs is not installed.
    """
    text, charset = _decoded(data, declared, repair)
    repairs: list[Repair] = []
    text = text.replace("\r\n", "\n")
    if repair and prose:
        text, repairs = _mended(text)
    if charset:
        repairs.insert(0, Repair("charset", 0, len(text), charset))
    return Text(text, tuple(repairs))


def _decoded(data: bytes, declared: str | None, repair: bool) -> tuple[str, str | None]:
    """The text, and its charset where that is not UTF-8."""
    for mark, charset in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(charset), None if charset == "utf-8-sig" else charset
            except UnicodeDecodeError as error:
                raise Undecodable(f"not {charset}, as its mark says: {error.reason}", error.start) from error
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        fault = error
    if not repair:
        raise Undecodable(f"not UTF-8: {fault.reason}", fault.start)
    if b"\0" in data[:_SAMPLE_BYTES]:
        raise Undecodable("not a text: null bytes", data.index(b"\0"))
    for charset in filter(None, (declared, _guessed(data, fault.start))):
        try:
            text = data.decode(charset)
        except (LookupError, UnicodeDecodeError):
            continue
        if not _CONTROLS.search(text):
            return text, codecs.lookup(charset).name
    raise Undecodable(f"not UTF-8 ({fault.reason}), and no other charset fits", fault.start)


def _guessed(data: bytes, first_fault: int) -> str | None:
    """The charset that the bytes around the first fault look like."""
    try:
        from charset_normalizer import from_bytes
    except ImportError as error:
        raise MissingDependency("charset-normalizer", extra="ingest", needed_for="ingest.repair") from error
    start = max(0, first_fault - _SAMPLE_BYTES // 2)
    best = from_bytes(data[start : start + _SAMPLE_BYTES]).best()
    return None if best is None or best.chaos > _MOST_CHAOS else best.encoding


def _mended(text: str) -> tuple[str, list[Repair]]:
    """The text with its wrongly decoded lines mended, and which they are."""
    if not _MENDABLE.search(text) and not _CONTROLS.search(text):
        return text, []
    fix, config = _fixer()
    pieces: list[str] = []
    repairs: list[Repair] = []
    at = 0
    for line in text.splitlines(keepends=True):
        body = line.rstrip("\n")
        if _MENDABLE.search(body) or _CONTROLS.search(body):
            struck = _OVERSTRUCK.sub("", body)
            fixed, steps = fix(struck, config)
            if fixed != body:
                said = [("strike", "out")] * (struck != body) + (steps or [])
                detail = " > ".join(f"{name} {value}" for name, value in said)
                kind = "control" if all(value in _CONTROL_STEPS for _, value in said) else "mojibake"
                repairs.append(Repair(kind, at, at + len(fixed), detail))
                line = fixed + line[len(body) :]
        pieces.append(line)
        at += len(line)
    if len(repairs) > MOST_REPAIRS:
        rest = repairs[MOST_REPAIRS:]
        note = Repair("mojibake", rest[0].start, rest[-1].end, f"{len(rest):,} more lines")
        repairs = [*repairs[:MOST_REPAIRS], note]
    return "".join(pieces), repairs


def _fixer() -> tuple[Any, TextFixerConfig]:
    try:
        from ftfy import TextFixerConfig, fix_and_explain
    except ImportError as error:
        raise MissingDependency("ftfy", extra="ingest", needed_for="ingest.repair") from error
    config = TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        normalization=None,
    )
    return fix_and_explain, config
