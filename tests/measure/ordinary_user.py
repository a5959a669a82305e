"""Run programs as an ordinary user, from a test that runs as root: ordinary_user.py FOLDER < programs.

Reads a JSON list of sources, writes a JSON list of outcomes. The interpreter is bound to FOLDER first:
root's own may lie where nobody else can reach it.
"""

from __future__ import annotations

import json
import os
import sys

from gyrocompass.measure.sandbox import syscalls
from gyrocompass.measure.sandbox.run import Program, SandboxConfig, run_program, sandbox_abilities

NEW_MOUNTS = 0x00020000
USER = 54_321


def main(folder: str) -> None:
    syscalls.unshare(NEW_MOUNTS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount(sys.base_prefix, folder, None, syscalls.MS_BIND)
    executable = os.path.realpath(sys.executable)
    sys._base_executable = folder + executable.removeprefix(os.path.realpath(sys.base_prefix))
    sys.base_prefix = folder
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    config = SandboxConfig(wall_seconds=20.0, allow_missing=sandbox_abilities().missing)
    outcomes = [run_program(Program(source), config) for source in json.load(sys.stdin)]
    walls = sorted(sandbox_abilities().walls)
    print(json.dumps({"walls": walls, "outcomes": [outcome._asdict() for outcome in outcomes]}))


if __name__ == "__main__":
    main(sys.argv[1])
