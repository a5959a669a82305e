"""Samples from a server: any that speaks OpenAI's completions with token ids in and out, vLLM for one.

    POST URL/v1/completions {model, prompt: [ids], max_tokens, temperature, seed, logprobs: 1,
                             return_tokens_as_token_ids: true}
    choices[0].logprobs.tokens = ["token_id:17", ...], .token_logprobs = [-0.3, ...]

Token in, token out: a server that answers with text alone is refused, since tokenising its text again gives
other tokens than it drew. Requests run side by side, a bounded number at a time. What may pass is asked again
with growing pauses (`core.http` says what that is); when it does not, the failure says so.

What weights an answer is of, the server alone knows. One that says it in `metadata.weight_version` (SGLang,
whose weights are renewed under a version that the caller names) is believed where the version is a number of
optimizer steps, `120` or `step-120` as checkpoints are called; of any other, the age is not known.

Left out: handing new weights to the server, which is done beside it; streaming.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.served import Server
from gyrocompass.model.sampler import Sampled, Sampling

_TOKEN = "token_id:"


def sample_upstream(
    config: Server,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Sampled]:
    """Go on from each prompt, on the server; arguments and answers as for `sampler.sample`.

    Raises:
        GyroError: the server cannot be reached, or fails again and again.
        BadInput: it refuses the request, or its answer has no token ids or no log-probabilities.
    """

    config = config.named()

    def one(asked: tuple[Sequence[int], int]) -> Sampled:
        return config.ask(
            "/v1/completions",
            _request(config, *asked, sampling),
            partial(_read, config, sampling),
            who="the engine",
            fix="start it again and run the same command: everything before this step is saved",
            sleep=sleep,
        )

    return list(config.many(one, zip(prompts, seeds, strict=True)))


def _request(config: Server, prompt: Sequence[int], seed: int, sampling: Sampling) -> dict[str, Any]:
    return {
        "model": config.model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": seed % 2**31,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "stop_token_ids": sorted(sampling.end_ids),
        # All of them are said: a server may else take its model's own defaults, and draw from another
        # distribution than the one whose log-probabilities it gives.
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "top_k": -1 if sampling.top_k is None else sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def _read(config: Server, sampling: Sampling, answer: Any) -> Sampled:
    try:
        choice = answer["choices"][0]
        tokens, logprobs = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
        if not all(token.startswith(_TOKEN) for token in tokens) or len(tokens) != len(logprobs):
            raise ValueError("its tokens are not token ids")
        ids = [int(token.removeprefix(_TOKEN)) for token in tokens]
        recorded = [float(logprob) for logprob in logprobs]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"the engine does not answer with token ids and their log-probabilities: {error!r}",
            where=str(config.url),
            fix="use a server that knows `return_tokens_as_token_ids`, such as vLLM",
        ) from error
    if not ids:
        raise BadInput("the engine answered with no token at all", where=str(config.url))
    return Sampled(ids, recorded, ids[-1] in sampling.end_ids, _weights_step(answer))


def _weights_step(answer: Mapping[str, Any]) -> int | None:
    """The step of the weights that an answer is of, if the server names one."""
    metadata = answer.get("metadata")
    version = metadata.get("weight_version") if isinstance(metadata, Mapping) else None
    found = re.fullmatch(r"(?:step-)?(\d+)", str(version))
    return int(found[1]) if found else None
