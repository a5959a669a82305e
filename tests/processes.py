"""Processes of their own, to be killed or to be ranks, that begin in milliseconds.

A server imports once what they need, before any thread is started, and forks them. Its imports are those of
all tests, since a session has one server.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import databases  # noqa: F401  (where the stores of these processes are, too)

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "pytest",
        "alembic.command",
        "gyrocompass.core.store",
        "gyrocompass.recipe.verify_resume",
        "transformers.models.llama.modeling_llama",
        "torch.distributed",
    ]
)
PATIENCE_S = 120


def run(target: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a process; its exit code, which is -9 after SIGKILL."""
    return run_together([(target, *arguments)])[0]


def run_together(calls: Sequence[Sequence[Any]]) -> list[int]:
    """Run functions with their arguments at the same time, each in a process; their exit codes."""
    processes = [PROCESSES.Process(target=target, args=arguments) for target, *arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "a process did not end"
    return [code for code in codes if code is not None]


def run_ranks(ranks: int, target: Callable[..., None], *arguments: Any) -> list[int]:
    """Run a function as each of several ranks, in the environment that `torchrun` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_together([(_as_rank, rank, ranks, port, target, *arguments) for rank in range(ranks)])


def _as_rank(rank: int, ranks: int, port: int, target: Callable[..., None], *arguments: Any) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "RANK": rank}
    os.environ |= {name: str(value) for name, value in (place | {"LOCAL_RANK": rank}).items()}
    target(*arguments)
