"""Calls of a function and what they return, observed from inside the sandbox; see `function_tests`.

    stdin: {module, name, most, known, impostors, mark}   --propose or confirm-->   stdout: mark{call: result}

This is a program and no part of the package: it is run as text, where there is the standard library alone.
Once it has read what is asked, the module's own output goes nowhere.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

NUMBERS = ["0", "1", "2", "3", "5", "7", "12", "18", "100", "-1", "255", "1999", "2024", "0.5", "-2.5"]
TEXTS = [
    "''", "'a'", "'abc'", "'Hello, World!'", "'a b  c'", "'/usr/lib/x.tar.gz'", "'a.b.c'", "'1,2,3'", "'42'",
    "'key=value; other=\"2\"'", "'2024-02-29'", "'%41+b&c=d'", "'<b>&amp;x</b>'", "'127.0.0.1'", "'1.2.3rc1'",
    "'text/html; charset=utf-8'", "'  x = 1\\n    y = 2\\n'", "'http://user@host:80/p?q=1#f'", "'utf-8'",
    "'From: A <a@b.c>'", "'is_x'", "'Mon, 01 Jan 2024 00:00:00 GMT'", "'-v'", "'*.py'", "'a\\tb'", "'é'",
]  # fmt: skip
BYTES = ["b''", "b'abc'", "b'\\x00\\xff'", "b'hello world\\n'", "b'1;2'"]
COLLECTIONS = [
    "[]", "[1, 2, 3]", "[3, 1, 2, 2]", "['a', 'b']", "['b.py', 'a.txt']", "[[1, 2], [3, 4]]", "('a', 'b')",
    "[0.5, 1.5, 4.0]", "(1, 2)", "(2024, 2, 29, 0, 0, 0, 3, 60, 0)", "{'a': 1, 'b': 2}", "{}", "{1, 2}",
    "['x=1', '--y', 'z']", "['a\\n', 'b\\n']", "[('a', 1), ('b', 2)]",
]  # fmt: skip
OTHERS = ["None", "True", "False", "int", "len", "str"]
HINTS = (
    ("path name str text string url host file line key value word msg pattern source encoding type char "
     "prefix sep tag s p", TEXTS),
    ("num count size width year month day index pos start stop code level limit sec n i x y a b c m k",
     NUMBERS),
    ("data buf byte raw", BYTES),
    ("list seq iter items args values lines names members dict map t l", COLLECTIONS),
)  # fmt: skip
"""What parameters are probably given, by words in their names; a word of one letter is the whole name."""

SECONDS = 0.05
"""For one call."""
TRIALS = 600
MOST_LATE = 10
LONGEST = 300
"""Characters of a result."""
DULL = ("False", "0", "''", "[]", "b''")
"""Results that many a wrong function has too: taken where there are not enough others."""


class TooLate(BaseException):
    """A call has had its time."""


class Observer:
    """One function in its module, called again and again."""

    def __init__(self, module: str, name: str) -> None:
        self.module = importlib.import_module(module)
        *self.owners, self.name = name.split(".")
        self.owner: Any = self.module
        for one in self.owners:
            self.owner = getattr(self.owner, one)
        self.function = vars(self.owner)[self.name]
        self.chance = random.Random(f"{module}.{name}")
        self.n_late = 0

    def propose(self, most: int) -> dict[str, str]:
        """Calls with different results, from the shortest to the longest of what was seen."""
        calls: dict[str, str] = {}
        for _ in range(TRIALS):
            call = f"{self.name}({arguments(self.function, self.chance, skip=bool(self.owners))})"
            if self.owners:
                call = f"{'.'.join(self.owners)}({arguments(self.owner, self.chance)}).{call}"
            text = self.result(call)
            if text is not None:
                calls.setdefault(text, call)
            if self.n_late == MOST_LATE:
                break
        texts = sorted((text for text in calls if text not in DULL), key=len)
        spread = [texts[round(n * (len(texts) - 1) / (most - 1))] for n in range(most)] if texts else []
        dull = [text for text in calls if text in DULL]
        return {calls[text]: text for text in [*dict.fromkeys(spread), *dull][:most]}

    def confirm(self, known: dict[str, str], impostors: list[str]) -> dict[str, str]:
        """The calls that return the same here; none if an impostor returns all of it too."""
        same = {call: text for call, text in known.items() if self.result(call) == text}
        for code in impostors:
            names: dict[str, Any] = {}
            exec(code, vars(self.module), names)
            setattr(self.owner, self.name, names[self.name])
            if all(self.result(call) == text for call, text in same.items()):
                return {}
        return same

    def result(self, call: str) -> str | None:
        """What a call returns, as Python text; None where it raises, or returns no plain value."""
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            random.seed(0)
            value = eval(call, dict(vars(self.module)))
            text = repr(value)
            good = value is not None and is_plain(value) and len(text) <= LONGEST and sys.prefix not in text
            return text if good and ast.literal_eval(text) == value else None
        except BaseException as error:
            self.n_late += isinstance(error, TooLate)
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def arguments(function: Callable[..., Any], chance: random.Random, skip: int = 0) -> str:
    """Arguments for the parameters that must be given, and half of the time for some others."""
    positional, named = [], []
    may = chance.random() < 0.5
    for parameter in list(inspect.signature(function).parameters.values())[skip:]:
        required = parameter.default is parameter.empty
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [proposed(parameter.name, chance) for _ in range(chance.randrange(3))]
        elif parameter.kind is parameter.VAR_KEYWORD:
            continue
        elif required and parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(proposed(parameter.name, chance))
        elif required or (may and chance.random() < 0.5):
            named.append(f"{parameter.name}={proposed(parameter.name, chance)}")
    return ", ".join([*positional, *named])


def proposed(name: str, chance: random.Random) -> str:
    """A value for a parameter of this name."""
    if chance.random() < 0.75:
        for words, pool in HINTS:
            if any(
                word == name.lower() or (len(word) > 2 and word in name.lower()) for word in words.split()
            ):
                return chance.choice(pool)
    return chance.choice(chance.choice([NUMBERS, TEXTS, TEXTS, BYTES, COLLECTIONS, OTHERS]))


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of numbers and texts alone, so that its `repr` says all of it."""
    if type(value) in (list, tuple, set, dict) and depth < 4:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return all(is_plain(part, depth + 1) for part in parts)
    return value is None or type(value) in (bool, int, float, str, bytes)


def _late(*_: object) -> None:
    raise TooLate


def main() -> None:
    """Read what is asked, close all streams to the module, answer."""
    asked, out = json.loads(sys.stdin.read()), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    signal.signal(signal.SIGALRM, _late)
    kept: dict[str, str] = {}
    try:
        observer = Observer(asked["module"], asked["name"])
        if inspect.isfunction(observer.function) and not inspect.iscoroutinefunction(observer.function):
            known = asked["known"]
            kept = (
                observer.propose(asked["most"])
                if known is None
                else observer.confirm(known, asked["impostors"])
            )
    except BaseException:  # whatever a module does when it is imported
        kept = {}
    os.write(out, f"\n{asked['mark']}{json.dumps(kept)}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
