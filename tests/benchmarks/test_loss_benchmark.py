"""The benchmarks run, count memory as they say and compare with the exact values; nothing here is timed."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are scripts that import their neighbours."""
    monkeypatch.syspath_prepend(FOLDER)


def module(name: str) -> ModuleType:
    from importlib import import_module

    return import_module(name)


def test_errors_are_those_against_float64_of_the_whole() -> None:
    head = module("loss_contenders").Head("", 37, 12, 20_000, "bfloat16")
    full = module("loss_contenders").full_logits
    found = module("loss_errors").errors(full, *head.inputs())
    h, w, target = head.inputs()

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        wide = [tensor.detach().to(dtype).requires_grad_() for tensor in (h, w)]
        losses = F.cross_entropy(wide[0] @ wide[1].T, target, reduction="none")
        return [part.detach().double() for part in (losses, *torch.autograd.grad(losses.mean(), wide))]

    ours, exact = run(torch.bfloat16), run(torch.float64)
    off = [a - b for a, b in zip(ours, exact, strict=True)]
    expected = [off[0].abs().max(), *(off[i].norm() / exact[i].norm() for i in (1, 2))]
    torch.testing.assert_close(list(found), [float(value) for value in expected], rtol=1e-6, atol=0)


def test_a_mean_is_compared_with_the_mean() -> None:
    contenders = module("loss_contenders")
    head = contenders.Head("", 64, 16, 300, "float32")
    found = module("loss_errors").errors(lambda *given: contenders.full_logits(*given).mean(), *head.inputs())
    assert 0 < found.nll_nats < 1e-6 and 0 < found.dh < 1e-5


def test_targets_and_logits_are_spread_as_said() -> None:
    h, w, target = module("loss_contenders").Head("", 300, 64, 5_000, "float32").inputs()
    assert float((h @ w.T).detach().std()) == pytest.approx(3, rel=0.05)
    assert target.max() < 5_000 and len(target.unique()) > 250


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_what_lies_beyond_inputs_and_gradients() -> None:
    """The floor holds z besides what has the size of the gradients, and nothing else."""
    contenders, worker_module = module("loss_contenders"), module("loss_worker")
    head = contenders.Head("", 512, 256, 65_536, "float32")
    n_bytes = head.n_tokens * head.vocabulary * 4
    subject = worker_module.Subject(contenders.FLOOR)
    subject.prepare(*head)
    first = subject.first()
    assert len(first.laps) == 4
    assert first.extra_bytes == pytest.approx(n_bytes, rel=0.1)
    subject = worker_module.Subject("full")
    subject.prepare(*head)
    first = subject.first()
    assert first.extra_bytes is not None and 0.9 * n_bytes < first.extra_bytes < 4 * n_bytes
    assert first.kept_bytes < 0.1 * n_bytes


def test_a_worker_that_fails_says_why() -> None:
    worker_module = module("loss_worker")
    with worker_module.Worker("no such contender", 1) as worker:
        worker.prepare(module("loss_contenders").Head("", 4, 4, 8, "float32"))
        with pytest.raises(RuntimeError, match="KeyError: 'no such contender'"):
            worker.ready()


def test_floors_count_z_once_and_twice() -> None:
    assert module("loss_contenders").floor_seconds([1.0, 2.0, 4.0, 8.0]) == (7.0, 15.0)


def test_an_exponent_is_the_slope_between_logarithms() -> None:
    exponent = module("loss_scaling").exponent
    assert exponent([10, 20, 40], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert exponent([10, 20, 40], [5.0, 5.0, 5.0]) == pytest.approx(0)


def test_ratios_of_minima_and_of_medians() -> None:
    result = module("loss_tables").Result
    assert result("a", [2.0, 3.0, 10.0]).over(result("b", [1.0, 2.0, 4.0])) == (2.0, 1.5)


def test_a_peer_that_fails_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, contenders = module("loss_gpu"), module("loss_contenders")

    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel for this\nmore")

    peers = {
        "good": contenders.Contender("good", contenders.full_logits, holds_logits=True),
        "bad": contenders.Contender("bad", fails, holds_logits=False),
        "gpu": contenders.Contender("gpu", fails, holds_logits=False, needs_gpu=True),
        "away": contenders.Contender("away", fails, holds_logits=False, package="no_such_package"),
    }
    monkeypatch.setattr(gpu, "ours", lambda head, device: {})
    monkeypatch.setattr(gpu, "gpu_peers", lambda head, device: peers)
    results, three, _ = gpu.measure(gpu.Bench(gpu.SMALL, "cpu"), 2, Console(quiet=True))
    rows = [module("loss_tables").cells(result, three) for result in results]
    assert [row[1] for row in rows] == [
        "2",
        "RuntimeError: no kernel for this",
        "needs a GPU",
        "not installed",
    ]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), "--small", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(tmp_path: Path) -> None:
    out = run("loss_gpu.py", "--device", "cpu", "--rounds", "1", "--write", str(tmp_path))
    assert "liger-kernel" in out and "times the three products" in out
    assert "| ours, chunked: separable | 1 |" in (tmp_path / "loss_gpu.md").read_text()


