"""Keyed pseudonyms: what names a person is replaced by what the holder of a key can turn back.

    span "anna@posteo.de" of kind email  --seal-->     [email:7dPq0y...]
    [email:7dPq0y...]                    --restore-->  anna@posteo.de    with the same key, or not at all

A pseudonym is `[KIND:TOKEN]`, where TOKEN is URL-safe base64 without padding of AES-256-SIV (RFC 5297) over
the text, with the kind as associated data. The text is UTF-8, ended by the byte 0x80 and filled with zeros to
a multiple of 16 bytes, so that its length shows in steps of 16 alone. SIV is deterministic: one text has one
pseudonym under a key, so that a person can still be followed through the data; under two keys the pseudonyms
of one text have nothing in common. A forged or damaged pseudonym is not turned into anything.

The key is 64 bytes in a file of one line of hexadecimal digits that only its owner may read. Whoever loses it
has made the data anonymous; whoever has it can undo all. Only its `key_id` is ever written anywhere else.

Needs the package `cryptography` (extra `pseudonyms`).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.data.curate.spans import Span

KEY_BYTES = 64

_PSEUDONYM = re.compile(r"\[([a-z][a-z._]*):([A-Za-z0-9_-]{43,})\]")
_BLOCK = 16
_END = b"\x80"


def new_key(path: Path) -> str:
    """Make a key file that only its owner may read.

    Returns:
        Its `key_id`.

    Raises:
        BadInput: there is a file already, or the folder cannot be written to.
    """
    key = secrets.token_bytes(KEY_BYTES)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key.hex() + "\n")
    except FileExistsError:
        raise BadInput("there is a file already", where=path, fix="use it, or name another") from None
    except OSError as error:
        raise BadInput(f"the key cannot be written: {error.strerror}", where=path) from None
    return _key_id(key)


def _key_id(key: bytes) -> str:
    return hashlib.sha256(b"gyrocompass pseudonyms\0" + key).hexdigest()[:16]


class Pseudonyms:
    """Makes pseudonyms with a key, and turns them back.

    Args:
        key_path: a file that `new_key` made.

    Raises:
        BadInput: the file cannot be read, or is not a key.
        MissingDependency: `cryptography` is not installed.
    """

    def __init__(self, key_path: Path) -> None:
        key = _read_key(key_path)
        self.key_id = _key_id(key)
        """16 hex digits that say which key it was, and nothing about it."""
        self._cipher: Any = _cipher(key)

    def seal(self, span: Span, text: str) -> str:
        """The pseudonym of what stands in a span; fits `spans.replace`."""
        data = text.encode("utf-8", "surrogatepass") + _END
        data += bytes(-len(data) % _BLOCK)
        sealed = self._cipher.encrypt(data, [span.kind.encode()])
        return f"[{span.kind}:{base64.urlsafe_b64encode(sealed).decode().rstrip('=')}]"

    def restore(self, text: str) -> tuple[str, int]:
        """The text with its pseudonyms turned back.

        Returns:
            The text, and how many things that look like pseudonyms this key did not make; they stay.
        """
        n_foreign = 0

        def original(match: re.Match[str]) -> str:
            nonlocal n_foreign
            found = self._open(match[1], match[2])
            n_foreign += found is None
            return match[0] if found is None else found

        return _PSEUDONYM.sub(original, text), n_foreign

    def _open(self, kind: str, token: str) -> str | None:
        from cryptography.exceptions import InvalidTag

        try:
            sealed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            data: bytes = self._cipher.decrypt(sealed, [kind.encode()])
        except (ValueError, InvalidTag):
            return None
        return data.rstrip(b"\0").removesuffix(_END).decode("utf-8", "surrogatepass")


def _read_key(path: Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text("ascii").strip())
    except OSError as error:
        raise BadInput(
            f"the key of the pseudonyms cannot be read: {error.strerror}",
            where=path,
            fix="make one, and keep it apart from the data",
        ) from None
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise BadInput(f"not a key: it is one line of {2 * KEY_BYTES} hexadecimal digits", where=path)
    return key


def _cipher(key: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV
    except ImportError:
        raise MissingDependency("cryptography", extra="pseudonyms", needed_for="pseudonyms") from None
    return AESSIV(key)
