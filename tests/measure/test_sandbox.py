"""The sandbox: what hostile programs try, behind each set of walls, as root and as an ordinary user."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gyrocompass.core.config import parse
from gyrocompass.core.errors import ConfigError, GyroError
from gyrocompass.measure.sandbox import run as sandbox
from gyrocompass.measure.sandbox.run import (
    Outcome,
    Program,
    SandboxConfig,
    Wall,
    run_many,
    run_program,
    sandbox_abilities,
)

TIGHT = SandboxConfig(cpu_seconds=1, wall_seconds=20.0)

FORK_BOMB = """
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(1000)
        made += 1
except OSError:
    print(made)
"""
STRAGGLER = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/bin/sleep", ["sleep", "{seconds}"])
    os._exit(0)
os.wait()
"""

WALLS: dict[str, frozenset[Wall]] = {
    "all": frozenset({"namespaces", "user", "landlock", "seccomp"}),
    "namespaces": frozenset({"namespaces", "user"}),
    "filters": frozenset({"landlock", "seccomp"}),
}


@pytest.fixture(params=WALLS)
def walls(request: pytest.FixtureRequest) -> frozenset[Wall]:
    chosen = WALLS[request.param]
    if not chosen <= sandbox_abilities().walls:
        pytest.skip(f"no {', '.join(chosen - sandbox_abilities().walls)} on this machine")
    return chosen


def contained(walls: frozenset[Wall], source: str, config: SandboxConfig = TIGHT) -> Outcome:
    return sandbox._run(Program(source), config, walls)


def running(argument: str) -> bool:
    """Whether a process with this argument runs anywhere on the machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def test_this_machine_keeps_every_promise() -> None:
    assert sandbox_abilities().missing == frozenset()


def test_a_program_runs_with_its_input_and_its_files() -> None:
    source = "import helper; print(helper.double(input()), open('data/a.txt').read())"
    source = f"import sys; sys.path.insert(0, '.')\n{source}"
    files = {"helper.py": "def double(text): return text * 2", "data/a.txt": "beside"}
    outcome = run_program(Program(source, stdin="ab\n", files=files))
    assert outcome[:4] == (0, "ok", "abab beside\n", "")
    assert 0 < outcome.cpu_seconds < 5


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("raise SystemExit(3)", 3, "error"),
        ("1 / 0", 1, "error"),
        ("import os; os.abort()", -6, "killed"),
        ("def f(): (", 1, "error"),
    ],
)
def test_the_status_and_the_reason(source: str, status: int, reason: str) -> None:
    assert run_program(Program(source))[:2] == (status, reason)


def test_a_fork_bomb_is_contained(walls: frozenset[Wall]) -> None:
    outcome = contained(walls, FORK_BOMB)
    assert outcome.reason == "ok" and int(outcome.stdout) < TIGHT.processes


def test_an_endless_loop_ends(walls: frozenset[Wall]) -> None:
    outcome = contained(walls, "while True: pass")
    assert outcome.reason == "timeout" and outcome.cpu_seconds >= 0.9


def test_the_clock_ends_one_that_waits_and_all_its_time_counts(walls: frozenset[Wall]) -> None:
    began = time.monotonic()
    outcome = contained(walls, "import time\nwhile True: time.sleep(1)", SandboxConfig(wall_seconds=1.0))
    assert outcome.reason == "timeout" and outcome.status is None
    assert outcome.cpu_seconds > 0 and time.monotonic() - began < 10


def test_ten_gigabytes_are_refused(walls: frozenset[Wall]) -> None:
    outcome = contained(walls, "x = bytearray(10 * 2**30)")
    assert (outcome.status, outcome.reason) == (1, "memory")


def test_no_file_outside_is_read_written_or_deleted(walls: frozenset[Wall], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    secret.chmod(0o666)
    source = f"""
import os
def attempt(name, action):
    try:
        print(name, action())
    except OSError:
        print(name, "refused")
