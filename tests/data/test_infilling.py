"""Documents rearranged for filling in the middle, and prefixes as context: nothing lost, nothing twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data.encode import Encoded
from gyrocompass.data.infilling import InfillingConfig, Sentinels, fill_in_the_middle, prefix_lm

SENTINELS = Sentinels(101, 102, 103)
BOS, EOS = 100, 99


def document(n: int, seed: int = 0) -> Encoded:
    """Tokens 0 to n - 1 between BOS and EOS, with bytes and weights of their own."""
    random = np.random.default_rng(seed)
    ids = np.array([BOS, *range(n), EOS], np.int32)
    weights = random.choice([0.0, 0.5, 1.0, 2.0], n + 2).astype(np.float32)
    weights[0] = 0
    return Encoded(ids, random.integers(0, 5, n + 2).astype(np.int32), weights)


def triples(encoded: Encoded) -> list[tuple[float, ...]]:
    return sorted(zip(*(column.tolist() for column in encoded), strict=True))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 12), seed=st.integers(0, 2**20), suffix_first=st.booleans())
def test_a_rearranged_document_is_the_same_document(n: int, seed: int, suffix_first: bool) -> None:
    before = document(n, seed)
    config = InfillingConfig(rate=1.0, spm=float(suffix_first), seed=seed)
    after = fill_in_the_middle(before, "a document", SENTINELS, config)
    if n == 0:
        assert after is before
        return
    assert [column.dtype for column in after] == [column.dtype for column in before]
    is_sentinel = np.isin(after.id_N, SENTINELS)
    assert is_sentinel.sum() == 3
    assert not after.byte_N[is_sentinel].any() and not after.weight_N[is_sentinel].any()
    kept = Encoded(*(column[~is_sentinel] for column in after))
    assert triples(kept) == triples(before)
    assert after.id_N[0] == BOS and after.id_N[-1] == EOS
    # What stands between the sentinels, put together again, is the text.
    ids = after.id_N.tolist()
    if suffix_first:
        assert ids[1:3] == [SENTINELS.prefix, SENTINELS.suffix]
        cut = ids.index(SENTINELS.middle)
        assert ids[cut + 1 : -1] + ids[3:cut] == list(range(n))
    else:
        first, second = ids.index(SENTINELS.suffix), ids.index(SENTINELS.middle)
        assert ids[1] == SENTINELS.prefix and second < len(ids) - 2
        assert ids[2:first] + ids[second + 1 : -1] + ids[first + 1 : second] == list(range(n))


def test_the_draw_belongs_to_seed_and_document() -> None:
    def drawn(name: str, seed: int) -> list[int]:
        return fill_in_the_middle(document(30), name, SENTINELS, InfillingConfig(seed=seed)).id_N.tolist()

    assert drawn("a", 1) == drawn("a", 1)
    assert len({tuple(drawn(name, seed)) for name in "abcdef" for seed in range(4)}) > 8


def test_rates_are_kept() -> None:
    config = InfillingConfig(rate=0.6, spm=0.25)
    found = [fill_in_the_middle(document(8), f"d{i}", SENTINELS, config).id_N.tolist() for i in range(1000)]
    rearranged = [ids for ids in found if SENTINELS.middle in ids]
    assert len(rearranged) / 1000 == pytest.approx(0.6, abs=0.07)
    # Documents whose prefix is empty, 8 of 36 cuts, begin with both sentinels either way.
    begins_with_suffix = sum(ids[2] == SENTINELS.suffix for ids in rearranged)
    assert begins_with_suffix / len(rearranged) == pytest.approx(0.25 + 0.75 * 8 / 36, abs=0.07)


def test_every_cut_is_as_likely() -> None:
    config = InfillingConfig(rate=1.0, spm=0.0)
    counts: dict[tuple[int, int], int] = {}
    for number in range(1500):
        ids = fill_in_the_middle(document(3), str(number), SENTINELS, config).id_N.tolist()
        cut = (ids.index(SENTINELS.suffix) - 2, len(ids) - 2 - ids.index(SENTINELS.middle))
        counts[cut] = counts.get(cut, 0) + 1
    # (prefix, middle) lengths with prefix + middle <= 3 and a middle: six of them.
    assert len(counts) == 6 and all(count == pytest.approx(250, rel=0.3) for count in counts.values())


def test_only_the_middle_counts_where_that_is_asked() -> None:
    before = document(9, 4)
    before.weight_N[1:] = 1.0
    config = InfillingConfig(rate=1.0, spm=0.5, counted="middle", seed=2)
    for name in "abcd":
        after = fill_in_the_middle(before, name, SENTINELS, config)
        counted = after.id_N[after.weight_N > 0].tolist()
        assert counted == [*range(counted[0], counted[0] + len(counted) - 1), EOS]
        assert after.byte_N.sum() == before.byte_N.sum()
    assert before.weight_N[1:].all(), "what was given is not changed"


def test_sentinels_are_three_tokens_of_no_text() -> None:
    config = InfillingConfig()
    with pytest.raises(BadInput, match="not three tokens"):
        fill_in_the_middle(document(3), "d", Sentinels(101, 101, 103), config)
    with pytest.raises(BadInput, match="token 2 is a sentinel and stands in a text") as raised:
        fill_in_the_middle(document(3), "a/b", Sentinels(2, 101, 103), config)
    assert "a/b" in str(raised.value)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 12), seed=st.integers(0, 2**20))
def test_a_prefix_is_context_alone(n: int, seed: int) -> None:
    before = document(n, seed)
    after = prefix_lm(before, "d", seed)
    assert np.array_equal(after.id_N, before.id_N) and np.array_equal(after.byte_N, before.byte_N)
    changed = np.flatnonzero(after.weight_N != before.weight_N)
    last = int(changed.max(initial=0))
    assert last < max(n, 1) and not after.weight_N[: last + 1].any()
    assert np.array_equal(after.weight_N[last + 1 :], before.weight_N[last + 1 :])
    assert np.array_equal(prefix_lm(before, "d", seed).weight_N, after.weight_N)


def test_every_prefix_is_as_likely() -> None:
    full = document(4)
    full.weight_N[1:] = 1.0
    lengths = [int((prefix_lm(full, str(n)).weight_N == 0).sum()) - 1 for n in range(2000)]
    assert np.bincount(lengths).tolist() == pytest.approx([500] * 4, rel=0.2)
