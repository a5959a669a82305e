"""A model in ctranslate2's format, made once from a folder in Hugging Face's, and checked against it.

    model folder --convert--> a folder below `kept`, by the hash of the model's files

Weights are kept in float32, whatever they are computed with later. A model that ctranslate2 computes
otherwise than we do (by a scaling or a cap that its converter does not know) is refused before it answers.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gyrocompass.core.errors import BadInput
from gyrocompass.core.folder import land, staging, sync
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.model.head import causal_lm, context_length
from gyrocompass.model.load import quiet, save_model
from gyrocompass.model.open import open_model
from gyrocompass.model.sampler import end_ids
from gyrocompass.model.score import evaluating
from gyrocompass.serve.embedded import Embedded
from gyrocompass.serve.engine.ct2 import CTranslate2Engine, Weights, ctranslate2, engine_name
from gyrocompass.serve.engine.desk import Limits
from gyrocompass.serve.engine.kinds import EngineSettings

_PROBE_TOKENS = 64
_MOST_OFF_NATS = 1e-3


def open_converted(
    folder: Path,
    name: str,
    *,
    kept: Path,
    weights: Weights = "float32",
    settings: EngineSettings | None = None,
) -> Embedded:
    """Serve a model folder with ctranslate2.

    Args:
        folder: of the model.
        name: what clients call it.
        kept: where converted models are kept.
        weights: what they are computed with.
        settings: of the engine.

    Raises:
        BadInput: it is no model folder, or ctranslate2 cannot compute this model.
        MissingDependency: ctranslate2 is not installed.
    """
    ctranslate2()
    model = open_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = load_tokenizer(folder)
    config = causal_lm(model).config
    limits = Limits(context_length(model), int(config.vocab_size))
    converted = convert(model, tokenizer, kept / f"ctranslate2-{_hash(folder)}")
    ends = end_ids(model, tokenizer)
    del model
    engine = CTranslate2Engine(converted, tokenizer, limits, ends, weights=weights, settings=settings)
    return Embedded(engine, tokenizer, name, engine_name(weights))


def convert(model: nn.Module, tokenizer: Any, target: Path) -> Path:
    """Make the folder of a converted model, unless it is there.

    Raises:
        BadInput: ctranslate2 does not know the architecture, or computes other log-probabilities.
    """
    if target.is_dir():
        return target
    library = ctranslate2()
    with staging(target.parent) as staged, tempfile.TemporaryDirectory(dir=target.parent) as whole:
        save_model(model, Path(whole), tokenizer)
        try:
            with quiet():
                library.converters.TransformersConverter(whole).convert(str(staged), force=True)
        except ValueError as error:
            raise BadInput(
                f"ctranslate2 cannot convert this model: {error}", fix="serve with the embedded engine"
            ) from error
        _check(model, library.Generator(str(staged), device="cpu", compute_type="float32"))
        sync(staged)
        land(staged, target, replace=False)
    return target


def _check(model: nn.Module, generator: Any) -> None:
    """Raise BadInput unless both say the same of some tokens."""
    config = causal_lm(model).config
    length = min(_PROBE_TOKENS, context_length(model))
    ids = np.random.default_rng(0).integers(config.vocab_size, size=length).tolist()
    theirs_LV = np.array(generator.forward_batch([ids], return_log_probs=True))[0, :, : config.vocab_size]
    with evaluating(model), torch.no_grad():
        ours_LV = causal_lm(model)(torch.tensor([ids])).logits[0].float().log_softmax(1).numpy()
    off = float(np.abs(ours_LV - theirs_LV).max())
    if not off <= _MOST_OFF_NATS:
        raise BadInput(
            f"ctranslate2 computes another model: its log-probabilities are off by {off:.2g} nats",
            fix="serve with the embedded engine",
        )


def _hash(folder: Path) -> str:
    """Of all that the model is read from."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