attempt("read", lambda: open({str(secret)!r}).read())
attempt("write", lambda: open({str(secret)!r}, "w"))
attempt("truncate", lambda: os.truncate({str(secret)!r}, 0))
attempt("create", lambda: open({str(tmp_path / "new")!r}, "w"))
attempt("delete", lambda: os.unlink({str(secret)!r}))
attempt("list", lambda: os.listdir({str(tmp_path)!r}))
attempt("chmod", lambda: os.chmod({str(secret)!r}, 0))
attempt("library", lambda: open(os.__file__, "a"))
attempt("shadow", lambda: open("/etc/shadow").read())
attempt("environment", lambda: open(f"/proc/{os.getppid()}/environ").read())
attempt("dots", lambda: open("../../../../../../tmp/dots", "w"))
open("inside", "w").write("mine")
print("inside", open("inside").read())
"""
    lines = contained(walls, source).stdout.splitlines()
    assert lines[-1] == "inside mine"
    assert len(lines) == 12 and all(line.endswith(" refused") for line in lines[:-1]), lines
    assert secret.read_text() == "the secret" and secret.stat().st_mode & 0o777 == 0o666
    assert [*tmp_path.iterdir()] == [secret]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def test_no_connection_is_made(walls: frozenset[Wall], listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    source = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2).send(b'out')"
    assert contained(walls, source).reason == "error"
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_a_flood_of_output_ends_the_run(walls: frozenset[Wall]) -> None:
    outcome = contained(walls, "while True: print('x' * 9999)", SandboxConfig(output_kib=64, wall_seconds=20))
    assert outcome.reason == "output" and len(outcome.stdout) == 64 * 1024


def test_no_child_outlives_its_parent(walls: frozenset[Wall]) -> None:
    seconds = f"{1e6 + os.getpid()}"
    contained(walls, STRAGGLER.replace("{seconds}", seconds))
    assert not running(seconds)


def test_nothing_of_the_caller_is_in_reach(walls: frozenset[Wall], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    outside = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(outside, True)
    source = f"""
import os, sys
print(sorted(os.environ), sys.flags.isolated, os.getuid(), "site" in sys.modules)
try:
    os.fstat({outside})
except OSError:
    print("closed")
for victim in ({os.getpid()}, os.getppid(), 1):
    try:
        if victim: os.kill(victim, 9)
    except OSError:
        print("safe")
"""
    outcome = contained(walls, source)
    os.close(outside)
    environment, *rest = outcome.stdout.splitlines()
    assert "API_KEY" not in environment and " 1 " in environment and environment.endswith("False")
    assert rest[0] == "closed" and len(rest) >= 2
    if "user" in walls:
        assert environment.split()[-2] != "0"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
def test_the_filter_refuses_what_no_program_needs() -> None:
    """unshare, ptrace, mount, shmget, io_uring_setup, bpf, the x32 twin of getpid; clone3 is not there."""
    source = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in (272, 101, 165, 29, 425, 321, 0x40000000 | 39, 435):
    libc.syscall(number, 0, 0, 0, 0, 0)
    print(ctypes.get_errno())
"""
    assert run_program(Program(source)).stdout.split() == ["1"] * 7 + ["38"]


@pytest.mark.parametrize(
    "source",
    [
        "f = open('a', 'wb')\nwhile True: f.write(bytes(2**20))",
        "for i in range(500): open(str(i), 'wb').write(bytes(2**20))",
        "held = [open('main.py') for _ in range(999)]",
    ],
)
def test_files_have_limits(source: str) -> None:
    outcome = run_program(Program(source))
    assert outcome.reason == "error" and "OSError" in outcome.stderr


def test_installed_packages_are_there_when_asked_for() -> None:
    program = Program("import numpy; print(int(numpy.arange(4).sum()))")
    config = SandboxConfig(packages=True, memory_mib=2048, wall_seconds=60, cpu_seconds=30)
    assert run_program(program).reason == "error"
    assert run_program(program, config).stdout == "6\n"


