"""The backends by name, and which one a question gets.

A name that the user chose is used or refused; "auto" takes the first that accepts the inputs. Where that is
the chunked backend only because this machine has no native one, a line on standard error says so, once.
"""

from __future__ import annotations

import functools
import os
import sys

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.loss._chunked import ChunkedBackend
from gyrocompass.loss._native import NativeBackend
from gyrocompass.loss._question import Backend, Logits
from gyrocompass.loss._triton import TritonBackend

_NATIVE = NativeBackend()
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (_NATIVE, TritonBackend(), ChunkedBackend())
}
"""In the order in which "auto" tries them."""


def backend_for(logits: Logits, name: str = "auto") -> Backend:
    """The backend of a question.

    Raises:
        BadInput: a backend that does not exist, or one that cannot take these inputs.
    """
    if name == "auto":
        chosen = next(backend for backend in BACKENDS.values() if backend.refusal(logits) is None)
        if chosen.name == "chunked" and _NATIVE.unsuited(logits) is None:
            _say_once(_NATIVE.refusal(logits))
        return chosen
    if name not in BACKENDS:
        raise BadInput(f"unknown backend {name!r}{did_you_mean(name, ['auto', 'reference', *BACKENDS])}")
    refusal = BACKENDS[name].refusal(logits)
    if refusal is not None:
        raise BadInput(f"the backend {name} cannot take this: {refusal}", fix="leave the choice to auto")
    return BACKENDS[name]


@functools.cache
def _say_once(reason: str | None) -> None:
    """Say what the native backend lacks, unless it was switched off on purpose."""
    if os.environ.get("GYRO_NATIVE") != "0":
        print(
            f"gyrocompass: the loss runs on the chunked backend (same numbers, slower): {reason}; see"
            " `gyro doctor`, or silence this with GYRO_NATIVE=0",
            file=sys.stderr,
            flush=True,
        )
