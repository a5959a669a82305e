"""Disks that are full, places that cannot be written, files that are broken: errors, never tracebacks."""

from __future__ import annotations

import errno
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from databases import copied
from gyrocompass.cli import main as command_line
from gyrocompass.cli import run as run_module
from tiny_recipe import FinishedRun

Run = Callable[..., tuple[int, str, str]]


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """A full disk, as far as a process can be shown one: what is longer is refused with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def store(finished_run: FinishedRun, tmp_path: Path) -> Path:
    return copied(finished_run.store, tmp_path / "store")


@pytest.mark.parametrize(
    "change",
    [
        "untrained.config.intermediate_size=5000",  # the model's weights
        "pretrained.lora={rank: 500}",  # a checkpoint
        "documents.sources=[{files: {path: LARGE}}]",  # Parquet
    ],
)
def test_a_disk_gets_full_in_a_stage(
    change: str, finished_run: FinishedRun, store: Path, gyro: Run, tmp_path: Path
) -> None:
    large = tmp_path / "large.txt"
    large.write_text(random.Random(0).randbytes(200_000).hex())
    change = f"stages.{change.replace('LARGE', str(large))}"
    with files_of_at_most(150_000):
        code, _, err = gyro("run", finished_run.recipe, "--store", store, "--set", change)
    assert code == 1 and "error: " in err and "not full" in err, err
    assert not [path.name for path in (store / "artifacts").iterdir() if path.name.startswith(".")]


def test_a_disk_is_full_when_the_report_is_written(store: Path, gyro: Run) -> None:
    before = (store / "runs" / "tiny" / "report.html").read_bytes()
    with files_of_at_most(10_000):
        code, _, err = gyro("report", "--store", store)
    assert code == 1 and "error: File too large" in err and "not full" in err
    assert [path.name for path in (store / "runs" / "tiny").glob(".*")] == []
    assert (store / "runs" / "tiny" / "report.html").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "{}", '{"recipe": 3}', "[]"])
def test_a_broken_record_of_a_run(content: str, store: Path, gyro: Run) -> None:
    (store / "runs" / "tiny" / "run.json").write_text(content)
    code, _, err = gyro("report", "--store", store)
    assert code == 1 and "run.json" in err and "run the recipe again" in err


def test_out_is_tried_before_any_work(
    finished_run: FinishedRun, gyro: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "finetune_recipe", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/1/out")):
        code, _, err = gyro("train", "m", "d", "--out", out)
        assert code == 2 and "cannot be written here" in err and "--out" in err, err


@pytest.mark.parametrize("command", [("lineage", "x"), ("report",), ("run", "stdlib", "--dry-run")])
def test_who_only_reads_makes_no_store(command: tuple[str, ...], gyro: Run, tmp_path: Path) -> None:
    code, out, err = gyro(*command, "--store", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert (code == 0 and "will run" in out) or (code == 2 and "there is no store here" in err)


BUGS = [ValueError("x"), OSError("x"), ConnectionError(111, "refused"), SafetensorError("invalid header")]
REFUSED = [
    (OSError(errno.EACCES, "Permission denied", "a"), "Permission denied\n  where: a\n"),
    (OSError(errno.EISDIR, "Is a directory", ".staged", None, "report.html"), "where: report.html"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device\n  fix: "),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "weights cannot be written"),
]


def command_that_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(_: object) -> int:
        raise error

    monkeypatch.setattr(command_line, "_load", lambda _: verb)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    command_that_raises(bug, monkeypatch)
    with pytest.raises(type(bug)):
        command_line.main(["report"])


@pytest.mark.parametrize(("error", "said"), REFUSED)
def test_what_a_disk_refuses_is_an_error(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, gyro: Run
) -> None:
    command_that_raises(error, monkeypatch)
    code, _, err = gyro("report")
    assert code == 1 and err.startswith("error: ") and said in err
