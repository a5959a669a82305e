"""Law 7, over the source itself: nothing here can read a pickle or run code that came with a model."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "src" / "gyrocompass").rglob("*.py"))
PICKLING = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNPICKLING = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "recv_object_list",
}
SANDBOXED = {"measure/observe_calls.py"}
"""Programs that run inside the sandbox alone, on code that was written to be run there."""
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("pd", "read_pickle")}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_module_reads_pickles_or_trusts_remote_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & PICKLING
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.split(".")[0] not in PICKLING
    for call in calls(tree):
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            assert (call.func.value.id, call.func.attr) not in LOADERS
        if isinstance(call.func, ast.Attribute):
            assert call.func.attr not in UNPICKLING, "these collectives unpickle"
        if isinstance(call.func, ast.Name) and not path.as_posix().endswith(tuple(SANDBOXED)):
            assert call.func.id not in ("eval", "exec")
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
            names = {keyword.arg for keyword in call.keywords}
            assert "local_files_only" in names, "a name that is no folder must not be looked up on a hub"


@pytest.mark.parametrize("program", sorted(SANDBOXED))
def test_programs_of_the_sandbox_are_read_as_text_and_imported_by_nobody(program: str) -> None:
    name = program.removesuffix(".py").replace("/", ".")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not any(one.endswith(name) for one in imported), f"{path} imports {program}"
