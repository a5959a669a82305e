"""Executors: the same work on many shards, here in processes or on a Ray cluster.

    executor.run(function, parts) --> the parts, in the order they are done

A part names files and says where its result goes; nothing but these names travels between processes, and the
result is a file that appears whole. What parts come to therefore depends neither on who does them nor on
their order, and a part whose file is there need not be done again.

`LocalExecutor` starts its processes fresh (spawn), each once for a whole build, and keeps twice as many parts
in flight as there are processes. Its processes end with their parent, however it ends. `RayExecutor` needs
the extra `ray`; its workers must see the same files under the same paths.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from gyrocompass.core.errors import BadInput, GyroError, MissingDependency

P = TypeVar("P")


class Executor(Protocol):
    """Does parts of work; a context, so that what it starts ends."""

    def run(self, function: Callable[[P], None], parts: Sequence[P]) -> Iterator[P]:
        """The parts as they are done; an error of one part ends it.

        Args:
            function: a function of a module, which leaves what it comes to in files that the part names.
            parts: what it is called with, one by one.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def available_cpus() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalExecutor:
    """Processes of this machine; with one worker, this process itself.

    Args:
        workers: how many; None: one for each CPU.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = available_cpus() if workers is None else workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        processes = list((self._pool._processes or {}).values())
        if error is not None:
            # What is in flight is lost anyway: a part's file appears whole or not at all.
            for process in processes:
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def run(self, function: Callable[[P], None], parts: Sequence[P]) -> Iterator[P]:
        """See `Executor`."""
        if self.workers == 1 or len(parts) < 2:
            for part in parts:
                function(part)
                yield part
            return
        try:
            yield from self._run_in_pool(function, parts)
        except BrokenProcessPool as error:
            raise GyroError(
                "a worker process was killed, most likely for want of memory",
                fix="give fewer workers, or free memory; the same command goes on from what is saved",
            ) from error

    def _run_in_pool(self, function: Callable[[P], None], parts: Sequence[P]) -> Iterator[P]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, _begin_worker)
        waiting = iter(parts)
        running: dict[Future[None], P] = {}
        while True:
            for part in waiting:
                running[self._pool.submit(function, part)] = part
                if len(running) >= 2 * self.workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it does: a killed parent closes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class RayExecutor:
    """Ray Data: parts are the rows of a data set that is mapped over the cluster.

    Args:
        workers: how many parts at once; None: as many as the cluster has CPUs.
        address: of a cluster; None: the one that RAY_ADDRESS names, else one on this machine.

    Raises:
        MissingDependency: Ray is not installed.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        try:
            import ray
            import ray.data
        except ModuleNotFoundError as error:
            raise MissingDependency("ray", extra="ray", needed_for="curation on a Ray cluster") from error
        self._ray: Any = ray
        self.workers, self._address, self._started = workers, address, False

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            own: dict[str, Any] = {}
            if not self._address and not os.environ.get("RAY_ADDRESS"):
                # A cluster of our own: as many CPUs as workers, and modules where this process finds them.
                paths = os.pathsep.join(path for path in sys.path if path)
                own = {"num_cpus": self.workers, "runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
            self._ray.init(address=self._address, **own, **quiet)
            self._started = True
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._started:
            self._ray.shutdown()

    def run(self, function: Callable[[P], None], parts: Sequence[P]) -> Iterator[P]:
        """See `Executor`."""
        if not parts:
            return
        numbers = [{"number": number} for number in range(len(parts))]
        blocks = self._ray.data.from_items(numbers, override_num_blocks=len(parts))

        def work(row: dict[str, Any]) -> dict[str, Any]:
            try:
                function(parts[row["number"]])
            except GyroError as error:  # Ray keeps the text of an error's cause, not the cause
                return row | {"error": [error.what, error.where, error.fix], "exit_code": error.exit_code}
            return row | {"error": [], "exit_code": 0}

        strategy = self._ray.data.TaskPoolStrategy(size=self.workers)
        for row in blocks.map(work, compute=strategy).iter_rows():
            if row["exit_code"]:
                what, where, fix = row["error"]
                kind = BadInput if row["exit_code"] == BadInput.exit_code else GyroError
                raise kind(what, where=where, fix=fix)
            yield parts[row["number"]]
