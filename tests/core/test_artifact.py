import json
import os
import re
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gyrocompass
from gyrocompass.core import artifact as artifact_module
from gyrocompass.core.artifact import MANIFEST, code_version, read_artifact, writing
from gyrocompass.core.errors import BadInput, DamagedArtifact, GyroError

FILES = {"weights.bin": bytes(range(256)) * 8, "empty": b"", "sub/one.json": b"{}", "sub/é ü.txt": b"x"}


def make(target: Path, *, files: dict[str, bytes] = FILES, kind: str = "model", **options):
    with writing(target, kind, **options) as draft:
        for name, content in files.items():
            file = draft.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        draft.counts["tokens"] = 12
    return draft.artifact


def test_what_was_written_is_read(tmp_path):
    made = make(tmp_path / "m", parents={"train": "tokens-0123456789abcdef"}, recipe={"b": (1,), "a": 1e-3})
    read = read_artifact(tmp_path / "m", kind="model")
    assert read == made
    assert read.manifest.recipe == {"a": 0.001, "b": [1]}
    assert read.manifest.counts == {"tokens": 12}
    assert {name: entry.bytes for name, entry in read.manifest.files.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert re.fullmatch(r"model-[0-9a-f]{16}", read.id)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_the_id_is_of_the_content_and_where_it_came_from(tmp_path):
    base = make(tmp_path / "base").id
    assert make(tmp_path / "again").id == base
    assert make(tmp_path / "kind", kind="dataset").id != base
    variants = [
        make(tmp_path / "parents", parents={"train": "tokens-1"}),
        make(tmp_path / "recipe", recipe={"steps": 1}),
        make(tmp_path / "content", files={**FILES, "empty": b"1"}),
        make(tmp_path / "name", files={**FILES, "empty2": b""}),
    ]
    assert len({base, *(variant.id for variant in variants)}) == 5


def test_a_record_is_sealed_and_no_part_of_the_id(tmp_path):
    ids = set()
    for name in ("once", "again"):
        with writing(tmp_path / name, "model") as draft:
            (draft.path / "weights").write_text("1")
            (draft.path / "log").write_text(f"it took {name}")
            draft.records.add("log")
        ids.add(draft.artifact.id)
    assert len(ids) == 1 and read_artifact(tmp_path / "once").manifest.files["log"].record
    (tmp_path / "once" / "log").write_text("it took otce")
    with pytest.raises(DamagedArtifact, match="log was changed"):
        read_artifact(tmp_path / "once")


def test_the_id_is_pinned(tmp_path):
    # A change of this value would disown every artifact there is.
    assert (
        make(tmp_path / "m", recipe={"steps": 1}, parents={"train": "tokens-1"}).id
        == "model-f621f18b9b882fbc"
    )


def test_an_older_artifact_is_replaced_whole(tmp_path):
    make(tmp_path / "m", files={"old": b"1"})
    new = make(tmp_path / "m", files={"new": b"2"})
    assert read_artifact(tmp_path / "m").id == new.id
    assert sorted(entry.name for entry in (tmp_path / "m").iterdir()) == [MANIFEST, "new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_an_error_leaves_what_was_there(tmp_path):
    old = make(tmp_path / "m")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), writing(tmp_path / "m", "model") as draft:
            (draft.path / "half").write_bytes(b"1")
            raise error
    assert read_artifact(tmp_path / "m").id == old.id
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    with pytest.raises(AssertionError):
        _ = draft.artifact


def test_other_things_are_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(BadInput, match="not replaced"), writing(tmp_path / name, "model"):
            pass
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "void").mkdir()
    make(tmp_path / "void")


def test_links_are_not_written(tmp_path):
    with pytest.raises(GyroError, match="link"), writing(tmp_path / "m", "model") as draft:
        (draft.path / "link").symlink_to("/etc/hostname")
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_no_artifact(tmp_path):
    with pytest.raises(BadInput, match="no artifact"):
        read_artifact(tmp_path / "none")
    with pytest.raises(DamagedArtifact, match=MANIFEST):
        read_artifact(tmp_path)
    make(tmp_path / "m")
    with pytest.raises(BadInput, match="a dataset is needed"):
        read_artifact(tmp_path / "m", kind="dataset")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    make(folder / "m", parents={"train": "tokens-1"}, recipe={"steps": 3, "rate": 0.1})
    make(folder / "other", recipe={"steps": 4})
    return folder


NAMES = st.sampled_from([*FILES, MANIFEST])


