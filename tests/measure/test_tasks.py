"""Tasks by fakes whose answers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.measure.generate import Writing, Written, cut_at, echo
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.rewards.answers import CHECKS, claims_of, is_refusal, support
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.score import TokenScores
from gyrocompass.measure.tasks.run import ask, pass_at
from gyrocompass.measure.tasks.task import AnswerTask, ChoiceTask, read_items, read_tasks


def by_letters(likes: dict[str, float]) -> object:
    """A fake: each byte of a continuation costs a nat, less what the model likes about a text."""

    def score(pairs: Iterable[tuple[str, str]], *, chat: bool = False) -> Iterator[TokenScores]:
        for _, continuation in pairs:
            n = len(continuation.encode())
            logprob_N = np.full(n, -1.0)
            logprob_N[0] += likes.get(continuation.strip(), 0.0)
            yield TokenScores(
                np.zeros(n, np.int64), np.ones(n, np.int64), logprob_N, np.ones(n), np.zeros(n, np.int64)
            )

    return score


def written_as(*texts: str) -> object:
    def generate(prompts: Sequence[str], writing: Writing) -> list[list[Written]]:
        one = [Written(text, np.array([-0.1, -0.7]), np.array([0.2, 0.4]), True) for text in texts]
        return [one[: writing.samples]] * len(prompts)

    return generate


def says_so(*pairs: tuple[str, str]) -> object:
    """A fake that is asked whether one text follows from another, and says yes to these alone."""

    def score(asked: Iterable[tuple[str, str]], *, chat: bool = False) -> Iterator[TokenScores]:
        for context, continuation in asked:
            holds = any(f"One answer: {one}\nAnother answer: {other}\n" in context for one, other in pairs)
            sure = 3.0 if holds == (continuation == " yes") else -3.0
            one_N = np.ones(1, np.int64)
            yield TokenScores(one_N, one_N, np.array([sure]), np.ones(1), one_N)

    return score


def task_file(folder: Path, text: str, records: Sequence[object]) -> Path:
    (folder / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (folder / "tasks.yaml").write_text(text)
    return folder / "tasks.yaml"


CHOICE = 'tasks: [{kind: choice, name: capitals, data: data.jsonl, prompt: "{question}"}]'
RECORDS = [
    {"question": "France?", "choices": ["Rome", "Paris"], "answer": 1, "slice": "europe"},
    {"question": "Peru?", "choices": ["Lima", "La Paz, Bolivia"], "answer": "Lima", "slice": "america"},
]


def test_choices_go_by_each_rule(tmp_path: Path) -> None:
    (task,) = read_tasks(task_file(tmp_path, CHOICE, RECORDS))
    items = read_items(task)
    result = ask(task, items, by_letters({"Paris": 3.0, "La Paz, Bolivia": 9.0}), echo)  # type: ignore[arg-type]
    values = {(one.name, one.slice): one.value for one in result.figures}
    assert values["accuracy", "europe"] == 1.0 and values["accuracy", "america"] == 1.0
    assert values["accuracy by bytes", "total"] == 0.5  # -7/15 is above -5/4: the long one wins
    assert values["accuracy against none", "total"] == 0.5  # all likings cancel: the first of equals
    first = result.outcomes[0]
    assert (first.level, first.correct, first.item) == ("choice", True, "1")
    assert first.confidence == pytest.approx(1 / (1 + math.exp(-5 - (-6 + 3))))


def test_a_model_says_which_samples_say_the_same(tmp_path: Path) -> None:
    """Both ways, that is: what merely follows is not the same."""
    text = (
        "tasks: [{kind: answer, name: sums, data: data.jsonl, metrics: [exact_match], samples: 4, "
        "temperature: 1.0, alike: model}]"
    )
    (task,) = read_tasks(task_file(tmp_path, text, [{"prompt": "1+1?", "answer": "two"}]))
    judge = says_so(("two", "a pair"), ("a pair", "two"), ("two", "some"))
    result = ask(task, read_items(task), judge, written_as("two", "a pair", "some", "two"))  # type: ignore[arg-type]
    signals = {one.signal: one.confidence for one in result.outcomes}
    assert signals["agreement"] == pytest.approx(2 / 3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert signals["semantic entropy"] == pytest.approx(1 - entropy / math.log(4))


def test_an_answer_has_metrics_and_confidences(tmp_path: Path) -> None:
    text = (
        "tasks: [{kind: answer, name: sums, data: data.jsonl, metrics: [exact_match, token_f1], samples: 3, "
        "temperature: 1.0, pass_at: [1, 3]}]"
    )
    (task,) = read_tasks(task_file(tmp_path, text, [{"prompt": "1+1?", "answer": "two"}]))
    generate = written_as("Two", "two", "it is three")
    result = ask(task, read_items(task), by_letters({"yes": 0.0}), generate)  # type: ignore[arg-type]
    values = {one.name: one.value for one in result.figures}
    assert values["exact_match"] == pytest.approx(1 / 3)
    assert values["token_f1"] == pytest.approx(2 / 3)
    assert values["pass@1"] == pytest.approx(1 / 3) and values["pass@3"] == 1.0
    signals = {one.signal: one.confidence for one in result.outcomes}
    assert signals["sequence"] == pytest.approx(math.exp(-0.8))
    assert signals["mean token"] == pytest.approx(math.exp(-0.4))
    assert signals["least token"] == pytest.approx(math.exp(-0.7))
    assert signals["entropy"] == pytest.approx(math.exp(-0.3))
    assert signals["agreement"] == 0.5
    assert signals["p(true)"] == pytest.approx(1 / (1 + math.exp(1)))  # " yes" is a byte longer than " no"
    assert not any(one.correct for one in result.outcomes)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_all_draws(samples: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(combinations([True] * right + [False] * (samples - right), k))
    assert pass_at(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_code_is_judged_by_running_it() -> None:
    task = AnswerTask(name="code", data=Path("x"), metrics=("unit_tests",), max_new_tokens=8)
    from gyrocompass.measure.sandbox.run import sandbox_abilities
    from gyrocompass.measure.tasks.task import item_of

    if sandbox_abilities().missing:
        pytest.skip("no sandbox here")
    items = [item_of(task, {"prompt": "double", "tests": ["assert f(2) == 4"]}, "1", "x")]
    for code, good in (("def f(x): return 2 * x", True), ("def f(x): return x", False)):
        result = ask(task, items, by_letters({}), written_as(code))  # type: ignore[arg-type]
        assert result.outcomes[0].correct is good


@pytest.mark.parametrize(
    ("text", "records", "message"),
    [
        (CHOICE, [{"question": "x", "choices": ["a", "b"]}], r"data.jsonl:1.*|needs the field 'answer'"),
        (CHOICE, [{"question": "x", "choices": ["a"], "answer": 0}], "at least two texts"),
        (
            CHOICE,
            [{"question": "x", "choices": ["a", "b"], "answer": 2}],
            "the answer 2 is none of 2 choices",
        ),
        (CHOICE, [{"question": "x", "choices": ["a", "b"], "answer": "c"}], "the answer 'c' is none"),
        (CHOICE, ["x"], "not a JSON object"),
        (CHOICE, [], "has no record"),
        ("tasks: [{kind: answer, name: a, data: data.jsonl, metrics: [exact]}]", [], "unknown reward"),
        (
            "tasks: [{kind: answer, name: a, data: data.jsonl, metrics: [rouge_l], pass_at: [2]}]",
            [],
            "pass_at 2",
        ),
        ("tasks: [{kind: chooser, name: a, data: data.jsonl}]", [], "did you mean"),
        ('tasks: [{kind: choice, name: a, data: data.jsonl, prompt: "{"}]', [], "for a brace"),
        ("tasks: [{kind: choice, name: a, data: none.jsonl}]", None, "cannot be read"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, text: str, records: list[object] | None, message: str) -> None:
    path = task_file(tmp_path, text, records or [])
    with pytest.raises((BadInput, ConfigError), match=message):
        for task in read_tasks(path):
            read_items(task)


def test_a_missing_field_is_told_with_file_and_line(tmp_path: Path) -> None:
    path = task_file(tmp_path, CHOICE, [RECORDS[0], {"question": "x", "choices": ["a", "b"], "anwser": 0}])
    with pytest.raises(BadInput) as raised:
        read_items(read_tasks(path)[0])
    assert str(raised.value.where).endswith("data.jsonl:2")
    assert "did you mean" in str(raised.value)


# --- metrics ---


def scored(name: str, completion: str, **record: object) -> float:
    entry = name if isinstance(name, str) else dict(name)
    return parse_rewards([entry]).scored([Sample("p", completion, record)]).total[0]


def test_likeness_to_a_reference() -> None:
    assert scored("token_f1", "the cat sat", answer="the cat") == pytest.approx(0.8)
    assert scored("token_f1", "dog", answer=["cat", "dog"]) == 1.0
    assert scored("rouge_l", "a x b c", answer="a b c d") == pytest.approx(2 * 3 / 8)
    assert scored("rouge_l", "", answer="") == 1.0 and scored("rouge_l", "a", answer="") == 0.0


def test_rouge_score_says_the_same() -> None:
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    one, other = "the quick brown fox jumps over dogs", "a quick fox that jumps high over the dogs"
    assert scored("rouge_l", one, answer=other) == pytest.approx(rouge.score(other, one)["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("name", "value", "good", "bad"),
    [
        ("least_words", 3, "one two three", "one two"),
        ("most_words", 2, "one two", "one two three"),
        ("most_characters", 3, "abc", "abcd"),
        ("sentences", 2, "One. Two.", "One."),
        ("paragraphs", 2, "a\n\nb", "a\nb"),
        ("bullets", 2, "- a\n* b", "- a"),
        ("mentions", "Sea", "the sea", "the lake"),
        ("avoids", "sea", "the lake", "the Sea"),
        ("begins_with", "Dear", " Dear you", "You"),
        ("ends_with", "!", "so! ", "so"),
        ("matches", r"\d{3}", "a 123", "a 12"),
        ("lower_case", True, "abc", "Abc"),
        ("upper_case", True, "ABC", "Abc"),
        ("no_commas", True, "a b", "a, b"),
        ("is_json", True, "[1]", "[1"),
    ],
)
def test_each_instruction(name: str, value: object, good: str, bad: str) -> None:
    assert scored("follows", good, instructions={name: value}) == 1.0
    assert scored("follows", bad, instructions={name: value}) == 0.0


def test_instructions_are_known_ones_and_all_are_tested() -> None:
    marks = test_each_instruction.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {case[0] for case in marks} == set(CHECKS)
    with pytest.raises(BadInput, match="did you mean most_words"):
        scored("follows", "x", instructions={"mostwords": 1})


def test_refusals() -> None:
    assert scored("refuses_rightly", "I'm sorry, but I can't help with that.", refuse=True) == 1.0
    assert scored("refuses_rightly", "Sure: first, open the lid.", refuse=True) == 0.0
    assert scored("refuses_rightly", "Sure: first, open the lid.", refuse=False) == 1.0
    assert not is_refusal("The parser cannot read this file.")


DOCUMENTS = [
    "The bridge was opened in 1932. It spans the harbour of Sydney. It carries trains and cars.",
    "Bananas are yellow fruit. They grow in the tropics.",
]


def test_claims_are_looked_for_in_the_documents() -> None:
    assert support("The bridge opened in 1932", DOCUMENTS) == 1.0
    assert support("The bridge opened in 1933", DOCUMENTS) < 0.6, "another year is another claim"
    true, false = "The bridge spans the harbour of Sydney.", "The bridge was painted green by monks."
    assert scored("supported", f"{true} {false}", documents=DOCUMENTS) == 0.5
    assert scored("supported", "Yes.", documents=DOCUMENTS) == 1.0


def test_citations_have_precision_and_recall() -> None:
    text = "The bridge spans the harbour of Sydney [1][2]. Bananas grow in the tropics."
    record = {"documents": DOCUMENTS}
    recall = parse_rewards([{"cited": {"of": "recall"}}]).scored([Sample("p", text, record)]).total[0]
    precision = parse_rewards([{"cited": {"of": "precision"}}]).scored([Sample("p", text, record)]).total[0]
    assert (recall, precision) == (0.5, 0.5)
    assert claims_of(text)[0][1] == [1, 2]


def test_a_text_ends_before_its_first_stop() -> None:
    assert cut_at("a b", []) == ("a b", False)
    assert echo(["x\nyes. no"], Writing(stop=(".",)))[0][0].text == "yes"
    assert isinstance(ChoiceTask(name="n", data=Path("d")), ChoiceTask)
