from __future__ import annotations

import math
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.curate.jaccard import compare
from gyrocompass.data.curate.minhash import (
    Permutations,
    Shingles,
    band_keys,
    minima,
    sequence_hashes,
    shingles,
)
from gyrocompass.data.curate.planted_duplicates import shingle_set
from gyrocompass.data.curate.words import Int64Array, UInt64Array, text_array, word_hashes

TEXTS = st.lists(st.lists(st.sampled_from("abcde"), max_size=12).map(" ".join), max_size=8)


def shingles_of(texts: list[str], length: int = 5) -> Shingles:
    return shingles(word_hashes(text_array(texts)), length)


@given(TEXTS, st.integers(1, 6))
def test_shingles_are_the_runs_of_words(texts: list[str], length: int) -> None:
    found = shingles_of(texts, length)
    pairs = set()
    for document, text in enumerate(texts):
        words = text.split()
        count = max(1, len(words) - length + 1) if words else 0
        runs = [tuple(words[place : place + length]) for place in range(count)]
        hashes = found.hash_S[found.begin_D1[document] : found.begin_D1[document + 1]].tolist()
        assert set(runs) == shingle_set(text, length)
        pairs |= set(zip(runs, hashes, strict=True))
    assert len({run for run, _ in pairs}) == len({number for _, number in pairs}) == len(pairs)


@given(TEXTS)
def test_sequences_are_equal_where_all_words_are(texts: list[str]) -> None:
    found = sequence_hashes(word_hashes(text_array([text.upper() for text in texts]))).tolist()
    assert len({(text, number) for text, number in zip(texts, found, strict=True)}) == len(set(texts))
    assert len(set(found)) == len(set(texts))


@given(TEXTS, st.data())
def test_overlaps_are_those_of_sets(texts: list[str], data: st.DataObject) -> None:
    found = shingles_of(texts, 2)
    sets = [shingle_set(text, 2) for text in texts]
    numbers = st.integers(0, len(texts) - 1) if texts else st.nothing()
    pairs = data.draw(st.lists(st.tuples(numbers, numbers), max_size=10)) if texts else []
    left, right = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))

    def gather(documents: Int64Array) -> tuple[UInt64Array, Int64Array]:
        parts = [found.hash_S[found.begin_D1[one] : found.begin_D1[one + 1]] for one in documents]
        return np.concatenate([np.empty(0, np.uint64), *parts]), np.cumsum([0, *map(len, parts)])

    overlap = compare(left, right, np.diff(found.begin_D1), gather)
    assert overlap.left_P.tolist() == [len(sets[one]) for one, _ in pairs]
    assert overlap.right_P.tolist() == [len(sets[other]) for _, other in pairs]
    assert overlap.shared_P.tolist() == [len(sets[one] & sets[other]) for one, other in pairs]


def test_the_share_of_equal_minima_is_the_similarity() -> None:
    draw = random.Random(3)
    permutations = Permutations.draw(400, 5, seed=1)
    for shared in (10, 40, 70, 90):
        common = [f"c{draw.random()}" for _ in range(shared)]
        texts = [" ".join(common + [f"{side}{draw.random()}" for _ in range(100 - shared)]) for side in "lr"]
        minimum_PD = minima(shingles_of(texts, 1), permutations)
        sets = [shingle_set(text, 1) for text in texts]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        error = math.sqrt(jaccard * (1 - jaccard) / 2000)
        assert abs(float((minimum_PD[:, 0] == minimum_PD[:, 1]).mean()) - jaccard) < 4 * error


def test_bands_agree_as_often_as_the_formula_says() -> None:
    draw = random.Random(5)
    permutations = Permutations.draw(25, 5, seed=0)
    agreed, expected = 0, 0.0
    for _ in range(400):
        words = [f"w{draw.random()}" for _ in range(120)]
        other = [word if draw.random() < 0.7 else f"x{draw.random()}" for word in words]
        texts = [" ".join(words), " ".join(other)]
        key_DB = band_keys(shingles_of(texts, 1), permutations)
        agreed += bool((key_DB[0] == key_DB[1]).any())
        sets = [shingle_set(text, 1) for text in texts]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        expected += 1 - (1 - jaccard**5) ** 25
    assert abs(agreed - expected) < 4 * math.sqrt(expected * (1 - expected / 400))


def test_documents_without_words_have_no_shingles() -> None:
    found = shingles_of(["", "one", "...", "one two"], 5)
    assert np.diff(found.begin_D1).tolist() == [0, 1, 0, 1]
    keys = band_keys(found, Permutations.draw(2, 2, 0))
    assert keys.shape == (4, 2) and len(np.unique(keys[1:2])) == 2
