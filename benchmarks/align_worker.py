"""A process for one contender: it takes a training step when it is told to, and says how long it took.

    with Worker("ours", task, threads=2) as worker:
        worker.ready()      # the model is loaded, the reference pass made
        worker.step()       # seconds, loss, peak memory

Everybody lives through all rounds and takes turns, one step at a time (`loss_worker.py` says why). Memory is
the resident set at its highest since the first step began, the process with all its libraries included
(Linux only). Freed memory is given back to the system after each step, off the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

from align_contenders import CONTENDERS, Said, Task
from loss_worker import give_back, resident_bytes


class Lap(NamedTuple):
    """One step."""

    seconds: float
    cpu_seconds: float
    """Of all threads: what a busy neighbour changes least."""
    loss: float
    nll_nats: float
    peak_bytes: int | None


class Pacer:
    """The worker's side of the clock: `pace` of a contender."""

    def __init__(self, answer: Callable[[Any], None], await_command: Callable[[], None]) -> None:
        self._answer, self._await = answer, await_command
        self._started = self._cpu_started = 0.0

    def __call__(self, said: Callable[[], Said] | None, apart_s: float) -> None:
        """Stop the clock, answer, wait, and start it again."""
        seconds = time.perf_counter() - self._started
        cpu_seconds = time.process_time() - self._cpu_started
        if said is None:
            give_back()
            _forget_peak()
            self._answer(apart_s)
        else:
            peak_bytes = resident_bytes("VmHWM")
            give_back()
            self._answer(Lap(seconds, cpu_seconds, *said(), peak_bytes))
        self._await()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()


def _forget_peak() -> None:
    if resident_bytes("VmHWM") is not None:
        Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """The other side: starts the process and asks it."""

    def __init__(self, name: str, task: Task, threads: int) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {"GOMP_SPINCOUNT": "10000"} | os.environ
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ready(self) -> float:
        """Wait for what comes before the first step; the seconds of a reference pass."""
        return float(self._hear())

    def step(self) -> Lap:
        """Take one."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Lap(*self._hear())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"a worker ended:\n{self._log.read()}")
        return json.loads(line)


def main(name: str, task: str) -> None:
    """Answer with one JSON line for each line that comes; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def await_command() -> None:
        if not sys.stdin.readline():
            raise SystemExit

    with tempfile.TemporaryDirectory() as folder:
        CONTENDERS[name].run(Task(*json.loads(task)), Pacer(answer, await_command), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
