"""The natural language of texts, by py3langid (extra `language`): 97 languages, offline.

    text --Language--> label "de", score 0.98

Text is read in pieces from its beginning, middle and end, so that a long document costs no more than a short
one. `score` is the model's probability, which its length-aware normalisation keeps honest for short texts;
below `minimum_score`, and where a text has no letters, the label is `und`. Code has a language of another
kind (`code_language`): documents whose slice is one of `skip_slices` get a null.

The model comes with the package as arrays of numbers; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar

import pyarrow as pa
from pydantic import Field, PositiveInt

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.data.curate.step import RecordStep, register

Identify = Callable[[str], tuple[str, float]]

UNDETERMINED = "und"

_PIECES = 3


@register
class Language(RecordStep):
    """Names the language of each document.

    Args:
        languages: ISO 639-1 codes to choose among; empty: all that the model knows.
        minimum_score: below it the label is `und`.
        sample_characters: of each document that are read.
        skip_slices: slices, or what their names begin with up to a slash, that have no natural language.
    """

    name: ClassVar[str] = "language"

    languages: tuple[str, ...] = ()
    minimum_score: float = Field(0.5, ge=0, le=1)
    sample_characters: PositiveInt = 1200
    skip_slices: tuple[str, ...] = ("code",)

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`label` and `score`.

        Raises:
            BadInput: the model does not know one of the languages.
            MissingDependency: py3langid is not installed.
        """
        identify = identifier(self.languages)
        labels: list[str | None] = []
        scores: list[float | None] = []
        texts, slices = documents.column("text").to_pylist(), documents.column("slice").to_pylist()
        for text, slice_name in zip(texts, slices, strict=True):
            if any(f"{slice_name}/".startswith(f"{skipped}/") for skipped in self.skip_slices):
                label, score = None, None
            else:
                label, score = self._identify(identify, text)
            labels.append(label)
            scores.append(score)
        return pa.RecordBatch.from_pydict(
            {
                "id": documents.column("id"),
                "label": pa.array(labels, pa.string()),
                "score": pa.array(scores, pa.float32()),
            }
        )

    def _identify(self, identify: Identify, text: str) -> tuple[str, float]:
        sampled = sample(text, self.sample_characters)
        if not any(map(str.isalpha, sampled)):
            return UNDETERMINED, 0.0
        label, score = identify(sampled)
        return (label if score >= self.minimum_score else UNDETERMINED), score


def sample(text: str, n: int) -> str:
    """About n characters of a text: its beginning, middle and end; all of it where it is not longer.

    >>> sample("abcdefghij", 6)
    'ab ef ij'
    """
    if len(text) <= n:
        return text
    size = n // _PIECES
    middle = (len(text) - size) // 2
    return " ".join([text[:size], text[middle : middle + size], text[len(text) - size :]])


@lru_cache(maxsize=4)
def identifier(languages: tuple[str, ...] = ()) -> Identify:
    """What names a language, made once a process.

    Raises:
        BadInput: the model does not know one of the languages.
        MissingDependency: py3langid is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingDependency("py3langid", extra="language", needed_for="naming languages") from None
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if languages:
        try:
            model.set_languages(list(languages))
        except ValueError as error:
            raise BadInput(str(error), where="languages", fix="use ISO 639-1 codes, such as en") from None

    def identify(text: str) -> tuple[str, float]:
        label, score = model.classify(text)
        return str(label), float(score)

    return identify