@pytest.mark.slow
def test_the_cpu_benchmark_runs() -> None:
    out = run("loss.py", "--threads", "1", "--heads", "135m", "--no-scaling")
    assert "F.linear_cross_entropy" in out and "times as long as ours" in out


def test_writing_leaves_tables_and_plot_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = module("loss")
    monkeypatch.setattr(loss, "report_head", lambda plan, threads, console: f"## {plan.head.title}\n")
    monkeypatch.setattr(loss, "scaling", lambda sweep, threads, console, folder: f"## in {folder.name}\n")
    monkeypatch.setattr(sys, "argv", ["loss.py", "--write", str(tmp_path / "new")])
    loss.main()
    titles = [line for line in (tmp_path / "new" / "loss.md").read_text().splitlines() if "## " in line]
    assert titles == [*(f"## {plan.head.title}" for plan in loss.PLANS.values()), "## in new"]


def test_without_a_folder_they_are_built_and_the_path_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss, drawn = module("loss"), []
    monkeypatch.setattr(loss, "report_head", lambda plan, threads, console: "## table\n")
    monkeypatch.setattr(loss, "scaling", lambda sweep, threads, console, folder: drawn.append(folder) or "")
    monkeypatch.setattr(loss, "BUILD", tmp_path / "build")
    monkeypatch.setattr(sys, "argv", ["loss.py"])
    loss.main()
    assert drawn == [tmp_path / "build"] and (tmp_path / "build" / "loss.md").is_file()
    assert f"written: {tmp_path / 'build' / 'loss.md'}" in capsys.readouterr().out


def test_versions_of_the_peers_are_stated() -> None:
    machine = module("loss_tables").machine()
    assert f"torch {torch.__version__}" in machine and f"trl {metadata.version('trl')}" in machine


def test_writing_takes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loss.py", "--heads", "demo", "--write", str(tmp_path)])
    with pytest.raises(SystemExit):
        module("loss").main()
    assert "takes all heads" in capsys.readouterr().err


def test_cost_is_fitted_along_each_axis_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = module("loss_scaling")

    class Linear:
        """A worker whose time grows with T and V, and whose memory does not."""

        def __init__(self, name: str, threads: int) -> None:
            self.head = sweeps.Head("", 0, 0, 0, "bfloat16")

        def __enter__(self) -> Linear:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def prepare(self, head: object) -> None:
            self.head = head

        def ready(self) -> None:
            pass

        def first(self) -> object:
            return module("loss_worker").First([9.0], 64 * 2**20, 0)

        def again(self) -> list[float]:
            return [1e-6 * self.head.n_tokens * self.head.vocabulary]

    monkeypatch.setattr(sweeps, "Worker", Linear)
    text = sweeps.scaling(sweeps.Sweep(), 1, Console(quiet=True), tmp_path)
    rows = [line for line in text.splitlines() if "ours" in line and "separable" in line]
    assert ["~ T^1.00" in rows[0], "~ V^1.00" in rows[1]] == [True, True]
    assert all("^0.00, 64 to 64 MiB" in row for row in rows)
    assert 1_000 < (tmp_path / "loss_scaling.svg").stat().st_size < 100_000


def test_who_is_slow_runs_once_and_fewer_tokens_are_scaled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = module("loss")
    seconds = {"floor": 1.0, "full": 2.0, "torch": 30.0}

    class Fixed:
        """A worker that takes as long as it is told."""

        def __init__(self, name: str, threads: int) -> None:
            self.laps = [seconds[name]] * (4 if name == "floor" else 1)

        def __enter__(self) -> Fixed:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def prepare(self, head: object) -> None:
            pass

        def ready(self) -> None:
            pass

        def first(self) -> object:
            return module("loss_worker").First(self.laps, 2**20, 0)

        def again(self) -> list[float]:
            return self.laps

        def errors(self, n_tokens: int) -> object:
            return module("loss_errors").Errors(0.0, 0.0, 0.0)

    contenders = {name: c for name, c in loss.peers(loss.PLANS["135m"].head).items() if name in seconds}
    monkeypatch.setattr(loss, "Worker", Fixed)
    monkeypatch.setattr(loss, "ours", lambda head: {})
    monkeypatch.setattr(loss, "peers", lambda head: contenders)
    plan = loss.PLANS["135m"]._replace(rounds=3, once_s=5.0, fewer_tokens={"torch": 512})
    results, three, four = loss.measure(plan, 1, Console(quiet=True))
    assert [result.seconds for result in results] == [[2.0] * 3, [120.0]]
    assert "(T 512, time x 4)" in results[1].title
    assert (three.seconds, four.seconds) == ([3.0] * 3, [4.0] * 3)
