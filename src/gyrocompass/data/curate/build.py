"""A build: from sources to a data set, step by step; what is finished is found again.

    read -> each step -> decide and write          each an artifact: corpus, annotations, dataset

Every stage lands as an artifact whose manifest is written last, and every shard's part within a stage as a
folder that appears whole. A build that is killed at any moment goes on from there and comes to the same root.
Annotations depend on their step and on what it reads, not on rules: another threshold decides again and scans
nothing. A shard that has not changed since an earlier build takes that build's annotations, so that a file
more, or a document less, costs a shard or two; steps about all documents are resolved again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gyrocompass.core.artifact import Artifact, DocumentRow, Draft
from gyrocompass.core.config import config_hash
from gyrocompass.core.errors import GyroError
from gyrocompass.core.folder import land, staging
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.curate.config import BuildConfig, NamedStep
from gyrocompass.data.curate.corpus import BATCH_ROWS, Corpus, annotation_path, id_numbers
from gyrocompass.data.curate.dataset import (
    COVERED,
    LEAVES,
    LEDGER,
    STATISTICS,
    DatasetPart,
    leaf_table,
    sums,
    write_part,
)
from gyrocompass.data.curate.decide import FAILURE_SCHEMA, FAILURES, Verdicts, decide
from gyrocompass.data.curate.executor import Executor
from gyrocompass.data.curate.merkle import Leaf, merkle_root
from gyrocompass.data.curate.parts import (
    ANNOTATIONS,
    Part,
    annotate_part,
    read_signatures,
    sign_part,
)
from gyrocompass.data.curate.pseudonym import Pseudonyms
from gyrocompass.data.curate.reading import link, read_corpus
from gyrocompass.data.curate.step import GlobalStep, RecordStep
from gyrocompass.data.curate.versions import DATASET, DATASET_KIND, remember
from gyrocompass.data.document import QUARANTINED

ANNOTATED = "annotations"
"""The kind of artifact that holds what a step said."""

PART_KEYS = "parts.json"
"""For each shard of annotations, what they depend on: equal keys, equal annotations."""

_VERSION = 1


class Stage(NamedTuple):
    """A finished stage of a build."""

    name: str
    artifact: Artifact
    reused: bool
    seconds: float


class Built(NamedTuple):
    """What a build came to."""

    config: BuildConfig
    corpus: Artifact
    """All that was read."""
    stages: tuple[Stage, ...]

    @property
    def dataset(self) -> Artifact:
        """The data set."""
        return self.stages[-1].artifact


class Builder:
    """Builds data sets into a store.

    Args:
        store: where artifacts are found and land.
        executor: who does the parts.
        progress: shown to the user.
        batch_rows: the most documents that a step sees at once; the result does not depend on it.
    """

    def __init__(
        self, store: Store, executor: Executor, progress: Progress, *, batch_rows: int = BATCH_ROWS
    ) -> None:
        self.store, self.executor, self.progress = store, executor, progress
        self.batch_rows = batch_rows

    def build(self, config: BuildConfig, on_stage: Callable[[Stage], None] = lambda stage: None) -> Built:
        """Do what is not finished.

        Args:
            config: the build.
            on_stage: told of each stage as it is done or found.

        Raises:
            BadInput: a source is missing, holds no document, or too much of it cannot be read.
            GyroError: a step fails on too many documents.
        """
        read = self._stage("read", on_stage, read_corpus, config, self.store, self.progress)
        on = self.build_on(config, read.artifact, on_stage)
        return on._replace(stages=(read, *on.stages))

    def build_on(
        self, config: BuildConfig, corpus: Artifact, on_stage: Callable[[Stage], None] = lambda stage: None
    ) -> Built:
        """The same on a corpus that was read before, whatever has become of its sources."""
        stages: list[Stage] = []
        notes: dict[str, Artifact] = {}
        for named in config.steps:
            stages.append(self._stage(named.label, on_stage, self._annotated, config, named, corpus, notes))
            notes[named.label] = stages[-1].artifact
        stages.append(self._stage("decide", on_stage, self._decided, config, corpus, notes))
        remember(self.store, stages[-1].artifact)
        return Built(config, corpus, tuple(stages))

    def _stage(
        self,
        name: str,
        on_stage: Callable[[Stage], None],
        work: Callable[..., tuple[Artifact, bool]],
        *arguments: Any,
    ) -> Stage:
        """Do a stage's work, or find it done, and tell of it."""
        begun = self.progress.clock()
        artifact, reused = work(*arguments)
        stage = Stage(name, artifact, reused, self.progress.clock() - begun)
        on_stage(stage)
        return stage

    def _annotated(
        self, config: BuildConfig, named: NamedStep, corpus: Artifact, notes: Mapping[str, Artifact]
    ) -> tuple[Artifact, bool]:
        """The annotations of one step."""
        labels = list(dict.fromkeys(name.partition(".")[0] for name in named.step.reads()))
        read = {label: notes[label] for label in labels}
        parents = {"corpus": corpus, **{f"reads.{label}": artifact for label, artifact in read.items()}}
        settings = _step_settings(named)
        ids = {role: parent.id for role, parent in parents.items()}
        key = "annotations-" + config_hash([settings, ids])
        found = self.store.find(key)
        if found is not None:
            return found, True
        with self.store.locked_work(key, f"{config.name}: {named.label}"):
            work = self.store.work_dir(key)
            part_keys = _part_keys(settings, corpus, read)
            folders = self._parts(named, corpus, read, work, part_keys)
            with self.store.create(key, ANNOTATED, parents=parents, recipe=settings) as draft:
                if isinstance(named.step, GlobalStep):
                    self._resolve(named.step, corpus, read, folders, draft.path)
                else:
                    for shard, folder in enumerate(folders):
                        link(folder / ANNOTATIONS, annotation_path(draft.path, shard))
                failures = pa.concat_tables([pq.read_table(folder / FAILURES) for folder in folders])
                documents = int(corpus.manifest.counts["documents"])
                _check_failures(failures, documents, config.max_failed_share, named.label)
                pq.write_table(failures, draft.path / FAILURES)
                (draft.path / PART_KEYS).write_text(json.dumps(part_keys), encoding="utf-8")
                draft.counts |= {"documents": documents, "failed": failures.num_rows}
            self.store.forget_work(key)
        return draft.artifact, False

    def _parts(
        self,
        named: NamedStep,
        corpus: Artifact,
        read: Mapping[str, Artifact],
        work: Path,
        part_keys: Sequence[str],
    ) -> list[Path]:
        """The folder of each shard's part, all of them done."""
        source = Corpus(corpus.path)
        folders = [work / f"{shard:05d}" for shard in range(len(source.shards))]
        earlier = self._earlier(named, part_keys)
        waiting = []
        for shard, folder in enumerate(folders):
            if folder.exists():
                continue
            if part_keys[shard] in earlier:
                _take_over(earlier[part_keys[shard]], folder)
                continue
            annotations = {label: artifact.path for label, artifact in read.items()}
            waiting.append(Part(named.step, corpus.path, annotations, shard, folder, self.batch_rows))
        rows = source.rows
        done = source.n_documents - sum(rows[part.shard] for part in waiting)
        task = self.progress.task(named.label, source.n_documents, "doc", done=done)
        function = sign_part if isinstance(named.step, GlobalStep) else annotate_part
        for part in self.executor.run(function, waiting):
            task.advance(rows[part.shard])
        task.finish()
        return folders

    def _earlier(self, named: NamedStep, part_keys: Sequence[str]) -> dict[str, Path]:
        """Annotations of unchanged shards in earlier artifacts, by part key."""
        if not isinstance(named.step, RecordStep):
            return {}
        wanted, found = set(part_keys), dict[str, Path]()
        for folder in self.store.folders(ANNOTATED):
            try:
                keys = json.loads((folder / PART_KEYS).read_text("utf-8"))
            except (OSError, ValueError):
                continue
            found |= {key: annotation_path(folder, n) for n, key in enumerate(keys) if key in wanted}
        return found

    def _resolve(
        self,
        step: GlobalStep,
        corpus: Artifact,
        read: Mapping[str, Artifact],
        folders: list[Path],
        target: Path,
    ) -> None:
        """The reduce side of a step about all documents; its rows go beside those of the corpus."""
        source = Corpus(corpus.path, {label: artifact.path for label, artifact in read.items()})
        made = step.resolve(read_signatures(folders), source)
        numbers = id_numbers(made["id"])
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        assert not len(numbers) or np.all(np.diff(numbers) > 0), f"{step.name}: two rows of one document"
        for shard in range(len(source.shards)):
            ids = pa.chunked_array([batch["id"] for batch in source.shard_batches(shard, ["id"])])
            wanted = id_numbers(ids)
            at = np.searchsorted(numbers, wanted)
            there = at < len(numbers)
            there[there] = numbers[at[there]] == wanted[there]
            places = np.zeros(len(wanted), np.int64)
            places[there] = order[at[there]]
            rows = made.select(made.schema.names[1:]).take(pa.array(places, mask=~there))
            table = pa.Table.from_batches([rows]).add_column(0, "id", ids.combine_chunks())
            pq.write_table(table, annotation_path(target, shard), compression="zstd")

    def _decided(
        self, config: BuildConfig, corpus: Artifact, notes: Mapping[str, Artifact]
    ) -> tuple[Artifact, bool]:
        """The data set."""
        settings = config.model_dump(mode="json")
        parents = {"corpus": corpus, **{f"annotations.{label}": found for label, found in notes.items()}}
        ids = {role: parent.id for role, parent in parents.items()}
        rules = settings["rules"]
        key = "dataset-" + config_hash([_VERSION, config.name, rules, _key_ids(config), ids])
        found = self.store.find(key)
        if found is not None:
            return found, True
        with self.store.locked_work(key, f"{config.name}: decide"):
            work = self.store.work_dir(key)
            annotations = {label: artifact.path for label, artifact in notes.items()}
            source = Corpus(corpus.path, annotations, self.batch_rows)
            verdicts = decide(source, config.rules, config.known)
            folders = self._write_parts(config, source, verdicts, work)
            with self.store.create(key, DATASET_KIND, parents=parents, recipe=settings) as draft:
                _assemble(draft, config, corpus, verdicts, folders)
                draft.documents = _listed(folders, verdicts)
            self.store.forget_work(key)
        return draft.artifact, False

    def _write_parts(self, config: BuildConfig, corpus: Corpus, verdicts: Verdicts, work: Path) -> list[Path]:
        folders = [work / f"{shard:05d}" for shard in range(len(corpus.shards))]
        begins = np.concatenate([[0], np.cumsum(corpus.rows)]).astype(np.int64)
        waiting = [
            DatasetPart(
                corpus.folder,
                corpus.annotations,
                config.rules,
                verdicts.kept_D[begins[shard] : begins[shard + 1]],
                shard,
                folder,
            )
            for shard, folder in enumerate(folders)
            if not folder.exists()
        ]
        task = self.progress.task("write", int(verdicts.kept_D.sum()), "doc")
        for part in self.executor.run(write_part, waiting):
            task.advance(int(part.kept.sum()))
        task.finish()
        return folders


