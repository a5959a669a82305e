"""`gyro doctor`: what this machine gives, which loss backend each dtype gets, and what to do about the rest.

Problems come first, each with its remedy. One is "broken" where something fails that was asked for: a
compiler that is there and fails, a store that was named and cannot be used. Then the exit code is 1. Anything
else that could be better is a note.

Each backend is asked in the order of the engine's own choice, with tensors of the dtype, so what is printed
is what a loss would get. The native backend is built on this occasion if it was not yet. A store is opened as
every verb opens it if its folder exists; nothing is made where there is none.

Left out: whether the machine is fast (`make bench`), and anything beyond this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gyrocompass import __version__
from gyrocompass.core.errors import GyroError
from gyrocompass.core.store import Store
from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._native import Status, status
from gyrocompass.loss._question import LogitRule, Logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEFAULT_STORE = Path("gyro-store")
_FOR_DEVELOPERS = {"test", "check"}
"""Extras that are of no use to a user."""


@dataclass(frozen=True)
class Problem:
    """Something that does not work, or could work better."""

    what: str
    fix: str
    broken: bool
    """Whether it was asked for and fails."""
    detail: str = ""


@dataclass(frozen=True)
class Choice:
    """The backend that hidden states and a head of one dtype get."""

    device: str
    dtype: str
    backend: str
    refusals: dict[str, str]
    """Why those that would come before it do not take them."""


@dataclass(frozen=True)
class Native:
    """The native backend's build."""

    available: bool
    reason: str
    library: str | None
    built_in_s: float | None
    """How long the build took, if it was made just now."""
    detail: str


@dataclass(frozen=True)
class StoreState:
    """Where artifacts would go."""

    place: str
    exists: bool
    writable: bool
    database: str | None
    """Where its database is; None if it was not opened."""


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    problems: list[Problem]
    backends: list[Choice]
    native: Native
    machine: dict[str, str]
    extras: dict[str, dict[str, str | None]]
    """By extra: packages and their versions, None if not installed."""
    store: StoreState


def doctor(options: argparse.Namespace) -> int:
    """Print what was found; 1 if something that was asked for is broken."""
    if options.url is not None:
        from gyrocompass.cli.probe import probe_server

        return probe_server(options)
    report = examine(options.store, options.store_url)
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print(report, Console())
    return int(any(problem.broken for problem in report.problems))


def examine(store: Path, store_url: str | None) -> Report:
    """Look at everything once."""
    native, built = _native()
    state, store_problem = _store(store, store_url)
    problems = [*_native_problems(built), *_machine_problems()]
    if store_problem is not None:
        problems.append(store_problem)
    return Report(
        problems=sorted(problems, key=lambda problem: not problem.broken),
        backends=[_choice(device, dtype) for device in _devices() for dtype in DTYPES],
        native=native,
        machine=_machine(),
        extras=_extras(),
        store=state,
    )


# --- the loss backends ---


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _choice(device: str, dtype: torch.dtype) -> Choice:
    """Ask the backends in the engine's order until one takes the dtype."""
    h_ND, w_VD = (torch.zeros(rows, 16, dtype=dtype, device=device) for rows in (2, 32))
    logits = Logits(h_ND, w_VD, None, None, None, LogitRule())
    refusals: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        refusal = backend.refusal(logits)
        if refusal is None:
            return Choice(device, _name(dtype), name, refusals)
        refusals[name] = refusal
    raise AssertionError("the chunked backend takes everything")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")


def _native() -> tuple[Native, Status]:
    """The build's status; makes the build if there is none yet (it says so on standard error)."""
    began_at, started_s = time.time(), time.monotonic()
    built = status()
    seconds = time.monotonic() - started_s
    is_new = built.path is not None and built.path.exists() and built.path.stat().st_mtime >= began_at - 1
    native = Native(
        available=built.available,
        reason=built.reason,
        library=None if built.path is None else str(built.path),
        built_in_s=round(seconds, 1) if is_new else None,
        detail=built.detail,
    )
    return native, built


def _native_problems(built: Status) -> Iterator[Problem]:
    """What keeps the native backend from being used."""
    compiler = os.environ.get("CXX")
    for reason in built.refused.values():
        yield Problem(reason, "the chunked backend takes this dtype: same numbers, slower", broken=False)
    if built.available:
        return
    if os.environ.get("GYRO_NATIVE") == "0":
        yield Problem(built.reason, "unset GYRO_NATIVE to have it back", broken=False)
    elif built.path is not None:
        fix = "name a folder that can be written to with $TORCH_EXTENSIONS_DIR; GYRO_NATIVE=0 does without"
        yield Problem(built.reason, fix, broken=True)
    elif "failed" in built.reason or (compiler is not None and shutil.which(compiler) is None):
        fix = "install a working g++ or clang++, or name one with $CXX; GYRO_NATIVE=0 does without"
        yield Problem(built.reason, fix, broken=True, detail=built.detail or "(it said nothing)")
    else:
        yield Problem(built.reason, "the chunked backend does its work: same numbers, slower", broken=False)


