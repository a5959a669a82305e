"""Tasks asked of a model, through callables: figures with intervals, and each answer with its confidences.

    ChoiceTask, ScoreContinuations --answer_choices--> accuracy by four rules, an outcome for each item
    AnswerTask, Generate           --answer_freely---> each metric, pass@k, an outcome for each item

A choice goes by the log-likelihood of each choice's tokens after the prompt:

    raw              the sum                          by bytes      the sum over its UTF-8 bytes
    by tokens        the sum over its tokens          against none  the sum less that without the question

An outcome is what calibration is fitted on: the confidence that the model had, by name, and whether it was
right. Of a choice it is the probability among the choices (softmax of the sums). Of a text that was written:

    sequence     exp(sum log p)              mean token   exp(mean log p)
    least token  exp(min log p)              entropy      exp(-mean entropy)
    agreement    the share of the other samples that say the same (`meaning`), where there are several
    p(true)      what the model gives to "yes" when it is asked whether its answer is right

pass@k is the unbiased 1 - C(n - c, k) / C(n, k) (Chen et al. 2021).

Shape legend: C choices of an item.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gyrocompass.measure.alignment import Figure
from gyrocompass.measure.generate import Generate, Writing, Written
from gyrocompass.measure.meaning import Alike, agreements, by_words
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.rewards.registry import Tools
from gyrocompass.measure.score import TokenScores
from gyrocompass.measure.tasks.task import AnswerTask, ChoiceTask, Item, Task

FloatArray = NDArray[np.float64]


class ScoreContinuations(Protocol):
    """How likely texts are after others."""

    def __call__(self, pairs: Iterable[tuple[str, str]], *, chat: bool = False) -> Iterator[TokenScores]:
        """(context, continuation) to the scores of the continuation's tokens; contexts of a chat are what the
        user says."""


RULES = ("accuracy", "accuracy by bytes", "accuracy by tokens", "accuracy against none")
FOLLOWS = (
    "{prompt}\nOne answer: {one}\nAnother answer: {other}\n"
    "Does the other answer follow from the one? Answer yes or no.\nAnswer:"
)
ASKED_BACK = "{prompt}{answer}\nIs this answer right? Answer yes or no.\nAnswer:"


class Outcome(NamedTuple):
    """One answer with one confidence, as a row of a table."""

    task: str
    item: str
    slice: str
    group: str
    level: str
    """`choice` or `answer`."""
    signal: str
    """Which confidence."""
    confidence: float
    correct: bool
    length: int
    """Tokens of the answer: a feature that calibrators may read."""
    position: int = 0
    """Of a token in its document."""


class TaskResult(NamedTuple):
    """What a task says of a model."""

    task: Task
    figures: list[Figure]
    outcomes: list[Outcome]
    shown: list[dict[str, object]]
    """Some of its items with the answers."""


def ask(
    task: Task,
    items: Sequence[Item],
    score: ScoreContinuations,
    generate: Generate,
    tools: Tools | None = None,
) -> TaskResult:
    """Put a task to a model.

    Args:
        task: the task.
        items: of `read_items`.
        score: of the model.
        generate: of the model.
        tools: what metrics need beside the answers.

    Raises:
        BadInput: a record lacks what a metric reads.
    """
    if isinstance(task, ChoiceTask):
        return answer_choices(task, items, score)
    return answer_freely(task, items, generate, score, tools)


# --- choices ---


def answer_choices(task: ChoiceTask, items: Sequence[Item], score: ScoreContinuations) -> TaskResult:
    """See the module."""
    asked = [(item.prompt, task.delimiter + choice) for item in items for choice in item.choices]
    alone = [(task.unconditional, task.delimiter + choice) for item in items for choice in item.choices]
    given, without = list(score(asked, chat=task.chat)), list(score(alone, chat=task.chat))
    right: dict[str, list[float]] = {rule: [] for rule in RULES}
    outcomes: list[Outcome] = []
    shown: list[dict[str, object]] = []
    start = 0
    for item in items:
        own = slice(start, start := start + len(item.choices))
        sum_C = np.array([scores.logprob_N.sum() for scores in given[own]])
        alone_C = np.array([scores.logprob_N.sum() for scores in without[own]])
        token_C = np.array([max(len(scores.logprob_N), 1) for scores in given[own]])
        byte_C = np.array([max(len(choice.encode()), 1) for choice in item.choices])
        by_rule = (sum_C, sum_C / byte_C, sum_C / token_C, sum_C - alone_C)
        for rule, value_C in zip(RULES, by_rule, strict=True):
            right[rule].append(float(int(value_C.argmax()) == item.right))
        p_C = np.exp(sum_C - np.logaddexp.reduce(sum_C))
        picked = int(sum_C.argmax())
        outcomes.append(
            Outcome(
                task.name, item.id, item.slice, item.group, "choice", "probability",
                float(p_C[picked]), picked == item.right, int(token_C[picked]),
            )
        )  # fmt: skip
        if len(shown) < 3:
            shown.append(
                {"prompt": item.prompt, "answer": item.choices[picked], "right": item.choices[item.right]}
            )
    return TaskResult(task, _figures(items, right, set(RULES)), outcomes, shown)


# --- what is written ---


def answer_freely(
    task: AnswerTask,
    items: Sequence[Item],
    generate: Generate,
    score: ScoreContinuations | None = None,
    tools: Tools | None = None,
) -> TaskResult:
    """See the module; without `score` there is no p(true)."""
    writing = Writing(task.max_new_tokens, task.samples, task.temperature, task.stop, task.chat, task.seed)
    written = generate([item.prompt for item in items], writing)
    rewards = parse_rewards(task.metrics, tools, where="metrics")
    samples = [
        Sample(item.prompt, one.text, item.record, n_tokens=len(one.logprob_N), finished=one.finished)
        for item, ones in zip(items, written, strict=True)
        for one in ones
    ]
    parts = {
        name: np.asarray(values).reshape(len(items), -1)
        for name, values in rewards.scored(samples).parts.items()
    }
    shares = {p.reward.name for p in rewards.parts if 0 <= p.reward.low <= p.reward.high <= 1}
    values = {name: part.mean(1).tolist() for name, part in parts.items()}
    deciding = task.correct or rewards.parts[0].reward.name
    passed = parts[deciding] >= 1
    for k in task.pass_at:
        values[f"pass@{k}"] = [pass_at(task.samples, int(good), k) for good in passed.sum(1)]
        shares.add(f"pass@{k}")
    values["cut off"] = [float(np.mean([not one.finished for one in ones])) for ones in written]
    outcomes = _outcomes(task, items, written, passed, score)
    shown = [
        {"prompt": item.prompt, "answer": ones[0].text, "right": bool(good[0])}
        for item, ones, good in zip(items[:3], written[:3], passed[:3], strict=True)
    ]
    return TaskResult(task, _figures(items, values, shares | {"cut off"}), outcomes, shown)


def _outcomes(
    task: AnswerTask,
    items: Sequence[Item],
    written: Sequence[Sequence[Written]],
    passed: NDArray[np.bool_],
    score: ScoreContinuations | None,
) -> list[Outcome]:
    signals: list[dict[str, float]] = []
    for ones in written:
        first = ones[0]
        logprob_N = first.logprob_N if len(first.logprob_N) else np.zeros(1)
        found = {
            "sequence": math.exp(float(logprob_N.sum())),
            "mean token": math.exp(float(logprob_N.mean())),
            "least token": math.exp(float(logprob_N.min())),
        }
        if not np.isnan(first.entropy_N).any():  # a server may not tell it
            found["entropy"] = math.exp(-float(first.entropy_N.mean())) if len(first.entropy_N) else 1.0
        signals.append(found)
    if task.samples > 1:
        for found, told in zip(signals, _agreements(task, items, written, score), strict=True):
            found |= told
    if score is not None:
        asked = [
            (ASKED_BACK.format(prompt=item.prompt, answer=ones[0].text), choice)
            for item, ones in zip(items, written, strict=True)
            for choice in (" yes", " no")
        ]
        for found, yes in zip(signals, _yes(asked, score, task.chat), strict=True):
            found["p(true)"] = yes
    return [
        Outcome(
            task.name, item.id, item.slice, item.group, "answer", signal,
            min(confidence, 1.0), bool(good[0]), len(ones[0].logprob_N),
        )
        for item, ones, good, found in zip(items, written, passed, signals, strict=True)
        for signal, confidence in found.items()
    ]  # fmt: skip


def _yes(asked: Sequence[tuple[str, str]], score: ScoreContinuations, chat: bool) -> list[float]:
    """P(yes) against no, for questions that stand twice: with " yes", and with " no"."""
    sums = np.array([float(scores.logprob_N.sum()) for scores in score(asked, chat=chat)]).reshape(-1, 2)
    return [1 / (1 + math.exp(min(no - yes, 700.0))) for yes, no in sums.tolist()]


def _agreements(
    task: AnswerTask,
    items: Sequence[Item],
    written: Sequence[Sequence[Written]],
    score: ScoreContinuations | None,
) -> list[dict[str, float]]:
    """Of each item's samples, by the judge that the task names; without `score` a model is none."""
    texts = [[one.text for one in ones] for ones in written]
    if task.alike != "model":
        return [agreements(own, by_words(task.alike)) for own in texts]
    if score is None:
        return [{} for _ in items]
    pairs = [
        (item, one, other)
        for item, own in zip(items, texts, strict=True)
        for one, other in permutations(dict.fromkeys(own), 2)
    ]
    asked = [
        (FOLLOWS.format(prompt=item.prompt, one=one, other=other), choice)
        for item, one, other in pairs
        for choice in (" yes", " no")
    ]
    follows = {
        (item.id, one, other): yes > 0.5
        for (item, one, other), yes in zip(pairs, _yes(asked, score, task.chat), strict=True)
    }
    return [agreements(own, _both_ways(item.id, follows)) for item, own in zip(items, texts, strict=True)]


def _both_ways(item: str, follows: Mapping[tuple[str, str, str], bool]) -> Alike:
    def alike(one: str, other: str) -> bool:
        return one == other or (follows[item, one, other] and follows[item, other, one])

    return alike


def pass_at(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k samples is right, without bias.

    >>> pass_at(4, 1, 2), pass_at(4, 3, 2), pass_at(4, 0, 1)
    (0.5, 1.0, 0.0)
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def _figures(items: Sequence[Item], values: dict[str, list[float]], shares: set[str]) -> list[Figure]:
    """Each measure by slice, and over all."""
    found = []
    slices = sorted({item.slice for item in items})
    for name, per_item in values.items():
        for part in [*(slices if len(slices) > 1 else []), "total"]:
            own = [place for place, item in enumerate(items) if part in ("total", item.slice)]
            found.append(
                Figure.of(
                    name,
                    part,
                    [per_item[place] for place in own],
                    [items[place].group for place in own],
                    is_share=name in shares,
                )
            )
    return found
