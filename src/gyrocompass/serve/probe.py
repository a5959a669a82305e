"""What silently ruins log-likelihoods: an OpenAI-compatible server, asked until it shows its faults.

    ids --echo--> one log-probability per token and one more        else: an extra BOS, a missing last token
    the same again, alone and in company --> the same numbers       else: answers change with batching
    the numbers themselves --> finite, fine-grained, at most 1      else: rounded, truncated, no distribution

Each check says what was seen. A fault is `wrong`; what the server does not have is `absent`, which harness
and gate can do without or not, as the text says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import httpx

from gyrocompass.core.errors import BadInput, GyroError

_TEXT = "The quick brown fox jumps over the lazy dog, and 17 + 25 = 42."
_SPREAD = 1e-4
"""Nats by which two answers to one question may differ."""
_COMPANY = 8


class Finding(NamedTuple):
    """One check."""

    name: str
    verdict: Literal["right", "wrong", "absent"]
    detail: str


class _Refused(Exception):  # noqa: N818
    """The server answered with an error."""


class _Server:
    """Asks it."""

    def __init__(self, url: str, api_key_env: str | None, timeout_s: float) -> None:
        headers = {}
        if api_key_env is not None:
            if api_key_env not in os.environ:
                raise BadInput(f"the environment variable {api_key_env} is not set", fix="export it")
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.root = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(headers=headers, timeout=timeout_s)
        self.model = ""

    def get(self, path: str) -> Any:
        """JSON of a path."""
        return self._read("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """JSON of an answer to JSON."""
        return self._read("POST", path, {"model": self.model, **body})

    def echo(self, prompt: Any, **more: Any) -> list[dict[str, Any]]:
        """The log-probabilities of a prompt, as the harness asks for them."""
        body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, **more}
        choices = self.post("/v1/completions", body)["choices"]
        return [one["logprobs"] for one in sorted(choices, key=lambda one: one["index"])]

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _read(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            response = self._client.request(method, self.root + path, json=body)
        except httpx.HTTPError as error:
            raise GyroError(
                f"the server cannot be asked: {error or type(error).__name__}", where=self.root + path
            ) from error
        if response.status_code != 200:
            raise _Refused(f"status {response.status_code}: {response.text[:200]}")
        try:
            return response.json()
        except ValueError as error:
            raise _Refused(f"not JSON: {response.text[:200]}") from error


def probe(
    url: str, *, model: str | None = None, api_key_env: str | None = None, timeout_s: float = 60.0
) -> list[Finding]:
    """Run all checks.

    Args:
        url: of the server, with or without /v1.
        model: its name there; None: the first that it lists.
        api_key_env: the environment variable that holds the key, if the server wants one.
        timeout_s: for each request.

    Raises:
        GyroError: it cannot be reached.
        BadInput: the key's variable is not set.
    """
    server = _Server(url, api_key_env, timeout_s)
    try:
        found = [_models(server, model)]
        if found[0].verdict != "right":
            return found
        ids = _ids(server, found)
        for check in (_alignment, _values, _same_again, _company, _generation, _chat):
            try:
                found += check(server, ids)
            except _Refused as refused:
                found.append(Finding(_NAMES[check], "absent", str(refused)))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                found.append(Finding(_NAMES[check], "wrong", f"the answer is not OpenAI's: {error!r}"))
        return found
    finally:
        server.close()


def _models(server: _Server, model: str | None) -> Finding:
    try:
        listed = [one["id"] for one in server.get("/v1/models")["data"]]
    except (_Refused, KeyError, TypeError) as error:
        return Finding("models", "wrong", f"/v1/models: {error}")
    if model is not None and model not in listed:
        return Finding("models", "wrong", f"no {model}; there is {', '.join(listed)}")
    server.model = model or listed[0]
    return Finding("models", "right", server.model)


def _ids(server: _Server, found: list[Finding]) -> list[int]:
    try:
        told = server.post("/tokenize", {"prompt": _TEXT, "add_special_tokens": False})["tokens"]
        ids = [int(token) for token in told]
        found.append(Finding("tokenizer", "right", f"/tokenize: {len(ids)} tokens"))
        return ids
    except (_Refused, KeyError, TypeError, ValueError) as error:
        found.append(Finding("tokenizer", "absent", f"/tokenize: {error}; small ids are used instead"))
        return list(range(100, 116))


def _alignment(server: _Server, ids: list[int]) -> list[Finding]:
    told = server.echo([ids])[0]
    values = told["token_logprobs"]
    sent, came = len(ids), len(values)
    found = []
    if came == sent + 1:
        found.append(
            Finding("one value per token", "right", f"{sent} sent, {came} told, the last one written")
        )
    else:
        why = {
            sent: "the written token is missing",
            sent + 2: "a token stands before the prompt, such as BOS",
        }
        detail = f"{sent} tokens sent, {came} told, {sent + 1} expected: {why.get(came, 'they do not fit')}"
        found.append(Finding("one value per token", "wrong", detail))
    if values[0] is None:
        found.append(Finding("nothing before the prompt", "right", "the first token has no log-probability"))
    else:
        detail = f"the first token has {values[0]}: something stands before it, such as BOS"
        found.append(Finding("nothing before the prompt", "wrong", detail))
    tops = told.get("top_logprobs")
    if not isinstance(tops, list) or not all(isinstance(top, Mapping) for top in tops[1:]):
        found.append(Finding("greedy can be told", "wrong", "top_logprobs is not a list of objects"))
        return found
    off = sum(max(top.values()) < value - 1e-9 for top, value in zip(tops[1:], values[1:], strict=False))
    detail = (
        f"{off} tokens are likelier than the best one" if off else "no token is likelier than the best one"
    )
    found.append(Finding("greedy can be told", "wrong" if off else "right", detail))
    return found


def _values(server: _Server, ids: list[int]) -> list[Finding]:
    values = [value for value in server.echo([ids])[0]["token_logprobs"] if value is not None]
    found = []
    wrong = [value for value in values if not math.isfinite(value) or value > 1e-6]
    least = min(values)
    if wrong:
        found.append(Finding("log-probabilities", "wrong", f"{wrong[0]} is none"))
    elif least <= -9999:
        found.append(Finding("log-probabilities", "wrong", f"cut off at {least}"))
    else:
        found.append(Finding("log-probabilities", "right", f"from {least:.3f} to {max(values):.3f} nats"))
    grain = _grain(values)
    if grain is None:
        found.append(Finding("fine-grained", "right", "no rounding to be seen"))
    else:
        found.append(Finding("fine-grained", "wrong", f"all are multiples of {grain}: rounded"))
    return found


def _grain(values: Sequence[float]) -> str | None:
    """What all values are multiples of, if it is coarse: decimals, or steps of a narrow float."""
    for digits in (1, 2, 3):
        if all(abs(value - round(value, digits)) < 1e-9 for value in values):
            return f"1e-{digits}"
    # bfloat16 has 8 bits: above 1 its steps are 1/128 and coarser.
    if all(abs(value * 256 - round(value * 256)) < 1e-6 for value in values):
        return "1/256"
    return None


def _same_again(server: _Server, ids: list[int]) -> list[Finding]:
    first, second = (server.echo([ids])[0]["token_logprobs"] for _ in range(2))
    return [_compared("the same again", first, second, "asked twice")]


def _company(server: _Server, ids: list[int]) -> list[Finding]:
    alone = server.echo([ids])[0]["token_logprobs"]
    others = [ids[: 1 + place % len(ids)] for place in range(1, _COMPANY)]
    together = server.echo([*others, ids])[-1]["token_logprobs"]
    with ThreadPoolExecutor(_COMPANY) as pool:
        answers = list(pool.map(lambda prompt: server.echo([prompt])[0], [*others, ids]))
    return [
        _compared("in one batch", alone, together, f"with {_COMPANY - 1} others in the request"),
        _compared("side by side", alone, answers[-1]["token_logprobs"], f"beside {_COMPANY - 1} requests"),
    ]


def _compared(name: str, one: Sequence[Any], other: Sequence[Any], how: str) -> Finding:
    if len(one) != len(other):
        return Finding(name, "wrong", f"{how}: {len(one)} values, then {len(other)}")
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    spread = max((abs(a - b) for a, b in pairs), default=0.0)
    return Finding(name, "right" if spread <= _SPREAD else "wrong", f"{how}: {spread:.1e} nats apart at most")


def _generation(server: _Server, ids: list[int]) -> list[Finding]:
    """What was written, echoed, has the log-probability with which it was written."""
    body = {"prompt": [ids], "max_tokens": 1, "logprobs": 5, "temperature": 0}
    told = server.post("/v1/completions", body)["choices"][0]["logprobs"]
    written = told["token_logprobs"][0]
    mass = sum(math.exp(value) for value in told["top_logprobs"][0].values())
    echoed = server.echo([ids])[0]["token_logprobs"][-1]
    found = [_compared("written as echoed", [written], [echoed], "the token after the prompt")]
    right = mass <= 1 + 1e-4
    found.append(
        Finding("a distribution", "right" if right else "wrong", f"the 5 likeliest have {mass:.4f} of it")
    )
    return found


def _chat(server: _Server, ids: list[int]) -> list[Finding]:
    body = {
        "messages": [{"role": "user", "content": "Say yes."}],
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 5,
        "temperature": 0,
    }
    answer = server.post("/v1/chat/completions", body)
    told = (answer["choices"][0].get("logprobs") or {}).get("content")
    if not told:
        return [Finding("chat tells log-probabilities", "absent", "a gate before it has no confidence")]
    written = (answer.get("usage") or {}).get("completion_tokens")
    if written is not None and written != len(told):
        detail = f"{written} tokens written, {len(told)} told"
        return [Finding("chat tells log-probabilities", "wrong", detail)]
    return [Finding("chat tells log-probabilities", "right", f"{len(told)} tokens with alternatives")]


_NAMES: Mapping[Callable[..., list[Finding]], str] = {
    _alignment: "one value per token",
    _values: "log-probabilities",
    _same_again: "the same again",
    _company: "in one batch",
    _generation: "written as echoed",
    _chat: "chat tells log-probabilities",
}
