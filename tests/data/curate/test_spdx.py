import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.curate import spdx
from gyrocompass.data.curate.spdx import NotAnExpression, Strictness, join, parse

NAMES = st.sampled_from([*sorted(spdx.STRICTNESS), "LicenseRef-Mine"])
EXPRESSIONS = st.recursive(
    NAMES,
    lambda inner: st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(
        lambda t: f"({t[0]} {t[1]} {t[2]})"
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("mit", "MIT"),
        ("GPL-2.0+", "GPL-2.0-or-later"),
        ("gpl-3.0", "GPL-3.0-only"),
        ("MIT OR Apache-2.0", "Apache-2.0 OR MIT"),
        ("MIT AND MIT", "MIT"),
        ("MIT OR ISC AND Zlib", "(ISC AND Zlib) OR MIT"),
        ("(MIT OR ISC) AND Zlib", "(ISC OR MIT) AND Zlib"),
        ("GPL-2.0-or-later WITH Classpath-exception-2.0", "GPL-2.0-or-later WITH Classpath-exception-2.0"),
        ("MIT and (ISC and Zlib)", "ISC AND MIT AND Zlib"),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert str(parse(text)) == normal


@pytest.mark.parametrize(
    "text", ["", "MIT AND", "(MIT", "MIT)", "AND MIT", "MIT ISC", "MIT OR/ISC", "(" * 200 + "MIT"]
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(NotAnExpression, match="not an SPDX expression"):
        parse(text)


@given(EXPRESSIONS)
def test_the_normal_form_is_stable_and_reads_back(text: str) -> None:
    expression = parse(text)
    assert parse(str(expression)) == expression
    assert set(expression.names) <= {*spdx.STRICTNESS, "LicenseRef-Mine"}


@given(st.lists(EXPRESSIONS.map(parse), min_size=1, max_size=5), st.randoms())
def test_join_is_the_least_upper_bound(expressions: list[spdx.Expression], chance) -> None:  # type: ignore[no-untyped-def]
    joined = join(expressions)
    assert joined is not None
    assert joined.strictness == max(expression.strictness for expression in expressions)
    shuffled = [*expressions, expressions[0]]
    chance.shuffle(shuffled)
    assert join(shuffled) == joined
    assert join([joined, *expressions]) == joined
    assert join([join(expressions[:1]), join(expressions)]) == joined  # type: ignore[list-item]


@given(EXPRESSIONS, EXPRESSIONS)
def test_a_choice_never_asks_for_more_and_a_conjunction_never_for_less(a: str, b: str) -> None:
    degrees = [parse(a).strictness, parse(b).strictness]
    assert parse(f"({a}) OR ({b})").strictness == min(degrees)
    assert parse(f"({a}) AND ({b})").strictness == max(degrees)


def test_an_unknown_licence_is_the_strictest() -> None:
    assert parse("LicenseRef-Mine").strictness == Strictness.UNKNOWN == max(Strictness)
    assert join([]) is None
