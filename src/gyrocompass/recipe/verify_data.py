"""Checks of a stage's data: what it counts (law 2), and that nothing it is measured on is learned from.

    accounting     the targets of one epoch of the sampler = those of the manifest, by slice and by document,
                   and no document is there twice
    disjointness   no document, content or origin in both the training and the held-out data

Two documents are the same if they have the same id or the same content hash; what a document was derived from
counts as being in the data too. Training data is that of the stage and of the training stages before it. Near
duplicates are left out: they are a matter of curation.

Shape legend: D documents, S slices, K counted tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from gyrocompass.core.artifact import Artifact, DocumentRow
from gyrocompass.core.store import Store
from gyrocompass.data.document import DOCUMENTS
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.recipe.verify_subject import Finding, Subject

# --- accounting ---


def accounting(subject: Subject) -> Finding:
    """Count every target of an epoch, window by window, beside the manifest.

    The epoch is that of natural slice weights, in which each piece is read exactly once; under weights of the
    stage's own an epoch is as many tokens, of whatever slices.
    """
    data, config = subject.data, subject.config
    one_epoch = SamplerConfig(
        length=config.sequence_length, rows_per_step=config.rows_per_step, epochs=1, seed=config.seed
    )
    counted_D = np.zeros(data.n_documents, np.int64)
    counted_S = np.zeros(len(data.slice_names), np.int64)
    task = subject.progress.task(f"{subject.name}: an epoch", data.n_targets, unit="tok")
    for window in Sampler(data, one_epoch):
        counts = window.weight_T > 0
        counted_D += np.bincount(window.document_T[counts], minlength=len(counted_D))
        counted_S += np.bincount(window.slice_T[counts], minlength=len(counted_S))
        task.advance(int(np.count_nonzero(counts)))
    task.finish()
    manifest = {name: int(count) for name, count in subject.data_artifact.manifest.counts.items()}
    wrong = _wrong_counts(dict(zip(data.slice_names, counted_S.tolist(), strict=True)), manifest)
    wrong_documents = np.flatnonzero(counted_D != _targets_by_document(data)).tolist()
    times = Counter(data.document_ids)
    twice = [name for name, n in times.items() if n > 1]
    named = [
        *wrong,
        *(f"document {data.document_ids[d]}" for d in wrong_documents[:3]),
        *(f"document {name} ({times[name]} times)" for name in twice[:3]),
    ]
    n_wrong = len(wrong) + len(wrong_documents) + len(twice)
    return Finding(
        n_wrong == 0,
        f"{int(counted_S.sum()):,} targets, {n_wrong} wrong",
        f"{manifest.get('targets', 0):,}, 0 wrong",
        f"in an epoch: the total, {len(counted_S)} slices and {len(counted_D):,} documents",
        f"counted otherwise than in the manifest of {subject.data_artifact.id}: {', '.join(named)}",
    )


def _wrong_counts(counted: Mapping[str, int], manifest: Mapping[str, int]) -> list[str]:
    """The slices (and the total) whose counts are not those of the manifest."""
    expected = {
        name.removeprefix("targets/"): count
        for name, count in manifest.items()
        if name.startswith("targets/")
    }
    wrong = [
        f"{name} ({counted.get(name, 0):,} for {expected.get(name, 0):,})"
        for name in sorted(counted.keys() | expected.keys())
        if counted.get(name, 0) != expected.get(name, 0)
    ]
    total = sum(counted.values())
    if total != manifest.get("targets"):
        wrong.append(f"total ({total:,} for {manifest.get('targets', 0):,})")
    return wrong


def _targets_by_document(data: TokenDataset) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    before_N = np.concatenate([np.zeros(1, np.int64), np.cumsum(data.weight_N > 0)])
    return np.diff(before_N[data.offset_D])


# --- disjointness ---


class _Known(NamedTuple):
    """What the documents upstream say of themselves."""

    content_hash: dict[str, str]
    origin_ids: dict[str, tuple[str, ...]]


def disjointness(subject: Subject) -> Finding:
    """Compare ids, content hashes and origins of both sides, as the store lists them."""
    if subject.held_out is None:
        return Finding(None, "no held_out", "")
    learned_from = (subject.data_artifact, *subject.learned_before)
    known = _upstream(subject.store, (*learned_from, subject.held_out))
    learned = _listed(subject.store, learned_from)
    held_out = _listed(subject.store, (subject.held_out,))
    path_of = {name: row.path for row in learned for name in _names(row, known)}
    shared = [
        f"    {row.path} (id {row.document_id}), learned from in {path_of[name]}"
        for row in held_out
        if (name := next((name for name in _names(row, known) if name in path_of), None))
    ]
    in_data = {name.partition("#")[0] for name in subject.data.document_ids}  # a preference's sides are one
    unlisted = in_data - {row.document_id for row in learned}
    return Finding(
        not shared and not unlisted and bool(held_out),
        f"{len(shared)} documents" + (f", {len(unlisted):,} not listed" if unlisted else ""),
        "0 documents",
        f"of {len(held_out):,} held out, among {len(learned):,} learned from; by id, content and origin",
        "\n".join(["held-out documents that are learned from too:", *shared[:5]]),
    )


def _upstream(store: Store, artifacts: Iterable[Artifact]) -> _Known:
    """Content hashes and origins of every document in the document artifacts that these were made from."""
    known = _Known({}, {})
    waiting, seen = [artifact.id for artifact in artifacts], set[str]()
    while waiting:
        artifact = store.open(waiting.pop(), verify=False)
        if artifact.id in seen:
            continue
        seen.add(artifact.id)
        waiting += artifact.manifest.parents.values()
        if (artifact.path / DOCUMENTS).is_file():
            table = pq.read_table(artifact.path / DOCUMENTS, columns=["id", "content_hash", "origin_ids"])
            for document_id, content_hash, origin_ids in zip(
                *(column.to_pylist() for column in table.itercolumns()), strict=True
            ):
                known.content_hash[document_id] = content_hash
                known.origin_ids[document_id] = tuple(origin_ids)
    return known


def _listed(store: Store, artifacts: Iterable[Artifact]) -> list[DocumentRow]:
    """The documents that some artifacts list and hold."""
    rows = (row for artifact in artifacts for row in store.documents(artifact.id))
    return [row for row in rows if row.status == "kept"]


def _names(row: DocumentRow, known: _Known) -> list[str]:
    """Ids and content hashes of a document and of everything it was derived from."""
    names: dict[str, None] = {}
    waiting = [row.document_id, *row.origin_ids]
    while waiting:
        document_id = waiting.pop(0)
        if document_id not in names:
            names[document_id] = None
            waiting += known.origin_ids.get(document_id, ())
    hashes = [known.content_hash[document_id] for document_id in names if document_id in known.content_hash]
    return [*names, *hashes]
