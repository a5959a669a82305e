"""What a task is: a YAML file that says how its records are asked, and the JSONL file that holds them.

    kind: choice                       kind: answer
    name: capitals                     name: sums
    data: capitals.jsonl               data: sums.jsonl
    prompt: "{question}\\nAnswer:"      prompt: "{question}\\nAnswer:"
    choices: choices                   metrics: [exact_match, token_f1]
    answer: label                      stop: ["\\n"]

Every field of a record may stand in the prompt. `slice` and `group` of a record, where it has them, are its
slice and what it was drawn as one with. A record that lacks a field is told with file and line before
anything is asked.

Left out: prompts with logic; write the text into the data, or bring the task from lm-evaluation-harness
(`lm_eval_tasks.py`).
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field, model_validator

from gyrocompass.core.config import Config, load_yaml, parse
from gyrocompass.core.errors import BadInput, ConfigError, did_you_mean
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.tasks.harness import Harness, harness_task, records


class TaskBase(Config):
    """What all tasks have."""

    name: str = Field(min_length=1)
    data: Path
    """Records, one JSON object a line; relative to the task's file."""
    prompt: str = "{prompt}"
    """What is asked, with fields of the record in braces; `{{` is a brace."""
    chat: bool = False
    """Put the prompt into the chat template, as what the user says."""
    most: int | None = Field(default=None, ge=1)
    """Ask only the first so many."""
    harness: Harness | None = None
    """How records are made, of a task of lm-evaluation-harness; None: they are lines of `data`."""

    def reads(self) -> tuple[Path, ...]:
        """The files that decide what is asked, beside the task's own."""
        if self.harness is None:
            return (self.data,)
        return (*self.harness.files, *self.harness.fewshot_files, *self.harness.included)

    def fields(self) -> set[str]:
        """The fields that every record must have."""
        return {name for _, name, _, _ in string.Formatter().parse(self.prompt) if name}

    @model_validator(mode="after")
    def _check_prompt(self) -> TaskBase:
        try:
            self.fields()
        except ValueError as error:
            raise ValueError(f"prompt: {error}; write {{{{ for a brace") from error
        return self


class ChoiceTask(TaskBase):
    """Which of some texts goes on from the prompt, by their log-likelihoods."""

    kind: Literal["choice"] = "choice"
    choices: str = "choices"
    """The field with the texts, at least two."""
    answer: str = "answer"
    """The field with the number of the right one, from 0, or its text."""
    delimiter: str = " "
    """Between the prompt and a choice."""
    unconditional: str = "Answer:"
    """What stands before a choice when it is scored without its question."""

    def fields(self) -> set[str]:
        """See `TaskBase`."""
        return super().fields() | {self.choices, self.answer}


class AnswerTask(TaskBase):
    """What the model writes, judged by metrics; with several samples, pass@k of each."""

    kind: Literal["answer"] = "answer"
    metrics: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    """As rewards in a recipe: `exact_match`, `token_f1`, `rouge_l`, `unit_tests`, `json_schema`, `follows`,
    `refuses_rightly`, `supported`, ... (docs/evaluation.md)."""
    correct: str | None = None
    """The metric that decides whether an answer is right, at 1; None: the first."""
    max_new_tokens: int = Field(default=64, ge=1)
    stop: tuple[str, ...] = ()
    samples: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    alike: Annotated[float, Field(gt=0, le=1)] | Literal["model"] = 0.8
    """When samples say the same, for confidences that compare them: if they share so much of their words
    (F1), or if the model, asked, takes each to follow from the other."""
    pass_at: tuple[int, ...] = ()
    """k of pass@k, at most `samples`."""
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> AnswerTask:
        try:
            names = [part.reward.name for part in parse_rewards(self.metrics, where="metrics").parts]
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.correct is not None and self.correct not in names:
            raise ValueError(
                f"correct: no metric is called {self.correct}{did_you_mean(self.correct, names)}"
            )
        if self.pass_at and max(self.pass_at) > self.samples:
            raise ValueError(f"pass_at {max(self.pass_at)} needs at least so many samples")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples at temperature 0 are all the same: set a temperature")
        return self


