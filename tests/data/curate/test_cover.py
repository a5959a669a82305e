from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.curate.cover import Cover, cover
from gyrocompass.data.curate.spans import Span, mask
from gyrocompass.data.document import Document, Message, Provenance, Repair, Step

WORDS = st.text("ab \n", max_size=12)
PLACES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


def spans(places: list[tuple[int, int]]) -> list[Cover]:
    return [Cover(Span(min(pair), max(pair), f"k{n}", 1.0), mask) for n, pair in enumerate(places)]


@given(turns=st.lists(WORDS, min_size=1, max_size=5), places=PLACES)
def test_every_covered_character_is_gone_and_every_other_stays(
    turns: list[str], places: list[tuple[int, int]]
) -> None:
    chat = Document(
        kind="chat",
        messages=tuple(Message("user", turn) for turn in turns),
        path="a",
        source="s",
        slice="chat",
    )
    covered = cover(chat, spans(places)).document
    # The same by hand, a character at a time: the first span that reaches a place without overlapping has it.
    joined = "\n\n".join(turns)
    owner: list[int | None] = [None] * max(len(joined), 41)
    for number, (one, other) in enumerate(places):
        start, end = min(one, other), max(one, other)
        if start < end and all(entry is None for entry in owner[start:end]):
            owner[start:end] = [number] * (end - start)
    begin, expected = 0, []
    for turn in turns:
        said, last = "", None
        for offset, character in enumerate(turn):
            here = owner[begin + offset]
            said += character if here is None else "" if here == last else f"[k{here}]"
            last = here
        expected.append(said)
        begin += len(turn) + 2
    assert begin - 2 == len(joined)
    assert [message.content for message in covered.messages] == expected
    assert (covered == chat) == (expected == turns)


@given(text=st.text("abc", min_size=3, max_size=20), places=PLACES, cut=st.integers(1, 19))
def test_steps_of_an_answer_end_where_they_ended(text: str, places: list[tuple[int, int]], cut: int) -> None:
    cut = min(cut, len(text))
    document = Document(
        kind="completion",
        prompt="ask",
        text=text,
        path="a",
        source="s",
        slice="c",
        steps=(Step(cut, 1.0), Step(len(text), 0.0)),
    )
    covered = cover(document, spans(places)).document
    assert covered.steps[1].end == len(covered.text)
    assert (
        covered.text[covered.steps[0].end :].endswith(text[cut:][-1:])
        or cut == len(text)
        or "[" in covered.text
    )
    assert 0 <= covered.steps[0].end <= len(covered.text)


def test_a_preference_is_covered_in_all_its_answers() -> None:
    document = Document(
        kind="preference",
        prompt="Who?",
        text="Ann.",
        rejected="Bob.",
        gold="Cid.",
        path="a",
        source="s",
        slice="p",
    )
    joined = "\n\n".join(document.texts)
    found = [
        Cover(Span(joined.index(name), joined.index(name) + 3, "name", 1.0), mask) for name in ("Bob", "Cid")
    ]
    covered, kinds = cover(document, found)
    assert (covered.prompt, covered.text, covered.rejected, covered.gold) == (
        "Who?",
        "Ann.",
        "[name].",
        "[name].",
    )
    assert kinds == {"name": 2} and covered.origin_ids == (document.id,)


def test_repairs_move_with_the_text() -> None:
    text = "Write to a@b.de in the café, or not."
    at = text.index("café")
    noted = Provenance("0" * 64, (), (Repair("mojibake", at, at + 4, "decode utf-8"),))
    document = Document(kind="text", text=text, path="a", source="s", slice="text", provenance=noted)
    covered = cover(document, [Cover(Span(9, 15, "email", 1.0), mask)]).document
    assert covered.provenance is not None
    (repair,) = covered.provenance.repairs
    assert covered.text[repair.start : repair.end] == "café"
