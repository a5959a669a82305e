"""Run programs elsewhere than the tests can: python ordinary_user.py FOLDER [WALL,...] < programs.

Reads a JSON list of sources, writes a JSON list of outcomes: as an ordinary user, or as root behind the given
walls. The interpreter is bound to FOLDER first: root's own may lie where nobody else can reach it.
"""

from __future__ import annotations

import json
import os
import sys

from gyrocompass.measure.sandbox import syscalls
from gyrocompass.measure.sandbox.run import Program, SandboxConfig, _run, sandbox_abilities

NEW_MOUNTS = 0x00020000
USER = 54_321


def main(folder: str, walls: str | None = None) -> None:
    syscalls.unshare(NEW_MOUNTS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount(sys.base_prefix, folder, None, syscalls.MS_BIND)
    executable = os.path.realpath(sys.executable)
    sys._base_executable = folder + executable.removeprefix(os.path.realpath(sys.base_prefix))
    sys.base_prefix = folder
    if walls is None:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        walls = ",".join(sandbox_abilities().walls)
    config = SandboxConfig(wall_seconds=20.0)
    programs = [Program(source) for source in json.load(sys.stdin)]
    outcomes = [_run(program, config, frozenset(walls.split(","))) for program in programs]
    print(json.dumps({"walls": walls, "outcomes": [outcome._asdict() for outcome in outcomes]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
