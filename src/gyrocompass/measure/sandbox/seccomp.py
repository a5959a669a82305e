"""The system-call filter: what a program under test never needs is refused with EPERM.

Refused to every program: sockets, tracing and reaching into other processes, new namespaces and mounts, keys,
BPF, io_uring and other ways around a filter, System V shared memory (which no memory limit counts). `clone3`
answers ENOSYS, because a filter cannot see its flags; the C library then falls back to `clone`.

`alone` is for kernels without namespaces, where the processes of others are in reach: then no new process can
be made (threads can), signals reach none but the program itself, and the modes and times of files stay as
they are, which Landlock does not cover.

Sources: seccomp(2); the kernel's tables of system calls; Linux `include/uapi/linux/bpf_common.h`.
"""

from __future__ import annotations

import ctypes
import errno
import os

from gyrocompass.measure.sandbox.syscalls import checked, libc

_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # name: (x86_64, aarch64)
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "open_by_handle_at": (304, 265),
}
_ALONE: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
}
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine: its column above, and its AUDIT_ARCH."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARGUMENT = 0, 4, 16
"""Offsets in struct seccomp_data; of an argument (little endian) the low half."""
_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020000
_X32 = 0x40000000
_SET_MODE_FILTER, _PR_SET_SECCOMP = 2, 22


class _Filter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filters", ctypes.POINTER(_Filter)))


def is_known_machine() -> bool:
    """Whether the numbers of this machine's system calls stand here."""
    return os.uname().machine in _ARCHITECTURES


def forbid(alone: bool) -> None:
    """Install the filter for this process and all it starts; needs PR_SET_NO_NEW_PRIVS; raises OSError.

    Args:
        alone: also no new process, and no signal to another one; see the module docstring.
    """
    rules = _rules(alone, os.getpid())
    filters = (_Filter * len(rules))(*(_Filter(*rule) for rule in rules))
    program = _Program(len(rules), filters)
    result = libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SET_MODE_FILTER), ctypes.byref(program), 0, 0)
    checked(result, "seccomp")


def _rules(alone: bool, own: int) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, value)."""
    column, architecture = _ARCHITECTURES[os.uname().machine]
    refuse = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    rules = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NR),
        *([(_AT_LEAST, 0, 1, _X32), refuse] if column == 0 else []),
        (_EQUAL, 0, 1, _CLONE3[column]),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]
    refused = {**_NUMBERS, **(_ALONE if alone else {})}
    for numbers in refused.values():
        number = numbers[column]
        if number is not None:
            rules += [(_EQUAL, 0, 1, number), refuse]
    rules += [(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _ARGUMENT), (_ANY_BIT, 0, 1, _CLONE_NEW), refuse]
    rules += [(_LOAD, 0, 0, _NR)]
    if alone:
        rules += [
            (_EQUAL, 0, 4, _CLONE[column]),
            (_LOAD, 0, 0, _ARGUMENT),
            (_ANY_BIT, 1, 0, _CLONE_THREAD),
            refuse,
        ]
        rules += [(_LOAD, 0, 0, _NR)]
        for numbers, harmless in ((_KILL, own), (_TGKILL, own), (_PRLIMIT, 0)):
            rules += [
                (_EQUAL, 0, 4, numbers[column]),
                (_LOAD, 0, 0, _ARGUMENT),
                (_EQUAL, 1, 0, harmless),
                refuse,
            ]
            rules += [(_LOAD, 0, 0, _NR)]
    return [*rules, (_RETURN, 0, 0, _ALLOW)]
