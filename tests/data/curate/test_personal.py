from itertools import pairwise

import pytest
from curate.annotation_cases import batch, check_step
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.data.curate import canaries, canaries_personal, checksums, personal
from gyrocompass.data.curate.national_ids import NATIONAL_IDS, normal
from gyrocompass.data.curate.personal import PersonalData, find_in
from gyrocompass.data.curate.spans import Span, disjoint, from_arrow, replace, to_arrow

PIECES = st.sampled_from(
    ["a@b.org ", "+49 30 901820", "8.8.8.8", "DE89370400440532013000", "4111 1111 1111 1111", "x", " ", "\n",
     "\0",
     "é", "€", "12 Church Road", "7", "-", ".", "::", "2a01:4f8::1", "123-45-6789", "(at)", "@", "+", "(",
     "\ud800"]
)  # fmt: skip


def found(text: str, minimum: float = 0.5) -> list[tuple[str, str]]:
    return [(span.kind, text[span.start : span.end]) for span in find_in(text) if span.score >= minimum]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mailto:anna.b@posteo.de.", [("email", "anna.b@posteo.de")]),
        ("bob (at) gmx (dot) de", [("email", "bob (at) gmx (dot) de")]),
        ("(anna@uni-graz.at)", [("email", "anna@uni-graz.at")]),
        ("x=müller@web.de", [("email", "müller@web.de")]),
        ("tel:+1-201-555-0123", [("phone", "+1-201-555-0123")]),
        ("Tel. 030 901820", [("phone", "030 901820")]),
        ("from 93.184.216.34:80", [("ip", "93.184.216.34")]),
        ("[2606:2800:220:1:248:1893:25c8:1946]:443", [("ip", "2606:2800:220:1:248:1893:25c8:1946")]),
        ("IBAN GB82 WEST 1234 5698 7654 32, please", [("iban", "GB82 WEST 1234 5698 7654 32")]),
        ("DE89370400440532013000", [("iban", "DE89370400440532013000")]),
        ("4111-1111-1111-1111", [("card", "4111-1111-1111-1111")]),
        ("3782 822463 10005", [("card", "3782 822463 10005")]),
        ("221B Baker Street, London NW1 6XE", [("address", "221B Baker Street, London NW1 6XE")]),
        ("Hauptstraße 12, 10115 Berlin", [("address", "Hauptstraße 12, 10115 Berlin")]),
        ("12 rue de la Paix, 75002 Paris", [("address", "12 rue de la Paix, 75002 Paris")]),
    ],
)
def test_a_form_is_found_whole(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    "text",
    ["version 1.2.3.4", "192.168.1.1", "a[1::2]", "std::dec", "12:30:45", "git@github.com:a/b.git",
     "x@example.org",
     "https://user:secret@host.de/", "@property.setter", "a@b.weight", "4111 1111 1111 1112",
     "DE89370400440532013001",
     "Spring 2020", "Decimal('+35236450.6')", "1.2.840.10045.3.1", "2026-11-26 06:20:54", "85010112345"],
)  # fmt: skip
def test_what_only_looks_alike_is_not_counted(text: str) -> None:
    assert found(text) == []


@pytest.mark.parametrize(
    ("country", "published"),
    [
        ("fr", "255081416802538"), ("es", "12345678Z"), ("es", "X1234567L"), ("it", "RSSMRA85T10A562S"),
        ("fi", "131052-308T"), ("ch", "756.9217.0769.85"), ("be", "85.07.30-033.28"), ("br",
        "529.982.247-25"),
        ("se", "811218-9876"), ("cn", "11010519491231002X"), ("de", "36574261809"), ("pl", "44051401359"),
        ("nl", "111222333"), ("ca", "046 454 286"), ("tr", "10000000146"), ("in", "2345 6789 0124"), ("au",
        "123 456 782"),
        ("gb", "AB123456C"), ("us", "219-09-9999"),
    ],
)  # fmt: skip
def test_published_examples_of_national_ids_are_valid_and_a_changed_digit_is_not(
    country: str, published: str
) -> None:
    identity = next(known for known in NATIONAL_IDS if known.country == country)
    assert identity.pattern.fullmatch(published)
    if country == "ca":  # the published example begins with the 0 of fictitious numbers
        assert checksums.luhn(normal(published)) and not identity.is_valid(normal(published))
        return
    assert identity.is_valid(normal(published))
    if country in {"gb", "us"}:
        return
    place = max(i for i, character in enumerate(published[:-1]) if character.isdigit())
    changed = published[:place] + str((int(published[place]) + 1) % 10) + published[place + 1 :]
    assert not identity.is_valid(normal(changed))


