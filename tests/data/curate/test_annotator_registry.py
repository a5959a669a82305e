from pathlib import Path

import pyarrow as pa
import pytest

from gyrocompass.data.curate.benchmark_items import Benchmark
from gyrocompass.data.curate.content_file import ContentFile
from gyrocompass.data.curate.decontaminate import Decontamination
from gyrocompass.data.curate.importance import Importance
from gyrocompass.data.curate.likelihood import Likelihood, LikelihoodBands
from gyrocompass.data.curate.moderation import Moderation, TermList
from gyrocompass.data.curate.ngram_model import NgramModel
from gyrocompass.data.curate.objections import Objections
from gyrocompass.data.curate.step import columns_of, step_types

NAMES = {
    "code_language", "decontamination", "domain", "importance", "language", "licences", "likelihood",
    "likelihood_bands", "moderation", "objections", "personal", "quality", "repetition", "secrets",
}  # fmt: skip


def test_every_annotator_is_known_by_its_name_and_says_its_columns_beforehand(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one two three four five six\n")
    NgramModel.fit(["abc"]).save(tmp_path / "model.safetensors")
    texts = ContentFile(path=tmp_path / "texts.txt")
    configured = {
        "decontamination": Decontamination(benchmarks=(Benchmark(name="b", path=texts.path),)),
        "importance": Importance(target=texts, raw=texts),
        "likelihood": Likelihood(score=f"ngram:{tmp_path / 'model.safetensors'}"),
        "likelihood_bands": LikelihoodBands(),
        "moderation": Moderation(lists={"x": TermList(words=("x",))}),
        "objections": Objections(entries=("domain: a.org",)),
    }
    known = step_types()
    assert set(known) >= NAMES
    for name in sorted(NAMES):
        step = configured.get(name) or known[name]()
        columns = columns_of(step, {"likelihood.bits_per_byte": pa.float64()})
        assert columns and not any(pa.types.is_null(kind) for kind in columns.values()), name


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_config_reads_back_what_it_dumps(name: str) -> None:
    known = step_types()[name]
    if not any(field.is_required() for field in known.model_fields.values()):
        assert known.model_validate(known().model_dump(mode="json")) == known()
