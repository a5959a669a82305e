"""Tasks of lm-evaluation-harness, read from their YAML files, with their data on this machine.

    task.yaml {task, dataset_kwargs: {data_files}, output_type, doc_to_text, doc_to_target, ...}
        --harness_task--> a task of ours, whose records are rendered as the harness renders them

`multiple_choice` becomes a choice among texts, `generate_until` an answer that is written. Fields and Jinja
templates are those of the harness; templates run in a sandbox. Few-shot examples are the first of their split
(`fewshot_config: {sampler: first_n}`): the harness's random ones depend on how it walks through a task.

Refused, with a reason: `!function` and other Python, data that would be downloaded, filters, other output
types. What only other tools read (tags, versions, weights of groups) is passed over.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import BaseLoader, StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput

_FORMATS = {"json", "csv", "parquet", "text"}
_PASSED_OVER = {
    "task", "tag", "group", "metadata", "description", "output_type", "dataset_path", "dataset_name",
    "dataset_kwargs", "test_split", "validation_split", "training_split", "fewshot_split", "doc_to_text",
    "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter", "num_fewshot",
    "fewshot_config", "metric_list", "generation_kwargs", "repeats", "should_decontaminate",
    "doc_to_decontamination_query", "include", "task_alias", "gen_prefix",
}  # fmt: skip
_METRICS = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}


class Harness(Config):
    """What of a task's file says how its records are made."""

    path: Path
    files: tuple[Path, ...]
    format: Literal["json", "csv", "parquet", "text"]
    fewshot_files: tuple[Path, ...] = ()
    included: tuple[Path, ...] = ()
    output_type: Literal["multiple_choice", "generate_until"]
    text: str
    target: str | int
    choice: str | tuple[str, ...] | None = None
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    num_fewshot: int = 0


def harness_task(path: Path) -> dict[str, Any]:
    """A task file as the fields of a task of ours, under `harness` what its records are made by.

    Raises:
        BadInput: it asks for what is not done here, or its data is not there.
    """
    data = _load(path)
    unknown = sorted(set(data) - _PASSED_OVER)
    if unknown:
        raise BadInput(
            f"{unknown[0]!r} is not read here",
            where=path,
            fix="leave it out, or use gyro lm-eval --model gyro",
        )
    output = data.get("output_type", "generate_until")
    if output not in ("multiple_choice", "generate_until"):
        raise BadInput(
            f"output_type {output!r} is not read here",
            where=path,
            fix="use multiple_choice or generate_until, or gyro lm-eval --model gyro",
        )
    for one in data.get("metric_list", []):
        if one.get("metric") not in _METRICS:
            raise BadInput(f"the metric {one.get('metric')!r} is not read here", where=path)
    if data.get("gen_prefix"):
        raise BadInput("gen_prefix is not read here", where=path)
    harness = _harness(data, path, output)
    common = {"name": str(data["task"]), "data": str(harness.files[0]), "harness": harness.model_dump()}
    if output == "multiple_choice":
        delimiter = {"delimiter": harness.target_delimiter}
        return {"kind": "choice", "prompt": "{prompt}", **delimiter, **common}
    asked = dict(data.get("generation_kwargs") or {})
    until = asked.pop("until", [harness.fewshot_delimiter])
    limit = asked.pop("max_gen_toks", 256)
    temperature = float(asked.pop("temperature", 0.0)) if asked.pop("do_sample", False) else 0.0
    asked.pop("temperature", None)
    if asked:
        raise BadInput(f"generation_kwargs.{next(iter(asked))} is not read here", where=path)
    stop = [until] if isinstance(until, str) else list(until)
    return {
        "kind": "answer",
        "prompt": "{prompt}",
        "metrics": ["exact_match"],
        "max_new_tokens": limit,
        "stop": stop,
        "temperature": temperature,
        **common,
    }


def _harness(data: Mapping[str, Any], path: Path, output: Any) -> Harness:
    for name in ("doc_to_text", "doc_to_target"):
        if name not in data:
            raise BadInput(f"the task has no {name}", where=path, fix="say how a record becomes a question")
    if output == "multiple_choice" and "doc_to_choice" not in data:
        raise BadInput("a multiple_choice task has no doc_to_choice", where=path)
    split = data.get("test_split") or data.get("validation_split")
    if split is None:
        raise BadInput("the task names no test_split and no validation_split", where=path)
    num_fewshot = int(data.get("num_fewshot") or 0)
    shots: tuple[Path, ...] = ()
    if num_fewshot:
        if (data.get("fewshot_config") or {}).get("sampler") != "first_n":
            raise BadInput(
                "few-shot examples at random are not the harness's here",
                where=path,
                fix="write fewshot_config: {sampler: first_n}",
            )
        from_ = data.get("fewshot_split") or data.get("training_split") or data.get("validation_split")
        if from_ in (None, split):
            raise BadInput("few-shot examples need a split of their own: fewshot_split", where=path)
        shots = _files(data, path, str(from_))
    choice = data.get("doc_to_choice")
    return Harness(
        path=path,
        files=_files(data, path, str(split)),
        format=data["dataset_path"],
        fewshot_files=shots,
        included=tuple(_included(path)),
        output_type=output,
        text=str(data["doc_to_text"]),
        target=data["doc_to_target"],
        choice=tuple(map(str, choice)) if isinstance(choice, list) else choice,
        description=str(data.get("description") or ""),
        target_delimiter=str(data.get("target_delimiter", " ")),
        fewshot_delimiter=str(data.get("fewshot_delimiter", "\n\n")),
        num_fewshot=num_fewshot,
    )