# --- the machine ---


def _machine() -> dict[str, str]:
    """Versions and abilities, in words."""
    return {
        "gyrocompass": __version__,
        "torch": str(torch.__version__),
        "triton": _version("triton") or "not installed",
        "threads": f"{torch.get_num_threads()} of torch, {_usable_cores()} usable cores",
        "AVX-512": _yes(torch.backends.cpu.get_cpu_capability() == "AVX512"),
        "AMX": _yes(torch.cpu._is_amx_tile_supported()),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        "distributed": ", ".join(_distributed()) or "none",
    }


def _machine_problems() -> Iterator[Problem]:
    """Settings under which torch does less than the machine can."""
    threads, cores = torch.get_num_threads(), _usable_cores()
    if threads > cores:
        yield Problem(
            f"torch has {threads} threads on {cores} usable cores; they wait for each other",
            f"set OMP_NUM_THREADS={cores}",
            broken=False,
        )
    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        fix = "install a torch that is built for CUDA, and a driver that is new enough for it"
        yield Problem("there is a GPU that torch cannot use", fix, broken=False)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _distributed() -> list[str]:
    if not torch.distributed.is_available():
        return []
    names = ("gloo", "nccl", "mpi", "ucc")
    return [name for name in names if getattr(torch.distributed, f"is_{name}_available")()]


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


# --- packages ---


def _extras() -> dict[str, dict[str, str | None]]:
    """The extras of this package, as its own metadata name them."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in metadata.requires("gyrocompass") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        if not name or not extra or extra.group(1) in _FOR_DEVELOPERS:
            continue
        if name.group() != "gyrocompass":
            found.setdefault(extra.group(1), {})[name.group()] = _version(name.group())
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- the store ---


def _store(place: Path, url: str | None) -> tuple[StoreState, Problem | None]:
    """Whether artifacts could be written; an existing store is opened."""
    place = place.absolute()
    exists, writable, database, problem = place.is_dir(), _is_writable(place), None, None
    fix = "choose a folder that can be written to with --store or GYRO_STORE"
    asked = place != _DEFAULT_STORE.absolute() or url is not None
    if not writable:
        problem = Problem(f"no store can be written to at {place}", fix, broken=asked)
    elif exists:
        try:
            database = Store(place, url).database.place
        except GyroError as error:
            problem = Problem(error.what, error.fix or fix, broken=True, detail=error.where or "")
    return StoreState(str(place), exists, writable, database), problem


def _is_writable(place: Path) -> bool:
    """Whether a file can be made in it, or in the nearest folder above it that exists."""
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return True
    except OSError:
        return False


# --- for people ---


def _print(report: Report, console: Console) -> None:
    for problem in report.problems:
        kind = "broken" if problem.broken else "note"
        _line(console, f"{kind}: {problem.what}")
        for line in problem.detail.splitlines():
            _line(console, f"  | {line}")
        _line(console, f"  fix: {problem.fix}")
    if not report.problems:
        _line(console, "no problems")
    console.print()
    console.print(_backend_table(report))
    native, store = report.native, report.store
    place = "" if native.library is None else f", {native.library}"
    when = "" if native.built_in_s is None else f" (just now, in {native.built_in_s} s)"
    state = "writable" if store.writable else "not writable"
    facts = report.machine | {
        "native": f"{native.reason}{when}{place}",
        "store": f"{store.place}, {state if store.exists else f'not there yet, {state}'}",
    }
    if store.database is not None:
        facts["database"] = store.database
    for extra, packages in report.extras.items():
        versions = (f"{name} {version or '(not installed)'}" for name, version in packages.items())
        facts[f"extra {extra}"] = ", ".join(versions)
    console.print(_facts_table(facts))


def _backend_table(report: Report) -> Table:
    table = Table(title="loss backends, by dtype", title_justify="left")
    for column in ("device", "dtype", "backend", "why not the ones before"):
        table.add_column(column, overflow="fold")
    for device, dtype, backend, refusals in (
        (choice.device, choice.dtype, choice.backend, choice.refusals) for choice in report.backends
    ):
        why = "\n".join(f"{name}: {refusal}" for name, refusal in refusals.items())
        table.add_row(device, dtype, backend, why)
    return table


def _facts_table(facts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
