"""The inside of the sandbox: builds the walls around itself, then becomes the program.

    launcher: unshare --fork--> init (process 1): mounts --fork--> limits, user, filter --exec--> program

The launcher waits for init and reports the CPU time of all; init waits for the program and reports its exit.
When init ends, the kernel kills whatever the program left behind. Without namespaces there is no init: the
filter then lets the program start no process at all.

`run.py` starts it in a fresh `python -I -S` with arguments `key=value`. It imports little (no pathlib,
no contextlib), because each program pays for it. Reports go to a pipe, one line each:

    failed: REASON          a wall could not be built; the program was not started
    exit STATUS             as in `subprocess`: negative for a signal
    cpu SECONDS
"""

from __future__ import annotations

import os
import resource
import sys
from _signal import SIGKILL, SIGTERM, signal  # type: ignore[import-not-found]  # `signal` takes 10 ms

from gyrocompass.measure.sandbox import seccomp, syscalls

BOX = "/box"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
FIRST_USER = 0x60000000
"""Above all users that systems give out."""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Job:
    """What the arguments say, and as whom the program will run."""

    def __init__(self, arguments: list[str]) -> None:
        said = dict(argument.split("=", 1) for argument in arguments)
        self.folder = said["folder"]
        self.walls = frozenset(said["walls"].split(","))
        self.readable = said["readable"].split(":")
        self.command = said["command"].split("\x1f")
        self.report = int(said["report"])
        numbers = ("cpu_seconds", "memory_bytes", "processes", "file_bytes", "open_files", "disk_bytes")
        self.limit = {name: int(said[name]) for name in numbers}
        self.namespaces = "namespaces" in self.walls
        self.drops = "user" in self.walls and os.getuid() == 0
        self.user = _unused_user() if self.drops else os.getuid()
        self.group = self.user if self.drops else os.getgid()

    def say(self, line: str) -> None:
        """One line of the report."""
        os.write(self.report, f"{line}\n".encode())


def _unused_user() -> int:
    """A user of this run alone: the process id is in it. A container may have only the first few users."""
    with open("/proc/self/uid_map", "rb") as file:
        last = max(int(first) + int(count) - 1 for first, _, count in map(bytes.split, file))
    pid = os.getpid()
    return FIRST_USER + pid if last > FIRST_USER + pid else max(1, last - pid % 4096)


def main(arguments: list[str]) -> None:
    """Run the job; the launcher's own end."""
    job = Job(arguments)
    try:
        _dies_with_parent()
        if job.namespaces:
            _leave_namespaces(job)
        child = os.fork()
        if child == 0:
            _start(job)
    except OSError as error:
        job.say(f"failed: {error}")
        os._exit(1)
    signal(SIGTERM, lambda *_: os.kill(child, SIGTERM if job.namespaces else SIGKILL))
    _, status, usage = os.wait4(child, 0)
    if not job.namespaces:
        job.say(f"exit {os.waitstatus_to_exitcode(status)}")
    job.say(f"cpu {usage.ru_utime + usage.ru_stime:.4f}")
    os._exit(0)


def _start(job: Job) -> None:
    """What the launcher forks: init, or the program where there are no namespaces."""
    try:
        if job.namespaces:
            _init(job)
        else:
            os.chdir(os.path.join(job.folder, "box"))
            _program(job)
    except OSError as error:
        job.say(f"failed: {error}")
    os._exit(1)


def _dies_with_parent() -> None:
    if sys.platform == "linux":
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, SIGKILL)


def _leave_namespaces(job: Job) -> None:
    """Root leaves them as root; an ordinary user becomes the owner of a user namespace first."""
    if job.drops:
        syscalls.unshare(syscalls.NEW_NAMESPACES)
        return
    syscalls.unshare(syscalls.NEW_NAMESPACES | syscalls.NEW_USER)
    _dies_with_parent()  # forgotten with the change of capabilities
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{job.user} {job.user} 1"),
        ("gid_map", f"{job.group} {job.group} 1"),
    ):
        _write(f"/proc/self/{name}", text.encode())


