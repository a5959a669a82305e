"""Log-probabilities of tokens, objectives over them, and the one reduction."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gyrocompass.loss.drop_in import linear_cross_entropy as linear_cross_entropy


def __getattr__(name: str) -> object:
    """`linear_cross_entropy` is imported when it is asked for: torch takes a second."""
    if name == "linear_cross_entropy":
        return import_module("gyrocompass.loss.drop_in").linear_cross_entropy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
