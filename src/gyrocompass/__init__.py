"""Gyrocompass: a language model's whole life on one signal, the log-probability of each token.

For those who train elsewhere: `patch(model)`, `unpatch(model)` and `loss.linear_cross_entropy`. They are
imported when they are asked for, so that `import gyrocompass` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("patch", "unpatch"):
        return getattr(import_module("gyrocompass.model.patch"), name)
    if name == "loss":
        return import_module("gyrocompass.loss")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