def _take_over(annotations: Path, target: Path) -> None:
    """A part's folder made of annotations that an earlier build has."""
    with staging(target.parent) as folder:
        link(annotations, folder / ANNOTATIONS)
        pq.write_table(FAILURE_SCHEMA.empty_table(), folder / FAILURES)
        land(folder, target, replace=False)


def _step_settings(named: NamedStep) -> dict[str, Any]:
    """What a step's annotations depend on besides what it reads."""
    step = named.step
    return {"step": step.name, "version": step.version, "options": step.model_dump(mode="json")}


def _part_keys(settings: Mapping[str, Any], corpus: Artifact, read: Mapping[str, Artifact]) -> list[str]:
    """What the annotations of each shard depend on: the step, the shard's bytes, what it reads of others."""
    keys = []
    for shard, name in enumerate(path.name for path in Corpus(corpus.path).shards):
        beside = [note.manifest.files[f"{shard:05d}.parquet"].sha256 for note in read.values()]
        keys.append(config_hash([settings, corpus.manifest.files[name].sha256, beside]))
    return keys


def _key_ids(config: BuildConfig) -> list[str]:
    """Which keys pseudonyms are made with: another key makes another data set."""
    files = [rule.pseudonymise.key_file for rule in config.rules if rule.pseudonymise is not None]
    return [Pseudonyms(Path(file)).key_id for file in files]


