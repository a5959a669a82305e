import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from curate.annotation_cases import batch, check_step, library_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.data.curate import likelihood
from gyrocompass.data.curate.content_file import ContentFile
from gyrocompass.data.curate.importance import Importance
from gyrocompass.data.curate.likelihood import Likelihood, LikelihoodBands
from gyrocompass.data.curate.ngram_model import NgramModel
from gyrocompass.data.curate.spans import from_arrow
from gyrocompass.data.curate.step import MemoryCorpus
from gyrocompass.measure.score import TokenScores, uniform

TEXTS = st.lists(st.text(alphabet="abé中 \n", max_size=20), max_size=5)


@pytest.fixture(autouse=True)
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def jumpy(texts: Iterable[str]) -> Iterator[TokenScores]:
        """Two bytes a token; what holds a z or a 中 surprises."""
        for text in texts:
            data = text.encode()
            pieces = [data[i : i + 2] for i in range(0, len(data), 2)]
            odd = np.array([b"z" in piece or b"\xb8" in piece for piece in pieces], dtype=bool)
            byte_N = np.array([len(piece) for piece in pieces] + [0], dtype=np.int64)
            logprob_N = np.append(np.where(odd, -20.0, -1.0), -0.5)
            yield TokenScores(byte_N, byte_N, logprob_N, 0 * logprob_N, byte_N)

    likelihood.scorer.cache_clear()
    monkeypatch.setitem(likelihood.SCORES, "uniform", lambda: uniform)
    monkeypatch.setitem(likelihood.SCORES, "jumpy", lambda: jumpy)


def test_a_uniform_score_has_eight_bits_per_byte() -> None:
    rows = check_step(Likelihood(score="uniform", reference="jumpy"), batch(["abc", "é", ""])).to_pylist()
    assert [row["bits_per_byte"] for row in rows] == [pytest.approx(8), pytest.approx(8), None]
    assert rows[0]["perplexity"] == pytest.approx(256) and rows[0]["nll_nats"] == pytest.approx(
        3 * math.log(256)
    )
    assert rows[0]["difference"] == pytest.approx(8 - 2.5 / 3 / math.log(2))
    assert rows[2]["difference"] is None and rows[2]["n_tokens"] == 0


def test_surprising_tokens_are_marked_in_characters() -> None:
    texts = ["abzdé", "a中b", "ééz"]
    rows = check_step(Likelihood(score="jumpy"), batch(texts))
    marked = [
        [text[span.start : span.end] for span in spans]
        for text, spans in zip(texts, from_arrow(rows["spans"]), strict=True)
    ]
    assert marked == [["zd"], ["a中"], ["z"]] or marked == [["zd"], ["中"], ["z"]]
    assert rows["surprising"].to_pylist()[0] == pytest.approx(1 / 4)


@settings(deadline=None)
@given(TEXTS)
def test_documents_do_not_see_each_other(texts: list[str]) -> None:
    check_step(Likelihood(score="uniform"), batch(texts))


def test_a_score_that_is_no_number_stops_and_names_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(texts: Iterable[str]) -> Iterator[TokenScores]:
        for scored in uniform(texts):
            yield scored._replace(logprob_N=scored.logprob_N * math.nan)

    monkeypatch.setitem(likelihood.SCORES, "broken", lambda: broken)
    with pytest.raises(GyroError, match="not finite") as error:
        Likelihood(score="broken").annotate(batch(["x"], path=["a/b.txt"]))
    assert "a/b.txt" in str(error.value.where)


def test_names_of_scores_are_checked(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="did you mean uniform"):
        Likelihood(score="unifrom").annotate(batch(["x"]))
    (tmp_path / "x.safetensors").write_bytes(b"no zip")
    for name in ("x.safetensors", "none.safetensors"):
        with pytest.raises(BadInput, match="not a model of runs"):
            Likelihood(score=f"ngram:{tmp_path / name}").annotate(batch(["x"]))


def bands(
    step: LikelihoodBands, values: list[float | None], slices: list[str], order: list[int]
) -> dict[str, dict[str, object]]:
    documents = batch(["x"] * len(values), slice=slices).append_column(
        step.column, pa.array(values, pa.float64())
    )
    documents = documents.take(pa.array(order, pa.int64()))
    parts = [documents.slice(i, 2) for i in range(0, len(values), 2)]
    resolved = step.resolve(iter([step.signatures(part) for part in parts]), MemoryCorpus(parts))
    return {row["id"]: row for row in resolved.to_pylist()}


def test_bands_are_of_each_slice_and_do_not_depend_on_order() -> None:
    values = [1.0, 2.0, 3.0, 100.0, 101.0, 102.0, None, 7.0]
    slices = ["a"] * 3 + ["b"] * 3 + ["a", "c"]
    rows = bands(LikelihoodBands(), values, slices, list(range(8)))
    assert [row["band"] for row in rows.values()] == ["head", "middle", "tail"] * 2 + [None, "middle"]
    assert [row["percentile"] for row in rows.values()][:3] == [
        pytest.approx(x) for x in (1 / 6, 1 / 2, 5 / 6)
    ]
    assert [*rows.values()][2]["robust_z"] == pytest.approx(1 / 1.4826) and [*rows.values()][7][
        "robust_z"
    ] is None
    order = random.Random(1).sample(range(8), 8)
    assert bands(LikelihoodBands(), values, slices, order) == rows
    nothing = LikelihoodBands().signatures(
        batch([]).append_column("likelihood.bits_per_byte", pa.array([], pa.float64()))
    )
    assert LikelihoodBands().resolve(iter([nothing]), MemoryCorpus([batch([])])).num_rows == 0


