"""The native backend: exact at its sizes, the same on any number of threads, built once or not at all."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from direct_backend import direct_sums, full_logits
from direct_question import EVERYTHING, Case, make
from torch import Tensor

from gyrocompass.loss import _native
from gyrocompass.loss._native import NativeBackend, _build, status
from gyrocompass.loss._noise import gumbel
from gyrocompass.loss._question import Asks, Gradients, LogitRule, Logits, Needs, Picks, Slopes, Sums
from gyrocompass.loss.logprob import token_logprobs

ENGINE = NativeBackend()
DTYPES = [torch.bfloat16, torch.float32]
needs_native = pytest.mark.skipif(not status().available, reason=status().reason)


def all_tensors(case: Case) -> Iterator[Tensor]:
    sums = ENGINE.sums(case.logits, case.picks, case.asks)
    gradients = ENGINE.gradients(case.logits, case.picks, case.slopes, EVERYTHING)
    yield from (tensor for tensor in (*sums, *gradients) if tensor is not None)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choices_are_the_best_there_are(dtype: torch.dtype) -> None:
    """Draws and top lists, whatever rounding makes of near ties."""
    case = make((130, 24, 3000), dtype, plain=False)
    sums = ENGINE.sums(case.logits, case.picks, case.asks)
    z_NV, _, allowed_NV = full_logits(case.logits)
    z_NV = torch.where(allowed_NV, z_NV, -torch.inf)
    assert case.asks.seed_N is not None and sums.drawn_N is not None and sums.top_token_NK is not None
    keys_NV = z_NV + gumbel(case.asks.seed_N, torch.arange(3000) + case.asks.first_token, torch.float64)
    chosen_N = keys_NV.gather(1, sums.drawn_N[:, None])[:, 0]
    torch.testing.assert_close(chosen_N, keys_NV.amax(1), rtol=0, atol=2e-5)
    chosen_NK = z_NV.gather(1, sums.top_token_NK)
    torch.testing.assert_close(chosen_NK, z_NV.topk(5).values, rtol=0, atol=2e-5)
    assert all(len(set(row.tolist())) == 5 for row in sums.top_token_NK)


@needs_native
def test_of_equal_logits_the_lower_token_comes_first() -> None:
    h_ND, w_VD = torch.ones(3, 2), torch.ones(1500, 2)
    logits = Logits(h_ND, w_VD, None, None, None, LogitRule())
    sums = ENGINE.sums(logits, Picks(torch.arange(0), torch.arange(0)), Asks(top=4))
    assert sums.top_token_NK is not None
    assert sums.top_token_NK.tolist() == [[0, 1, 2, 3]] * 3


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    """Bitwise: who computes a tile does not matter, and sums are added up in one order."""
    case = make((300, 48, 2000), dtype, plain=False)
    alone = list(all_tensors(case))
    torch.set_num_threads(3)
    try:
        together = list(all_tensors(case))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


FUSED = [
    (torch.float32, EVERYTHING, True, True),
    (torch.bfloat16, EVERYTHING, True, False),
    (torch.bfloat16, EVERYTHING, False, True),
    (torch.bfloat16, Needs(True, False, True, False), True, True),
]
"""Which gradients are wanted, whether the processor has matrix units, and whether logits are then kept."""


@needs_native
@pytest.mark.parametrize("rows_each", [32, 64, 96])
@pytest.mark.parametrize(("dtype", "needs", "matrix_units", "in_blocks"), FUSED)
def test_the_fused_route_answers_as_the_two_passes(
    dtype: torch.dtype,
    needs: Needs,
    matrix_units: bool,
    in_blocks: bool,
    rows_each: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In blocks whose logits are kept, or in one block without."""
    monkeypatch.setattr(_native, "_has_matrix_units", lambda: matrix_units)
    n_rows, _, vocabulary = size = (130, 15, 400)
    monkeypatch.setattr(_native, "_KEPT_BYTES", rows_each * vocabulary * 4)
    monkeypatch.setattr(_native, "_FEWEST_ROWS", 1)
    case = make(size, dtype, plain=False)
    seen = []

    def slopes_of(rows: slice, block: Sums, own: slice) -> Slopes:
        seen.append((rows, own))
        assert len(block.top_N) == rows.stop - rows.start
        by_row = (None if part is None else part[rows] for part in case.slopes[:5])
        return Slopes(*by_row, case.slopes.pick_P[own])  # type: ignore[arg-type]

    assert ENGINE.prefers_fused(case.logits, needs) == in_blocks
    sums, gradients = ENGINE.fused(case.logits, case.picks, case.asks, slopes_of, needs)
    two_passes = ENGINE.gradients(case.logits, case.picks, case.slopes, needs)
    for one, other in zip(sums, ENGINE.sums(case.logits, case.picks, case.asks), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.allclose(one, other, rtol=1e-6, atol=1e-6)
    carried = {"dw_VD", "db_VR"} if dtype == torch.bfloat16 and in_blocks else set()
    for name, one, other in zip(Gradients._fields, gradients, two_passes, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            # Near the middle between two bf16 numbers, whole numbers and float32 may go to different sides.
            bound = 5e-4 if name in carried else 1e-6
            assert float((one - other).norm()) <= bound * float(other.norm())
    each = math.ceil(n_rows / math.ceil(n_rows / rows_each)) if in_blocks else n_rows
    rows = [slice(start, min(start + each, n_rows)) for start in range(0, n_rows, each)]
    assert seen == [(block, slice(3 * block.start, 3 * block.stop)) for block in rows]


@needs_native
@pytest.mark.parametrize(
    ("dz", "answer"), [([1.0] + [2.0**-9] * 8, 1.015625), ([1.0, math.nan, 1.0], math.nan)]
)
def test_dw_of_bf16_grows_by_what_bf16_alone_would_lose(
    dz: list[float], answer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 + 8 * 2^-9: in bf16 each addition would round back to 1. A NaN in one block is one in the end."""
    monkeypatch.setattr(_native, "_has_matrix_units", lambda: False)
    monkeypatch.setattr(_native, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(_native, "_KEPT_BYTES", 32 * 100 * 4)
    dz_N = torch.zeros(32 * len(dz))
    dz_N[::32] = torch.tensor(dz)
    h_ND, w_VD = torch.zeros(len(dz_N), 40), torch.zeros(100, 40)
    h_ND[::32] = 1
    logits = Logits(h_ND.bfloat16(), w_VD.bfloat16(), None, None, None, LogitRule())

    def slopes_of(rows: slice, block: Sums, own: slice) -> Slopes:
        return Slopes(torch.zeros_like(block.top_N), dz_N[rows], None, None, None, torch.empty(0))

    none = Picks(torch.arange(0), torch.arange(0))
    _, gradients = ENGINE.fused(logits, none, Asks(), slopes_of, Needs(True, True, False, False))
    assert gradients.dw_VD is not None
    torch.testing.assert_close(
        gradients.dw_VD.float(), torch.full((100, 40), answer), rtol=0, atol=0, equal_nan=True
    )


@needs_native
def test_fused_is_preferred_where_blocks_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(vocabulary: int, dtype: torch.dtype, width: int = 2) -> Logits:
        h_ND, w_VD = torch.zeros(4096, width, dtype=dtype), torch.zeros(vocabulary, width, dtype=dtype)
        return Logits(h_ND, w_VD, None, None, None, LogitRule())

    frozen = Needs(True, False, False, False)
    assert ENGINE.prefers_fused(logits(8192, torch.float32), EVERYTHING)
    assert not ENGINE.prefers_fused(logits(128_256, torch.float32), EVERYTHING)
    for matrix_units in (False, True):
        monkeypatch.setattr(_native, "_has_matrix_units", lambda units=matrix_units: units)
        for vocabulary, width in ((8192, 1024), (49_152, 576), (128_256, 2048)):
            large = logits(vocabulary, torch.bfloat16, width)
            assert ENGINE.prefers_fused(large, EVERYTHING) is not matrix_units
        assert not ENGINE.prefers_fused(logits(128_256, torch.bfloat16, 576), EVERYTHING)
    assert ENGINE.prefers_fused(logits(8192, torch.bfloat16), frozen)
    assert not ENGINE.prefers_fused(logits(128_256, torch.bfloat16), frozen)


@needs_native
@pytest.mark.parametrize("needs", [Needs(True, False, False, False), Needs(False, True, False, False)])
def test_only_what_is_needed_is_answered(needs: Needs) -> None:
    case = make((70, 16, 400), torch.float32, plain=False)
    some = ENGINE.gradients(case.logits, case.picks, case.slopes, needs)
    every = ENGINE.gradients(case.logits, case.picks, case.slopes, EVERYTHING)
    for want, one, other in zip((*needs, needs.low_rank), some, every, strict=True):
        assert (one is not None) == want
        assert one is None or torch.equal(one, other)


@needs_native
def test_any_layout_is_taken() -> None:
    case = make((33, 10, 90), torch.bfloat16, plain=False)
    odd = case.logits._replace(
        h_ND=case.logits.h_ND.T.contiguous().T,
        w_VD=torch.cat([case.logits.w_VD, case.logits.w_VD], 1)[:, :10],
    )
    assert odd.h_ND.stride(1) != 1 and odd.w_VD.stride(0) == 20
    twisted = case._replace(logits=odd)
    assert all(
        torch.equal(one, other) for one, other in zip(all_tensors(case), all_tensors(twisted), strict=True)
    )


@needs_native
def test_tokens_that_are_not_allowed_are_nowhere() -> None:
    """A row of which nothing is left, and logits so far apart that exp is 0."""
    h_ND, w_VD = torch.tensor([[1.0], [300.0], [2.0]]), torch.linspace(-1, 1, 40)[:, None]
    floor_N = torch.tensor([-torch.inf, -torch.inf, 99.0])
    logits = Logits(h_ND, w_VD, None, None, None, LogitRule(), floor_N)
    picks = Picks(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 7]))
    asks = Asks(entropy=True, mean_logit=True, sum_sq=True)
    sums, expected = ENGINE.sums(logits, picks, asks), direct_sums(logits, picks, asks)
    for found, wanted in zip(sums, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-6, atol=1e-3)
    assert sums.exp_N[2] == 0 and sums.top_N[2] == torch.finfo(torch.float32).min
    one_N = torch.ones(3)
    slopes = Slopes(torch.zeros(3), one_N, one_N, None, one_N, one_N)
    gradients = ENGINE.gradients(logits._replace(h_ND=h_ND / 300), picks, slopes, EVERYTHING)
    assert gradients.dh_ND is not None and gradients.dh_ND[2] == 0


def test_what_it_does_not_take_it_refuses() -> None:
    wide, narrow, half = torch.zeros(2, 3), torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3).half()
    for h_ND, w_VD in [(wide, narrow), (half, half), (wide.double(), wide.double())]:
        refusal = ENGINE.refusal(Logits(h_ND, w_VD, None, None, None, LogitRule()))
        assert refusal is not None and "float32" in refusal
    double_bias = Logits(wide, wide, torch.zeros(2).double(), None, None, LogitRule())
    assert ENGINE.refusal(double_bias) is not None
    elsewhere = wide.to("meta")
    assert "CPU" in (ENGINE.refusal(Logits(elsewhere, elsewhere, None, None, None, LogitRule())) or "")


def test_factors_without_columns_are_left_to_the_chunked_backend() -> None:
    """Both end in a division by zero in the operators."""
    h_ND, w_VD, target_N = torch.zeros(2, 0), torch.zeros(5, 0), torch.tensor([1, 4])
    flat = Logits(h_ND, w_VD, None, None, None, LogitRule())
    rankless = Logits(torch.zeros(2, 3), torch.zeros(5, 3), None, h_ND, w_VD, LogitRule())
    for logits in (flat, rankless):
        assert "at least one column" in (ENGINE.refusal(logits) or "")
        h_ND, w_VD, _, a_NR, b_VR = (
            part if part is None else part.requires_grad_() for part in logits[:5]
        )  # fmt: skip
        low_rank = None if a_NR is None else (a_NR, b_VR)
        logprob_N = token_logprobs(h_ND, w_VD, target_N, low_rank=low_rank).logprob_T
        assert logprob_N.tolist() == pytest.approx([-math.log(5)] * 2)
        logprob_N.sum().backward()
        assert h_ND.grad is not None and h_ND.grad.shape == h_ND.shape


def tried(monkeypatch: pytest.MonkeyPatch, **environment: str) -> _build.Status:
    """What a process with this environment would find."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return _build._status.__wrapped__()


class Operators:
    """A library whose products work for some dtypes."""

    def __init__(self, bf16: bool | str, float32: bool | str) -> None:
        self.answers = {True: bf16, False: float32}

    def works(self, bf16: bool) -> bool:
        answer = self.answers[bf16]
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


@pytest.mark.parametrize(
    ("bf16", "float32"), [(True, True), ("not on this ISA\nat f.cpp", True), (True, False), ("no", "no")]
)
def test_a_product_that_is_refused_or_wrong_costs_its_dtype_alone(
    bf16: bool | str, float32: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build, "_missing", lambda: None)
    monkeypatch.setattr(_build, "_build", lambda *_: None)
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    monkeypatch.setattr(torch.ops, "gyrocompass_native", Operators(bf16, float32), raising=False)
    found = _build._status.__wrapped__()
    for dtype, works in ((torch.bfloat16, bf16), (torch.float32, float32)):
        refusal = found.refusal(dtype)
        assert (refusal is None) == (works is True)
        if refusal is not None:
            assert str(dtype).removeprefix("torch.") in refusal or not found.available
            assert ("wrong answer" in refusal) == (works is False) and "f.cpp" not in refusal
    assert found.available == (bf16 is True or float32 is True)


FALLS_BACK = """
import torch
from gyrocompass.loss.logprob import token_logprobs
def ask(dtype, **options):
    zeros = torch.zeros(5, 3, dtype=dtype)
    token_logprobs(zeros[:2], zeros, torch.tensor([1, 2]), **options)
ask(torch.float64), ask(torch.float16), ask(torch.float32, backend="chunked")
print("so far nothing", flush=True)
ask(torch.float32), ask(torch.bfloat16), ask(torch.float32)
"""


@pytest.mark.parametrize(("switch", "n_lines"), [("1", 1), ("0", 0)])
def test_falling_back_is_said_in_one_line(switch: str, n_lines: int) -> None:
    """Once per process, and for inputs that the native backend would take."""
    older = "torch.backends.cpu.get_cpu_capability = lambda: 'AVX2'"
    program = f"import torch; {older}\n{FALLS_BACK}"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"GYRO_NATIVE": switch},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    )
    first, *said = run.stdout.splitlines()
    assert first == "so far nothing" and len(said) == n_lines
    if said:
        assert "chunked backend" in said[0] and "AVX-512" in said[0] and "GYRO_NATIVE=0" in said[0]


needs_avx512 = pytest.mark.skipif(
    sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() != "AVX512", reason="never built here"
)


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(monkeypatch, GYRO_NATIVE="0")
    assert not found.available and "GYRO_NATIVE" in found.reason


def test_an_older_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(sys, "platform", "linux")
    assert tried(monkeypatch).reason == "this processor has no AVX-512"


@needs_avx512
def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = tried(monkeypatch, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert not found.available and "no-such-compiler" in found.reason


@needs_avx512
def test_a_build_that_fails_is_a_reason_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = script(tmp_path / "compiler", "echo 'native.cpp:1: no such header' >&2; exit 1")
    cache = tmp_path / "cache"
    found = tried(monkeypatch, CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(cache))
    assert not found.available and "compiler" in found.reason
    assert "no such header" in found.detail
    assert list(cache.iterdir()) == []
    assert "once" in capfd.readouterr().err


@needs_avx512
def test_a_compiler_that_writes_nonsense_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = script(tmp_path / "compiler", 'for last; do :; done; echo nonsense > "$last"')
    found = tried(monkeypatch, CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert not found.available and "library" in found.reason


@needs_native
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    """Both compile (here: wait, then copy), one's library stays, both use it."""
    library = status().path
    compiler = script(
        tmp_path / "compiler",
        f'for last; do :; done; echo . >> "{tmp_path}/runs"; sleep 4; cp "{library}" "$last"',
    )
    environment = os.environ | {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    program = "from gyrocompass.loss._native import status; print(status().available, status().path)"
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].strip() for process in both]
    (folder,) = (tmp_path / "cache").iterdir()
    assert answers == [f"True {folder / 'gyrocompass_native.so'}"] * 2
    assert 1 <= len((tmp_path / "runs").read_text().split()) <= 2


MEMORY = """
import pathlib, torch
from gyrocompass.loss._native import NativeBackend
from gyrocompass.loss._question import *

def ask(n_rows, width, vocabulary):
    h, w = torch.ones(n_rows, width).bfloat16(), torch.ones(vocabulary, width).bfloat16()
    row = torch.arange(n_rows)
    logits = Logits(h, w, None, None, None, LogitRule())
    picks = Picks(row, row)
    number = lambda key: int(pathlib.Path("/proc/self/status").read_text().split(key)[1].split()[0])
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = number("VmRSS:")
    sums = NativeBackend().sums(logits, picks, Asks(entropy=True))
    slopes = Slopes(sums.top_N, 1 / sums.exp_N, None, None, None, -torch.ones(n_rows))
    gradients = NativeBackend().gradients(logits, picks, slopes, Needs(True, True, False, False))
    own = sum(tensor.numel() * tensor.element_size() for tensor in gradients if tensor is not None)
    return (number("VmHWM:") - before) * 1024 - own

torch.set_num_threads(1)
ask(64, 64, 512)
print(ask(1024, 64, 60_000))
"""


@needs_native
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset")
def test_memory_beyond_the_gradients_is_small() -> None:
    """1024 x 60,000 logits are 246 MB in float32."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 40e6


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path
