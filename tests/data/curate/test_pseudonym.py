import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.personal import find_in
from gyrocompass.data.curate.pseudonym import Pseudonyms, new_key
from gyrocompass.data.curate.spans import Span, replace

TEXT = "Anna <anna@posteo.de> and bert@posteo.de; anna@posteo.de again, from 93.184.216.34"


@pytest.fixture(scope="module")
def pseudonyms(tmp_path_factory: pytest.TempPathFactory) -> Pseudonyms:
    path = tmp_path_factory.mktemp("keys") / "key"
    new_key(path)
    return Pseudonyms(path)


def test_only_the_key_turns_pseudonyms_back(pseudonyms: Pseudonyms, tmp_path: Path) -> None:
    hidden = replace(TEXT, find_in(TEXT), pseudonyms.seal)
    assert "posteo" not in hidden and "93.184" not in hidden
    assert pseudonyms.restore(hidden) == (TEXT, 0)
    other_id = new_key(tmp_path / "other")
    other = Pseudonyms(tmp_path / "other")
    assert other.key_id == other_id != pseudonyms.key_id
    assert other.restore(hidden) == (hidden, 4)
    assert replace(TEXT, find_in(TEXT), other.seal) != hidden


def test_one_text_has_one_pseudonym_and_its_kind_is_sealed_in(pseudonyms: Pseudonyms) -> None:
    seals = [
        pseudonyms.seal(Span(0, 1, "email", 1), text)
        for text in ("anna@posteo.de", "bert@posteo.de", "anna@posteo.de")
    ]
    assert seals[0] == seals[2] != seals[1]
    assert pseudonyms.restore(seals[0].replace("email", "phone"))[1] == 1
    damaged = seals[0][:-2] + ("A" if seals[0][-2] != "A" else "B") + "]"
    assert pseudonyms.restore(damaged) == (damaged, 1)


@given(st.text(min_size=1))
def test_every_text_comes_back(pseudonyms: Pseudonyms, text: str) -> None:
    sealed = pseudonyms.seal(Span(0, len(text), "id.fr", 1.0), text)
    assert pseudonyms.restore(f"[{sealed}]") == (f"[{text}]", 0)
    n_bytes = len(text.encode("utf-8", "surrogatepass"))
    assert len(sealed) == len("[id.fr:]") + -(-(16 + 16 * (n_bytes // 16 + 1)) * 4 // 3)


def test_the_key_is_its_owners_alone_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(BadInput, match="a file already"):
        new_key(path)
    with pytest.raises(BadInput, match="cannot be written"):
        new_key(tmp_path / "none" / "key")


@pytest.mark.parametrize("content", ["", "abc", "zz" * 64, "00" * 63])
def test_what_is_no_key_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(BadInput, match="not a key"):
        Pseudonyms(tmp_path / "key")
    with pytest.raises(BadInput, match="cannot be read"):
        Pseudonyms(tmp_path / "none")
