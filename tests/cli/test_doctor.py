"""`gyro doctor`: what is broken is named with a remedy, what was asked for and fails is an exit code of 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from databases import IN_A_FILE
from gyrocompass.cli import doctor as module
from gyrocompass.cli.main import main
from gyrocompass.core.store import Store
from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._native import Status
from gyrocompass.loss._question import LogitRule, Logits

AVAILABLE = Status(True, "compiled for this machine")


@pytest.fixture(autouse=True)
def whole_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to complain about, whatever machine the tests run on."""
    monkeypatch.setattr(module, "status", lambda: AVAILABLE)
    monkeypatch.setattr(module, "_usable_cores", lambda: 1_000)
    monkeypatch.setattr(module, "_machine_problems", lambda: iter(()))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("GYRO_NATIVE", raising=False)


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["doctor", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def in_own_process(folder: Path, **environment: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "gyrocompass", "doctor", "--json", "--store", str(folder / "store")],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(folder / "empty")} | environment,
        check=False,
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def can_build() -> bool:
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def test_a_whole_machine_has_no_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = examined(capsys, "--store", str(tmp_path))
    assert (code, report["problems"]) == (0, [])
    assert main(["doctor", "--store", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no problems")


def test_each_dtype_gets_what_the_engine_would_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = examined(capsys, "--store", str(tmp_path))
    choices = {choice["dtype"]: choice for choice in report["backends"] if choice["device"] == "cpu"}
    assert list(choices) == ["float32", "bf16", "float16", "float64"]
    for choice, dtype in zip(choices.values(), module.DTYPES, strict=True):
        logits = Logits(torch.zeros(3, 8, dtype=dtype), torch.zeros(5, 8, dtype=dtype), None, None, None,
                        LogitRule())  # fmt: skip
        refusals = {name: backend.refusal(logits) for name, backend in BACKENDS.items()}
        assert choice["backend"] == next(name for name, refusal in refusals.items() if refusal is None)
        before = list(BACKENDS)[: list(BACKENDS).index(choice["backend"])]
        assert choice["refusals"] == {name: refusals[name] for name in before}


def test_a_refusal_is_shown_to_people_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky:
        name = "picky"

        def refusal(self, logits: Logits) -> str | None:
            return None if logits.h_ND.dtype == torch.bfloat16 else "only bf16"

    monkeypatch.setattr(module, "BACKENDS", {"picky": Picky()} | BACKENDS)
    assert main(["doctor", "--store", str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ cpu")]
    assert ["picky: only bf16" in row for row in rows[:4]] == [True, False, True, True]


@pytest.mark.skipif(not can_build(), reason="nothing would be compiled here")
def test_a_compiler_that_fails_is_named_and_broken(tmp_path: Path) -> None:
    code, report, _ = in_own_process(tmp_path, CXX="/bin/false", GYRO_NATIVE="1")
    (problem,) = [problem for problem in report["problems"] if "compiler" in problem["what"]]
    assert code == 1 and problem["broken"] and "/bin/false" in problem["what"] and "CXX" in problem["fix"]


def test_what_a_compiler_said_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Status(False, "the C++ compiler (g++) failed", "native.cpp:7: error: no [bold] brgemm")
    monkeypatch.setattr(module, "status", lambda: failed)
    assert main(["doctor", "--store", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("broken: the C++ compiler (g++) failed\n  | native.cpp:7: error: no [bold] brgemm")


def test_a_compiler_that_was_named_and_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "status", lambda: Status(False, "no C++ compiler was found"))
    code, report = examined(capsys, "--store", str(tmp_path))
    assert code == 0 and report["problems"][0]["broken"] is False  # nobody asked for one
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, report = examined(capsys, "--store", str(tmp_path))
    assert code == 1 and report["problems"][0]["broken"] is True


def test_a_library_that_cannot_be_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unwritable = Status(False, "the library could not be made: read-only", path=tmp_path / "x.so")
    monkeypatch.setattr(module, "status", lambda: unwritable)
    code, report = examined(capsys, "--store", str(tmp_path))
    assert code == 1 and "TORCH_EXTENSIONS_DIR" in report["problems"][0]["fix"]


def test_a_backend_that_is_switched_off_is_a_note(tmp_path: Path) -> None:
    code, report, err = in_own_process(tmp_path, GYRO_NATIVE="0")
    (problem,) = [problem for problem in report["problems"] if "GYRO_NATIVE=0" in problem["what"]]
    assert code == 0 and not problem["broken"] and problem["fix"].startswith("unset GYRO_NATIVE")
    assert not report["native"]["available"] and "compiling" not in err


def test_a_build_of_this_moment_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "native.so"

    def builds() -> Status:
        library.touch()
        return AVAILABLE._replace(path=library)

    monkeypatch.setattr(module, "status", builds)
    _, report = examined(capsys, "--store", str(tmp_path))
    assert report["native"]["built_in_s"] is not None
    os.utime(library, (1e9, 1e9))
    monkeypatch.setattr(module, "status", lambda: AVAILABLE._replace(path=library))
    _, report = examined(capsys, "--store", str(tmp_path))
    assert report["native"]["built_in_s"] is None


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = examined(capsys, "--store", str(tmp_path / "a" / "b"))
    assert code == 0 and report["store"]["writable"] and not report["store"]["exists"]
    assert list(tmp_path.iterdir()) == []


def test_a_named_store_that_cannot_be_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code, report = examined(capsys, "--store", str(tmp_path / "file" / "store"))
    assert code == 1 and not report["store"]["writable"] and "--store" in report["problems"][0]["fix"]


def test_the_default_store_was_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GYRO_STORE", raising=False)
    (tmp_path / "gyro-store").touch()
    monkeypatch.setattr(module, "_is_writable", lambda place: False)
    code, report = examined(capsys)
    assert code == 0 and len(report["problems"]) == 1


@IN_A_FILE
def test_an_existing_store_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path)
    code, report = examined(capsys, "--store", str(tmp_path))
    assert code == 0 and report["store"]["database"].endswith("store.sqlite")
    (tmp_path / "store.sqlite").write_text("this is no database " * 100)
    code, report = examined(capsys, "--store", str(tmp_path))
    assert code == 1 and "database" in report["problems"][0]["what"]


def test_broken_things_come_before_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "status", lambda: Status(False, "this processor has no AVX-512"))
    (tmp_path / "file").touch()
    _, report = examined(capsys, "--store", str(tmp_path / "file" / "store"))
    assert [problem["broken"] for problem in report["problems"]] == [True, False]


def test_more_threads_than_cores_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(module, "_usable_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    notes = [problem for problem in module._machine_problems() if "threads" in problem.what]
    assert len(notes) == 1 and notes[0].fix == "set OMP_NUM_THREADS=1" and not notes[0].broken


def test_packages_of_extras_have_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = examined(capsys, "--store", str(tmp_path))
    assert report["extras"]["lora"].keys() == {"peft"} and "check" not in report["extras"]
    assert module._version("no-such-package") is None
