"""Where a document comes from and what it is about: the site of its address, and a subject by its terms.

    path, source, text --Domain--> host "en.example.org", site "example.org", subject "law", score

The site is the part of a host that somebody registered: the last two labels, or three where the second last
is one of the general ones (`co.uk`). The subject is the one whose terms make up most of the words, if they
are at least `minimum_share` of them; terms come with the config, and the default lists are English and small:
they sort documents for a first look. Topics that the data itself has are found by clustering instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from gyrocompass.data.curate.blocks import by_blocks
from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.step import RecordStep, register
from gyrocompass.data.curate.text_shape import Float64Array
from gyrocompass.data.curate.word_runs import WordRuns, hash_words

_SUBJECTS = {
    "law": "court plaintiff defendant statute contract liability judge appeal clause jurisdiction tort",
    "medicine": "patient clinical disease treatment therapy diagnosis symptom dose hospital surgery "
    "infection",
    "finance": "market investor equity bond dividend asset loan bank revenue inflation portfolio tax",
    "computing": "function class module return argument string file server code python object method thread",
    "mathematics": "theorem proof lemma integer matrix equation finite polynomial convergence algebra",
    "biology": "cell protein gene species enzyme dna organism membrane evolution bacteria tissue",
    "physics": "energy particle quantum electron momentum field relativity photon velocity gravity",
    "history": "century empire king war treaty emperor dynasty revolution colony parliament",
    "cooking": "tablespoon teaspoon flour butter sugar oven recipe garlic onion simmer bake",
    "sport": "match goal league championship coach tournament player team season score",
}
SUBJECTS: Mapping[str, tuple[str, ...]] = {name: tuple(terms.split()) for name, terms in _SUBJECTS.items()}
"""Terms by subject."""

_HOST = re.compile(r"(?i)(?:^|\s)(?:https?|ftp)://(?:[^/@\s]*@)?([^/:\s?#]+)")
_GENERAL = frozenset(["ac", "co", "com", "edu", "gob", "gov", "gouv", "mil", "net", "ne", "or", "org"])


@register
class Domain(RecordStep):
    """Names the site and the subject of each document.

    Args:
        subjects: single words by subject, in small letters.
        minimum_share: of a document's words that a subject's terms make up.
    """

    name: ClassVar[str] = "domain"

    subjects: dict[str, tuple[str, ...]] = Field(default_factory=lambda: dict(SUBJECTS))
    minimum_share: float = Field(0.01, gt=0, le=1)

    @field_validator("subjects")
    @classmethod
    def _terms_are_words(cls, subjects: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for subject, terms in subjects.items():
            wrong = [term for term in terms if not term.isalnum() or term != term.lower()]
            if wrong or not terms:
                raise ValueError(f"terms of {subject} are single words in small letters, unlike {wrong}")
        return subjects

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`host`, `site`, `subject` and its `score`, the share of its terms; null where there is none."""
        return by_blocks(documents, self._annotate)

    def _annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        places = zip(
            documents.column("path").to_pylist(), documents.column("source").to_pylist(), strict=True
        )
        hosts = [host_of(path) or host_of(source) for path, source in places]
        shares = self._shares(Joined.of(documents))
        best = shares.argmax(axis=0) if len(self.subjects) else np.zeros(shares.shape[1], np.int64)
        score = shares.max(axis=0, initial=0.0)
        named = score >= self.minimum_share
        subjects = [
            list(self.subjects)[i] if is_named else None for i, is_named in zip(best, named, strict=True)
        ]
        return pa.RecordBatch.from_pydict(
            {
                "id": documents.column("id"),
                "host": pa.array(hosts, pa.string()),
                "site": pa.array([site_of(host) if host else None for host in hosts], pa.string()),
                "subject": pa.array(subjects, pa.string()),
                "score": pa.array(score, pa.float32(), mask=~named),
            }
        )

    def _shares(self, joined: Joined) -> Float64Array:
        """Share of each document's words by subject, subjects x documents."""
        words = WordRuns(joined)
        first_G, hash_G = words.ngram_hashes(1)
        shares = np.zeros((len(self.subjects), len(joined.texts)))
        for number, terms in enumerate(self.subjects.values()):
            is_term = np.isin(hash_G, np.array([hash_words(term) for term in terms], np.uint64))
            shares[number] = np.bincount(words.row_W[first_G][is_term], minlength=len(joined.texts))
        return shares / np.maximum(words.n_words_D, 1)


def host_of(place: str) -> str | None:
    """The host of an address.

    >>> host_of("https://me@En.Example.co.uk:80/a"), host_of("a/b.txt")
    ('en.example.co.uk', None)
    """
    match = _HOST.search(place)
    return match[1].lower().rstrip(".") if match else None


def site_of(host: str) -> str:
    """The part of a host that somebody registered.

    >>> site_of("en.example.co.uk"), site_of("www.example.org"), site_of("93.184.216.34")
    ('example.co.uk', 'example.org', '93.184.216.34')
    """
    labels = host.split(".")
    if labels[-1].isdigit():
        return host
    n = 3 if len(labels) > 2 and labels[-2] in _GENERAL and len(labels[-1]) == 2 else 2
    return ".".join(labels[-n:])
