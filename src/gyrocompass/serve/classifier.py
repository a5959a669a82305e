"""A trained classifier as a safety scorer: a model with a scalar head, read as the logit of "unsafe"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.measure.reward_calibration import load_calibration
from gyrocompass.model.head import context_length
from gyrocompass.model.open import open_model
from gyrocompass.model.reward_model import RewardModel
from gyrocompass.model.scalar_head import has_scalar_head


def open_classifier(folder: Path) -> Callable[[str], float]:
    """From a text to sigmoid of what the head says at its last token, calibrated where it was.

    A text that is longer than the context is cut at the start.

    Raises:
        BadInput: the model has no scalar head.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = open_model(folder, dtype=None, device=device), load_tokenizer(folder)
    if not has_scalar_head(model):
        raise BadInput(
            "this model has no scalar head, so it classifies nothing",
            where=folder,
            fix="train one with the objective bradley_terry or pointwise_classification",
        )
    judge, length = RewardModel(model, load_calibration(folder)), context_length(model)

    def classify(text: str) -> float:
        said = tokenizer.encode(text, add_special_tokens=False)
        ids = [tokenizer.bos_token_id, *said, tokenizer.eos_token_id][-length:]
        row = TokenRow("0", "", "", ids, [0] * len(ids), [0.0, *[1.0] * (len(ids) - 1)])
        (reward,) = judge.rewards(TokenDataset.of([row]), length, 1)
        return float(1 / (1 + np.exp(-reward)))

    return classify
