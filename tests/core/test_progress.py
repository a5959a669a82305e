import io

import pytest
from rich.console import Console

from gyrocompass.core.progress import Progress, duration


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def test_plain_lines_come_every_ten_seconds_and_at_the_end():
    clock, console = FakeClock(), plain()
    with Progress(console, clock=clock) as progress:
        task = progress.task("pretrain", 3_000)
        for _ in range(30):
            clock.now_s += 1
            task.advance(100, loss=3.21456)
    assert console.file.getvalue().splitlines() == [
        "pretrain: 1.0k of 3.0k tok (33%), 100 tok/s, 20 s left, loss 3.215",
        "pretrain: 2.0k of 3.0k tok (67%), 100 tok/s, 10 s left, loss 3.215",
        "pretrain: 3.0k of 3.0k tok (100%), 100 tok/s, 0.0 s left, loss 3.215",
        "pretrain: 3.0k of 3.0k tok (100%), 100 tok/s, took 30 s, loss 3.215",
    ]


def test_the_rate_follows_the_last_half_minute():
    clock = FakeClock()
    with Progress(plain(), clock=clock) as progress:
        task = progress.task("read", 10_000)
        for rate in (10, 100):
            for _ in range(60):
                clock.now_s += 1
                task.advance(rate)
        assert task.rate() == pytest.approx(100)
        task.finish()
    assert "55 tok/s, stopped after 2 min 0 s" in progress.console.file.getvalue()


def test_unknown_totals_and_nothing_to_do():
    clock, console = FakeClock(), plain()
    with Progress(console, clock=clock) as progress:
        reading = progress.task("read [x]", None, unit="doc")
        progress.task("nothing", 0)
        clock.now_s += 2
        reading.advance(3)
        reading.finish()
        reading.finish()
    assert console.file.getvalue().splitlines() == [
        "read [x]: 3 doc, 1.5 doc/s, took 2.0 s",
        "nothing: 0 of 0 tok (100%), 0 tok/s, took 2.0 s",
    ]


def test_an_error_says_how_far_it_came():
    clock, console = FakeClock(), plain()
    with pytest.raises(KeyboardInterrupt), Progress(console, clock=clock) as progress:
        task = progress.task("train", 10, unit="step")
        clock.now_s += 4
        task.advance(4)
        raise KeyboardInterrupt
    assert console.file.getvalue() == "train: 4 of 10 step (40%), 1 step/s, stopped after 4.0 s\n"


def test_quiet_is_quiet():
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal)
        with Progress(console, quiet=True) as progress:
            progress.task("train", 10).advance(10)
        assert console.file.getvalue() == ""


def test_bars_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(console) as progress:
        task = progress.task("train [x]", 10, unit="step")
        task.advance(10, loss=2.5)
    shown = console.file.getvalue()
    assert "train [x]" in shown
    assert "10 of 10 step (100%)" in shown
    assert "loss 2.5" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (9.96, "10.0 s"), (59.7, "1 min 0 s"), (3599.6, "1 h 0 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
