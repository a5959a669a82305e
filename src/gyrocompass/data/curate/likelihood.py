"""Likelihood as a figure of documents: perplexity, surprising places, and the difference of two models.

    documents, Score            --Likelihood------> bits_per_byte, perplexity, spans of surprising tokens
    documents, two Scores       --Likelihood------> difference of their bits per byte
    figures of all documents    --LikelihoodBands-> percentile and band of each within its slice

A `Score` gives the log-probability of each token of a text, whoever computes it; curation imports no model.
Scores are asked for by name: `ngram:FILE` is a file of `NgramModel`, and whoever runs the step adds others to
`SCORES`, such as a language model's.

What to select by them:

- perplexity bands by slice (CCNet: Wenzek et al. 2020): the middle of each slice, not the middle of all;
- RHO (Mindermann et al. 2022): `difference` between the model in training and a reference trained on what is
  good: high where there is something left to learn that can be learned;
- two models of the same kind, one of a target and one of everything, as in DSIR (Xie et al. 2023; Moore &
Lewis
  2010): `difference` of target less raw: low where a document is like the target. `importance` does the same
  without a model.

A log-probability that is no number stops the run and names the document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gyrocompass.core.errors import BadInput, GyroError, did_you_mean
from gyrocompass.data.curate.ngram_model import NgramModel
from gyrocompass.data.curate.spans import Span, to_arrow
from gyrocompass.data.curate.step import CorpusAccess, GlobalStep, RecordStep, register

_LOG_2 = float(np.log(2))


class Scored(Protocol):
    """What a score says of one text: its tokens in order; see `measure.score.TokenScores`."""

    @property
    def byte_N(self) -> NDArray[np.int64]:
        """Bytes of text each stands for."""

    @property
    def logprob_N(self) -> NDArray[np.float64]:
        """log p, nats."""


Score = Callable[[Iterable[str]], Iterator[Scored]]

SCORES: dict[str, Callable[[], Score]] = {}
"""Makers of scores by name; whoever runs a step adds what it names, in each process that runs it."""


class Figures(NamedTuple):
    """A text under a score."""

    nll_nats: float
    n_tokens: int
    bits_per_byte: float
    perplexity: float
    """For each token."""
    spans: list[Span]


@register
class Likelihood(RecordStep):
    """Scores documents.

    Args:
        score: the name of a score.
        reference: the name of another that it is compared with; None: of none.
        surprise_nats: -log p from which on a token is marked.
    """

    name: ClassVar[str] = "likelihood"

    score: str
    reference: str | None = None
    surprise_nats: float = Field(12.0, gt=0)

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`nll_nats`, `n_tokens`, `bits_per_byte`, `perplexity`, `surprising` (share of tokens) and `spans`.

        With a reference also `reference_bits_per_byte` and `difference`. Of an empty text all but the counts
        are null.

        Raises:
            BadInput: no score has that name.
            GyroError: a log-probability is not finite.
        """
        figures = self._figures(self.score, documents)
        of_bytes = [f.bits_per_byte if f.n_tokens else None for f in figures]
        columns = {
            "id": documents.column("id"),
            "nll_nats": pa.array([f.nll_nats for f in figures], pa.float64()),
            "n_tokens": pa.array([f.n_tokens for f in figures], pa.int64()),
            "bits_per_byte": pa.array(of_bytes, pa.float64()),
            "perplexity": pa.array([f.perplexity if f.n_tokens else None for f in figures], pa.float64()),
            "surprising": pa.array(
                [len(f.spans) / f.n_tokens if f.n_tokens else None for f in figures], pa.float32()
            ),
            "spans": to_arrow([f.spans for f in figures]),
        }
        if self.reference is not None:
            reference = [
                f.bits_per_byte if f.n_tokens else None for f in self._figures(self.reference, documents)
            ]
            pairs = zip(of_bytes, reference, strict=True)
            difference = [a - b if a is not None and b is not None else None for a, b in pairs]
            columns["reference_bits_per_byte"] = pa.array(reference, pa.float64())
            columns["difference"] = pa.array(difference, pa.float64())
        return pa.RecordBatch.from_pydict(columns)

    def _figures(self, name: str, documents: pa.RecordBatch) -> list[Figures]:
        texts = [text or "" for text in documents.column("text").to_pylist()]
        paths = documents.column("path").to_pylist()
        scored = scorer(name)(iter(texts))
        return [
            self._of(text, scores, f"{path}, under {name}")
            for text, path, scores in zip(texts, paths, scored, strict=True)
        ]

    def _of(self, text: str, scores: Scored, where: str) -> Figures:
        surprisal_N = -np.asarray(scores.logprob_N, np.float64)
        if not np.isfinite(surprisal_N).all():
            raise GyroError(
                "a log-probability is not finite", where=where, fix="look at the model, or drop the document"
            )
        n_bytes = len(text.encode("utf-8", "surrogatepass"))
        nll = float(surprisal_N.sum())
        n_tokens = len(surprisal_N)
        bits = nll / _LOG_2 / n_bytes if n_bytes else 0.0
        perplexity = float(np.exp(min(nll / n_tokens, 700.0))) if n_tokens else 0.0
        odd = np.flatnonzero((surprisal_N >= self.surprise_nats) & (scores.byte_N > 0))
        spans = _places(text, scores.byte_N, surprisal_N, odd) if len(odd) else []
        return Figures(nll, n_tokens if n_bytes else 0, bits, perplexity, spans)


