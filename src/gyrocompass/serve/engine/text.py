"""Tokens into text, as they come: whole characters, and nothing that a stop may yet cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gyrocompass.measure.generate import cut_at

_BROKEN = "\ufffd"
_WINDOW = 8
"""Tokens before a new one that its text may depend on: some tokenizers write blanks by what precedes."""
_LONGEST_CHARACTER = 4
"""Tokens that one character may be spread over."""


class TextStream:
    """The text of a sequence that grows.

    Args:
        tokenizer: the model's.
        stops: the text ends before the first of these.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._told = 0
        """Tokens whose text is in `_held` or was given."""
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is sure now that this token came; `stopped` says whether a stop did."""
        self._ids.append(token)
        return self._give(self._fresh(final=False), final=False)

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        return "" if self.stopped else self._give(self._fresh(final=True), final=True)

    def _fresh(self, final: bool) -> str:
        """Text of the tokens not told yet, as far as it is whole characters."""
        start = max(0, self._told - _WINDOW)
        before = self._decode(self._ids[start : self._told])
        both = self._decode(self._ids[start:])
        pending = len(self._ids) - self._told
        if both.endswith(_BROKEN) and not final and pending < _LONGEST_CHARACTER:
            return ""
        self._told = len(self._ids)
        return both[len(before) :]

    def _give(self, fresh: str, final: bool) -> str:
        text, self.stopped = cut_at(self._held + fresh, self._stops)
        if self.stopped or final:
            self._held = ""
            return text
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _overlap(text: str, stop: str) -> int:
    """The most characters at the text's end that begin the stop.

    >>> _overlap("one tw", "two")
    2
    """
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
