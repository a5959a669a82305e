"""What any database takes: texts without NUL and half surrogates, numbers that JSON can say.

PostgreSQL stores no NUL in a text and no infinity in JSON; a model may write the one and say the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def storable(value: Any) -> Any:
    """The value with U+FFFD in place of what no text may hold, and None in place of numbers that are none.

    >>> storable({"a": "x\\0y", "b": [float("-inf"), 1.5]})
    {'a': 'x�y', 'b': [None, 1.5]}
    """
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        plain = value.isascii() and "\0" not in value
        return value if plain else _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {storable(str(name)): storable(entry) for name, entry in value.items()}
    if isinstance(value, Sequence):
        return [storable(entry) for entry in value]
    return value
