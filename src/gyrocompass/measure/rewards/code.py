"""Rewards on Python code: it parses, compiles, passes its tests, a linter, a security check, a formatter.

Each is in [0, 1]. What is judged is the completion, or prompt and completion together where the prompt is
the beginning of the code (`with_prompt`); of a completion with a fenced block, what stands in its first one.
Code without a single statement gets 0 everywhere, for else saying nothing would be flawless.

Only `unit_tests` runs the code, in the sandbox. Linter, formatter and security check read it, without the
configuration and without the comments by which code could excuse itself (`noqa`, `nosec`, `fmt: off`).

Left out: other languages.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Literal, NamedTuple

from gyrocompass.core.errors import BadInput, GyroError, MissingDependency
from gyrocompass.measure.reward import Sample, shortened
from gyrocompass.measure.rewards.registry import SANDBOX, Tools, reward
from gyrocompass.measure.sandbox.run import Outcome, Program, run_many

_FENCE = re.compile(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)
_SKIPS_FORMATTING = re.compile(r"#\s*(fmt|yapf)\s*:")
_CHECK_SECONDS = 300.0


def code_of(sample: Sample, with_prompt: bool) -> str:
    """The code of a sample.

    >>> code_of(Sample("", "Here it is:\\n```python\\nx = 1\\n```\\nDone."), with_prompt=False)
    'x = 1\\n'
    """
    fenced = _FENCE.search(sample.completion)
    code = fenced[1] if fenced else sample.completion
    return sample.prompt + code if with_prompt else code


def _compiled(code: str, flags: int) -> CodeType | ast.Module | None:
    """What code compiles to; None where it does not, or says nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
            return compile(code, "<completion>", "exec", flags, dont_inherit=True) if tree.body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _sound(samples: Sequence[Sample], with_prompt: bool) -> dict[int, str]:
    """The code of those samples that parse, by their index."""
    codes = {index: code_of(sample, with_prompt) for index, sample in enumerate(samples)}
    return {index: code for index, code in codes.items() if _compiled(code, ast.PyCF_ONLY_AST) is not None}


@reward()
def parses(samples: Sequence[Sample], tools: Tools, *, with_prompt: bool = False) -> list[float]:
    """1 where the code parses.

    >>> parses([Sample("", "x = 1"), Sample("", "x ="), Sample("", "# nothing")], Tools())
    [1.0, 0.0, 0.0]
    """
    sound = _sound(samples, with_prompt)
    return [float(index in sound) for index in range(len(samples))]


@reward()
def compiles(samples: Sequence[Sample], tools: Tools, *, with_prompt: bool = False) -> list[float]:
    """1 where the code compiles: it parses, and every return, break and name stands where it may.

    >>> compiles([Sample("", "x = 1"), Sample("", "return 1")], Tools())
    [1.0, 0.0]
    """
    return [float(_compiled(code_of(sample, with_prompt), 0) is not None) for sample in samples]


_HARNESS = """
import os, sys
def judge():
    key, out, run, leave = sys.stdin.readline().strip(), os.dup(1), __builtins__.exec, os._exit
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    read = lambda name: compile(open(name, encoding="utf-8").read(), name, "exec")
    tests = [read(f"test_{index}.py") for index in range(COUNT)]
    names = {"__name__": "solution", "__builtins__": __builtins__}
    run(read("solution.py"), names)
    for index, test in enumerate(tests):
        try:
            run(test, names)
        except BaseException:
            continue
        os.write(out, f"{key} {index}\\n".encode())
    leave(0)
judge()
"""
"""Reads everything before the code runs, which might change the files."""


@reward(needs=SANDBOX)
def unit_tests(
    samples: Sequence[Sample],
    tools: Tools,
    *,
    field: str = "tests",
    score: Literal["share", "all"] = "share",
    with_prompt: bool = False,
) -> list[float]:
    """The share of its tests that the code passes, or 1 only where it passes all.

    The tests run one after another in one process in the sandbox, each as if written below the code. A test
    passes if it raises nothing. Only a line with a random key, which the code is not told, says so; leaving
    early passes nothing. (Code that walks the interpreter's frames to find the key is beyond this.)

    Args:
        samples: their records have the tests: a text, or a list of texts, each a test.
        tools: the sandbox.
        field: where the tests stand.
        score: share or all.
        with_prompt: the prompt is the beginning of the code.

    Raises:
        BadInput: a record has no tests, or one that does not compile.
        GyroError: the machine cannot contain the code.
    """
    tests = [_tests(sample, field) for sample in samples]
    programs, keys = {}, {}
    for index, code in _sound(samples, with_prompt).items():
        keys[index] = secrets.token_hex(16)
        programs[index] = _test_program(code, tests[index], keys[index])
    outcomes = dict(zip(programs, run_many([*programs.values()], tools.sandbox), strict=True))
    values = [0.0] * len(samples)
    for index, outcome in outcomes.items():
        share = _passed(outcome, keys[index]) / len(tests[index])
        values[index] = share if score == "share" else float(share == 1.0)
    return values


