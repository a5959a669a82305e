"""The system calls that Python's `os` does not offer: namespaces, mounts, Landlock, prctl.

Runs inside the launcher, so it imports nothing but ctypes and os. Numbers above 423 are the same on all
architectures; those below stand in `seccomp.py`.

Sources: the Linux manual pages unshare(2), mount_setattr(2), landlock(7), prctl(2).
"""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)

MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446

NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""Mounts, host name, IPC, process ids, network."""
NEW_USER = 0x10000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
SIGKILL = 9

LANDLOCK_TRUNCATE_ABI = 3
"""The first Landlock that covers truncation."""
_LANDLOCK_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Every access to files that a version knows, by the version that added it."""
_LANDLOCK_READ = 0b1101
"""Execute, read a file, list a folder."""
_LANDLOCK_OF_FILES = 0b0111 | 1 << 14 | 1 << 15
"""What a rule about a file, not a folder, may grant."""
_PATH_BENEATH = 1


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def checked(result: int, what: str) -> int:
    """The result of a system call, or its error as an OSError."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int) -> None:
    """One of the process's attributes; raises OSError."""
    checked(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def unshare(flags: int) -> None:
    """Leave the namespaces of the parent; raises OSError."""
    checked(libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2); raises OSError."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    result = libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    checked(result, f"mount {target}")


def make_read_only(target: str) -> None:
    """A mount and all below it: nothing can be written, no setuid, no devices; raises OSError."""
    attributes = _MountAttributes(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    path = os.fsencode(target)
    result = libc.syscall(MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, ctypes.byref(attributes), size)
    checked(result, f"mount_setattr {target}")


def enter_root(folder: str) -> None:
    """Make a mounted folder the root; what was the root before can no longer be reached; raises OSError."""
    os.chdir(folder)
    pivot_root = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    checked(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    checked(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def landlock_version() -> int:
    """The kernel's Landlock version; 0 where it has none."""
    return max(0, int(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)))


def landlock(readable: list[str], writable: list[str]) -> None:
    """From now on files can be reached only below these paths; needs PR_SET_NO_NEW_PRIVS; raises OSError."""
    version = landlock_version()
    every = _LANDLOCK_ALL[max(known for known in _LANDLOCK_ALL if known <= version)]
    attributes = _RulesetAttributes(every)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = checked(libc.syscall(LANDLOCK_CREATE, ctypes.byref(attributes), size, 0), "landlock")
    for paths, access in ((readable, _LANDLOCK_READ), (writable, every)):
        for path in paths:
            _allow_beneath(ruleset, path, access)
    checked(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _allow_beneath(ruleset: int, path: str, access: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        access &= _LANDLOCK_OF_FILES
    rule = _PathBeneath(access, opened)
    checked(libc.syscall(LANDLOCK_ADD, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0), f"landlock {path}")
    os.close(opened)
