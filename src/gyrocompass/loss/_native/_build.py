"""The native backend's C++ is compiled on first use, once per machine, and kept.

It takes one call of the compiler, into a temporary folder beside its place, that is then renamed: a build
that is killed leaves nothing that stands in the way, and of two processes that build at once one wins and
both go on. (torch's own `cpp_extension.load` leaves a lock file after a kill, at which the next process waits
forever, and needs ninja.)

The place is `$TORCH_EXTENSIONS_DIR`, else `gyrocompass` in `$XDG_CACHE_HOME` or `~/.cache`, in a folder whose
name is a hash of all that the build depends on: the sources, the compiler's command, torch and the
processor's abilities. GYRO_NATIVE=0 switches the native backend off.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

_FOLDER = Path(__file__).parent
_LIBRARY = "gyrocompass_native.so"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-fPIC", "-shared", "-w")
_DTYPES = (torch.bfloat16, torch.float32)
_LAST_LINES = 20
"""Of what the compiler said, how much is kept."""


class Status(NamedTuple):
    """Whether there is a native backend in this process, and why not."""

    available: bool
    """For one dtype at least."""
    reason: str
    """A sentence: why not, or where it is from."""
    detail: str = ""
    """What the compiler said last, if it failed."""
    path: Path | None = None
    """The library that is loaded."""
    refused: Mapping[torch.dtype, str] = MappingProxyType({})
    """Dtypes that it does not take although it is there, and why."""

    def refusal(self, dtype: torch.dtype) -> str | None:
        """Why it does not take bf16 or float32, or None if it does."""
        return self.refused.get(dtype) if self.available else self.reason


_lock = threading.Lock()


def status() -> Status:
    """Build and load the library if that was not tried yet; the answer is the same for the whole process."""
    with _lock:
        return _status()


@functools.cache
def _status() -> Status:
    reason = _missing()
    if reason is not None:
        return Status(False, reason)
    command = _command()
    library = _cache_folder() / _key(command) / _LIBRARY
    try:
        if not library.exists():
            failure = _build(command, library)
            if failure is not None:
                return failure
        torch.ops.load_library(library)
    except OSError as error:
        return Status(False, f"the native backend's library could not be made or read: {error}", path=library)
    refused = {dtype: why for dtype in _DTYPES if (why := _refusal(dtype)) is not None}
    if len(refused) == len(_DTYPES):
        return Status(False, refused[torch.float32])
    return Status(True, "compiled for this machine", path=library, refused=refused)


def _refusal(dtype: torch.dtype) -> str | None:
    """Why a small product does not come out right, if so: oneDNN may be switched off or capped."""
    name = str(dtype).removeprefix("torch.")
    try:
        works = torch.ops.gyrocompass_native.works(dtype == torch.bfloat16)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        return f"oneDNN refuses matrix products of {name} (is it switched off or capped?): {said}"
    return None if works else f"this processor's matrix products of {name} gave a wrong answer"


def _missing() -> str | None:
    """What the build or the processor lacks, before anything is tried."""
    if os.environ.get("GYRO_NATIVE") == "0":
        return "the native backend is switched off by GYRO_NATIVE=0"
    if sys.platform != "linux":
        return "the native backend is built on Linux only"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "this processor has no AVX-512"
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler ({_compiler()}) was found; $CXX can name one"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _command() -> list[str]:
    """The compiler's command, without where to put the library."""
    home = Path(torch.__file__).parent
    return [
        _compiler(),
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(home / "include")),
        str(_FOLDER / "native.cpp"),
        *(f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]


def _cache_folder() -> Path:
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gyrocompass"


def _key(command: list[str]) -> str:
    """The name of the folder of this build."""
    digest = hashlib.sha256()
    for source in sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join([*command, torch.__version__, platform.machine(), _processor()]).encode())
    return f"native-{digest.hexdigest()[:16]}"


def _processor() -> str:
    """What this processor can do: `-march=native` code must not run on one that can do less."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


def _build(command: list[str], library: Path) -> Status | None:
    """Compile; None if the library is there afterwards."""
    print(
        "gyrocompass: compiling the native loss backend (once, about 20 s) ...", file=sys.stderr, flush=True
    )
    place = library.parent
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".building-", dir=place.parent, ignore_cleanup_errors=True
    ) as temporary:
        draft = Path(temporary) / "build"
        draft.mkdir()
        run = subprocess.run(
            [*command, "-o", str(draft / _LIBRARY)], capture_output=True, text=True, errors="replace"
        )
        if run.returncode != 0:
            said = "\n".join((run.stderr or run.stdout).splitlines()[-_LAST_LINES:])
            return Status(
                False, f"the C++ compiler ({command[0]}) failed; `gyro doctor` shows what it said", said
            )
        try:
            draft.rename(place)
        except OSError:
            # Another process was first; its library is as good.
            if not library.exists():
                raise
    return None
