"""A small language model of bytes without weights from anywhere: counts of runs, interpolated.

    texts --fit--> NgramModel --save, load--> a .safetensors file --score--> log p of every byte

The probability of a byte after its k predecessors mixes its share among what followed them in the training
texts with the probability after k - 1, down to 1/256:

    p_k(b | c) = (n(c b) + s p_(k-1)(b | c')) / (n(c) + s),    c' = c without its first byte

Every p_k sums to 1 over the 256 bytes. It is what a filter needs that asks how usual a text is among others
of its kind; it takes no torch, and its `score` fits wherever a `Score` is asked for (each byte is a token).

Runs are counted by 64-bit hashes. Left out: pruning and Kneser-Ney, which matter for smaller files and a few
percent of perplexity.

Shape legend: N bytes of a text, K runs that were seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.word_runs import Hashes, prefix_hashes, range_hashes

_FORMAT = 1


class ByteScores(NamedTuple):
    """What the model says of the bytes of one text."""

    byte_N: NDArray[np.int64]
    """1 each."""
    logprob_N: NDArray[np.float64]
    """log p, nats."""


class _Counts(NamedTuple):
    """How often each of some runs was seen."""

    hash_K: Hashes
    """Sorted."""
    count_K: NDArray[np.int64]

    def of(self, hashes: Hashes) -> NDArray[np.float64]:
        """How often each of these was seen."""
        if not len(self.hash_K):
            return np.zeros(len(hashes))
        at = np.minimum(np.searchsorted(self.hash_K, hashes), len(self.hash_K) - 1)
        return np.where(self.hash_K[at] == hashes, self.count_K[at], 0).astype(np.float64)


class NgramModel:
    """Counts of runs of up to `order` bytes.

    Args:
        runs: for each length from 1 the runs that were seen.
        contexts: for each of them the runs without their last byte, where one followed.
        smoothing: `s` in the formula.
    """

    def __init__(self, runs: list[_Counts], contexts: list[_Counts], smoothing: float) -> None:
        self._runs, self._contexts, self.smoothing = runs, contexts, smoothing

    @classmethod
    def fit(cls, texts: Iterable[str], order: int = 5, smoothing: float = 4.0) -> NgramModel:
        """Count the runs of texts; a run never begins before its text.

        Args:
            texts: what is usual.
            order: bytes of the longest run, 1 at least.
            smoothing: above 0.
        """
        assert order >= 1 and smoothing > 0
        runs: list[list[Hashes]] = [[] for _ in range(order)]
        contexts: list[list[Hashes]] = [[] for _ in range(order)]
        for text in texts:
            prefix = _prefix(text)
            for size in range(1, order + 1):
                start = np.arange(max(len(prefix) - size, 0))
                runs[size - 1].append(range_hashes(prefix, start, start + size))
                contexts[size - 1].append(range_hashes(prefix, start, start + size - 1))
        return cls([_counted(parts) for parts in runs], [_counted(parts) for parts in contexts], smoothing)

    def score(self, texts: Iterable[str]) -> Iterator[ByteScores]:
        """The log-probability of every byte of each text; a `Score`.

        >>> model = NgramModel.fit(["abab" * 50])
        >>> usual, odd = (scores.logprob_N.mean() for scores in model.score(["abab", "zzzz"]))
        >>> bool(usual > -1.0 > -5.0 > odd)
        True
        """
        for text in texts:
            prefix = _prefix(text)
            p_N = np.full(len(prefix) - 1, 1 / 256)
            for size, (runs, contexts) in enumerate(zip(self._runs, self._contexts, strict=True), 1):
                start = np.arange(max(len(prefix) - size, 0))
                n_run = runs.of(range_hashes(prefix, start, start + size))
                n_context = contexts.of(range_hashes(prefix, start, start + size - 1))
                p_N[size - 1 :] = (n_run + self.smoothing * p_N[size - 1 :]) / (n_context + self.smoothing)
            yield ByteScores(np.ones(len(p_N), np.int64), np.log(p_N))

    def save(self, path: Path) -> None:
        """Write it to a `.safetensors` file."""
        arrays = {"format": np.array([_FORMAT]), "smoothing": np.array([self.smoothing])}
        for name, levels in (("run", self._runs), ("context", self._contexts)):
            for size, counts in enumerate(levels, 1):
                arrays |= {f"{name}_hash_{size}": counts.hash_K, f"{name}_count_{size}": counts.count_K}
        save_file(arrays, path)

    @classmethod
    def load(cls, path: Path) -> NgramModel:
        """Read what `save` wrote.

        Raises:
            BadInput: the file cannot be read, or is something else.
        """
        try:
            arrays = load_file(path)
            if arrays["format"].tolist() != [_FORMAT]:
                raise BadInput(
                    "a model of runs in a format of another version", where=path, fix="fit it again"
                )
            order = sum(name.startswith("run_hash_") for name in arrays)
            runs, contexts = (
                [
                    _Counts(arrays[f"{name}_hash_{size}"], arrays[f"{name}_count_{size}"])
                    for size in range(1, order + 1)
                ]
                for name in ("run", "context")
            )
            return cls(runs, contexts, float(arrays["smoothing"].item()))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise BadInput(
                f"not a model of runs: {error}", where=path, fix="give what NgramModel.save wrote"
            ) from None


def _prefix(text: str) -> Hashes:
    return prefix_hashes(np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8))


def _counted(parts: list[Hashes]) -> _Counts:
    hashes, counts = np.unique(np.concatenate([*parts, np.zeros(0, np.uint64)]), return_counts=True)
    return _Counts(hashes, counts.astype(np.int64))
