"""A build that is killed goes on from what is saved, and comes to the same root."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from curate_steps import SMALL_SHARDS, build_slowly, built, config
from test_build import TEXTS, lines, root_of

from processes import PATIENCE_S, PROCESSES

KILLS = 6


def wait_until_looked_at(file: Path, documents: int, process: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.is_alive():  # type: ignore[attr-defined]
        if file.exists() and file.stat().st_size >= documents:
            return
        time.sleep(0.002)


def children_of(pid: int | None) -> list[str]:
    """The processes that a process started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def end_soon(pids: list[str]) -> bool:
    """Whether all of them end within the patience that tests have."""
    deadline = time.monotonic() + PATIENCE_S
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_again_and_again_it_comes_to_the_same_root(tmp_path: Path, workers: int) -> None:
    source, counts = lines(tmp_path / "a.jsonl", TEXTS * 4), tmp_path / "counts"
    steps = [{"count_words": {"wait_s": 0.003, "counting_file": str(counts)}}, "same_start"]
    kills = KILLS if workers == 1 else 2
    for number in range(kills):
        target = build_slowly
        process = PROCESSES.Process(
            target=target, args=(str(source), str(tmp_path / "store"), workers, str(counts))
        )
        process.start()
        before = counts.stat().st_size if counts.exists() else 0
        wait_until_looked_at(counts, before + len(TEXTS) * 4 // (kills + 1), process)
        children = children_of(process.pid) if process.is_alive() else []
        process.kill()
        process.join(PATIENCE_S)
        assert end_soon(children), f"workers outlive their parent after kill {number}"
        assert process.exitcode == -signal.SIGKILL
    looked_at = counts.stat().st_size
    build = config(source, steps=steps, shard_bytes=SMALL_SHARDS)
    found = built(build, tmp_path / "store")
    assert counts.stat().st_size - looked_at < len(TEXTS) * 4, "what was done before the kill was kept"
    assert not any((tmp_path / "store" / "work").iterdir()), "nothing is left lying about"
    never_killed = built(build, tmp_path / "other")
    assert root_of(found) == root_of(never_killed)
    assert found.dataset.id == never_killed.dataset.id


@pytest.mark.parametrize("place", ["land", "sync", "remember", "_assemble", "decide", "_gather"])
def test_killed_at_a_given_place_it_comes_to_the_same_root(tmp_path: Path, place: str) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    for nth in (1, 2):
        process = PROCESSES.Process(target=_die_at, args=(str(source), str(tmp_path / "store"), place, nth))
        process.start()
        process.join(PATIENCE_S)
        assert process.exitcode in (-signal.SIGKILL, 0)
    found = built(config(source), tmp_path / "store")
    assert root_of(found) == root_of(built(config(source), tmp_path / "other"))


def _die_at(source: str, store: str, place: str, nth: int) -> None:
    """Build, and be killed when a function of the pipeline is called for the nth time."""
    from gyrocompass.core import store as stores
    from gyrocompass.data.curate import build, parts, reading

    calls = 0
    for module in (build, parts, reading, stores):
        if hasattr(module, place):
            original = getattr(module, place)

            def dying(*arguments: object, original: object = original, **named: object) -> object:
                nonlocal calls
                calls += 1
                if calls == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **named)  # type: ignore[operator]

            setattr(module, place, dying)
    built(config(Path(source)), Path(store))