Task: TypeAlias = ChoiceTask | AnswerTask
_Either: TypeAlias = Annotated[Task, Field(discriminator="kind")]


class _File(Config):
    """Tasks of one file."""

    tasks: tuple[_Either, ...] = Field(min_length=1)


class Item(NamedTuple):
    """One record, ready to be asked."""

    id: str
    slice: str
    group: str
    prompt: str
    record: Mapping[str, Any]
    choices: tuple[str, ...] = ()
    right: int = -1
    """Which choice is right."""


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a YAML file, a list under `tasks`; or the one of lm-evaluation-harness (`harness`).

    Raises:
        ConfigError: it is not as tasks are, with the line of each mistake.
        BadInput: it cannot be read, or two tasks have one name.
    """
    if _is_harness(path):
        task = parse(_File, {"tasks": [harness_task(path)]}, str(path)).tasks[0]
        return [task]
    tasks = parse(_File, load_yaml(path)).tasks
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"two tasks are called {name}", where=path, fix="give each its own name")
    return [task.model_copy(update={"data": path.parent / task.data}) for task in tasks]


def _is_harness(path: Path) -> bool:
    """Whether a file is a task of the harness; what cannot be read is for others to say."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    keys = {line.partition(":")[0] for line in lines if ":" in line}
    return "tasks" not in keys and bool(keys & {"task", "doc_to_text", "include"})


def read_items(task: Task) -> list[Item]:
    """The records of a task.

    Raises:
        BadInput: the file cannot be read or has no record; a record is no object, lacks a field, or its
            answer is none of its choices: with file and line.
    """
    if task.harness is not None:
        made = islice(enumerate(records(task.harness)), task.most)
        return [item_of(task, record, str(number), place) for number, (place, record) in made]
    try:
        text = task.data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the records of {task.name} cannot be read: {error}", where=task.data) from error
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            items.append(_item(task, line, number))
        if len(items) == task.most:
            break
    if not items:
        raise BadInput(
            f"the task {task.name} has no record", where=task.data, fix="write one JSON object a line"
        )
    return items


def _item(task: Task, line: str, number: int) -> Item:
    where = f"{task.data}:{number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadInput(f"not JSON: {error}", where=where, fix="write one JSON object a line") from error
    if not isinstance(record, dict):
        raise BadInput("not a JSON object", where=where, fix="write one JSON object a line")
    missing = sorted(task.fields() - record.keys())
    if missing:
        raise BadInput(
            f"the task {task.name} needs the field {missing[0]!r}, and this record has none",
            where=where,
            fix=f"add it{did_you_mean(missing[0], record)}, or change the task's prompt",
        )
    return item_of(task, record, str(record.get("id", number)), where)


def item_of(task: Task, record: Mapping[str, Any], name: str, where: str) -> Item:
    """A record as the task asks it.

    Raises:
        BadInput: there are no two choices, or the answer is none of them.
    """
    item = Item(
        id=name,
        slice=str(record.get("slice", task.name)),
        group=str(record.get("group", f"{task.name}/{name}")),
        prompt=task.prompt.format_map(record),
        record=record,
    )
    if isinstance(task, AnswerTask):
        return item
    choices, answer = record[task.choices], record[task.answer]
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise BadInput(f"{task.choices!r} is not a list of at least two texts", where=where)
    texts = tuple(str(choice) for choice in choices)
    if isinstance(answer, str) and answer in texts:
        answer = texts.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise BadInput(
            f"the answer {answer!r} is none of {len(texts)} choices",
            where=where,
            fix="give its number, from 0, or its text",
        )
    return item._replace(choices=texts, right=answer)
