"""A process for one contender: the loss on one side of a pipe, whoever times it on the other.

    with Worker("native/separable", threads=2) as worker:
        worker.prepare(head)
        worker.first()      # seconds and memory
        worker.again()      # seconds
        worker.errors(256)

Everybody has a process of their own that lives through all rounds, so that contenders can take turns within
a second or two without sharing an allocator, and each one's memory is its own. A waiting worker sleeps.

Memory is the resident set (Linux only): its peak during a repetition, above what it was when the inputs had
been made, minus the gradients. A first, tiny repetition has loaded every library before; freed memory was
given back to the system. What is still there when the gradients are gone is what a backend keeps.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

from loss_contenders import FLOOR, Contender, Head, floor_laps, ours, peers
from loss_errors import Errors, errors

_STATUS = Path("/proc/self/status")


class First(NamedTuple):
    """What a first repetition tells."""

    laps: list[float]
    """Seconds; several for the floor."""
    extra_bytes: int | None
    """Peak of the process, beyond inputs and gradients."""
    kept_bytes: int | None
    """What stays when inputs and gradients are counted out."""


class Subject:
    """The worker's side: one contender, and the inputs of one head after the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.at_rest: int | None = None

    def prepare(self, *head: Any) -> None:
        """Make inputs; load every library by a tiny repetition first."""
        self.inputs: Any = None
        self.laps: list[Callable[[], object]] = []
        self.head = Head(*head)
        if self.at_rest is None:
            self._set_up(self.head._replace(n_tokens=8, vocabulary=64))
            self._repetition()
            self.inputs, self.laps = None, []
            give_back()
            self.at_rest = resident_bytes("VmRSS")
        self._set_up(self.head)

    def first(self) -> First:
        """A repetition, watching memory. Everything above what the process was at rest is counted, so that
        what a backend keeps from one head to the next is charged every time."""
        give_back()
        if self.at_rest is not None:
            Path("/proc/self/clear_refs").write_text("5")
        laps = self._repetition()
        highest = resident_bytes("VmHWM")
        self._clear()
        give_back()
        resting = resident_bytes("VmRSS")
        if self.at_rest is None or highest is None or resting is None:
            return First(laps, None, None)
        h_TD, w_VD, target_T = self.inputs
        before = self.at_rest + h_TD.nbytes + w_VD.nbytes + target_T.nbytes
        return First(laps, highest - before - self.head.gradient_bytes, resting - before)

    def again(self) -> list[float]:
        """A repetition."""
        laps = self._repetition()
        self._clear()
        return laps

    def errors(self, n_tokens: int) -> Errors | None:
        """Errors on the first tokens alone; the floor has none."""
        if self.name == FLOOR:
            return None
        h_TD, w_VD, target_T = self.inputs
        loss_T = self._contender().loss_T
        return errors(loss_T, h_TD[:n_tokens].clone(), w_VD, target_T[:n_tokens].clone())

    def _set_up(self, head: Head) -> None:
        self.inputs = head.inputs()
        if self.name == FLOOR:
            self.laps = floor_laps(self.inputs)()
            return
        loss_T, inputs = self._contender().loss_T, self.inputs
        self.laps = [lambda: loss_T(*inputs).mean().backward()]

    def _contender(self) -> Contender:
        return (ours(self.head) | peers(self.head))[self.name]

    def _repetition(self) -> list[float]:
        seconds = []
        for lap in self.laps:
            start = time.perf_counter()
            lap()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _clear(self) -> None:
        for tensor in self.inputs[:2]:
            tensor.grad = None


def give_back() -> None:
    """Return what was freed to the system, so that it is not counted again."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes(field: str) -> int | None:
    """A line of the process's status (VmRSS: now, VmHWM: at its highest), or None if it has none."""
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Worker:
    """The other side: starts the process and asks it. `prepare` answers at once; `ready` waits for it."""

    def __init__(self, name: str, threads: int) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # How long an idle thread spins before it sleeps, as in `gyro` (decision 0008).
        environment = {"GOMP_SPINCOUNT": "10000"} | os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def prepare(self, head: Head) -> None:
        """Begin to make inputs; several workers may do so at once."""
        self._tell("prepare", *head)

    def ready(self) -> None:
        """Wait for them."""
        self._hear()

    def first(self) -> First:
        """A repetition, watching memory."""
        self._tell("first")
        return First(*self._hear())

    def again(self) -> list[float]:
        """A repetition."""
        self._tell("again")
        seconds: list[float] = self._hear()
        return seconds

    def errors(self, n_tokens: int) -> Errors | None:
        """Errors on the first tokens alone; None for the floor."""
        self._tell("errors", n_tokens)
        found = self._hear()
        return None if found is None else Errors(*found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _tell(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"a worker ended:\n{self._log.read()}")
        return json.loads(line)


def main(name: str) -> None:
    """Answer commands, one JSON line each; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    subject = Subject(name)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        answers.write(json.dumps(getattr(subject, verb)(*arguments)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
