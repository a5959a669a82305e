"""Rewards on code: what parses, compiles, passes its tests, a linter, a formatter and a security check."""

from __future__ import annotations

from pathlib import Path

import pytest

from gyrocompass.core.errors import BadInput, ConfigError, GyroError, MissingDependency
from gyrocompass.measure.reward import Sample, checked
from gyrocompass.measure.rewards import code
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.rewards.registry import Tools
from gyrocompass.measure.sandbox.run import SandboxConfig

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3"]


def values(entry: object, *completions: str, **record: object) -> list[float]:
    reward = parse_rewards([entry], Tools(sandbox=SandboxConfig(wall_seconds=30))).parts[0].reward
    return checked(reward, [Sample("", completion, record) for completion in completions])


@pytest.mark.parametrize(
    ("source", "parses", "compiles"),
    [
        (ADD, 1.0, 1.0),
        ("def add(a, b):", 0.0, 0.0),
        ("return 1", 1.0, 0.0),
        ("def f(a, a): pass", 1.0, 0.0),
        ("", 0.0, 0.0),
        ("# nothing said", 0.0, 0.0),
        ("x = '\\d'", 1.0, 1.0),  # a SyntaxWarning is not an error
        ("x = 1\0", 0.0, 0.0),
        ("(" * 5_000 + ")" * 5_000, 0.0, 0.0),
        ("x = " + "-" * 50_000 + "1", 0.0, 0.0),
        ("x = '\ud800'", 0.0, 0.0),
        (f"Here:\n```python\n{ADD}```\nand more", 1.0, 1.0),
        (f"```\n{ADD}", 1.0, 1.0),
    ],
)
def test_what_parses_and_what_compiles(source: str, parses: float, compiles: float) -> None:
    assert (values("parses", source), values("compiles", source)) == ([parses], [compiles])


def test_the_prompt_can_be_the_beginning_of_the_code() -> None:
    sample = Sample("def add(a, b):\n", "    return a + b\n", {"tests": TESTS[:1]})
    for name in ("parses", "compiles", "unit_tests"):
        assert parse_rewards([{name: {"with_prompt": True}}])([sample]) == [1.0]
        assert parse_rewards([name])([sample]) == [0.0]


def test_the_share_of_unit_tests_that_pass() -> None:
    wrong, broken = ADD.replace("+", "-"), "def add(:"
    assert values("unit_tests", ADD, wrong, broken, tests=TESTS) == pytest.approx([2 / 3, 0.0, 0.0])
    assert values({"unit_tests": {"score": "all"}}, ADD, tests=TESTS) == [0.0]
    assert values({"unit_tests": {"score": "all"}}, ADD, tests="\n".join(TESTS[:2])) == [1.0]


def test_ways_around_the_tests_pass_nothing() -> None:
    cheats = (
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os\nos.write(1, b'0 0\\n1 1\\n')\nprint('ok')",
        "for i in range(3): open(f'test_{i}.py', 'w').write('pass')",
        "import builtins\nbuiltins.compile = lambda *a, **k: (lambda: None).__code__",
        "raise SystemExit(0)",
    )
    assert values("unit_tests", *cheats, tests=TESTS[:2]) == [0.0] * len(cheats)


def test_what_passed_before_an_endless_loop_counts() -> None:
    reward = parse_rewards(["unit_tests"], Tools(sandbox=SandboxConfig(cpu_seconds=1, wall_seconds=20)))
    source = f"{ADD}def loop():\n    while True: pass\n"
    assert reward([Sample("", source, {"tests": [TESTS[0], "loop()"]})]) == [0.5]


@pytest.mark.parametrize("tests", [[], "", ["assert ("]])
def test_tests_that_test_nothing_are_refused(tests: object) -> None:
    with pytest.raises(BadInput, match="no test, or one that does not compile"):
        values("unit_tests", ADD, tests=tests)


def test_the_linter_counts_findings_against_lines() -> None:
    bad = "import os\nimport sys  # noqa\nx = 1\ny = 2\n"
    assert values("linted", ADD, bad, "x =", "") == [1.0, 0.5, 0.0, 0.0]
    assert values({"linted": {"rules": ["F811"]}}, bad) == [1.0]
    with pytest.raises(GyroError, match="ruff failed"):
        values({"linted": {"rules": ["NOTARULE"]}}, ADD)


def test_formatting_follows_the_project(tmp_path: Path) -> None:
    wide = f"x = f({', '.join(['argument'] * 11)})\n"
    assert values("formatted", ADD, "x=1\n", wide, "# fmt: off\nx=1\n", "x =") == [1.0, 0.0, 0.0, 0.0, 0.0]
    config = tmp_path / "ruff.toml"
    config.write_text("line-length = 120\n")
    assert values({"formatted": {"config": str(config)}}, wide) == [1.0]
    with pytest.raises(BadInput, match="not there"):
        values({"formatted": {"config": str(tmp_path / "none.toml")}}, ADD)


def test_the_security_check() -> None:
    pytest.importorskip("bandit")
    shell = "import subprocess\nsubprocess.call('ls ' + input(), shell=True)  # nosec\n"
    assert values("secure", ADD, shell, "x =") == [1.0, 0.0, 0.0]
    asserted = "assert True\n"
    assert values("secure", asserted) == [1.0]
    assert values({"secure": {"severity": "low"}}, asserted) == [0.0]
    with pytest.raises(ConfigError, match="hihg"):
        values({"secure": {"severity": "hihg"}}, ADD)


@pytest.mark.parametrize(
    ("reward", "tool"), [("linted", "ruff"), ("formatted", "ruff"), ("secure", "bandit")]
)
def test_a_missing_tool_names_its_extra(reward: str, tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=f"{reward} needs the package {tool}") as raised:
        values(reward, ADD)
    assert "gyrocompass[rewards]" in str(raised.value)
