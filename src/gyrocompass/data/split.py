"""Which side of a split a document is on, from its content alone.

    side = "held_out" if hash(salt, split key) < held_out_share else "train"

The key is the content hash, so equal contents are on one side whatever their paths, their order or what else
is in the data; a document with a group follows its group (what is derived from a file is on its side). Each
slice is split in the same share, up to chance: a small slice may have nothing held out.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from gyrocompass.data.document import Document

Side = Literal["train", "held_out"]


def side(document: Document, held_out_share: float, salt: str = "") -> Side:
    """The document's side.

    Args:
        document: any document.
        held_out_share: the expected share of held-out groups, 0 to 1.
        salt: another salt is another split.

    >>> side(Document(kind="text", text="x = 1", path="a.py", source="files", slice="code"), 0.05)
    'train'
    """
    digest = hashlib.sha256(f"{salt}\0{document.split_key}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:8]) < held_out_share * 2**64 else "train"
