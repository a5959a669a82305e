"""Files that a step's config names: their content is part of the config.

Two configs that name one file before and after a change differ by its hash, so that annotations that were
made with the old content are not taken for those of the new.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import model_validator

from gyrocompass.core.config import Config


class ContentFile(Config):
    """A file.

    Args:
        path: where it is.
        sha256: of its content; filled in when the config is read, and checked where it is given.
    """

    path: Path
    sha256: str = ""

    @model_validator(mode="before")
    @classmethod
    def _hash_the_content(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("path"), str | Path):
            return data
        try:
            with Path(data["path"]).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"the file cannot be read: {data['path']}: {error.strerror}") from None
        if data.get("sha256") not in (None, "", found):
            raise ValueError(f"the file has changed: {data['path']} has the sha256 {found}")
        return data | {"sha256": found}
