from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gyrocompass.data.document import Document, Quarantined, Record, Skipped
from gyrocompass.data.ingest.config import IngestSource
from gyrocompass.data.ingest.read import read_ingest


class Read(list[Record]):
    """What a source gave, by kind."""

    @property
    def documents(self) -> list[Document]:
        return [record for record in self if isinstance(record, Document)]

    @property
    def quarantined(self) -> list[Quarantined]:
        return [record for record in self if isinstance(record, Quarantined)]

    @property
    def skipped(self) -> list[Skipped]:
        return [record for record in self if isinstance(record, Skipped)]

    @property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def read(here: Path) -> Callable[..., Read]:
    def read(path: str = ".", **options: Any) -> Read:
        return Read(read_ingest(IngestSource.model_validate({"path": path, **options})))

    return read
