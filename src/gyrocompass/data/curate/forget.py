"""Forgetting a document: what saw it, its removal from what is stored, and that no later version reads it.

    plan(store, name) --> Forgetting            what saw it, where it is stored
    carry_out(builder, Forgetting) --> Forgotten     opt-out list, new versions without it, old ones deleted

The opt-out list comes first: whatever happens after it, no later build reads the document or a copy of its
content, and the same command goes on from there. Every stored corpus that holds it is written again without
it: one shard changes, the others stay, and with them what steps said of their documents. Data sets that were
made from it are decided again, each with a proof that the document is not in it. Then the old corpora,
annotations, data sets, and whatever documents and tokens recipes made from them are deleted; lineage still
knows that they were there.

Models are not deleted. They are named, as what learned from it: they have to be trained again, and that is
for the recipe that made them. Files outside of the store are the user's, and stay too.
"""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gyrocompass.core.artifact import Artifact, ArtifactId, DocumentRow
from gyrocompass.core.errors import BadInput
from gyrocompass.core.lineage import walk
from gyrocompass.core.store import Store
from gyrocompass.data.curate.build import ANNOTATED, Builder
from gyrocompass.data.curate.config import BuildConfig, build_from
from gyrocompass.data.curate.corpus import Corpus
from gyrocompass.data.curate.dataset import read_leaves
from gyrocompass.data.curate.merkle import Absence, prove
from gyrocompass.data.curate.optout import STORE_LIST, OptOut, add_to_list
from gyrocompass.data.curate.reading import CORPUS, SKIPPED, link, opt_out_of, stored_key
from gyrocompass.data.curate.versions import DATASET_KIND
from gyrocompass.data.document import QUARANTINED

DELETED_KINDS = (CORPUS, ANNOTATED, DATASET_KIND, "documents", "tokens")
"""Kinds of artifacts that hold documents, their tokens, or what was said of each of them."""


class Seen(NamedTuple):
    """An artifact that saw the document."""

    id: ArtifactId
    kind: str
    present: bool
    """Whether its folder is here."""
    learned: bool
    """Whether it was learned from, and not only measured on."""


class Forgetting(NamedTuple):
    """What forgetting a document comes to."""

    document_id: str
    path: str
    entries: tuple[str, ...]
    """What the opt-out list gets: the document, what was made of it, its content."""
    saw: tuple[Seen, ...]
    corpora: tuple[Artifact, ...]
    """The corpora that hold it, or a copy of it."""
    datasets: tuple[Artifact, ...]
    """The data sets that were made from these."""

    @property
    def learned(self) -> list[Seen]:
        """What cannot forget: models that learned from it, and what stands on them."""
        return [entry for entry in self.saw if entry.kind not in DELETED_KINDS]


class Renewed(NamedTuple):
    """A data set, and the version that took its place."""

    before: ArtifactId
    after: Artifact
    proof: Absence
    """That the document is not in it."""


class Forgotten(NamedTuple):
    """What was done."""

    renewed: list[Renewed]
    deleted: list[Path]


def plan_to_forget(store: Store, name: str) -> Forgetting:
    """What saw a document, and where it is stored; changes nothing.

    Args:
        store: where it is known.
        name: a document's id or a beginning of it, its path or the end of it.

    Raises:
        BadInput: nothing, or more than one thing, has this name; or it is an artifact's.
    """
    found = walk(store, name)
    if found.document is None:
        raise BadInput(f"{name!r} is an artifact; a document is forgotten", fix="give its id or its path")
    facts = found.document
    known = {summary.id: summary for summary in store.artifacts()}
    saw = [
        Seen(artifact_id, known[artifact_id].kind, known[artifact_id].present, artifact_id in found.learned)
        for artifact_id in sorted(found.saw)
        if artifact_id in known
    ]
    corpora = [store.open(folder.name, verify=False) for folder in store.folders(CORPUS)]
    contents = {digest for corpus in corpora for digest in _contents(corpus.path, facts.id)}
    entries = (facts.id, *facts.derived_ids, *sorted(contents))
    covered = OptOut.of(entries)
    holding = tuple(corpus for corpus in corpora if _covered_rows(Corpus(corpus.path), covered))
    ids = {corpus.id for corpus in holding}
    datasets = (store.open(folder.name, verify=False) for folder in store.folders(DATASET_KIND))
    made = tuple(dataset for dataset in datasets if dataset.manifest.parents["corpus"] in ids)
    return Forgetting(facts.id, facts.path, entries, tuple(saw), holding, made)


