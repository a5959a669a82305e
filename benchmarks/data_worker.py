"""One contender in a process of its own, and what it took: CPU seconds and the highest resident memory.

    python data_worker.py duplicates NAME DOCUMENTS PAIRS      (pairs of ids are written, one a line)
    python data_worker.py scaling DOCUMENTS MEMORY_MB          (a made corpus of so many documents)
    python data_worker.py version NAME                         (null: not installed)

The last line on standard output is JSON. CPU seconds are those of the whole process and of its children, from
its start to when all pairs are known: imports and reading count. Memory is the kernel's high-water mark.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contenders import CONTENDERS

if TYPE_CHECKING:
    import pyarrow as pa

_STATUS = Path("/proc/self/status")
MADE_WORDS = 230
MADE_SHARE = 0.2


def cpu_seconds() -> float:
    """Of this process and of those it started that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_bytes() -> int:
    """The most this process ever held."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duplicates(name: str, path: str, pairs_path: str) -> dict[str, Any]:
    """Find pairs and write them."""
    start = time.perf_counter()
    pairs = list(CONTENDERS[name].find(Path(path)))
    found = {"cpu_s": cpu_seconds(), "wall_s": time.perf_counter() - start, "peak_bytes": peak_bytes()}
    Path(pairs_path).write_text("".join(f"{one}\t{other}\n" for one, other in pairs), encoding="utf-8")
    return found


def scaling(n_documents: str, memory_mb: str) -> dict[str, Any]:
    """Near-duplicates among made documents; making them is not counted."""
    from gyrocompass.data.curate.near_duplicates import NearDuplicateStep

    step = NearDuplicateStep(memory_mb=int(memory_mb))
    making = 0.0
    n_bytes = 0

    def signatures() -> Iterator[pa.RecordBatch]:
        nonlocal making, n_bytes
        batches = made(int(n_documents))
        while True:
            start = cpu_seconds()
            batch = next(batches, None)
            making += cpu_seconds() - start
            if batch is None:
                return
            n_bytes += batch["text"].nbytes
            yield step.signatures(batch)

    found = step.find(signatures())
    cpu_s, peak = cpu_seconds() - making, peak_bytes()
    # A variant's id is its origin's and "x": found if both are in one cluster.
    survivor = dict(zip(found.ids.to_pylist(), found.ids.take(found.survivor_D).to_pylist(), strict=True))
    variants = [one for one in survivor if one.endswith("x")]
    together = sum(survivor[one] == survivor[one[:-1]] for one in variants)
    return {
        "documents": int(n_documents),
        "text_bytes": n_bytes,
        "cpu_s": cpu_s,
        "peak_bytes": peak,
        "compared": found.n_compared,
        "variants": len(variants),
        "found": together,
        "dropped": int((found.partner_D >= 0).sum()),
    }


def made(n_documents: int) -> Iterator[pa.RecordBatch]:
    """Documents of words drawn by Zipf's law; one in five is another with each fiftieth word replaced."""
    import numpy as np
    import pyarrow as pa

    draw = np.random.default_rng(0)
    vocabulary = np.array([f"{'bcdfghklmnprst'[n % 14]}{'aeiou'[n % 5]}{n:x}" for n in range(60_000)], object)
    batch_rows = 1000
    for begin in range(0, n_documents, batch_rows):
        rows = min(batch_rows, n_documents - begin)
        n_variants = round(rows * MADE_SHARE)
        lengths = draw.integers(60, 2 * MADE_WORDS - 60, rows)
        texts, ids = [], []
        for row in range(rows - n_variants):
            words = vocabulary[(len(vocabulary) ** draw.random(lengths[row])).astype(np.int64) - 1]
            texts.append(" ".join(words))
            ids.append(f"{begin + row:08d}")
            if row < n_variants:
                other = words.copy()
                other[25::50] = "replaced"
                texts.append(" ".join(other))
                ids.append(f"{begin + row:08d}x")
        yield pa.RecordBatch.from_arrays([pa.array(ids), pa.array(texts, pa.large_string())], ["id", "text"])


def version(name: str) -> str | None:
    """What is installed."""
    return CONTENDERS[name].version()


if __name__ == "__main__":
    verbs: dict[str, Callable[..., Any]] = {"duplicates": duplicates, "scaling": scaling, "version": version}
    print(json.dumps(verbs[sys.argv[1]](*sys.argv[2:])))
