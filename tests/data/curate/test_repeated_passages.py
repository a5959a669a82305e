from __future__ import annotations

import random
import string
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.curate.fingerprints import fingerprints
from gyrocompass.data.curate.repeated_passages import RepeatedPassageStep, repeated_passages
from gyrocompass.data.curate.step import columns_of

TEXTS = st.lists(st.one_of(st.text("ab", max_size=40), st.text("aé日🙂\x00", max_size=40)), max_size=6)


def reference(texts: list[str], minimum: int) -> list[list[tuple[int, int]]]:
    """Spans by looking at every window, in the order of the texts."""
    first: dict[str, tuple[int, int]] = {}
    spans: list[list[tuple[int, int]]] = []
    for document, text in enumerate(texts):
        copied: set[int] = set()
        touching: list[tuple[int, int]] = []
        for start in range(len(text) - minimum + 1):
            window = text[start : start + minimum]
            seen = first.setdefault(window, (document, start))
            if seen[0] < document or start >= seen[1] + minimum:
                copied.update(range(start, start + minimum))
        for place in sorted(copied):
            if touching and touching[-1][1] == place:
                touching[-1] = (touching[-1][0], place + 1)
            else:
                touching.append((place, place + 1))
        spans.append(touching)
    return spans


def spans_by_id(table: pa.RecordBatch) -> dict[str, list[tuple[int, int]]]:
    return {row["id"]: [(span["start"], span["end"]) for span in row["spans"]] for row in table.to_pylist()}


@settings(deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_spans_are_all_windows_that_stand_before(texts: list[str], draw: Any) -> None:
    step = RepeatedPassageStep(minimum=8)
    ids = [f"{number:02d}" for number in range(len(texts))]
    found = repeated_passages(texts, ids, step)
    assert spans_by_id(found) == dict(zip(ids, reference(texts, 8), strict=True))
    for row, text in zip(sorted(found.to_pylist(), key=lambda row: row["id"]), texts, strict=True):
        copied = sum(span["end"] - span["start"] for span in row["spans"])
        assert row["share"] == pytest.approx(copied / max(len(text), 1))
        assert (row["partner"] is None) == (not row["spans"])
    order = draw.sample(range(len(texts)), len(texts))
    assert spans_by_id(
        repeated_passages([texts[n] for n in order], [ids[n] for n in order], step)
    ) == spans_by_id(found)


def prose(draw: random.Random, length: int) -> str:
    return "".join(draw.choice(string.ascii_lowercase + " é日") for _ in range(length))


def test_a_passage_is_found_in_chunks_far_apart() -> None:
    draw = random.Random(1)
    passages = [prose(draw, 150) for _ in range(20)]
    texts = [prose(draw, 300) + passages[number % 20] + prose(draw, 300) for number in range(100)]
    whole = spans_by_id(repeated_passages(texts, step=RepeatedPassageStep(minimum=100)))
    assert whole == dict(zip(whole, reference(texts, 100), strict=True))
    assert sum(map(len, whole.values())) == 80
    in_two = RepeatedPassageStep(minimum=100, chunk_mb=0.05, most_sources=50)
    assert spans_by_id(repeated_passages(texts, step=in_two)) == whole
    # With few sources for each fingerprint, letters beside a passage that happen to be equal may be missed.
    in_ten = spans_by_id(repeated_passages(texts, step=RepeatedPassageStep(minimum=100, chunk_mb=0.01)))
    inside = {name: [(start + 2, end - 2) for start, end in spans] for name, spans in whole.items()}
    for name, spans in inside.items():
        assert len(in_ten[name]) == len(spans)
        for (start, end), (first, last) in zip(in_ten[name], spans, strict=True):
            assert first - 2 <= start <= first and last <= end <= last + 2


def test_the_partner_is_where_the_longest_passage_stands_first() -> None:
    draw = random.Random(2)
    one, two = prose(draw, 60), prose(draw, 90)
    texts = [one + prose(draw, 20), two + prose(draw, 20), one + "--" + two]
    found = {
        row["id"]: row for row in repeated_passages(texts, step=RepeatedPassageStep(minimum=50)).to_pylist()
    }
    assert found["00000002"]["partner"] == "00000001"
    assert [span["kind"] for span in found["00000002"]["spans"]] == ["repeated", "repeated"]


@given(st.integers(4, 40), st.randoms(use_true_random=False))
def test_texts_with_a_passage_in_common_share_a_fingerprint(passage: int, draw: random.Random) -> None:
    common = bytes(draw.randrange(4) for _ in range(passage))
    texts = [
        bytes(draw.randrange(4) for _ in range(draw.randrange(50)))
        + common
        + bytes(draw.randrange(4) for _ in range(draw.randrange(50)))
        for _ in range(2)
    ]
    one, two = (set(fingerprints(np.frombuffer(text, np.uint8), passage).tolist()) for text in texts)
    assert one & two


def test_fingerprints_are_few() -> None:
    text = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
    assert 3.5 < len(fingerprints(text, 200)) / (len(text) / 200) < 4.5


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(MissingDependency, match="pydivsufsort") as raised:
        repeated_passages(["a long enough text " * 20])
    assert raised.value.fix == "pip install 'gyrocompass[substrings]'"


def test_the_step_has_its_columns_before_there_are_documents() -> None:
    assert list(columns_of(RepeatedPassageStep(), {})) == ["spans", "share", "partner"]
