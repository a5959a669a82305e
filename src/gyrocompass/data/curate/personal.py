"""Personal data in texts: found, scored and marked, never changed.

    text --PersonalData--> spans [(start, end, "email", 0.95), ...], count, n_email, n_phone, ...

Kinds that a pattern knows: `email`, `phone`, `ip`, `iban`, `card`, `id.COUNTRY` (national identities with
their check digits) and `address`. Names take a recogniser, which is a program of its own: one that is
in `RECOGNISERS`, or `spacy:MODEL` with a model that is already installed. Nothing is downloaded.

A span's score says how sure it is; every candidate is kept, and the counts are of those with at least
`minimum_score`. What is done about them (drop, mask, pseudonyms) is the decision's business: see `pseudonym`.

Left out: what identifies only together with other facts (birthdays, jobs), and numbers of countries that
have neither a check digit nor a form of their own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from gyrocompass.core.errors import BadInput, MissingDependency, did_you_mean
from gyrocompass.data.curate import digit_groups, personal_numbers, personal_words
from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.spans import Span, by_document, disjoint, to_arrow
from gyrocompass.data.curate.step import RecordStep, register

Recogniser = Callable[[Sequence[str]], list[list[Span]]]
"""Gives the spans of names of each text."""

PersonalKind = Literal["email", "phone", "ip", "iban", "card", "id", "address"]
KINDS: tuple[PersonalKind, ...] = ("email", "phone", "ip", "iban", "card", "id", "address")

RECOGNISERS: dict[str, Callable[[], Recogniser]] = {}
"""Makers of recognisers by name; a plug-in adds its own."""


@register
class PersonalData(RecordStep):
    """Marks personal data.

    Args:
        kinds: which are looked for.
        names: a registered recogniser, or `spacy:MODEL`; None: names are not looked for.
        minimum_score: of the spans that are counted.
    """

    name: ClassVar[str] = "personal"

    kinds: tuple[PersonalKind, ...] = KINDS
    names: str | None = None
    minimum_score: float = Field(0.5, ge=0, le=1)

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`spans`, how many there are (`count`), and of each kind that is looked for (`n_email`, ...).

        Raises:
            BadInput: no recogniser has that name.
            MissingDependency: the recogniser's package or model is not installed.
        """
        joined = Joined.of(documents)
        spans = by_document(joined, find(joined, self.kinds))
        if self.names is not None:
            named = recogniser(self.names)(joined.texts)
            spans = [disjoint([*found, *names]) for found, names in zip(spans, named, strict=True)]
        counted = [*dict.fromkeys(self.kinds), *(["name"] if self.names else [])]
        counts = {kind: np.zeros(len(spans), np.int32) for kind in counted}
        for row, of_document in enumerate(spans):
            for span in of_document:
                if span.score >= self.minimum_score:
                    counts[span.kind.partition(".")[0]][row] += 1
        total = sum(counts.values(), np.zeros(len(spans), np.int32))
        return pa.RecordBatch.from_pydict(
            {"id": documents.column("id"), "spans": to_arrow(spans), "count": total}
            | {f"n_{kind}": counts[kind] for kind in counted}
        )


def find(joined: Joined, kinds: Sequence[PersonalKind] = KINDS) -> list[Span]:
    """Every candidate in a joined text, overlaps included."""
    groups = digit_groups.find(joined.code_N)
    finders = {
        "email": lambda: personal_words.emails(joined),
        "phone": lambda: personal_numbers.phones(joined, groups),
        "ip": lambda: personal_numbers.network_addresses(joined, groups),
        "iban": lambda: personal_numbers.ibans(joined, groups),
        "card": lambda: personal_numbers.cards(joined, groups),
        "id": lambda: personal_numbers.national_ids(joined, groups),
        "address": lambda: personal_words.addresses(joined, groups),
    }
    return [span for kind in kinds for span in finders[kind]()]


def find_in(text: str, kinds: Sequence[PersonalKind] = KINDS) -> list[Span]:
    """The personal data of one text.

    >>> [(span.kind, span.score) for span in find_in("Anna <anna.b@posteo.de>, +49 30 901820")]
    [('email', 0.95), ('phone', 0.95)]
    """
    if not _POSSIBLE.search(text):
        return []
    joined = Joined([text])
    return by_document(joined, find(joined, kinds))[0]


_POSSIBLE = re.compile(r"[\d@:]|at[)\]]|AT[)\]]")
"""Something that each kind needs: a digit, an @ or its spelling, the colons of an address."""


@functools.lru_cache(maxsize=4)
def recogniser(name: str) -> Recogniser:
    """The recogniser of names that a config asks for, made once a process."""
    if name in RECOGNISERS:
        return RECOGNISERS[name]()
    family, _, model = name.partition(":")
    if family == "spacy" and model:
        return _spacy(model)
    known = [*RECOGNISERS, "spacy:MODEL"]
    raise BadInput(f"no recogniser of names is called {name!r}{did_you_mean(name, known)}", where="names")


def _spacy(model: str) -> Recogniser:
    try:
        import spacy
    except ImportError:
        raise MissingDependency("spacy", extra="names", needed_for="finding names") from None
    try:
        pipeline = spacy.load(model)
    except OSError:
        raise BadInput(
            f"the spaCy model {model} is not installed", where="names", fix=f"install it: pip install {model}"
        ) from None

    def find_names(texts: Sequence[str]) -> list[list[Span]]:
        return [
            [
                Span(e.start_char, e.end_char, "name", 0.7)
                for e in parsed.ents
                if e.label_ in {"PERSON", "PER"}
            ]
            for parsed in pipeline.pipe(texts)
        ]

    return find_names