def _check_failures(failures: pa.Table, documents: int, most: float, label: str) -> None:
    if failures.num_rows <= most * documents:
        return
    first = "\n".join(f"    {row['path']}: {row['reason']}" for row in failures.slice(0, 3).to_pylist())
    raise GyroError(
        f"the step {label} failed on {failures.num_rows} of {documents} documents; the first:\n{first}",
        where=label,
        fix="mend the step or the documents, or raise max_failed_share: these are then dropped",
    )


def _assemble(
    draft: Draft, config: BuildConfig, corpus: Artifact, verdicts: Verdicts, folders: Sequence[Path]
) -> None:
    """All parts as one data set."""
    for shard, folder in enumerate(folders):
        link(folder / "documents.parquet", draft.path / f"documents-{shard:05d}.parquet")
    statistics = sums(pa.concat_tables([pq.read_table(folder / STATISTICS) for folder in folders]))
    pq.write_table(statistics, draft.path / STATISTICS)
    covered = pa.concat_tables([pq.read_table(folder / COVERED) for folder in folders])
    pq.write_table(covered, draft.path / COVERED)
    pq.write_table(verdicts.ledger, draft.path / LEDGER, compression="zstd")
    link(corpus.path / QUARANTINED, draft.path / QUARANTINED)
    leaves = sorted(_leaves(folders))
    pq.write_table(leaf_table(leaves), draft.path / LEAVES)
    counts = {
        "documents": len(leaves),
        "bytes": pc.sum(statistics["bytes"]).as_py() or 0,
        "dropped": verdicts.ledger.num_rows,
        "covered": covered.num_rows,
        "quarantined": int(corpus.manifest.counts["quarantined"]),
    }
    by_slice = Counter[str]()
    for row in statistics.to_pylist():
        by_slice[f"documents/{row['slice']}"] += row["documents"]
        by_slice[f"bytes/{row['slice']}"] += row["bytes"]
    draft.counts |= {**counts, **by_slice}
    facts = {"name": config.name, "root": merkle_root(leaves).hex(), "corpus": corpus.id, "counts": counts}
    (draft.path / DATASET).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _leaves(folders: Sequence[Path]) -> Iterator[Leaf]:
    for folder in folders:
        table = pq.read_table(folder / LEAVES)
        yield from map(Leaf, table["id"].to_pylist(), table["fields"].to_pylist())


def _listed(folders: Sequence[Path], verdicts: Verdicts) -> Iterator[DocumentRow]:
    """What the data set holds, and what it does not hold any more."""
    columns = ["id", "path", "source", "slice", "origin_ids"]
    for folder in folders:
        for row in pq.read_table(folder / "documents.parquet", columns=columns).to_pylist():
            origins = tuple(row.pop("origin_ids"))
            yield DocumentRow(row["id"], row["path"], row["source"], row["slice"], origin_ids=origins)
        for row in pq.read_table(folder / COVERED).to_pylist():
            yield DocumentRow(row["id"], row["path"], row["source"], row["slice"], status="covered")
    for batch in verdicts.ledger.to_batches(max_chunksize=4096):
        for row in batch.select(["id", "path", "source", "slice"]).to_pylist():
            yield DocumentRow(row["id"], row["path"], row["source"], row["slice"], status="dropped")
