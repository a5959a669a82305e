"""Ctrl-C and SIGTERM as something a loop can look at between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupt_flag() -> Iterator[list[int]]:
    """A list that a first Ctrl-C (or SIGTERM) puts something into; a second one interrupts at once.

    Signals reach the main thread alone: elsewhere nothing is caught.
    """
    seen: list[int] = []

    def on_interrupt(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
