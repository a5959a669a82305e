"""Run a Python program that nobody has read, so that nothing but its own end can come of it.

    Program, SandboxConfig --run_program--> Outcome
    programs               --run_many-----> outcomes, a bounded number at a time

What is promised, and by which wall of the kernel it is kept:

    time, memory, sizes   limits of the process, a clock outside; always
    files                 a root of its own in memory (mount namespace); Landlock
    network               a network without devices (network namespace); a filter of system calls
    processes             ids of their own, all killed with the first (PID namespace), and a limit on their
                          number; without namespaces the filter lets the program start none
    user                  root becomes a user that nobody else is

What a machine can do is found out once, by doing it (`sandbox_abilities`). Where a promise cannot be kept,
nothing is run, unless the caller allows that promise to be missing. Where two walls keep the same promise,
both are built.

The program runs as `python -I -S` in a folder of its own with a clean environment: the standard library
alone, or with `packages: true` what the caller's environment has installed (the start then takes longer).

A run costs about 50 ms of CPU, 30 of them for the two bare interpreters (the launcher's and the program's).

Left out: a limit on the memory of all processes together (each has `memory_mib`, and there are at most
`processes`), protection from a bug of the kernel itself, and anything but Linux, where only limits are kept.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from gyrocompass.core.config import Config
from gyrocompass.core.errors import GyroError

Wall = Literal["namespaces", "user", "landlock", "seccomp"]
Promise = Literal["files", "network", "processes", "user"]
Reason = Literal["ok", "error", "timeout", "memory", "killed", "output"]

KEPT_BY: Mapping[Promise, tuple[Wall, ...]] = {
    "files": ("namespaces", "landlock"),
    "network": ("namespaces", "seccomp"),
    "processes": ("namespaces", "seccomp"),
    "user": ("user",),
}
"""Each promise and the walls of which one is enough."""

_PACKAGE = Path(__file__).parents[2]
_LAUNCH = (  # a bare package instead of ours, whose __init__ imports typing: 16 ms
    "import sys; package = type(sys)('gyrocompass'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['gyrocompass'] = package; "
    "from gyrocompass.measure.sandbox.launch import main; main(sys.argv[2:])"
)
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime")
_GRACE_SECONDS = 2.0
_MIB = 2**20


class SandboxConfig(Config):
    """What a program may use, and what a machine may lack."""

    cpu_seconds: PositiveInt = 5
    """Of each process."""
    wall_seconds: PositiveFloat = 10.0
    """Of the whole run, its start included."""
    memory_mib: int = Field(default=512, ge=64)
    """Address space of each process."""
    processes: PositiveInt = 8
    """Processes and threads at one time."""
    file_mib: PositiveInt = 16
    """The largest file."""
    disk_mib: PositiveInt = 64
    """All files together; kept by namespaces."""
    open_files: int = Field(default=64, ge=8)
    output_kib: PositiveInt = 256
    """Of standard output and of standard error, each; more than this ends the run."""
    packages: bool = False
    """Whether installed packages can be imported."""
    workers: PositiveInt | None = None
    """Programs at one time; by default one for each CPU."""
    allow_missing: frozenset[Promise] = frozenset()
    """Promises that may be broken where the machine cannot keep them."""


class Program(NamedTuple):
    """A Python text to run, its input, and the files that lie beside it."""

    source: str
    stdin: str = ""
    files: Mapping[str, str] = {}
    """Relative path: text."""


class Outcome(NamedTuple):
    """What came of a program."""

    status: int | None
    """The exit status; negative for a signal; None where the run was ended from outside."""
    reason: Reason
    """ok and error (by the exit status); timeout (CPU or wall); memory (it died of a MemoryError); output (it
    wrote too much); killed (by a signal)."""
    stdout: str
    stderr: str
    cpu_seconds: float
    """Of all its processes."""


class Abilities(NamedTuple):
    """Which walls stand on this machine, and why the others do not."""

    walls: frozenset[Wall]
    why_not: Mapping[Wall, str]

    @property
    def missing(self) -> frozenset[Promise]:
        """The promises that cannot be kept here."""
        return frozenset(promise for promise, walls in KEPT_BY.items() if not self.walls.intersection(walls))


def run_program(program: Program, config: SandboxConfig | None = None) -> Outcome:
    """Run one program and wait for its end.

    Raises:
        GyroError: the machine cannot keep a promise that `allow_missing` does not name; the sandbox could not
            be built.
    """
    config = config or SandboxConfig()
    return _run(program, config, _checked_walls(config))


def run_many(programs: Sequence[Program], config: SandboxConfig | None = None) -> list[Outcome]:
    """Run programs, at most `workers` at a time; the outcomes are in the order of the programs.

    Raises:
        GyroError: as `run_program`.
    """
    config = config or SandboxConfig()
    walls = _checked_walls(config)
    workers = config.workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: _run(program, config, walls), programs))


@cache
def sandbox_abilities() -> Abilities:
    """Find out which walls can be built here, by building each on top of those before it."""
    walls: frozenset[Wall] = frozenset()
    why_not: dict[Wall, str] = {}
    for wall in get_args(Wall):
        with_it: frozenset[Wall] = walls | {wall}
        try:
            # Root makes namespaces as root, so they are of use only with another user to be afterwards.
            others: frozenset[Wall] = frozenset({"user"} if wall == "namespaces" else ())
            outcome = _run(Program(""), SandboxConfig(), with_it | others)
            if outcome.reason != "ok":
                raise GyroError(f"an empty program ended with {outcome.reason}: {outcome.stderr.strip()}")
            walls = with_it
        except GyroError as error:
            why_not[wall] = error.what
    return Abilities(walls, why_not)


def _checked_walls(config: SandboxConfig) -> frozenset[Wall]:
    """The walls of this machine, if they are enough."""
    abilities = sandbox_abilities()
    missing = abilities.missing - config.allow_missing
    if missing:
        reasons = "; ".join(f"no {wall}: {why}" for wall, why in abilities.why_not.items())
        raise GyroError(
            f"this machine cannot contain programs: nothing would guard {', '.join(sorted(missing))}",
            where=reasons,
            fix="run on Linux 5.13 or newer with user namespaces or Landlock and seccomp (a container: allow "
            f"unshare and mount), or accept the risk with allow_missing: [{', '.join(sorted(missing))}]",
        )
    return abilities.walls


def _run(program: Program, config: SandboxConfig, walls: frozenset[Wall]) -> Outcome:
    """Run a program behind the given walls."""
    folder = Path(tempfile.mkdtemp(prefix="gyro-box-"))
    try:
        _lay_out(folder, program)
        return _Run(folder, config, walls).outcome()
    finally:
        _remove(folder)


def _lay_out(folder: Path, program: Program) -> None:
    """What the launcher reads: box/ with main.py and the files, root/ for the mounts, the input."""
    folder.chmod(0o711)  # the program may run as another user
    (folder / "root").mkdir()
    box = folder / "box"
    box.mkdir(mode=0o700)
    (folder / "input").write_text(program.stdin, encoding="utf-8", errors="surrogatepass")
    for name, text in {**program.files, "main.py": program.source}.items():
        path = box / name
        assert path.resolve().is_relative_to(box.resolve()), f"{name} lies outside the program's folder"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):  # modes, or nested too deep for Python
        subprocess.run(["rm", "-rf", str(folder)], check=False, stderr=subprocess.DEVNULL)


class _Run:
    """One launcher, watched: the clock, the flood, the report."""

    def __init__(self, folder: Path, config: SandboxConfig, walls: frozenset[Wall]) -> None:
        self.config = config
        self.stopped: Reason | None = None
        report, self.report_end = os.pipe()
        self.deadline = time.monotonic() + config.wall_seconds
        with (folder / "input").open("rb") as stdin:
            self.process = subprocess.Popen(
                _command(folder, config, walls, self.report_end),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[self.report_end],
                env={},
                start_new_session=True,
            )
        os.close(self.report_end)
        assert self.process.stdout and self.process.stderr
        self.report = report
        self.streams = {report: "report"}
        self.streams |= {self.process.stdout.fileno(): "stdout", self.process.stderr.fileno(): "stderr"}
        self.read = {name: bytearray() for name in self.streams.values()}

    def outcome(self) -> Outcome:
        """Wait, stop it if need be, and say what came of it."""
        try:
            self._watch()
        finally:
            # While the launcher is not yet waited for, its id is its group's and nobody else's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with self.process:  # closes its pipes and waits for it
                os.close(self.report)
        return self._judge()

    def _watch(self) -> None:
        """Read until the report ends, which is when the launcher and everything in it have ended."""
        with selectors.DefaultSelector() as selector:
            for stream in self.streams:
                os.set_blocking(stream, False)
                selector.register(stream, selectors.EVENT_READ)
            while self.report in selector.get_map():
                ready = selector.select(max(0.0, self.deadline - time.monotonic()))
                if not ready:
                    if self.stopped:  # the launcher did not obey in time
                        return
                    self._stop("timeout")
                for key, _ in ready:
                    if not self._take(key.fd):
                        selector.unregister(key.fd)
            for key in list(selector.get_map().values()):
                with contextlib.suppress(BlockingIOError):
                    while self._take(key.fd):
                        pass

    def _take(self, stream: int) -> bool:
        """Read what there is; False at the end of the stream."""
        name = self.streams[stream]
        chunk = os.read(stream, 1 << 16)
        kept = self.read[name]
        room = self.config.output_kib * 1024 - len(kept)
        kept += chunk[:room]
        if len(chunk) > room and not self.stopped:
            self._stop("output")
        return bool(chunk)

    def _stop(self, reason: Reason) -> None:
        self.stopped = reason
        self.deadline = time.monotonic() + _GRACE_SECONDS
        self.process.send_signal(signal.SIGTERM)

    def _judge(self) -> Outcome:
        report = dict(line.split(" ", 1) for line in self.read["report"].decode().splitlines())
        stdout, stderr = (self.read[name].decode(errors="replace") for name in ("stdout", "stderr"))
        died = "cpu" in report or self.process.returncode == -signal.SIGKILL
        if "failed:" in report or not (self.stopped or died):
            raise GyroError(
                f"the sandbox could not be built: {report.get('failed:') or stderr.strip() or 'no report'}",
                fix="see gyrocompass.measure.sandbox.run for what it needs",
            )
        cpu_seconds = float(report.get("cpu", 0.0))
        if self.stopped or "exit" not in report:  # killed: by the kernel, for want of memory
            return Outcome(None, self.stopped or "killed", stdout, stderr, cpu_seconds)
        status = int(report["exit"])
        return Outcome(status, self._reason(status, stderr, cpu_seconds), stdout, stderr, cpu_seconds)

    def _reason(self, status: int, stderr: str, cpu_seconds: float) -> Reason:
        if status == 0:
            return "ok"
        out_of_time = status == -signal.SIGKILL and cpu_seconds >= self.config.cpu_seconds
        if status == -signal.SIGXCPU or out_of_time:
            return "timeout"
        if status < 0:
            return "killed"
        last_line = stderr.rstrip().rpartition("\n")[2]
        return "memory" if "MemoryError" in last_line.partition(":")[0] else "error"


def _command(folder: Path, config: SandboxConfig, walls: frozenset[Wall], report: int) -> list[str]:
    """The launcher's command line; its arguments are described in `launch.py`."""
    base = str(getattr(sys, "_base_executable", sys.executable))
    program = [sys.executable, "-I"] if config.packages else [base, "-I", "-S"]
    readable = [*_SYSTEM, sys.base_prefix, *([sys.prefix] if config.packages else [])]
    readable += [os.path.realpath(path) for path in readable]
    arguments = {
        "folder": folder,
        "walls": ",".join(sorted(walls)),
        "readable": ":".join(dict.fromkeys(path for path in readable if os.path.lexists(path))),
        "command": "\x1f".join([*program, "-B", "-X", "utf8", "main.py"]),
        "report": report,
        "cpu_seconds": config.cpu_seconds,
        "memory_bytes": config.memory_mib * _MIB,
        "processes": config.processes,
        "file_bytes": config.file_mib * _MIB,
        "open_files": config.open_files,
        "disk_bytes": config.disk_mib * _MIB,
    }
    words = [f"{key}={value}" for key, value in arguments.items()]
    return [base, "-I", "-S", "-c", _LAUNCH, str(_PACKAGE), *words]
