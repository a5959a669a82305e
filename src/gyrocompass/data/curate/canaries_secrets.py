"""Secrets to plant, and what looks like one and is not.

Values are drawn in the issuers' published formats; none was ever issued.
"""

from __future__ import annotations

import base64
import hashlib
import random
import string
import uuid
from collections.abc import Sequence

from gyrocompass.data.curate.canaries import Draw, Found, measure, plant
from gyrocompass.data.curate.secrets import SecretEngine, find_in
from gyrocompass.data.curate.spans import Span

_ALNUM = string.ascii_letters + string.digits
_HEX = string.digits + "abcdef"
_BASE32 = string.ascii_uppercase + "234567"
_URL = _ALNUM + "-_"


def _form(*parts: str | tuple[str, int]) -> Draw:
    """Draws literal parts as they are, and the others from their alphabet."""

    def draw(chance: random.Random) -> str:
        return "".join(
            part if isinstance(part, str) else "".join(chance.choices(part[0], k=part[1])) for part in parts
        )

    return draw


def _private_key(chance: random.Random) -> str:
    body = base64.b64encode(chance.randbytes(600)).decode()
    lines = "\n".join(body[i : i + 64] for i in range(0, len(body), 64))
    name = chance.choice(["RSA ", "EC ", "OPENSSH ", ""])
    return f"-----BEGIN {name}PRIVATE KEY-----\n{lines}\n-----END {name}PRIVATE KEY-----"


def _password(chance: random.Random) -> str:
    letters = chance.choices(_ALNUM + "#%+!?", k=chance.randint(10, 20))
    return "".join(
        [*letters, chance.choice(string.digits), chance.choice(string.ascii_uppercase), chance.choice("qwz")]
    )


def _jwt(chance: random.Random) -> str:
    parts = (
        b'{"alg":"HS256","typ":"JWT"}',
        b'{"sub":"%d","name":"n"}' % chance.randint(10**8, 10**9),
        chance.randbytes(32),
    )
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


DRAWS: dict[str, Draw] = {
    "secret.aws": _form("AKIA", (_BASE32, 16)),
    "secret.github": _form("ghp_", (_ALNUM, 36)),
    "secret.gitlab": _form("glpat-", (_ALNUM, 20)),
    "secret.slack": _form("xoxb-", (string.digits, 12), "-", (string.digits, 12), "-", (_ALNUM, 24)),
    "secret.stripe": _form("sk_live_", (_ALNUM, 24)),
    "secret.google": _form("AIza", (_URL, 34), ("abcd", 1)),
    "secret.openai": _form("sk-proj-", (_ALNUM, 40), "T3BlbkFJ", (_ALNUM, 40)),
    "secret.huggingface": _form("hf_", (string.ascii_letters, 34)),
    "secret.npm": _form("npm_", (_ALNUM, 36)),
    "secret.pypi": _form("pypi-AgEIcHlwaS5vcmc", (_ALNUM, 120)),
    "secret.sendgrid": _form("SG.", (_ALNUM, 22), ".", (_ALNUM, 43)),
    "secret.digitalocean": _form("dop_v1_", (_HEX, 64)),
    "secret.databricks": _form("dapi", (_HEX, 32)),
    "secret.telegram": _form(("123456789", 9), ":AA", (_ALNUM, 33)),
    "secret.jwt": _jwt,
    "secret.private_key": _private_key,
    "secret.url": _password,
    "secret.assigned": _password,
}
"""What draws a secret of each kind."""

WORDS = {"secret.url": "postgres://admin:", "secret.assigned": "password = '"}
"""What stands before values that do not say what they are."""

AFTER = {"secret.url": "@db.intern/x", "secret.assigned": "'"}
"""What stands behind them."""

DECOYS: tuple[Draw, ...] = (
    lambda c: hashlib.sha256(c.randbytes(4)).hexdigest(),
    lambda c: str(uuid.UUID(bytes=c.randbytes(16), version=4)),
    lambda c: f"commit {hashlib.sha1(c.randbytes(4)).hexdigest()}",
    lambda c: f"sha512-{base64.b64encode(c.randbytes(64)).decode()}",
    lambda c: f"md5 = {hashlib.md5(c.randbytes(4), usedforsecurity=False).hexdigest()}",
    lambda c: "password = os.environ[PASSWORD]",
    lambda c: "password = getpass.getpass(prompt)",
    lambda c: "api_key=YOUR_API_KEY_GOES_HERE_123",
    lambda c: "token: ${{ secrets.GITHUB_TOKEN }}",
    lambda c: "AKIAIOSFODNN7EXAMPLE",
    lambda c: f"ghp_{'x' * 36}",
    lambda c: "-----BEGIN PUBLIC KEY-----",
    lambda c: f"task-{c.randint(100, 999)}-sk-risk",
    lambda c: f"the token {c.choice(['NAME', 'INDENT', 'STRING'])} ends the line",
    lambda c: "https://user:password@host.org/path",
    lambda c: f"data:image/png;base64,{base64.b64encode(c.randbytes(48)).decode()}",
    lambda c: f"secret_name = section{c.randint(2, 9)}.title",
    lambda c: f"token = tokens[{c.randint(0, 99)}]",
    lambda c: f"next_token=lexer_state_{c.randint(0, 9)}",
    lambda c: f"0x{c.randbytes(16).hex()}",
)
"""What draws a decoy."""


def measured(
    engine: SecretEngine = "builtin", seed: int = 0, n: int = 300, minimum_score: float = 0.5
) -> dict[tuple[str, str], Found]:
    """Recall and precision on planted texts, `n` of each slice.

    Other engines have names of their own for kinds, so that only the places of what they find count.
    """

    def find(text: str) -> Sequence[Span]:
        return [span._replace(kind="secret") for span in find_in(text, engine)]

    texts = plant(DRAWS, DECOYS, seed=seed, n=n, before=WORDS, after=AFTER)
    return measure(
        find_in if engine == "builtin" else find, texts, minimum_score, same_kind=engine == "builtin"
    )