def _places(
    text: str, byte_N: NDArray[np.int64], surprisal_N: NDArray[np.float64], odd: NDArray[np.int64]
) -> list[Span]:
    """Tokens as spans of characters: those that any of their bytes belong to."""
    begins = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) & 0xC0 != 0x80
    character = np.concatenate([np.cumsum(begins) - 1, [len(text)]])
    end_N = np.cumsum(byte_N)
    spans = []
    for token in odd.tolist():
        first, end = int(end_N[token] - byte_N[token]), int(end_N[token])
        start, last = int(character[first]), int(character[end - 1])
        spans.append(Span(start, last + 1, "surprising", float(1 - np.exp(-surprisal_N[token]))))
    return sorted({(span.start, span.end): span for span in spans}.values())


@lru_cache(maxsize=4)
def scorer(name: str) -> Score:
    """A score by name, made once a process.

    Raises:
        BadInput: none has that name, or its file is none.
    """
    if name in SCORES:
        return SCORES[name]()
    family, _, path = name.partition(":")
    if family == "ngram" and path:
        return NgramModel.load(Path(path)).score
    raise BadInput(
        f"no score is called {name!r}{did_you_mean(name, [*SCORES, 'ngram:FILE'])}", where="likelihood.score"
    )


_VALUES = pa.schema([("id", pa.string()), ("slice", pa.string()), ("value", pa.float64())])
_BANDS = pa.schema(
    [("id", pa.string()), ("percentile", pa.float64()), ("band", pa.string()), ("robust_z", pa.float64())]
)


@register
class LikelihoodBands(GlobalStep):
    """Says where a document's figure stands among those of its slice.

    Args:
        column: the figure.
        bands: names from the lowest figures to the highest.
        cuts: the shares of documents at which the bands part, ascending.
    """

    name: ClassVar[str] = "likelihood_bands"

    column: str = "likelihood.bits_per_byte"
    bands: tuple[str, ...] = ("head", "middle", "tail")
    cuts: tuple[float, ...] = (1 / 3, 2 / 3)

    @model_validator(mode="after")
    def _cuts_fit(self) -> LikelihoodBands:
        if len(self.cuts) != len(self.bands) - 1 or list(self.cuts) != sorted({*self.cuts}):
            raise ValueError(f"{len(self.bands)} bands part at {len(self.bands) - 1} ascending cuts")
        if any(not 0 < cut < 1 for cut in self.cuts):
            raise ValueError("a cut is a share between 0 and 1")
        return self

    def reads(self) -> tuple[str, ...]:
        """The figure."""
        return (self.column,)

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The figure and the slice of each document."""
        columns = [
            documents.column("id"),
            documents.column("slice"),
            documents.column(self.column).cast(pa.float64()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=_VALUES)

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """`percentile` (0 to 1, the mean of equal ones), `band`, and `robust_z`.

        robust_z is (value - median) / (1.4826 times the median distance from it), null where that is 0.
        """
        table = pa.Table.from_batches(list(signatures), _VALUES)
        value_D = table["value"].to_numpy()
        slices, number_D = np.unique(np.array(table["slice"].to_pylist(), dtype=object), return_inverse=True)
        percentile_D = np.full(len(value_D), np.nan)
        z_D = np.full(len(value_D), np.nan)
        for number in range(len(slices)):
            rows = np.flatnonzero((number_D == number) & ~np.isnan(value_D))
            if len(rows):
                percentile_D[rows] = _percentiles(value_D[rows])
                z_D[rows] = _robust_z(value_D[rows])
        band_D = np.searchsorted(np.array(self.cuts), np.nan_to_num(percentile_D), side="right")
        names = [None if np.isnan(p) else self.bands[b] for p, b in zip(percentile_D, band_D, strict=True)]
        columns = [table["id"].combine_chunks(), percentile_D, names, z_D]
        return pa.RecordBatch.from_arrays(
            [
                pa.array(column, field.type, from_pandas=True)
                for column, field in zip(columns, _BANDS, strict=True)
            ],
            schema=_BANDS,
        )


def _percentiles(value_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of values below each, and half of those that equal it."""
    ordered = np.sort(value_D)
    below, upto = np.searchsorted(ordered, value_D, "left"), np.searchsorted(ordered, value_D, "right")
    return np.asarray((below + upto) / (2 * len(value_D)), np.float64)


def _robust_z(value_D: NDArray[np.float64]) -> NDArray[np.float64]:
    distance_D = value_D - np.median(value_D)
    scale = 1.4826 * float(np.median(np.abs(distance_D)))
    return distance_D / scale if scale else np.full(len(value_D), np.nan)
