import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.word_runs import WordRuns, hash_words, small_letters, word_list

TEXTS = st.lists(
    st.lists(
        st.sampled_from(
            ["a", "B", "ab", "é", "É", "İ", "中文", "𝔘", "😀", " ", "\n", "-", "_", "1", "\0", "ß"]
        ),
        max_size=15,
    ).map("".join),
    max_size=5,
)


def plain_words(text: str) -> list[str]:
    """The reference: word by word."""
    found = re.findall(r"[一-鿿]|(?:(?![一-鿿])[^\W_])+", text)
    return ["".join(c.lower() if len(c.lower()) == 1 else c for c in word) for word in found]


@settings(deadline=None)
@given(TEXTS)
def test_words_are_those_of_the_reference(texts: list[str]) -> None:
    texts = [text.replace("😀", "-") for text in texts]
    words = WordRuns(Joined(texts))
    assert words.n_words_D.tolist() == [len(plain_words(text)) for text in texts]
    for start, end, row in zip(words.start_W, words.end_W, words.row_W, strict=True):
        inside = words.joined.text[start:end]
        assert inside in texts[row] and plain_words(inside) == [small_letters(inside)]


@settings(deadline=None)
@given(TEXTS)
def test_runs_have_one_hash_exactly_if_their_words_are_the_same(texts: list[str]) -> None:
    texts = [text.replace("😀", "-") for text in texts]
    words = WordRuns(Joined(texts))
    for n in (1, 2, 3):
        expected = [
            " ".join(run)
            for text in texts
            for run in zip(*(plain_words(text)[i:] for i in range(n)), strict=False)
        ]
        first, hashes = words.ngram_hashes(n)
        assert len(first) == len(expected)
        assert len(set(hashes.tolist())) == len(set(expected))
        assert [hash_words(run) for run in expected] == hashes.tolist()


def test_the_hash_of_a_run_is_the_same_in_any_layout_and_at_any_place() -> None:
    first = WordRuns(Joined(["The quick-brown FOX"])).ngram_hashes(4)[1]
    second = WordRuns(Joined(["x " * 100_000, "é the\n\nquick (brown)... fox"])).ngram_hashes(4)[1]
    assert second[-1] == first[0]
    assert all(a == b for a, b in pairwise(second[:1000].tolist()))


def test_scripts_without_spaces_have_a_word_in_each_character() -> None:
    assert word_list("東京へ行く ok 𠀀𠀁a") == ["東", "京", "へ", "行", "く", "ok", "𠀀", "𠀁", "a"]