def carry_out(builder: Builder, forgetting: Forgetting, reason: str = "") -> Forgotten:
    """Opt the document out, make what holds it again without it, and delete what held it.

    Args:
        builder: with the store of the plan.
        forgetting: what `plan_to_forget` found.
        reason: a remark for the list; it stays there, so it should not say who asked.
    """
    store = builder.store
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    remark = f"{today} {' '.join(reason.split())}".strip()
    add_to_list(store.root / STORE_LIST, forgetting.entries, remark)
    covered = OptOut.of(forgetting.entries)
    renewed = []
    doomed = [store.folder(entry.id) for entry in forgetting.saw if entry.kind in DELETED_KINDS]
    for corpus in forgetting.corpora:
        datasets = [entry for entry in forgetting.datasets if entry.manifest.parents["corpus"] == corpus.id]
        for dataset in datasets:
            config = build_from(dataset.manifest.recipe, dataset.id)
            without = _without(store, corpus, covered, config)
            if without is not None:
                after = builder.build_on(config, without).dataset
                proof = prove(read_leaves(after.path), forgetting.document_id)
                assert isinstance(proof, Absence), "no later version holds the document"
                renewed.append(Renewed(dataset.id, after, proof))
        doomed += [corpus.path, *(dataset.path for dataset in datasets)]
        doomed += [folder for folder in store.folders(ANNOTATED) if _is_about(folder, corpus, store)]
    keep = {entry.after.path for entry in renewed}
    deleted = [folder for folder in dict.fromkeys(doomed) if folder.is_dir() and folder not in keep]
    for folder in deleted:
        shutil.rmtree(folder)
    return Forgotten(renewed, deleted)


def _contents(folder: Path, document_id: str) -> list[str]:
    """The content hash of a document, where a corpus has it."""
    return [
        row["content_hash"]
        for batch in Corpus(folder).batches(["id", "content_hash"])
        for row in batch.filter(pc.equal(batch["id"], document_id)).to_pylist()
    ]


def _covered_rows(corpus: Corpus, covered: OptOut) -> dict[int, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """For each shard that holds something covered, which of its rows are."""
    hashes = pa.array(sorted(covered.hashes), pa.string())
    found = {}
    for shard in range(len(corpus.shards)):
        masks = [
            pc.or_(pc.is_in(batch["id"], hashes), pc.is_in(batch["content_hash"], hashes)).to_numpy(
                zero_copy_only=False
            )
            for batch in corpus.shard_batches(shard, ["id", "content_hash"])
        ]
        mask = np.concatenate(masks)
        if mask.any():
            found[shard] = mask
    return found


def _without(store: Store, corpus: Artifact, covered: OptOut, config: BuildConfig) -> Artifact | None:
    """The corpus without what is covered, as the build would read it now; None if nothing is left."""
    opt_out = opt_out_of(config, store)
    recipe = {**corpus.manifest.recipe, "opt_out": opt_out.digest}
    key = stored_key(recipe)
    found = store.find(key)
    if found is not None:
        return found
    source = Corpus(corpus.path)
    rows = _covered_rows(source, covered)
    if sum(int(mask.sum()) for mask in rows.values()) == source.n_documents:
        return None
    with store.create(key, CORPUS, recipe=recipe) as draft:
        shards = 0
        for shard, path in enumerate(source.shards):
            target = draft.path / f"corpus-{shards:05d}.parquet"
            if shard not in rows:
                link(path, target)
            elif not _filter(path, rows[shard], target):
                continue
            shards += 1
        for name in (QUARANTINED, SKIPPED):
            link(corpus.path / name, draft.path / name)
        left = Corpus(draft.path)
        draft.counts |= _counts(left, corpus)
        draft.documents = _listed(left)
    return draft.artifact


def _filter(path: Path, covered: np.ndarray[tuple[int], np.dtype[np.bool_]], target: Path) -> bool:
    """A shard without some rows, row group by row group; False if none is left, and no file."""
    if covered.all():
        return False
    place = 0
    with pq.ParquetFile(path) as file, pq.ParquetWriter(target, file.schema_arrow, compression="zstd") as out:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            left = table.filter(pa.array(~covered[place : place + table.num_rows]))
            place += table.num_rows
            if left.num_rows:
                out.write_table(left)
    return True


def _counts(left: Corpus, corpus: Artifact) -> dict[str, int | float]:
    counts: dict[str, int | float] = {
        name: corpus.manifest.counts[name] for name in ("quarantined", "skipped")
    }
    counts |= {"documents": 0, "bytes": 0}
    for batch in left.batches(["slice", "n_bytes"]):
        for name, n_bytes in zip(batch["slice"].to_pylist(), batch["n_bytes"].to_pylist(), strict=True):
            for key, value in (("documents", 1), ("bytes", n_bytes)):
                counts[key] += value
                counts[f"{key}/{name}"] = counts.get(f"{key}/{name}", 0) + value
    return counts


def _listed(corpus: Corpus) -> list[DocumentRow]:
    return [
        DocumentRow(row["id"], row["path"], row["source"], row["slice"], origin_ids=tuple(row["origin_ids"]))
        for batch in corpus.batches(["id", "path", "source", "slice", "origin_ids"])
        for row in batch.to_pylist()
    ]


def _is_about(folder: Path, corpus: Artifact, store: Store) -> bool:
    return store.open(folder.name, verify=False).manifest.parents.get("corpus") == corpus.id