@given(data=st.data())
@settings(deadline=None, max_examples=120)
def test_any_damage_is_found_and_named(pristine, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "m"
    shutil.copytree(pristine / "m", folder)
    name = data.draw(NAMES, label="file")
    file = folder / name
    content = file.read_bytes()
    damage = data.draw(
        st.sampled_from(["flip", "truncate", "delete", "append", "insert", "folder", "other's"])
    )
    if damage == "flip":
        assume(content)
        at = data.draw(st.integers(0, len(content) - 1), label="at")
        changed = content[at] ^ data.draw(st.integers(1, 255), label="bits")
        file.write_bytes(content[:at] + bytes([changed]) + content[at + 1 :])
    elif damage == "truncate":
        assume(content)
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1), label="to")])
    elif damage == "append":
        file.write_bytes(content + data.draw(st.binary(min_size=1, max_size=9)))
    elif damage == "insert":
        at = data.draw(st.integers(0, len(content)), label="at")
        file.write_bytes(content[:at] + data.draw(st.sampled_from([b" ", b"\n", b"\0", b"0"])) + content[at:])
    elif damage == "other's":
        file = folder / MANIFEST
        shutil.copy(pristine / "other" / MANIFEST, file)
        # The same files under another recipe are another artifact, and whole; a store knows it by the name.
        assert read_artifact(folder).id != read_artifact(pristine / "m").id
        return
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir()
    with pytest.raises(DamagedArtifact) as caught:
        read_artifact(folder)
    assert caught.value.where == str(file)
    assert file.name in caught.value.what


def test_added_files_and_links_are_damage(pristine, tmp_path):
    shutil.copytree(pristine / "m", tmp_path / "m")
    (tmp_path / "m" / "adapter.bin").write_bytes(b"x")
    with pytest.raises(DamagedArtifact, match=r"adapter\.bin was added"):
        read_artifact(tmp_path / "m", verify=False)
    (tmp_path / "m" / "adapter.bin").unlink()
    (tmp_path / "m" / "empty").unlink()
    (tmp_path / "m" / "empty").symlink_to("/dev/null")
    with pytest.raises(DamagedArtifact, match="empty is a link"):
        read_artifact(tmp_path / "m")


def test_without_verification_sizes_and_names_are_checked(pristine, tmp_path):
    shutil.copytree(pristine / "m", tmp_path / "m")
    file = tmp_path / "m" / "weights.bin"
    file.write_bytes(bytes(len(FILES["weights.bin"])))
    read_artifact(tmp_path / "m", verify=False)
    file.write_bytes(b"")
    with pytest.raises(DamagedArtifact, match="0 bytes where 2048"):
        read_artifact(tmp_path / "m", verify=False)


def test_a_resealed_manifest_must_still_fit_its_content_hash(pristine, tmp_path):
    shutil.copytree(pristine / "m", tmp_path / "m")
    file = tmp_path / "m" / MANIFEST

    def reseal(**changes):
        fields = json.loads((pristine / "m" / MANIFEST).read_text())
        del fields["seal"]
        file.write_text(artifact_module._render({**fields, **changes}), encoding="utf-8")

    reseal(recipe={"steps": 5})
    with pytest.raises(DamagedArtifact, match="content hash"):
        read_artifact(tmp_path / "m")
    reseal(surprise=1)
    with pytest.raises(DamagedArtifact, match="wrong fields"):
        read_artifact(tmp_path / "m")
    reseal(format=2)
    with pytest.raises(BadInput, match="format 2"):
        read_artifact(tmp_path / "m")


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"format": 1}', "{", "[" * 100_000])
def test_manifests_that_are_none(pristine, tmp_path, text):
    shutil.copytree(pristine / "m", tmp_path / "m")
    (tmp_path / "m" / MANIFEST).write_text(text)
    with pytest.raises(DamagedArtifact, match=MANIFEST):
        read_artifact(tmp_path / "m")


def test_large_files_are_hashed_in_pieces(tmp_path):
    megabytes = 96
    tracemalloc.start()
    with writing(tmp_path / "m", "model") as draft, (draft.path / "large.bin").open("wb") as file:
        file.truncate(megabytes * 2**20)
    read_artifact(tmp_path / "m")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 * 2**20


def test_a_bad_recipe_or_kind_is_refused_before_the_work(tmp_path):
    with pytest.raises(TypeError, match="bytes"), writing(tmp_path / "m", "model", recipe={"a": b""}):
        pytest.fail("the block ran")
    with pytest.raises(AssertionError), writing(tmp_path / "m", "My Model"):
        pytest.fail("the block ran")
    assert list(tmp_path.iterdir()) == []


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package's folder, of which the code version is asked."""
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(gyrocompass, "__file__", str(folder / "__init__.py"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    return folder


def test_code_version(package, monkeypatch):
    fresh = code_version.__wrapped__
    assert fresh() == gyrocompass.__version__
    git(package.parent, "init")
    (package.parent / "README").write_text("another project")
    git(package.parent, "add", "README")
    git(package.parent, "commit", "-m", "first")
    assert fresh() == gyrocompass.__version__, "the checkout does not track the package"
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "second")
    commit = git(package.parent, "rev-parse", "--short=12", "HEAD")
    assert fresh() == f"{gyrocompass.__version__}+g{commit}"
    (package.parent / "README").write_text("not the package")
    assert fresh() == f"{gyrocompass.__version__}+g{commit}"
    (package / "__init__.py").write_text("changed = True")
    assert fresh() == f"{gyrocompass.__version__}+g{commit}.dirty"
    monkeypatch.setenv("PATH", "")
    assert fresh() == gyrocompass.__version__
