"""Windows predict each token once, with as much before it as they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.data.windows import windowed
from gyrocompass.model.score import evaluating, score_dataset, scored_tokens
from tiny_models import VOCABULARY, tiny

MODEL = tiny("llama", dtype=torch.float64)


def document(name: str, ids: list[int], context: int = 0) -> TokenRow:
    weights = [0.0 if place <= context else 1.0 for place in range(len(ids))]
    return TokenRow(name, "s", "t", ids, [1] * len(ids), weights, "g")


DOCUMENTS = st.lists(
    st.lists(st.integers(1, VOCABULARY - 1), min_size=2, max_size=40), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=30)
@given(DOCUMENTS, st.integers(2, 12), st.data())
def test_each_token_once_after_a_plain_loop(texts: list[list[int]], length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    dataset = TokenDataset.of(document(str(n), ids) for n, ids in enumerate(texts))
    with evaluating(MODEL):
        parts = list(scored_tokens(MODEL, windowed(dataset, length, stride), length, 4))
    found = np.sort(np.concatenate([part.logprob_K for part in parts]))
    expected = []
    for ids in texts:
        for place in range(1, len(ids)):
            # The window in which this token is predicted first.
            beyond = max(0, place - length)
            start = -(-beyond // stride) * stride
            with torch.no_grad():
                logprob_V = MODEL(torch.tensor([ids[start:place]])).logits[0, -1].log_softmax(0)
            assert place - start >= min(place, length - stride + 1)
            expected.append(float(logprob_V[ids[place]]))
    np.testing.assert_allclose(found, np.sort(expected), atol=1e-9)


def test_sums_are_those_of_the_documents() -> None:
    dataset = TokenDataset.of([document("a", list(range(1, 31)), context=20), document("b", [1, 2, 3])])
    whole = score_dataset(MODEL, dataset, length=30)
    rolled = score_dataset(MODEL, windowed(dataset, 10, 4), length=10)
    for name in ("a", "b"):
        ones = [ledger.sums("document", name) for ledger in (whole, rolled)]
        assert ones[0].count == ones[1].count and ones[0].bytes == ones[1].bytes
    texts = TokenDataset.of([document("a", list(range(1, 31)), context=20), document("b", [1, 2, 3])])
    same = [score_dataset(MODEL, one, length=10).total for one in (texts, windowed(texts, 10, 10))]
    assert same[0].value == pytest.approx(same[1].value)


@pytest.mark.parametrize("stride", [0, 11])
def test_a_stride_is_within_a_window(stride: int) -> None:
    with pytest.raises(BadInput, match=f"a stride of {stride}"):
        windowed(TokenDataset.of([document("a", [1, 2])]), 10, stride)
