"""Where models come from: made new from a config, or brought in from a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from gyrocompass.core.artifact import MANIFEST, Artifact, Draft, read_artifact
from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.measure.reward_calibration import copy_calibration
from gyrocompass.model.gguf import convert_gguf, package_file
from gyrocompass.model.load import new_causal_lm, save_model
from gyrocompass.model.open import open_model
from gyrocompass.recipe.stage import Stage, TokenizerName, Workplace


class NewModelStage(Stage):
    """A model with random weights: `config` is that of `transformers`, with its `model_type`.

    The vocabulary's size and the ids of its special tokens come from the tokenizer.
    """

    kind: Literal["new_model"] = "new_model"
    makes: ClassVar[str] = "model"
    tokenizer: TokenizerName
    config: dict[str, Any]
    seed: int = 0

    @property
    def context(self) -> int | None:
        """The model's context in tokens, if the config says."""
        return _context_of(self.config)

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """See the class."""
        tokenizer = load_tokenizer(workplace.input("tokenizer"))
        ids = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        model = new_causal_lm({**ids, **self.config}, seed=self.seed)
        save_model(model, draft.path, tokenizer=tokenizer)
        draft.counts["parameters"] = sum(p.numel() for p in model.parameters())


class ImportedModelStage(Stage):
    """A model and its tokenizer from a Hugging Face folder, copied into the store.

    A folder that is a model artifact, of this store or another, becomes a parent of the copy: lineage goes on
    through it.
    """

    kind: Literal["imported_model"] = "imported_model"
    version: ClassVar[int] = 2
    makes: ClassVar[str] = "model"
    folder: Path

    @property
    def context(self) -> int | None:
        """The model's context in tokens, if its config.json says."""
        return folder_context(self.folder)

    def outside(self) -> Any:
        """Sizes and times of all files in the folder.

        Raises:
            BadInput: there is no such folder.
        """
        return folder_state(self.folder)

    def origins(self) -> dict[str, Artifact]:
        """The folder itself, where it is an artifact."""
        return folder_origin("imported", self.folder)

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """See the class."""
        model = copy_model(self.folder, draft.path)
        copy_calibration(self.folder, draft.path)
        draft.counts["parameters"] = sum(p.numel() for p in model.parameters())


class GgufModelStage(Stage):
    """A model from a GGUF file, by its path or as an installed package ships it, dequantised to float32."""

    kind: Literal["gguf_model"] = "gguf_model"
    makes: ClassVar[str] = "model"
    file: str
    """A path; with `package`, a name inside it."""
    package: str | None = None
    """An importable package that ships the file."""

    def outside(self) -> Any:
        """The file's size, and its time where it is no package's."""
        path = self._path()
        stat = path.stat()
        return [path.name, stat.st_size, stat.st_mtime_ns if self.package is None else 0]

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """See the class."""
        model = convert_gguf(self._path(), draft.path)
        draft.counts["parameters"] = sum(p.numel() for p in model.parameters())

    def _path(self) -> Path:
        path = Path(self.file) if self.package is None else package_file(self.package, self.file)
        if not path.is_file():
            raise BadInput("there is no such GGUF file", where=path)
        return path


def folder_state(folder: Path) -> list[list[Any]]:
    """Sizes and times of all files of a model's folder: what a cache key covers of it.

    Raises:
        BadInput: there is no such folder.
    """
    if not folder.is_dir():
        raise BadInput("there is no such model folder", where=folder, fix="give a Hugging Face folder")
    return [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def folder_origin(role: str, folder: Path) -> dict[str, Artifact]:
    """A model's folder as a parent in a role, where it is an artifact."""
    return {role: read_artifact(folder, kind="model")} if (folder / MANIFEST).is_file() else {}


def check_same_vocabulary(one: Path, other: Path, where: str) -> None:
    """Refuse two models that do not mean the same by a token's number.

    Raises:
        BadInput: their heads have another number of tokens, or their tokenizers name them otherwise.
    """
    sizes = [_vocabulary_size(folder) for folder in (one, other)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise BadInput(
            f"this model has {sizes[1]} tokens of vocabulary, the one that is trained {sizes[0]}",
            where=where,
            fix="take two models of one tokenizer",
        )
    names = [load_tokenizer(folder).get_vocab() for folder in (one, other)]
    if names[0] != names[1]:
        different = sorted(dict(names[0].items() ^ names[1].items()))
        raise BadInput(
            f"this model's tokenizer is not that of the one that is trained: {len(different)} tokens have "
            f"another number, such as {different[0]!r}",
            where=where,
            fix="take two models of one tokenizer",
        )


def _vocabulary_size(folder: Path) -> int | None:
    size = _config_of(folder).get("vocab_size")
    return size if isinstance(size, int) else None


def copy_model(base: Path, target: Path) -> nn.Module:
    """Copy a model and its tokenizer, a LoRA adapter merged in, without what its own run said of itself."""
    model = open_model(base, dtype=None, device=torch.device("cpu"))
    save_model(model, target, tokenizer=load_tokenizer(base))
    return model


def folder_context(folder: Path) -> int | None:
    """The context in tokens of the model in a folder; None if its config does not say.

    Raises:
        BadInput: there is no config.json that can be read.
    """
    return _context_of(_config_of(folder))


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the model's config.json: {error}", where=folder) from error
    if not isinstance(config, dict):
        raise BadInput("a model's config.json is a JSON object", where=folder / "config.json")
    return config


def _context_of(config: Mapping[str, Any]) -> int | None:
    # GPT-2 has a name of its own for it.
    length = config.get("max_position_embeddings", config.get("n_positions"))
    return length if isinstance(length, int) else None