def test_many_programs_keep_their_order() -> None:
    programs = [Program(f"print({index})") for index in range(6)]
    outcomes = run_many(programs, SandboxConfig(workers=2))
    assert [outcome.stdout for outcome in outcomes] == [f"{index}\n" for index in range(6)]
    assert run_many([], SandboxConfig()) == []


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    contained(sandbox_abilities().walls, "open('a', 'w')")
    deep = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')"
    contained(sandbox_abilities().walls & WALLS["filters"], deep)
    assert not [*tmp_path.iterdir()]


def test_what_a_machine_lacks_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = sandbox.Abilities(frozenset({"user"}), {"namespaces": "unshare: Operation not permitted"})
    monkeypatch.setattr(sandbox, "sandbox_abilities", lambda: bare)
    with pytest.raises(GyroError, match=r"files, network, processes") as raised:
        run_program(Program("print(1)"), SandboxConfig(allow_missing=frozenset({"user"})))
    assert "Operation not permitted" in str(raised.value) and "allow_missing" in str(raised.value)
    monkeypatch.setattr(sandbox, "sandbox_abilities", lambda: bare._replace(walls=frozenset()))
    allowed = SandboxConfig(allow_missing=frozenset({"files", "network", "processes", "user"}))
    assert run_program(Program("print(1)"), allowed).stdout == "1\n"


def test_a_wall_that_cannot_be_built_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_SYSTEM", ("/nowhere",))
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")
    with pytest.raises(GyroError, match="could not be built"):
        run_program(Program(""))


def test_an_unknown_promise_is_named() -> None:
    with pytest.raises(ConfigError, match="network"):
        parse(SandboxConfig, {"allow_missing": ["netwrk"]})


def elsewhere(tmp_path: Path, sources: list[str], *walls: str) -> tuple[str, list[Outcome]]:
    """The walls and outcomes of `ordinary_user.py`."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    interpreter = tmp_path / "interpreter"
    interpreter.mkdir()
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("ordinary_user.py"), interpreter, *walls],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    return answer["walls"], [Outcome(**outcome) for outcome in answer["outcomes"]]


only_root = pytest.mark.skipif(os.getuid() != 0, reason="the other tests already run as an ordinary user")


@only_root
def test_an_ordinary_user_is_as_well_guarded(tmp_path: Path, listener: socket.socket) -> None:
    seconds = f"{2e6 + os.getpid()}"
    sources = [
        FORK_BOMB,
        STRAGGLER.replace("{seconds}", seconds),
        f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 2)",
        "open('/tmp/outside', 'w')",
        "print(open('/etc/passwd').read())",
        "import os; os.kill(0, 9)",
        "print('fine')",
    ]
    walls, outcomes = elsewhere(tmp_path, sources)
    if "namespaces" not in walls and "seccomp" not in walls:
        pytest.skip("this machine gives an ordinary user no walls")
    bomb, straggler, connection, *files, itself, fine = outcomes
    assert bomb.reason == "ok" and int(bomb.stdout) < 8
    assert not running(seconds), straggler
    assert [outcome.reason for outcome in (connection, *files)] == ["error"] * 3
    assert not Path("/tmp/outside").exists()
    assert itself.reason in ("killed", "error")
    assert fine.stdout == "fine\n"


@only_root
def test_root_without_namespaces_still_becomes_another_user(tmp_path: Path) -> None:
    """As in a container that may not unshare."""
    source = """
import os
open(os.path.join(os.environ["HOME"], "inside"), "w").write("mine")
print(os.getuid() > 0, open("inside").read())
for path in ("/etc/passwd", "../input"):
    try:
        open(path)
    except OSError:
        print("refused")
"""
    _, (seen, bomb) = elsewhere(tmp_path, [source, FORK_BOMB], "user,landlock,seccomp")
    assert seen.stdout.split() == ["True", "mine", "refused", "refused"], seen.stderr
    assert bomb.stdout == "0\n"