def _files(data: Mapping[str, Any], path: Path, split: str) -> tuple[Path, ...]:
    """The files of a split, which stand beside the task's file or where the command runs."""
    kind = data.get("dataset_path")
    if kind not in _FORMATS:
        raise BadInput(
            f"dataset_path {kind!r} is none of {', '.join(sorted(_FORMATS))}: it would be downloaded",
            where=path,
            fix="keep the data in files and name them in dataset_kwargs.data_files",
        )
    named = (data.get("dataset_kwargs") or {}).get("data_files")
    found = named.get(split) if isinstance(named, Mapping) else named if split == "train" else None
    if not found:
        raise BadInput(f"dataset_kwargs.data_files has no split {split!r}", where=path)
    paths = []
    for name in [found] if isinstance(found, str) else found:
        places = (path.parent / name, Path(name))
        there = next((place for place in places if place.is_file()), None)
        if there is None:
            raise BadInput(f"there is no file {name}", where=path, fix="write it relative to the task's file")
        paths.append(there)
    return tuple(paths)


class _Loader(yaml.SafeLoader):
    """Plain YAML; Python by a tag is named and refused."""


def _refuse(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    raise BadInput(
        f"!{suffix} runs code, which is not done here",
        where=f"{loader.name}:{node.start_mark.line + 1}",
        fix="write it as a field or a Jinja template, or use gyro lm-eval --model gyro",
    )


_Loader.add_multi_constructor("!", _refuse)


def _load(path: Path, depth: int = 0) -> dict[str, Any]:
    """A file over what it includes."""
    try:
        with path.open(encoding="utf-8") as file:
            data = yaml.load(file, _Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"the task cannot be read: {error}", where=path) from error
    if not isinstance(data, dict):
        raise BadInput("a task's file is a mapping", where=path)
    base = data.get("include")
    if base is None:
        return data
    if depth > 8:
        raise BadInput("files that include each other", where=path)
    return _load(path.parent / str(base), depth + 1) | data


def _included(path: Path) -> Iterator[Path]:
    """The files that a task's file is laid over."""
    data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if data.get("include") is not None:
        yield path.parent / str(data["include"])
        yield from _included(path.parent / str(data["include"]))


# --- records ---


def records(harness: Harness) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record's place, and what a task of ours asks of it: prompt, choices, answer.

    Raises:
        BadInput: a file cannot be read; a record lacks a field or has no answer among its choices.
    """
    shots = "".join(_shots(harness))
    for place, document in _documents(harness.files, harness.format):
        yield place, {**document, **_asked(harness, document, harness.description + shots, place)}


def _shots(harness: Harness) -> Iterator[str]:
    documents = _documents(harness.fewshot_files, harness.format)
    for number, (place, document) in enumerate(documents):
        if number == harness.num_fewshot:
            return
        own = _asked(harness, document, "", place)
        answer = own["choices"][own["answer"]] if "choices" in own else own["answer"]
        yield f"{own['prompt']}{harness.target_delimiter}{answer}{harness.fewshot_delimiter}"


def _asked(harness: Harness, document: Mapping[str, Any], before: str, where: str) -> dict[str, Any]:
    prompt = before + str(_value(harness.text, document, where))
    target = _value(harness.target, document, where)
    if harness.output_type == "generate_until":
        answer = target[0] if isinstance(target, list) and len(target) == 1 else target
        return {"prompt": prompt, "answer": str(answer)}
    assert harness.choice is not None
    choices = _choices(harness.choice, document, where)
    if isinstance(target, str) and target.strip().isdigit() and target not in choices:
        target = int(target)
    if isinstance(target, str) and target not in choices:
        raise BadInput(f"the target {target!r} is none of the choices", where=where)
    answer = choices.index(target) if isinstance(target, str) else int(target)
    return {"prompt": prompt, "choices": choices, "answer": answer}


def _choices(choice: str | Sequence[str], document: Mapping[str, Any], where: str) -> list[str]:
    if not isinstance(choice, str):
        return [str(one) for one in choice]
    found = _value(choice, document, where)
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError) as error:
            raise BadInput(f"doc_to_choice gives no list: {found[:80]!r}", where=where) from error
    if isinstance(found, Mapping):
        found = list(found.values())
    if not isinstance(found, list):
        raise BadInput(f"doc_to_choice gives no list: {str(found)[:80]!r}", where=where)
    return [str(one) for one in found]


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
)


def _value(rule: str | int, document: Mapping[str, Any], where: str) -> Any:
    """A field, a number, or a template of the record."""
    if isinstance(rule, int):
        return rule
    if rule in document:
        return document[rule]
    try:
        return _ENVIRONMENT.from_string(rule).render(**document)
    except TemplateError as error:
        raise BadInput(f"the template {rule[:60]!r}: {error}", where=where) from error


def _documents(files: Sequence[Path], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of files, each with its place."""
    for path in files:
        try:
            yield from _READERS[kind](path)
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the records cannot be read: {error}", where=path) from error


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        for number, record in enumerate(json.loads(text)):
            yield f"{path}#{number}", record
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise BadInput(f"not JSON: {error}", where=f"{path}:{number}") from error


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, record in enumerate(csv.DictReader(file), 2):
            yield f"{path}:{number}", dict(record)


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    for number, record in enumerate(pq.read_table(path).to_pylist()):
        yield f"{path}#{number}", record


def _text(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield f"{path}:{number}", {"text": line}


_READERS = {"json": _json, "csv": _csv, "parquet": _parquet, "text": _text}
