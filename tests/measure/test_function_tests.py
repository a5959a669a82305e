"""Tests made of what a function says: they pass the function, and nothing that is not like it."""

from __future__ import annotations

import ast
import inspect
import random

import pytest

from gyrocompass.measure import observe_calls
from gyrocompass.measure.function_tests import Subject, function_tests, impostors
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.rewards.code import unit_tests
from gyrocompass.measure.rewards.registry import REWARDS, Tools

pytestmark = pytest.mark.skipif(
    REWARDS["unit_tests"].why_not() is not None, reason="this machine cannot contain programs"
)

SHLEX_QUOTE = """\
def quote(s):
    if not s:
        return "''"
    if _find_unsafe(s) is None:
        return s
    return "'" + s.replace("'", "'\\"'\\"'") + "'"
"""
COMMONPREFIX = """\
def commonprefix(m):
    if not m: return ''
    if not isinstance(m[0], (list, tuple)):
        m = tuple(map(os.fspath, m))
    s1 = min(m)
    s2 = max(m)
    for i, c in enumerate(s1):
        if c != s2[i]:
            return s1[:i]
    return s1
"""
WRAPPED = """\
def fill(self, text):
    return "\\n".join(self.wrap(text))
"""
SUBJECTS = [
    Subject("shlex", "quote", SHLEX_QUOTE),
    Subject("genericpath", "commonprefix", COMMONPREFIX),
    Subject("textwrap", "TextWrapper.fill", WRAPPED),
]


@pytest.fixture(scope="module")
def tests() -> list[list[str]]:
    return function_tests(SUBJECTS)


def passed(code: str, own: list[str]) -> float:
    return unit_tests([Sample("", code, {"tests": own})], Tools(), score="all")[0]


def test_a_function_passes_its_own_tests(tests: list[list[str]]) -> None:
    for subject, own in zip(SUBJECTS, tests, strict=True):
        assert len(own) > 1, subject.name
        assert passed(subject.code, own) == 1.0


def test_no_other_code_does(tests: list[list[str]]) -> None:
    for subject, own in zip(SUBJECTS, tests, strict=True):
        for code in [*impostors(subject.code), "x = 1", f"def {subject.own_name}(*_): return None"]:
            assert passed(code, own) == 0.0, code
    assert passed(SHLEX_QUOTE.replace("return s\n", "return s.upper()\n"), tests[0]) == 0.0


def test_the_real_function_answers_for_nobody(tests: list[list[str]]) -> None:
    """Whoever hands the call on to the library calls himself, and one who takes it over is found out."""
    for code in ("def quote(s):\n    import shlex\n    return shlex.quote(s)\n", "from shlex import quote\n"):
        assert passed(code, tests[0]) == 0.0


def test_they_are_the_same_each_time(tests: list[list[str]]) -> None:
    assert function_tests(SUBJECTS) == tests


@pytest.mark.parametrize(
    ("module", "name", "code"),
    [
        ("time", "sleep", "def sleep(secs):\n    return None\n"),  # no function of Python
        ("uuid", "getnode", "def getnode():\n    return _node\n"),  # always the same
        ("tempfile", "gettempdir", "def gettempdir():\n    return _gettempdir()\n"),
        ("shlex", "quote", "def quote(s):\n    return s\n"),  # its code is not what it says
        ("no_such_module", "f", "def f(x):\n    return x\n"),
        ("asyncio", "sleep", "async def sleep(delay, result=None):\n    return result\n"),
    ],
)
def test_what_cannot_be_told_apart_has_none(module: str, name: str, code: str) -> None:
    assert function_tests([Subject(module, name, code)]) == [[]]


def test_a_function_that_hands_back_its_argument_has_none() -> None:
    code = "def normcase(s):\n    return os.fspath(s)\n"
    assert function_tests([Subject("posixpath", "normcase", code)]) == [[]]


@pytest.mark.parametrize("function", [inspect.cleandoc, ast.literal_eval, random.Random.randrange, print])
def test_proposed_arguments_bind(function: object) -> None:
    chance = random.Random(0)
    assert callable(function)
    for _ in range(200):
        call = ast.parse(f"f({observe_calls.arguments(function, chance)})", mode="eval").body
        assert isinstance(call, ast.Call)
        named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(function).bind(*call.args, **named)