def test_planted_data_is_found_and_decoys_are_not() -> None:
    table = canaries_personal.measured(seed=1, n=150)
    for key, cell in table.items():
        assert cell.recall >= 0.98, (key, cell)
        assert cell.precision >= 0.95, (key, cell)
    assert {slice_name for slice_name, _ in table} == {"prose", "code", "chat", "all"}
    assert all(table["all", kind].planted >= 20 for kind in canaries_personal.DRAWS)


def test_a_finder_that_finds_nothing_or_everything_measures_badly() -> None:
    planted = list(canaries.plant(canaries_personal.DRAWS, canaries_personal.DECOYS, seed=1, n=5))
    assert canaries.measure(lambda text: [], planted)["all", "all"].recall == 0
    everything = canaries.measure(
        lambda text: [Span(i, i + 9, "email", 1) for i in range(len(text) - 9)], planted
    )
    assert everything["all", "email"].precision < 0.1


@settings(deadline=None)
@given(st.lists(st.lists(PIECES, max_size=12).map("".join), max_size=5))
def test_documents_do_not_see_each_other(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # Arrow holds no lone surrogates
    rows = check_step(PersonalData(), batch(texts))
    for text, spans in zip(texts, from_arrow(rows["spans"]), strict=True):
        assert spans == sorted(spans)
        assert all(a.end <= b.start for a, b in pairwise(spans))
        assert all(0 <= span.start < span.end <= len(text) for span in spans)


def test_counts_are_by_kind_and_above_the_least_score() -> None:
    documents = batch(["anna@posteo.de, bert@posteo.de, 10.0.0.1", "nothing"])
    rows = PersonalData().annotate(documents)
    assert (rows["count"].to_pylist(), rows["n_email"].to_pylist(), rows["n_ip"].to_pylist()) == (
        [2, 0],
        [2, 0],
        [0, 0],
    )
    rows = PersonalData(minimum_score=0.1, kinds=("ip",)).annotate(documents)
    assert rows.schema.names == ["id", "spans", "count", "n_ip"] and rows["n_ip"].to_pylist() == [1, 0]


def test_names_come_from_a_recogniser_that_is_plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def capitals(texts: list[str]) -> list[list[Span]]:
        return [
            [Span(text.index("Anna"), text.index("Anna") + 4, "name", 0.7)] if "Anna" in text else []
            for text in texts
        ]

    monkeypatch.setitem(personal.RECOGNISERS, "capitals", lambda: capitals)
    rows = PersonalData(names="capitals").annotate(batch(["mail Anna at anna@posteo.de", "x"]))
    assert [span.kind for span in from_arrow(rows["spans"])[0]] == ["name", "email"]
    assert rows["n_name"].to_pylist() == [1, 0]
    with pytest.raises(BadInput, match="did you mean capitals"):
        PersonalData(names="capital").annotate(batch(["x"]))


def test_a_recogniser_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(MissingDependency, match="spacy"):
        PersonalData(names="spacy:en_core_web_none").annotate(batch(["x"]))


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.sampled_from([0.2, 0.7, 0.95])), max_size=12)
)
def test_overlaps_are_resolved_for_the_surer_and_nothing_else_is_lost(
    drawn: list[tuple[int, int, float]],
) -> None:
    spans = [Span(start, start + length, "x", score) for start, length, score in drawn]
    kept = disjoint(spans)
    assert all(a.end <= b.start for a, b in pairwise(kept))
    for span in spans:
        rivals = [other for other in kept if other.start < span.end and span.start < other.end]
        assert rivals and max(other.score for other in rivals) >= span.score
    assert from_arrow(to_arrow([kept])) == [[span._replace(score=pytest.approx(span.score)) for span in kept]]


def test_what_is_replaced_leaves_the_rest_as_it_was() -> None:
    spans = [Span(1, 3, "a", 1.0), Span(5, 6, "b", 1.0)]
    assert replace("0123456789", spans, lambda span, text: f"<{span.kind}{text}>") == "0<a12>34<b5>6789"
