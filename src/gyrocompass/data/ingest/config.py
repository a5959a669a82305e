"""What a recipe says about raw files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gyrocompass.data.ingest.pages import Extractor
from gyrocompass.data.ingest.streams import IngestLimits
from gyrocompass.data.records import RecordOptions


class IngestSource(RecordOptions):
    """Raw files of any kind: archives, web pages, code, chat logs, tables and text, each by its suffix."""

    path: str = Field(min_length=1)
    """A file, a folder, or a pattern such as `dumps/**/*.tar.gz`."""
    include: tuple[str, ...] = ()
    """Patterns below a folder. Empty: all that is not hidden."""
    html: Extractor | Literal["skip"] = "trafilatura"
    """What finds the text of a page: `trafilatura` (the cleanest), `resiliparse` (some 15 times faster)."""
    repair: bool = True
    """Whether other charsets than UTF-8 are read, and wrongly decoded prose is mended; each noted."""
    on_damage: Literal["quarantine", "refuse"] = "quarantine"
    """What is done where a file is damaged, hostile or too large: go on with the next one, or stop."""
    limits: IngestLimits = Field(default_factory=IngestLimits)
