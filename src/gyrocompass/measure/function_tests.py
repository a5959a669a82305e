"""Unit tests of functions whose right answer is known: what the function itself says to made-up arguments.

    Subject --propose calls, run them in the sandbox--> calls with their results, the same in two processes
            --keep what tells right from wrong--------> tests, each an assertion on one call

A subject stands in a module that can be imported. A test puts the function that is judged in the place of the
real one, so that it finds the names that its body reads, and so that nothing else answers for it:

    assert gcd(12, 18) == 6

Calls are proposed by the names of the parameters (`path`: texts; `n`: whole numbers) and by chance; the
chance is the hash of the function's name, so the tests of one Python version are always the same. A call is
kept if it returns a plain value other than None (numbers, texts, and lists, tuples, sets and dictionaries of
them), within a twentieth of a second, and the same one in another process. A subject has tests only if

    - two of its calls, or more, differ in their result, so that no constant passes;
    - its own code, as text, passes all of them, through the very reward that will judge others;
    - no body fails to fail that hands back a parameter, its truth, its length or its text.

So a function that passes has said what the real one says to a handful of calls: evidence, and no proof.

Left out: functions that are known by what they raise, change or print; coroutines; classes as a whole.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gyrocompass.measure.reward import Sample
from gyrocompass.measure.rewards.code import unit_tests
from gyrocompass.measure.rewards.registry import Tools
from gyrocompass.measure.sandbox.run import Program, SandboxConfig, run_many

MOST_TESTS = 6
ANSWER = "observed: "
"""The line with which the observer answers begins so."""
_OBSERVER = Path(__file__).with_name("observe_calls.py")


class Subject(NamedTuple):
    """A function of a module that can be imported, and its code as text."""

    module: str
    """`os.path`."""
    name: str
    """`join`, or `Class.method`."""
    code: str
    """Its definition, at the left margin, as an answer has it."""

    @property
    def own_name(self) -> str:
        """Its name without that of its class."""
        return self.name.rpartition(".")[2]


def function_tests(subjects: Sequence[Subject], config: SandboxConfig | None = None) -> list[list[str]]:
    """The tests of each subject, in their order; none where it cannot be told right from wrong this way.

    Args:
        subjects: their modules are imported, and they are called, in the sandbox alone.
        config: of the sandbox.

    Raises:
        GyroError: the machine cannot contain programs.
    """
    config = config or SandboxConfig()
    proposed = _observed([_request(subject, None) for subject in subjects], config)
    asked = [index for index, calls in enumerate(proposed) if len(calls) > 1]
    confirmed = _observed([_request(subjects[index], proposed[index]) for index in asked], config)
    tests: list[list[str]] = [[] for _ in subjects]
    for index, calls in zip(asked, confirmed, strict=True):
        if len(calls) > 1:
            tests[index] = [_test(subjects[index], call, result) for call, result in calls.items()]
    return _passed_by_their_own(subjects, tests, config)


def _request(subject: Subject, known: Mapping[str, str] | None) -> Program:
    """What proposes calls; with `known` ones, what confirms them and sends the impostors in."""
    asked = {"module": subject.module, "name": subject.name, "most": MOST_TESTS, "known": known}
    asked["mark"] = ANSWER
    asked["impostors"] = [] if known is None else impostors(subject.code)
    return Program(_OBSERVER.read_text(encoding="utf-8"), stdin=json.dumps(asked))


def _observed(programs: Sequence[Program], config: SandboxConfig) -> list[dict[str, str]]:
    """Calls and their results, as Python text; nothing where a program came to no end, or to two."""
    answers = [
        [line.removeprefix(ANSWER) for line in outcome.stdout.splitlines() if line.startswith(ANSWER)]
        for outcome in run_many(programs, config)
    ]
    return [json.loads(lines[0]) if len(lines) == 1 else {} for lines in answers]


def _test(subject: Subject, call: str, result: str) -> str:
    """A test as `unit_tests` runs it: below the judged code, in its namespace."""
    owner = ".".join(["_module", *subject.name.split(".")[:-1]])
    name = subject.own_name
    return (
        f"import {subject.module} as _module\n"
        f"assert {name}.__code__.co_filename == 'solution.py'\n"
        "globals().update({name: value for name, value in vars(_module).items() if name not in globals()})\n"
        f"setattr({owner}, {name!r}, {name})\n"
        f"assert {call} == {result}\n"
    )


def _passed_by_their_own(
    subjects: Sequence[Subject], tests: Sequence[list[str]], config: SandboxConfig
) -> list[list[str]]:
    """The tests that the subject's own code passes, all of them, as text and alone; none for the others."""
    tested = [index for index, own in enumerate(tests) if own]
    samples = [Sample("", subjects[index].code, {"tests": tests[index]}) for index in tested]
    passed = unit_tests(samples, Tools(sandbox=config), score="all")
    good = {index for index, value in zip(tested, passed, strict=True) if value == 1.0}
    return [own if index in good else [] for index, own in enumerate(tests)]


def may_be_told(subject: Subject) -> bool:
    """Whether it is worth a try: it takes something, returns something, and is no generator or coroutine.

    >>> codes = [f"def f(x):\\n    {body}" for body in ("return x", "return", "yield x")]
    >>> [may_be_told(Subject("m", "f", code)) for code in codes]
    [True, False, False]
    """
    definition = _definition(subject.code)
    nodes = list(ast.walk(definition))
    if isinstance(definition, ast.AsyncFunctionDef) or any(
        isinstance(n, ast.Yield | ast.YieldFrom) for n in nodes
    ):
        return False
    takes = len(_parameters(definition)) - ("." in subject.name)
    return takes > 0 and any(isinstance(node, ast.Return) and node.value is not None for node in nodes)


def _definition(code: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    (definition,) = ast.parse(code).body
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    return definition


def _parameters(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = definition.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names + [argument.arg for argument in (given.vararg, given.kwarg) if argument]


def impostors(code: str) -> list[str]:
    """The same function with bodies that do nothing for it.

    >>> impostors("def f(x):\\n    return x + 1")[0]
    'def f(x):\\n    return x'
    """
    definition = _definition(code)
    forms = ("{}", "bool({})", "not {}", "len({})", "str({})")
    bodies = [form.format(name) for name in _parameters(definition) for form in forms]
    signature = f"def {definition.name}({ast.unparse(definition.args)}):"
    return [f"{signature}\n    return {body}" for body in bodies]