def test_cuts_that_do_not_fit_are_refused() -> None:
    for cuts in ((0.5,), (0.6, 0.4), (0.5, 1.5)):
        with pytest.raises(ValidationError):
            LikelihoodBands(cuts=cuts)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.text(alphabet="abé", max_size=12), max_size=4),
    st.text(alphabet="abé中", max_size=6),
    st.integers(1, 4),
)
def test_the_model_of_runs_is_a_distribution_at_every_place(
    texts: list[str], context: str, order: int
) -> None:
    model = NgramModel.fit(texts, order=order, smoothing=1.5)
    prefix = context.encode("utf-8")
    total = 0.0
    for byte in range(128):  # what is valid alone; the others are summed by the counts of the reference
        (scores,) = model.score([(prefix + bytes([byte])).decode("utf-8")])
        total += math.exp(scores.logprob_N[-1])
        assert math.exp(scores.logprob_N[-1]) == pytest.approx(
            plain_probability(texts, prefix, byte, order, 1.5)
        )
    rest = sum(plain_probability(texts, prefix, byte, order, 1.5) for byte in range(128, 256))
    assert total + rest == pytest.approx(1)


def plain_probability(texts: list[str], prefix: bytes, byte: int, order: int, smoothing: float) -> float:
    """The reference: the formula, by counting."""
    p = 1 / 256
    data = [text.encode() for text in texts]
    for size in range(1, order + 1):
        if len(prefix) < size - 1:
            break
        context = prefix[len(prefix) - size + 1 :]
        places = [(d, i) for d in data for i in range(len(d) - size + 1) if d[i : i + size - 1] == context]
        p = (sum(d[i + size - 1] == byte for d, i in places) + smoothing * p) / (len(places) + smoothing)
    return p


def test_code_is_likelier_under_a_model_of_code(tmp_path: Path) -> None:
    texts = [text for text in library_texts(60) if len(text) > 3000]
    prose = [
        "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 5
    ]
    NgramModel.fit(texts[:20], order=5).save(tmp_path / "code.safetensors")
    NgramModel.fit(prose, order=5).save(tmp_path / "prose.safetensors")
    step = Likelihood(
        score=f"ngram:{tmp_path / 'code.safetensors'}", reference=f"ngram:{tmp_path / 'prose.safetensors'}"
    )
    rows = step.annotate(
        batch([*(text[:3000] for text in texts[20:30]), "The night was dark and the rain fell. "])
    ).to_pylist()
    assert np.mean([row["bits_per_byte"] for row in rows[:-1]]) < 4
    assert all(row["difference"] < -0.5 for row in rows[:-1])
    assert rows[-1]["difference"] > 0


def files(tmp_path: Path, target: str, raw: str) -> Importance:
    for name, content in (("target", target), ("raw", raw)):
        (tmp_path / name).write_text(content)
    return Importance(target=ContentFile(path=tmp_path / "target"), raw=ContentFile(path=tmp_path / "raw"))


def test_importance_is_of_what_the_target_has_more_of(tmp_path: Path) -> None:
    step = files(
        tmp_path, "the court ruled\nthe judge ruled\n" * 50, "the cat sat\nthe court ruled\na dog ran\n" * 50
    )
    rows = check_step(step, batch(["the judge ruled", "a cat ran", "the the the", ""])).to_pylist()
    weights = [row["log_weight"] for row in rows]
    assert weights[0] > 0 > weights[1] and weights[3] == 0
    assert rows[0]["per_feature"] == pytest.approx(weights[0] / 5)


def test_the_noise_of_importance_samples_by_weight(tmp_path: Path) -> None:
    step = files(tmp_path, "good\n" * 60 + "bad\n" * 20, "good\n" * 40 + "bad\n" * 40)
    chance = random.Random(0)
    wins = 0
    for _ in range(60):
        documents = batch(["good", "bad"] * 10, id=[f"{chance.getrandbits(64):016x}" for _ in range(20)])
        noisy = step.annotate(documents)["noisy"].to_pylist()
        wins += sum(noisy[i] > noisy[i + 1] for i in range(0, 20, 2))
    weights = [row["log_weight"] for row in step.annotate(batch(["good", "bad"])).to_pylist()]
    expected = 1 / (1 + math.exp(weights[1] - weights[0]))
    assert wins / 600 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 600))


def test_files_without_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no words"):
        files(tmp_path, "a b", " \n").annotate(batch(["x"]))
    with pytest.raises(ValidationError, match="cannot be read"):
        ContentFile(path=tmp_path / "none")
