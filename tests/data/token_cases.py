"""Generated token datasets, shared by the tests of this folder."""

from __future__ import annotations

from hypothesis import strategies as st

from gyrocompass.data.tokens import TokenDataset, TokenRow


@st.composite
def token_rows(draw: st.DrawFn, max_documents: int = 12, max_tokens: int = 25) -> list[TokenRow]:
    """Documents of random lengths over up to three slices and two sources, some tokens weighing nothing."""
    rows = []
    next_id = 1
    for index in range(draw(st.integers(1, max_documents))):
        n = draw(st.integers(2, max_tokens))
        weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0]), min_size=n, max_size=n))
        rows.append(
            TokenRow(
                f"d{index}",
                draw(st.sampled_from(["a", "b", "c"])),
                draw(st.sampled_from(["s", "t"])),
                list(range(next_id, next_id + n)),
                [(7 * k) % 5 for k in range(n)],
                weights,
                draw(st.sampled_from(["", "g", "h"])),
            )
        )
        next_id += n
    return rows


def token_datasets(max_documents: int = 12, max_tokens: int = 25) -> st.SearchStrategy[TokenDataset]:
    """`token_rows` as a dataset. Every token id occurs once, so that an id names its place."""
    return token_rows(max_documents, max_tokens).map(TokenDataset.of)
