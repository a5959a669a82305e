"""The backends by name, and which one a question gets.

A name that the user chose is used or refused; "auto" takes the first that accepts the inputs.
"""

from __future__ import annotations

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.loss._chunked import ChunkedBackend
from gyrocompass.loss._native import NativeBackend
from gyrocompass.loss._question import Backend, Logits
from gyrocompass.loss._triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (NativeBackend(), TritonBackend(), ChunkedBackend())
}
"""In the order in which "auto" tries them."""


def backend_for(logits: Logits, name: str = "auto") -> Backend:
    """The backend of a question.

    Raises:
        BadInput: a backend that does not exist, or one that cannot take these inputs.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.refusal(logits) is None)
    if name not in BACKENDS:
        raise BadInput(f"unknown backend {name!r}{did_you_mean(name, ['auto', 'reference', *BACKENDS])}")
    refusal = BACKENDS[name].refusal(logits)
    if refusal is not None:
        raise BadInput(f"the backend {name} cannot take this: {refusal}", fix="leave the choice to auto")
    return BACKENDS[name]
