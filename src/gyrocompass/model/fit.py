"""Whether a model can read what it is given: every token in its vocabulary, every row within its context."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.head import context_length, find_head


def check_fit(model: nn.Module, data: TokenDataset, length: int, where: str) -> None:
    """Refuse data that a model cannot read, before any work is done.

    Raises:
        BadInput: rows are longer than its context, or a token is not in its vocabulary.
    """
    check_context(context_length(model), length, where)
    check_vocabulary(model, data.id_N, where)


def check_context(context: int, length: int, where: str) -> None:
    """Refuse rows longer than a context.

    Raises:
        BadInput: they are.
    """
    if length > context:
        raise BadInput(
            f"sequence_length is {length}, and the model's context is {context} tokens",
            where=where,
            fix=f"set it to {context} or less",
        )


def check_vocabulary(model: nn.Module, id_N: NDArray[np.integer], where: str) -> None:
    """Refuse tokens that a model does not know.

    Raises:
        BadInput: there is one.
    """
    vocabulary, highest = len(find_head(model).w_VD), int(id_N.max(initial=0))
    if highest >= vocabulary:
        raise BadInput(
            f"the data has a token {highest}, the model a vocabulary of {vocabulary}",
            where=where,
            fix="make the tokens with the tokenizer that the model was made for",
        )
