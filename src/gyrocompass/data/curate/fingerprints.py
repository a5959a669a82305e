"""Fingerprints of a text: a few numbers that any two texts share which have a long passage in common.

Winnowing (Schleimer, Wilkerson and Aiken 2003): all runs of k bytes are hashed, and of every w of them in a
row the smallest hash is kept. A passage of k + w - 1 bytes holds w runs, whatever stands around it; the
smallest of them is kept in both texts. With k = w half the passage, a text keeps about four hashes for each
such length.

Shape legend: N bytes, R runs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gyrocompass.data.curate.words import UInt64Array, mix, powers


def fingerprints(byte_N: npt.NDArray[np.uint8], passage: int) -> UInt64Array:
    """The kept hashes, ascending, each once; none if the text is shorter than a passage.

    Args:
        byte_N: a text.
        passage: bytes of the shortest passage that two texts must have in common to share a fingerprint.

    >>> texts = b"-- to be or not to be", b"so to be or not to b"
    >>> one, two = (np.frombuffer(text, np.uint8) for text in texts)
    >>> bool(np.isin(fingerprints(one, 16), fingerprints(two, 16)).any())
    True
    """
    if len(byte_N) < passage:
        return np.empty(0, np.uint64)
    run = passage // 2
    window = passage - run + 1
    power_N, inverse_N = powers(len(byte_N))
    running = np.zeros(len(byte_N) + 1, np.uint64)
    np.cumsum((byte_N.astype(np.uint64) + np.uint64(1)) * power_N[: len(byte_N)], out=running[1:])
    hash_R = (running[run:] - running[:-run]) * inverse_N[: len(byte_N) - run + 1]
    return np.unique(_least(mix(hash_R), window))


def _least(hash_R: UInt64Array, window: int) -> UInt64Array:
    """The smallest of each window: of the rest of one block and the begin of the next (van Herk 1992)."""
    n_windows = len(hash_R) - window + 1
    padded = np.full(-(-len(hash_R) // window) * window, 2**64 - 1, np.uint64)
    padded[: len(hash_R)] = hash_R
    blocks = padded.reshape(-1, window)
    begins = np.minimum.accumulate(blocks, axis=1).reshape(-1)
    rests = np.minimum.accumulate(blocks[:, ::-1], axis=1)[:, ::-1].reshape(-1)
    return np.minimum(rests[:n_windows], begins[window - 1 : window - 1 + n_windows])
