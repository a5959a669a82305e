"""Progress of long work: how far, how fast, how long still.

On a terminal, a bar for each task, drawn by rich. Elsewhere (a log, CI), one plain line at most every ten
seconds and one at the end of each task:

    pretrain: 1.2M of 3.0M tok (40%), 12.3k tok/s, 2 min 26 s left, loss 3.214

The rate is over the last half minute, so that the time left follows what the machine does now.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Clock = Callable[[], float]
"""Seconds, from any beginning; never backwards."""

_LINE_EVERY_S = 10.0
_BAR_EVERY_S = 0.1
_RATE_OVER_S = 30.0
_SAMPLE_EVERY_S = 0.5


class Task:
    """One piece of long work; made by `Progress.task`."""

    def __init__(self, progress: Progress, label: str, total: float | None, unit: str, done: float) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._done_before = done
        self.numbers: dict[str, float] = {}
        self._progress = progress
        self._samples = deque([(progress.clock(), done)])
        self._begun = self._samples[0][0]

    def advance(self, n: float = 1, **numbers: float) -> None:
        """Say that `n` more units are done; numbers such as `loss=3.2` are shown beside."""
        self.done += n
        self.numbers.update(numbers)
        now = self._progress.clock()
        if now - self._samples[-1][0] >= _SAMPLE_EVERY_S:
            self._samples.append((now, self.done))
            while now - self._samples[0][0] > _RATE_OVER_S and len(self._samples) > 2:
                self._samples.popleft()
        self._progress.show(self, now)

    def finish(self) -> None:
        """Say that no more will come; the rate of the last line is that of the whole."""
        self._progress.end(self)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the task began."""
        return self._progress.clock() - self._begun

    def rate(self) -> float:
        """Units in a second, lately."""
        begin_s, begin = self._samples[0]
        seconds = self._progress.clock() - begin_s
        return (self.done - begin) / seconds if seconds > 0 else 0.0

    def line(self, *, ended: bool = False) -> str:
        """The task in one plain line."""
        if self.total is None:
            parts = [f"{_amount(self.done)} {self.unit}"]
        else:
            share = self.done / self.total if self.total else 1.0
            parts = [f"{_amount(self.done)} of {_amount(self.total)} {self.unit} ({share:.0%})"]
        rate = (self.done - self._done_before) / max(self.elapsed_s, 1e-9) if ended else self.rate()
        parts.append(f"{_amount(rate)} {self.unit}/s")
        if ended:
            whole = self.total is None or self.done >= self.total
            parts.append(f"{'took' if whole else 'stopped after'} {duration(self.elapsed_s)}")
        elif self.total is not None and rate > 0:
            parts.append(f"{duration(max(self.total - self.done, 0) / rate)} left")
        parts += [f"{name} {value:.4g}" for name, value in self.numbers.items()]
        return f"{self.label}: {', '.join(parts)}"


class Progress:
    """Shows the progress of tasks while its `with` block runs.

    Args:
        console: where to; by default rich's, on standard error, so that results alone go to standard output.
        quiet: show nothing.
        clock: where the time comes from.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, clock: Clock = time.monotonic
    ) -> None:
        if console is None:
            from rich.console import Console

            console = Console(stderr=True)
        self.console = console
        self.clock = clock
        self._quiet = quiet
        self._bars: Bars | None = None
        self._bar_ids: dict[Task, TaskID] = {}
        self._shown_s: dict[Task, float] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self._quiet:
            self._bars = _bars(self.console)
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in list(self._shown_s):
            self.end(task)
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def task(self, label: str, total: float | None, unit: str = "tok", *, done: float = 0.0) -> Task:
        """Begin a task.

        Args:
            label: what is done, in a word or two.
            total: how many units there are; None if nobody knows yet.
            unit: the unit's short name.
            done: how many units were done before, by work that is now resumed.
        """
        task = Task(self, label, total, unit, done)
        self._shown_s[task] = self.clock()
        if self._bars is not None:
            self._bar_ids[task] = self._bars.add_task(label, total=total, line="")
        return task

    def note(self, text: str) -> None:
        """Print a line that stays, above the bars."""
        self._print(text)

    def show(self, task: Task, now_s: float) -> None:
        """Show how far a task is, if it is time to; called by the task."""
        every_s = _LINE_EVERY_S if self._bars is None else _BAR_EVERY_S
        if task not in self._shown_s or now_s - self._shown_s[task] < every_s:
            return
        self._shown_s[task] = now_s
        if self._bars is not None:
            self._update_bar(task, ended=False)
        else:
            self._print(task.line())

    def end(self, task: Task) -> None:
        """Show a task's last line, once; called by the task, and for those still open at the end."""
        if self._shown_s.pop(task, None) is None:
            return
        if self._bars is not None:
            self._update_bar(task, ended=True)
        else:
            self._print(task.line(ended=True))

    def _update_bar(self, task: Task, *, ended: bool) -> None:
        assert self._bars is not None
        line = task.line(ended=ended).removeprefix(f"{task.label}: ")
        self._bars.update(self._bar_ids[task], completed=task.done, total=task.total, line=line)

    def _print(self, line: str) -> None:
        if not self._quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(3.21), duration(146), duration(7500)
    ('3.2 s', '2 min 26 s', '2 h 5 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _amount(value: float) -> str:
    """A number in at most five characters: 950, 12.3k, 1.2M."""
    for step, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= step * 0.99995:
            return f"{value / step:.1f}{suffix}"
    return f"{value:.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def _bars(console: Console) -> Bars:
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[line]}", markup=False),
        console=console,
    )
