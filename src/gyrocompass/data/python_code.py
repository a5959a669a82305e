"""What Python source says about itself: public functions with their docstrings, by the syntax tree.

Nothing is imported or executed. Names that begin with an underscore are private and left out, and so is
what is defined inside functions.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator
from typing import NamedTuple

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


NOT_PYTHON = (SyntaxError, ValueError, RecursionError)
"""What `parse` raises: not this version's syntax, null bytes, nested too deeply."""


class Function(NamedTuple):
    """A public function or method with a docstring and a body."""

    qualified_name: str
    owner: str | None
    """The class of a method."""
    signature: str
    """`def name(arguments) -> result:` on one line, without decorators."""
    docstring: str
    """Without its indentation."""
    code: str
    """Signature and body, without the docstring and without the indentation of a class."""


def parse(text: str) -> ast.Module:
    """The syntax tree; warnings about what is only odd (an invalid escape) are not shown.

    Raises:
        NOT_PYTHON: one of these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def docstrings(module_name: str, tree: ast.Module) -> str:
    """The docstrings of a module and its public classes and functions as one text, each under its name.

    >>> print(docstrings("m", parse('"Does things."\\ndef f(x): "Doubles."')))
    m
    <BLANKLINE>
    Does things.
    <BLANKLINE>
    f(x)
    <BLANKLINE>
    Doubles.
    """
    parts = [(module_name, ast.get_docstring(tree))]
    for name, _, node in _public(tree):
        arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
        parts.append((name + arguments, ast.get_docstring(node)))
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts if text and text.strip())


def functions(text: str, tree: ast.Module) -> Iterator[Function]:
    """The public functions that have a docstring and something to do after it."""
    lines = text.split("\n")  # as the parser counts them; splitlines() also splits at form feeds
    for name, owner, node in _public(tree):
        if isinstance(node, ast.ClassDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or node.body[1].lineno <= (node.body[0].end_lineno or 0):
            continue
        signature = _signature(node)
        body = "\n".join(lines[node.body[0].end_lineno : node.end_lineno]).strip("\n")
        code = textwrap.dedent(" " * node.col_offset + signature + "\n" + body)
        if _is_python(code):  # not where a string's lines begin left of the function
            yield Function(name, owner, signature, docstring, code)


def _public(
    tree: ast.Module | ast.ClassDef, prefix: str = "", owner: str | None = None
) -> Iterator[tuple[str, str | None, Definition]]:
    """Qualified name, owning class and node of public definitions, in their order."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, owner, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{prefix}{node.name}.", node.name)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){result}:"


def _is_python(code: str) -> bool:
    try:
        parse(code)
    except NOT_PYTHON:
        return False
    return True
