"""JSON over HTTP, asked for again where that may help: the one client below every server that we ask.

Asked again: no connection, a time-out, an answer cut off in the middle or that is no JSON, one that `read`
finds no use for, 408, 409, 429 and 5xx, after

    wait_k = first_wait * 2^k seconds, or what the server's Retry-After says

Not asked again: any other status, which the same request would meet again. Left out: streaming, dates in
Retry-After (then the usual wait follows), and connections that are kept open.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from gyrocompass.core.errors import BadInput, GyroError

T = TypeVar("T")

_MAY_PASS = {408, 409, 429}
_SHOWN_CHARACTERS = 200


class Patience(NamedTuple):
    """How often a server is asked, and how long it may take each time."""

    attempts: int
    first_wait_s: float
    timeout_s: float


class UselessAnswer(Exception):  # noqa: N818
    """Raised by `read`: the server answered, but not what was asked; it is asked again."""


class _MayPass(Exception):  # noqa: N818
    """A failure that may be gone at the next attempt; the server may have said when."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


def ask_json(
    url: str,
    body: Mapping[str, Any] | None,
    patience: Patience,
    *,
    read: Callable[[Any], T],
    who: str,
    fix: str,
    api_key_env: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Send JSON and read the JSON that comes back; without a body the path is only read (GET).

    Args:
        url: where to.
        body: what is sent; None: nothing is.
        patience: how often, and how long.
        read: takes what is needed out of the answer; raises `UselessAnswer` where it is not there.
        who: what messages call the server, such as "the engine".
        fix: what to do when it keeps failing.
        api_key_env: the environment variable that holds the key, if the server wants one.
        sleep: waits between attempts, in seconds.

    Raises:
        BadInput: the key's variable is not set, or the server refuses the request.
        GyroError: it fails `attempts` times.
    """
    headers = {"Content-Type": "application/json", **_authorization(api_key_env, who)}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    for attempt in range(patience.attempts):
        try:
            return read(_answer(request, patience.timeout_s, who))
        except (_MayPass, UselessAnswer) as failure:
            if attempt + 1 == patience.attempts:
                raise GyroError(
                    f"{who} failed {patience.attempts} times in a row: {failure}", where=url, fix=fix
                ) from failure
            said_s = failure.wait_s if isinstance(failure, _MayPass) else None
            sleep(patience.first_wait_s * 2**attempt if said_s is None else said_s)
    raise AssertionError("there is at least one attempt")


def shown(text: str) -> str:
    """The beginning of what a server said, for a message."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _authorization(api_key_env: str | None, who: str) -> dict[str, str]:
    if api_key_env is None:
        return {}
    if api_key_env not in os.environ:
        raise BadInput(
            f"the environment variable {api_key_env} is not set; it holds the key of {who}",
            fix=f"export {api_key_env}=...",
        )
    return {"Authorization": f"Bearer {os.environ[api_key_env]}"}


def _answer(request: urllib.request.Request, timeout_s: float, who: str) -> Any:
    """One attempt."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        said = f"status {error.code}: {shown(_read_error(error))}"
        if error.code in _MAY_PASS or error.code >= 500:
            raise _MayPass(said, _seconds(error.headers.get("Retry-After"))) from error
        raise BadInput(
            f"{who} refuses: {said}", where=request.full_url, fix="see the model's name, the url and the key"
        ) from error
    except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
        raise _MayPass(str(error) or type(error).__name__) from error
    try:
        return json.loads(answer)
    except ValueError as error:
        raise _MayPass(f"not JSON: {shown(answer.decode(errors='replace'))}") from error


def _read_error(error: urllib.error.HTTPError) -> str:
    """What came with an error's status; the connection may end in the middle of it."""
    try:
        with error:
            return error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; None for a date or nothing."""
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None
