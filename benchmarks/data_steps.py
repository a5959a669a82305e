"""Speed of each annotating step on the standard library, and what the finders find of what is planted.

    python benchmarks/data_steps.py              (about two minutes on one core)
    python benchmarks/data_steps.py --mib 4      (of the library)

Speed is MB of UTF-8 text in a CPU-second of this process, all threads together, in batches of 256 documents;
the first batch is run once before the clock starts, so that tables and models are there. Recall and
precision are of texts with planted values and decoys (`canaries`), by kind and by slice; the least of each
is shown too.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from gyrocompass.data.curate import canaries_personal, canaries_secrets
from gyrocompass.data.curate.benchmark_items import Benchmark
from gyrocompass.data.curate.canaries import Found
from gyrocompass.data.curate.code_language import CodeLanguage
from gyrocompass.data.curate.corpus import batch_of
from gyrocompass.data.curate.decontaminate import Decontamination
from gyrocompass.data.curate.domain import Domain
from gyrocompass.data.curate.language import Language
from gyrocompass.data.curate.licences import Licences
from gyrocompass.data.curate.likelihood import Likelihood
from gyrocompass.data.curate.moderation import Moderation, TermList
from gyrocompass.data.curate.ngram_model import NgramModel
from gyrocompass.data.curate.objections import Objections
from gyrocompass.data.curate.personal import PersonalData
from gyrocompass.data.curate.quality import Quality
from gyrocompass.data.curate.repetition import Repetition
from gyrocompass.data.curate.secrets import Secrets
from gyrocompass.data.curate.step import GlobalStep, RecordStep
from gyrocompass.data.document import Document

BATCH = 256


def library(limit_bytes: int) -> list[pa.RecordBatch]:
    """The library's files in batches, as many as the limit allows, evenly over their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    total = sum(path.stat().st_size for path in paths)
    chosen = paths[:: max(round(total / limit_bytes), 1)]
    documents = [
        Document(
            kind="text",
            text=path.read_bytes().decode("utf-8", "replace"),
            path=path.relative_to(folder).as_posix(),
            source="stdlib",
            slice="code/library",
            language="python",
        )
        for path in chosen
    ]
    return [batch_of(documents[start : start + BATCH]) for start in range(0, len(documents), BATCH)]


def steps(folder: Path, batches: list[pa.RecordBatch]) -> Iterator[tuple[str, RecordStep | GlobalStep]]:
    """Every step with the settings that it is measured with."""
    texts = [text for batch in batches for text in batch["text"].to_pylist()]
    NgramModel.fit(texts[::10]).save(folder / "model.safetensors")
    items = [" ".join(text.split()[200:240]) for text in texts[::7]]
    (folder / "items.txt").write_text("\n".join(item for item in items if item), "utf-8")
    yield "personal", PersonalData()
    yield "secrets (builtin)", Secrets()
    yield "secrets (betterleaks)", Secrets(engine="betterleaks")
    yield "licences", Licences()
    yield "objections", Objections(entries=("domain: example.org", "author: Nobody"))
    yield "language", Language(skip_slices=())
    yield "code_language", CodeLanguage()
    yield "domain", Domain()
    yield "quality", Quality()
    yield "repetition", Repetition()
    yield "moderation", Moderation(lists={"profane": TermList(package="better_profanity")})
    yield "decontamination", Decontamination(benchmarks=(Benchmark(name="b", path=folder / "items.txt"),))
    yield "likelihood (ngram)", Likelihood(score=f"ngram:{folder / 'model.safetensors'}")


def megabytes_per_second(step: RecordStep | GlobalStep, batches: list[pa.RecordBatch]) -> float:
    """MB of text in a CPU-second."""
    look = step.annotate if isinstance(step, RecordStep) else step.signatures
    look(batches[0].slice(0, 32))
    started = time.process_time()
    for batch in batches:
        look(batch)
    spent = time.process_time() - started
    return sum(sum(batch["n_bytes"].to_pylist()) for batch in batches) / 1e6 / spent


def found_table(title: str, found: Mapping[tuple[str, str], Found]) -> Table:
    """Recall and precision by slice, and of the kind that does worst."""
    table = Table("slice", "planted", "recall", "precision", "least recall", "least precision", title=title)
    for slice_name in sorted({slice_name for slice_name, _ in found}):
        total = found[slice_name, "all"]
        kinds = [cell for (name, kind), cell in found.items() if name == slice_name and kind != "all"]
        planted = [cell for cell in kinds if cell.planted]
        table.add_row(
            slice_name,
            str(total.planted),
            f"{total.recall:.4f}",
            f"{total.precision:.4f}",
            f"{min(cell.recall for cell in planted):.4f}",
            f"{min(cell.precision for cell in planted):.4f}",
        )
    return table


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=float, default=12.0, help="MiB of the library (default 12)")
    parser.add_argument("--only", default="", help="steps whose name begins so")
    arguments = parser.parse_args()
    console = Console()
    batches = library(int(arguments.mib * 2**20))
    n_bytes = sum(sum(batch["n_bytes"].to_pylist()) for batch in batches)
    speed = Table("step", "MB per CPU-second", "CPU-seconds for 83 MB")
    with tempfile.TemporaryDirectory() as folder:
        for name, step in steps(Path(folder), batches):
            if name.startswith(arguments.only):
                rate = megabytes_per_second(step, batches)
                speed.add_row(name, f"{rate:.1f}", f"{83 / rate:.1f}")
    console.print(f"{sum(batch.num_rows for batch in batches)} files, {n_bytes / 1e6:.1f} MB")
    console.print(speed)
    if not arguments.only:
        console.print(found_table("personal data, planted", canaries_personal.measured()))
        console.print(found_table("secrets, planted (builtin)", canaries_secrets.measured()))
        console.print(found_table("secrets, planted (both engines)", canaries_secrets.measured("both")))


if __name__ == "__main__":
    main()