def _init(job: Job) -> None:
    """Process 1: the mounts, the program, then the end of all, waited for so that their time counts."""
    _dies_with_parent()
    signal(SIGTERM, lambda *_: _kill_others())
    _build_root(job)
    child = os.fork()
    if child == 0:
        try:
            _program(job)
        except OSError as error:
            job.say(f"failed: {error}")
        os._exit(1)
    try:
        while True:
            ended, status = os.wait()
            if ended == child:
                job.say(f"exit {os.waitstatus_to_exitcode(status)}")
                _kill_others()
    except ChildProcessError:
        os._exit(0)


def _kill_others() -> None:
    """Everything in this world but init."""
    try:
        os.kill(-1, SIGKILL)
    except ProcessLookupError:
        pass


def _build_root(job: Job) -> None:
    """A root of its own in memory: what may be read, a few devices, and the box with the program's files."""
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    root = os.path.join(job.folder, "root")
    box = root + BOX
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("tmpfs", root, "tmpfs", flags, "size=1m,mode=755")
    for path in sorted(job.readable, key=len):
        if not os.path.lexists(root + path):
            _show(root, path)
            if not os.path.islink(path):
                syscalls.make_read_only(root + path)
    for device in DEVICES:
        _show(root, device)
    os.mkdir(box)
    options = f"size={job.limit['disk_bytes']},nr_inodes=4096,mode=700"
    syscalls.mount("tmpfs", box, "tmpfs", flags, options)
    _copy(os.path.join(job.folder, "box"), box, job)
    syscalls.enter_root(root)
    syscalls.mount(None, "/", None, flags | syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
    os.chdir(BOX)


def _show(root: str, path: str) -> None:
    """Make one path of the machine visible below the new root: a link as a link, anything else by a bind."""
    inside = root + path
    os.makedirs(os.path.dirname(inside), mode=0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), inside)
        return
    if os.path.isdir(path):
        os.mkdir(inside)
    else:
        _write(inside, b"")
    syscalls.mount(path, inside, None, syscalls.MS_BIND | syscalls.MS_REC)


def _copy(source: str, target: str, job: Job) -> None:
    """The program's files, owned by the program's user."""
    for entry in os.scandir(source):
        inside = f"{target}/{entry.name}"
        if entry.is_dir():
            os.mkdir(inside)
            _copy(entry.path, inside, job)
        else:
            with open(entry.path, "rb") as file:
                _write(inside, file.read())
        os.chown(inside, job.user, job.group)
    os.chown(target, job.user, job.group)


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _program(job: Job) -> None:
    """Limits, user, files, system calls, in this order; then there is no way back."""
    box = os.getcwd()
    if job.drops and not job.namespaces:
        _own(box, job)
    _limit(job)
    if job.drops:
        os.setgroups([])
        os.setresgid(job.group, job.group, job.group)
        os.setresuid(job.user, job.user, job.user)
    os.umask(0o077)
    if sys.platform == "linux":
        _dies_with_parent()
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    if "landlock" in job.walls:
        visible = [path for path in (*job.readable, *DEVICES) if os.path.exists(path)]
        syscalls.landlock(visible, [box, "/dev/null"])
    os.set_inheritable(job.report, False)
    if job.namespaces:
        os.setsid()  # else a signal to its group would reach the launcher
    if "seccomp" in job.walls:
        seccomp.forbid(alone=not job.namespaces)
    os.execve(job.command[0], job.command, {**ENVIRONMENT, "HOME": box, "TMPDIR": box})


def _own(folder: str, job: Job) -> None:
    for place, _, names in os.walk(folder):
        for path in (place, *(f"{place}/{name}" for name in names)):
            os.chown(path, job.user, job.group)


def _limit(job: Job) -> None:
    """The limits of a process; of `processes`, init and the launcher count where they share the user."""
    limit = job.limit
    shared = 2 if job.namespaces and not job.drops else 0
    for which, soft, hard in (
        (resource.RLIMIT_CPU, limit["cpu_seconds"], limit["cpu_seconds"] + 1),
        (resource.RLIMIT_AS, limit["memory_bytes"], limit["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limit["file_bytes"], limit["file_bytes"]),
        (resource.RLIMIT_NOFILE, limit["open_files"], limit["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
        *(
            [(resource.RLIMIT_NPROC, limit["processes"] + shared, limit["processes"] + shared)]
            if job.namespaces or job.drops
            else []
        ),
    ):
        resource.setrlimit(which, (soft, hard))


if __name__ == "__main__":
    main(sys.argv[1:])
