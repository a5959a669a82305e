"""Rewards on the text itself: what it says, how near the answer it is, its form, its length, its repetition.

Each is in [0, 1]. `field` names the field of the record that a completion is compared with.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, NonNegativeInt, PositiveInt

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.measure.reward import Sample, shortened
from gyrocompass.measure.rewards.registry import Tools, reward


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression of Python's `re`."""


@reward()
def exact_match(
    samples: Sequence[Sample],
    tools: Tools,
    *,
    field: str = "answer",
    ignore_case: bool = False,
    extract: Pattern | None = None,
) -> list[float]:
    """1 where the completion is the answer, 0 elsewhere; white space at the ends and runs of it do not count.

    Args:
        samples: their records have the answer, or a list of answers of which each will do.
        tools: not used.
        field: where the answer stands.
        ignore_case: compare without case.
        extract: what is compared is the last match's group 1 (or the match), as in `#### (.*)`; a completion
            without a match is wrong.
    """

    def plain(text: Any) -> str:
        words = " ".join(str(text).split())
        return words.casefold() if ignore_case else words

    def given(sample: Sample) -> str | None:
        if extract is None:
            return sample.completion
        found = list(re.finditer(extract, sample.completion))
        return found[-1][1 if found[-1].re.groups else 0] if found else None

    values = []
    for sample in samples:
        wanted = sample.needed(field, "exact_match")
        answers = {plain(answer) for answer in (wanted if isinstance(wanted, list) else [wanted])}
        said = given(sample)
        values.append(float(said is not None and plain(said) in answers))
    return values


@reward()
def regex(
    samples: Sequence[Sample],
    tools: Tools,
    *,
    pattern: Pattern | None = None,
    field: str = "pattern",
    how: Literal["search", "whole"] = "search",
) -> list[float]:
    """1 where a regular expression is found in the completion (`search`) or is all of it (`whole`).

    Args:
        samples: their records have the expression, if `pattern` is not given.
        tools: not used.
        pattern: one expression for all samples.
        field: where the expression stands otherwise.
        how: search or whole.

    Raises:
        BadInput: a record's expression is not one.
    """
    values = []
    for sample in samples:
        expression = pattern if pattern is not None else str(sample.needed(field, "regex"))
        try:
            match = re.compile(expression)
        except re.error as error:
            raise BadInput(f"{expression!r} is not a regular expression: {error}", where=field) from error
        found = match.search(sample.completion) if how == "search" else match.fullmatch(sample.completion)
        values.append(float(found is not None))
    return values


@reward(needs="jsonschema")
def json_schema(
    samples: Sequence[Sample],
    tools: Tools,
    *,
    inline: dict[str, Any] | None = None,
    field: str = "schema",
) -> list[float]:
    """1 where the completion is JSON that its schema allows (draft 2020-12, unless `$schema` says another).

    Args:
        samples: their records have the schema (an object, or its JSON text), if `inline` is not given.
        tools: not used.
        inline: one schema for all samples.
        field: where the schema stands otherwise.

    Raises:
        BadInput: a schema is not one, or refers to one that lies elsewhere: nothing is fetched.
        MissingDependency: the package jsonschema is not installed.
    """
    values = []
    for sample in samples:
        schema = inline if inline is not None else sample.needed(field, "json_schema")
        allows = _validator(json.dumps(schema) if not isinstance(schema, str) else schema)
        try:
            value = json.loads(sample.completion, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            values.append(0.0)
        else:
            values.append(float(allows(value)))
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


@lru_cache(maxsize=256)
def _validator(text: str) -> Callable[[Any], bool]:
    """Whether a schema, given as JSON, allows a value."""
    try:
        import jsonschema
        import jsonschema_specifications
        import referencing.exceptions
    except ImportError as error:
        needed_for = "the reward json_schema"
        raise MissingDependency("jsonschema", extra="rewards", needed_for=needed_for) from error
    try:
        schema = json.loads(text)
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, jsonschema.SchemaError) as error:
        raise BadInput(f"not a JSON schema: {error}".partition("\n")[0], where=shortened(text)) from error
    validator = kind(schema, registry=jsonschema_specifications.REGISTRY)

    def allows(value: Any) -> bool:
        try:
            return bool(validator.is_valid(value))
        except RecursionError:
            return False
        except referencing.exceptions.Unresolvable as error:
            raise BadInput(f"the schema refers to {error.ref!r}, which is not in it", where=text) from error

    return allows


@reward()
def length(
    samples: Sequence[Sample], tools: Tools, *, target: PositiveInt, slack: NonNegativeInt = 0
) -> list[float]:
    """1 near a target length, falling in a straight line to 0.

        r = max(0, 1 - max(0, |n - target| - slack) / target),  n: tokens of the completion

    Args:
        samples: their token counts are read.
        tools: not used.
        target: tokens.
        slack: tokens above or below that cost nothing.

    >>> [length([Sample("", "", n_tokens=n)], Tools(), target=10, slack=2) for n in (10, 12, 17, 40)]
    [[1.0], [1.0], [0.5], [0.0]]
    """
    return [max(0.0, 1.0 - max(0, abs(sample.n_tokens - target) - slack) / target) for sample in samples]


@reward()
def distinct(samples: Sequence[Sample], tools: Tools, *, n: PositiveInt = 3) -> list[float]:
    """How little a completion repeats itself: the share of distinct ones among its n-grams of words.

    Args:
        samples: their completions are read.
        tools: not used.
        n: words in an n-gram; a completion with fewer words repeats nothing, and gets 1.

    >>> distinct([Sample("", "a b a b a b")], Tools(), n=2)
    [0.4]
    """
    return [distinct_share(sample.completion, n) for sample in samples]


@reward()
def overlap(
    samples: Sequence[Sample], tools: Tools, *, field: str = "answer", n: PositiveInt = 1
) -> list[float]:
    """How much of the answer's wording a completion has, and how little else: F1 of their n-grams of words.

        r = 2 |A and C| / (|A| + |C|),  A, C: the n-grams of answer and completion, as multisets

    Words are runs of letters and digits, and single signs, so that it can be read on code. Two texts without
    an n-gram are alike if they are equal.

    Args:
        samples: their records have the answer.
        tools: not used.
        field: where the answer stands.
        n: words in an n-gram.

    >>> overlap([Sample("", "return a + b", {"answer": "return b"})], Tools())
    [0.6666666666666666]

    Source: Rajpurkar et al. 2016, arXiv:1606.05250 (F1 of words).
    """
    return [_overlap(str(sample.needed(field, "overlap")), sample.completion, n) for sample in samples]


def _overlap(answer: str, completion: str, n: int) -> float:
    grams = [Counter(_grams(_WORD.findall(text), n)) for text in (answer, completion)]
    total = sum(map(Counter.total, grams))
    return 2 * (grams[0] & grams[1]).total() / total if total else float(answer == completion)


_WORD = re.compile(r"\w+|[^\w\s]")


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def distinct_share(text: str, n: int = 3) -> float:
    """Distinct n-grams of words over all of them; 1 where there are none.

    Source: J. Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, 2016.
    """
    grams = _grams(text.split(), n)
    return len(set(grams)) / len(grams) if grams else 1.0
