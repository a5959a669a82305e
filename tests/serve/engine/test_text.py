from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.measure.generate import cut_at
from gyrocompass.serve.engine.text import TextStream


class Bytes:
    """A token for each byte."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


@given(
    st.text(st.sampled_from("abé€😀 "), max_size=30),
    st.lists(st.text(st.sampled_from("abé€"), min_size=1, max_size=3), max_size=3),
)
def test_pieces_make_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(Bytes(), stops)
    pieces = []
    for token in text.encode():
        pieces.append(stream.add(token))
        assert "\ufffd" not in pieces[-1]
        if stream.stopped:
            break
    else:
        pieces.append(stream.finish())
    # Writing ends with the first stop that is whole, as that of `generate` does.
    until = next((n for n in range(len(text) + 1) if cut_at(text[:n], stops)[1]), len(text))
    assert ("".join(pieces), stream.stopped) == cut_at(text[:until], stops)


def test_what_never_becomes_a_character_is_shown_in_the_end() -> None:
    stream = TextStream(Bytes(), ())
    assert [stream.add(token) for token in b"a\xf0\x9f"] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
