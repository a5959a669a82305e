"""The recipe over Debian's documentation, in its smallest form, on a planted tree."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from rich.console import Console

from gyrocompass.core.store import Store
from gyrocompass.data.document import read_documents
from gyrocompass.recipe.recipe import load_recipe
from gyrocompass.recipe.run import read_run, run_recipe

DEP5 = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nFiles: *\nLicense: {}\n"


def plant(root: Path) -> None:
    """Packages of a known and an unknown licence, in two languages, with a copy and addresses among them."""
    for package, licence in (("frob", "GPL-2+"), ("own", "something-of-its-own")):
        folder = root / "usr/share/doc" / package
        folder.mkdir(parents=True)
        (folder / "copyright").write_text(DEP5.format(licence))
        for number in range(60):
            words = " ".join(f"word{(number * k) % 97} of the guide," for k in range(1, 40))
            name = f"guide{number}.de.txt.gz" if number % 3 == 0 else f"guide{number}.txt.gz"
            text = f"Chapter {number} of {package}. Write to ann.huber{number}@posteo.de. {words}\n"
            (folder / name).write_bytes(gzip.compress(text.encode()))
    (root / "usr/share/doc/frob/copy.txt").write_bytes(
        gzip.decompress((root / "usr/share/doc/frob/guide1.txt.gz").read_bytes())
    )


@pytest.mark.timeout(600)
def test_its_smallest_form_on_a_planted_tree(tmp_path: Path) -> None:
    root = tmp_path / "root"
    plant(root)
    build = "stages.documents.build"
    settings = [
        f"{build}.sources.0.debian.root={root}",
        f"{build}.sources.0.debian.most_documents=100",
        "stages.pretrained.steps=3",
        "stages.pretrained.evaluate_every_steps=3",
        "stages.pretrained.checkpoint_every_steps=3",
        "stages.pretrained.rows_per_step=2",
        "stages.pretrained.rows_per_micro_batch=2",
        "stages.tokenizer.vocabulary_size=400",
        "tracking.mlflow=null",
        "stages.completions.max_new_tokens=4",
        "stages.train_documents.held_out_share=0.3",
        "stages.held_out_documents.held_out_share=0.3",
    ]
    store = Store(tmp_path / "store")
    run_recipe(load_recipe("debian", settings, variant="small"), store, Console(quiet=True))
    stages = {stage.name: stage for stage in read_run(store, "debian").stages}
    kept = list(read_documents(store.folder(stages["documents"].artifact)))
    assert len(kept) == 60, "the package whose licence has no SPDX name is out, and so is the copy"
    assert {document.licence for document in kept} == {"GPL-2.0-or-later"}
    assert {document.language for document in kept} == {None, "de"}
    assert all("[email]" in document.text and "@" not in document.text for document in kept)
    assert "pretrained" in stages
