import json
import random
from pathlib import Path
from typing import Any

import pytest
from curate.annotation_cases import batch, check_step, library_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gyrocompass.core.config import config_hash
from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.benchmark_items import Benchmark
from gyrocompass.data.curate.decontaminate import Certificate, Decontamination
from gyrocompass.data.curate.spans import from_arrow
from gyrocompass.data.curate.word_runs import word_list

LONG = (
    "A farmer has seventeen sheep and all but nine of them run away, "
    "how many sheep does the farmer have left at home?"
)
SHORT = "Who painted the night watch?"
TINY = "What is love?"
ITEMS = [
    {"question": LONG, "answer": "nine"},
    {"question": SHORT, "answer": "Rembrandt van Rijn"},
    {"question": TINY, "answer": "42"},
]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Decontamination:
    path = tmp_path_factory.mktemp("benchmarks") / "riddles.jsonl"
    path.write_text("\n".join(map(json.dumps, ITEMS)))
    return Decontamination(benchmarks=(Benchmark(name="riddles", path=path, answer="answer"),))


def kinds(step: Decontamination, texts: list[str]) -> list[list[tuple[str, str]]]:
    spans = from_arrow(check_step(step, batch(texts))["spans"])
    return [
        [(span.kind, text[span.start : span.end]) for span in found]
        for text, found in zip(texts, spans, strict=True)
    ]


def test_each_test_finds_what_it_is_for(step: Decontamination) -> None:
    halves = LONG.split()
    texts = [
        f"Riddle one. {LONG.upper()}  Think!",
        f"Q: {LONG}\nA: The answer is: Nine.",
        f"They said {' '.join(halves[2:16])} and so on",
        "who -- painted the NIGHT watch?!",
        f"{SHORT} It was Rembrandt van Rijn, they say.",
        LONG.replace("seventeen", "eighteen").replace("away", "off"),
        TINY,
        "The night watch was painted in 1642. A farmer has sheep.",
        "",
    ]
    found = kinds(step, texts)
    assert [[kind for kind, _ in of_text] for of_text in found] == [
        ["substring:riddles#0"], ["answer:riddles#0"], ["ngram:riddles#0"], ["substring:riddles#1"],
        ["answer:riddles#1"], ["jaccard:riddles#0"], [], [], [],
    ]  # fmt: skip
    assert found[0][0][1] == LONG.upper().rstrip("?") and found[1][0][1].endswith("Nine")
    assert found[2][0][1] == " ".join(halves[2:16]).rstrip(",")
    assert found[4][0][1].endswith("Rijn")


def test_coverage_is_the_share_of_runs(step: Decontamination) -> None:
    words = LONG.split()
    text = " ".join(words[2:16])
    runs = len(word_list(LONG)) - 13 + 1
    row = step.annotate(batch([text, "x"])).to_pylist()
    assert row[0]["coverage"] == pytest.approx(2 / runs) and row[0]["contaminated"]
    assert row[1]["coverage"] == 0 and not row[1]["contaminated"]
    strict = step.model_copy(update={"coverage": 0.5, "jaccard": None})
    assert not strict.annotate(batch([text]))["contaminated"][0].as_py()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from([LONG, SHORT, "nine", "rembrandt van rijn", LONG[20:90], "x y z",
"\0", "é", "\n"]), max_size=5)
                .map(" ".join), max_size=4))  # fmt: skip
def test_documents_do_not_see_each_other(step: Decontamination, texts: list[str]) -> None:
    check_step(step, batch(texts))


def plain_hits(text: str) -> set[str]:
    """The reference: which items stand in the text as a whole or by a run of 13 words."""
    words = " ".join(["", *word_list(text), ""])
    found = set()
    for number, item in enumerate(ITEMS):
        question = word_list(item["question"])
        runs = [question[i : i + 13] for i in range(len(question) - 12)] or (
            [question] if len(question) >= 5 else []
        )
        if any(" ".join(["", *run, ""]) in words for run in runs):
            found.add(f"riddles#{number}")
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.sampled_from([*LONG.split(), *SHORT.split(), LONG, SHORT, "a farmer has seventeen sheep"]),
        max_size=40,
    )
)
def test_exact_hits_are_those_of_the_reference(step: Decontamination, pieces: list[str]) -> None:
    text = " ".join(pieces)
    spans = from_arrow(step.model_copy(update={"jaccard": None}).annotate(batch([text]))["spans"])[0]
    assert {span.kind.partition(":")[2] for span in spans} == plain_hits(text)


