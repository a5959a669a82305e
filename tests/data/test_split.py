from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.document import Document
from gyrocompass.data.split import side


def document(text: str, path: str = "a", group: str | None = None) -> Document:
    return Document("text", path, "s", "x", text=text, group=group)


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.floats(0, 1),
    st.text(max_size=3).filter(str.isascii),
)
def test_equal_contents_and_groups_are_on_one_side(text: str, share: float, salt: str) -> None:
    where = side(document(text), share, salt)
    assert side(document(text, path="elsewhere"), share, salt) == where
    assert side(document("derived", group=document(text).content_hash), share, salt) == where


def test_the_share_is_met_and_salt_changes_the_split() -> None:
    documents = [document(str(k)) for k in range(4000)]
    held_out = [side(each, 0.1) == "held_out" for each in documents]
    assert 320 < sum(held_out) < 480  # five standard deviations
    other = [side(each, 0.1, "other") == "held_out" for each in documents]
    assert held_out != other
    assert 10 < sum(a and b for a, b in zip(held_out, other, strict=True)) < 80


def test_a_larger_share_holds_out_more_of_the_same() -> None:
    for k in range(200):
        if side(document(str(k)), 0.1) == "held_out":
            assert side(document(str(k)), 0.2) == "held_out"
    assert {side(document(str(k)), 0.0) for k in range(50)} == {"train"}
    assert {side(document(str(k)), 1.0) for k in range(50)} == {"held_out"}
