from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate import words
from gyrocompass.data.curate.words import SPACELESS, blocks, text_array, word_hashes

ALPHABET = "aAbB _1.-\n\x00\x7féÉßΣσς·“”日本ไท🙂İ²"
TEXTS = st.lists(st.one_of(st.text(ALPHABET, max_size=30), st.text(max_size=30)), max_size=8)


def reference(text: str) -> list[str]:
    alone = "".join(f"{chr(low)}-{chr(high)}" for low, high in SPACELESS)
    return [
        word for run in re.findall(r"\w+", text.lower()) for word in re.findall(f"[{alone}]|[^{alone}]+", run)
    ]


@given(TEXTS)
def test_hashes_are_equal_where_words_are(texts: list[str]) -> None:
    found = word_hashes(text_array(texts))
    expected = [reference(text) for text in texts]
    assert np.diff(found.begin_D1).tolist() == [len(words) for words in expected]
    pairs = set(zip((word for words in expected for word in words), found.hash_W.tolist(), strict=True))
    assert len({word for word, _ in pairs}) == len({number for _, number in pairs}) == len(pairs)


@given(TEXTS, TEXTS)
def test_a_text_has_the_same_hashes_whatever_stands_around_it(texts: list[str], others: list[str]) -> None:
    alone = [word_hashes(text_array([text])).hash_W.tolist() for text in texts]
    array = text_array([*others, *texts, *others])
    found = word_hashes(array)
    among = [found.hash_W[begin:end].tolist() for begin, end in pairwise(found.begin_D1)]
    assert among[len(others) : len(others) + len(texts)] == alone
    sliced = word_hashes(array.slice(len(others), len(texts)))
    assert sliced.hash_W.tolist() == [number for numbers in alone for number in numbers]


@given(TEXTS, st.integers(1, 40))
def test_blocks_are_the_texts_in_order(texts: list[str], block_bytes: int) -> None:
    cut = list(blocks(text_array(texts), block_bytes))
    assert [text for block in cut for text in block.to_pylist()] == texts
    assert all(len(block) == 1 or block.nbytes <= block_bytes + 8 * (len(block) + 1) for block in cut)


def test_a_text_longer_than_the_kept_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one two three " * 100 + "日本" + "x" * 50
    whole = word_hashes(text_array([text])).hash_W
    words._kept_powers.cache_clear()
    monkeypatch.setattr(words, "_MOST_CHARACTERS", 2)
    assert (word_hashes(text_array([text])).hash_W == whole).all()
    words._kept_powers.cache_clear()


def test_a_surrogate_and_a_null_are_refused() -> None:
    with pytest.raises(BadInput, match="surrogate"):
        text_array(["fine", "\ud800"])
    with pytest.raises(BadInput, match="NoneType"):
        text_array(["fine", None])  # type: ignore[list-item]
    with pytest.raises(BadInput, match="no text"):
        text_array(pa.array(["fine", None]))