def test_planted_items_are_found_in_real_files_and_nothing_else_is(tmp_path: Path) -> None:
    texts = library_texts(120)
    chance = random.Random(0)
    vocabulary = sorted({word for text in texts[:10] for word in word_list(text) if word.isalpha()})
    items = [" ".join(chance.choices(vocabulary, k=chance.randint(5, 40))) for _ in range(200)]
    (tmp_path / "items.txt").write_text("\n".join(items))
    step = Decontamination(benchmarks=(Benchmark(name="planted", path=tmp_path / "items.txt"),))
    planted = {}
    for number in chance.sample(range(len(items)), 60):
        row, words = chance.randrange(len(texts)), items[number].split()
        if row in planted:
            continue
        if len(words) > 20 and number % 2:
            words[chance.randrange(len(words))] = "changed"
        texts[row] = f"{texts[row]}\n# {'  '.join(words).title()}.\n"
        planted[row] = number
    rows = step.annotate(batch(texts)).to_pylist()
    found = {
        row: {span["kind"].partition("#")[2] for span in document["spans"]}
        for row, document in enumerate(rows)
    }
    assert {row: {str(number)} for row, number in planted.items()} == {
        row: hits for row, hits in found.items() if hits
    }


def test_a_certificate_says_what_was_checked_and_what_hit(step: Decontamination) -> None:
    documents = batch([LONG, "clean", f"{SHORT} Rembrandt van Rijn", LONG])
    parts = [step.annotate(documents.slice(i, 1)) for i in range(4)]
    certificate = Certificate(step)
    certificate.add(parts)
    said = certificate.to_json()
    assert said["documents"] == {"checked": 4, "contaminated": 3}
    (benchmark,) = said["benchmarks"]
    assert benchmark["items"] == {"all": 3, "by_ngram": 1, "whole": 1, "unchecked": 1}
    assert benchmark["unchecked"] == [2] and benchmark["by_test"] == {"answer": 1, "substring": 1}
    ids = documents["id"].to_pylist()
    assert benchmark["hits"] == {"0": {"substring": [ids[0], ids[3]]}, "1": {"answer": [ids[2]]}}
    assert said["settings"]["ngram"] == 13
    other = Certificate(step)
    other.add(parts[::-1])
    assert json.dumps(other.to_json(), sort_keys=True) == json.dumps(said, sort_keys=True)
    with pytest.raises(BadInput, match="no benchmark"):
        Certificate(Decontamination(benchmarks=()))


def test_a_changed_benchmark_is_another_config(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_text("one two three four five six\n")
    first = Decontamination(benchmarks=(Benchmark(name="b", path=path),))
    sha256 = first.benchmarks[0].sha256
    path.write_text("one two three four five seven\n")
    second = Decontamination(benchmarks=(Benchmark(name="b", path=path),))
    assert config_hash(first) != config_hash(second)
    with pytest.raises(ValidationError, match="has changed"):
        Benchmark(name="b", path=path, sha256=sha256)
    with pytest.raises(ValidationError, match="cannot be read"):
        Benchmark(name="b", path=tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("a.jsonl", '{"question": "x"}\n{', "not JSON"), ("a.jsonl", '{"q": 1}', "no field question"), ("a.json",
     "{}", "a list"),
     ("a.txt", "\n", "no items"), ("a.jsonl", '[1]', "no field"), ("a.txt", b"\xff\xfe", "cannot be read")],
)  # fmt: skip
def test_a_benchmark_that_cannot_be_read_says_where(
    tmp_path: Path, name: str, content: Any, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    step = Decontamination(benchmarks=(Benchmark(name="b", path=path),))
    with pytest.raises(BadInput, match=reason) as error:
        step.annotate(batch(["x"]))
    assert str(path) in str(error.value.where)


def test_nested_fields_and_lists_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"data": {"q": SHORT}, "answers": ["Rembrandt", "van Rijn"]}]))
    step = Decontamination(benchmarks=(Benchmark(name="b", path=path, question="data.q", answer="answers"),))
    assert kinds(step, [f"{SHORT} rembrandt; van rijn"])[0][0][0] == "answer:b#0"


def test_items_in_a_script_without_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("夜警是哪位荷兰画家在一六四二年画的？\n", "utf-8")
    step = Decontamination(benchmarks=(Benchmark(name="b", path=tmp_path / "a.txt"),))
    found = kinds(step, ["问：夜警是哪位荷兰画家在一六四二年画的？答：伦勃朗。", "夜警是一幅画。"])
    assert found == [[("substring:b#0", "夜警是哪位荷兰画家在一六四二年画的")], []]


def test_lengths_that_would_miss_items_are_refused() -> None:
    with pytest.raises(ValidationError, match="never be looked for"):
        Decontamination(benchmarks=(), ngram=3, shortest=5)