def _tests(sample: Sample, field: str) -> list[str]:
    given = sample.needed(field, "unit_tests")
    tests = [given] if isinstance(given, str) else [str(test) for test in given]
    if not tests or any(_compiled(test, 0) is None for test in tests):
        raise BadInput(
            f"the field {field!r} holds no test, or one that does not compile",
            where=f"prompt {shortened(sample.prompt)!r}",
        )
    return tests


def _test_program(code: str, tests: Sequence[str], key: str) -> Program:
    files = {"solution.py": code, **{f"test_{index}.py": test for index, test in enumerate(tests)}}
    return Program(_HARNESS.replace("COUNT", str(len(tests))), stdin=key + "\n", files=files)


def _passed(outcome: Outcome, key: str) -> int:
    return len({line for line in outcome.stdout.splitlines() if line.startswith(f"{key} ")})


@reward(needs="ruff")
def linted(
    samples: Sequence[Sample],
    tools: Tools,
    *,
    rules: tuple[str, ...] = ("E4", "E7", "E9", "F"),
    with_prompt: bool = False,
) -> list[float]:
    """How clean the code is to ruff: 1 without findings, less by each one's share of the lines.

        r = max(0, 1 - findings / lines that are not blank)

    Args:
        samples: code that does not parse gets 0.
        tools: not used.
        rules: ruff's names of rules or of groups of them; its own defaults if not given.
        with_prompt: the prompt is the beginning of the code.

    Raises:
        MissingDependency: ruff is not installed.
        GyroError: ruff failed, for example over an unknown rule.
    """
    sound = _sound(samples, with_prompt)
    options = ["check", "--isolated", "--no-cache", "--ignore-noqa", "--output-format=json", "--select"]
    report = _check("ruff", [*options, ",".join(rules)], sound, "the reward linted").report
    findings = Counter(Path(finding["filename"]).name for finding in json.loads(report or "[]"))
    values = [0.0] * len(samples)
    for index, code in sound.items():
        lines = sum(bool(line.strip()) for line in code.splitlines())
        values[index] = max(0.0, 1.0 - findings[_file(index)] / lines)
    return values


@reward(needs="ruff")
def formatted(
    samples: Sequence[Sample], tools: Tools, *, config: Path | None = None, with_prompt: bool = False
) -> list[float]:
    """1 where `ruff format` changes nothing and the code asks for no exception.

    Args:
        samples: code that does not parse gets 0.
        tools: not used.
        config: the pyproject.toml or ruff.toml with the project's formatting; ruff's defaults if not given.
        with_prompt: the prompt is the beginning of the code.

    Raises:
        BadInput: there is no such config.
        MissingDependency: ruff is not installed.
        GyroError: ruff failed.
    """
    if config is not None and not config.is_file():
        raise BadInput("the config of the reward formatted is not there", where=config)
    sound = _sound(samples, with_prompt)
    setting = ["--isolated"] if config is None else ["--config", str(config.resolve())]
    after = _check("ruff", ["format", "--no-cache", *setting], sound, "the reward formatted").codes
    return [
        float(index in sound and after[index] == sound[index] and not _SKIPS_FORMATTING.search(sound[index]))
        for index in range(len(samples))
    ]


@reward(needs="bandit")
def secure(
    samples: Sequence[Sample],
    tools: Tools,
    *,
    severity: Literal["low", "medium", "high"] = "medium",
    with_prompt: bool = False,
) -> list[float]:
    """1 where bandit finds nothing of at least this severity.

    Args:
        samples: code that does not parse gets 0.
        tools: not used.
        severity: the least that counts.
        with_prompt: the prompt is the beginning of the code.

    Raises:
        MissingDependency: bandit is not installed.
        GyroError: bandit failed.
    """
    sound = _sound(samples, with_prompt)
    options = ["--quiet", "--recursive", "--ignore-nosec", "--format=json", f"--severity-level={severity}"]
    report = _check("bandit", options, sound, "the reward secure").report
    found = {Path(finding["filename"]).name for finding in json.loads(report or '{"results": []}')["results"]}
    return [float(index in sound and _file(index) not in found) for index in range(len(samples))]


def _file(index: int) -> str:
    return f"s{index}.py"


class _Checked(NamedTuple):
    """What a checker said, and what it left of the codes."""

    report: str
    codes: dict[int, str]


def _check(
    tool: Literal["ruff", "bandit"], options: Sequence[str], codes: Mapping[int, str], what: str
) -> _Checked:
    """Let a checker see all codes in one run; the names of its files are `_file`'s."""
    if find_spec(tool) is None:
        raise MissingDependency(tool, extra="rewards", needed_for=what)
    if not codes:
        return _Checked("", {})
    with tempfile.TemporaryDirectory(prefix="gyro-check-") as folder:
        paths = {index: Path(folder) / _file(index) for index in codes}
        for index, path in paths.items():
            path.write_bytes(codes[index].encode())
        done = subprocess.run(
            [sys.executable, "-P", "-m", tool, *options, folder],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            timeout=_CHECK_SECONDS,
            cwd=folder,
        )
        after = {index: path.read_bytes().decode() for index, path in paths.items()}
    if done.returncode not in (0, 1):
        raise GyroError(f"{tool} failed with status {done.returncode}", where=what, fix=done.stderr.strip())
    return _Checked(done.stdout, after)
