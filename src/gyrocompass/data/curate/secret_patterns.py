"""Secrets that say what they are, and values that are assigned to names of secrets.

    hints: literal text that every such secret holds; found by plain search, which costs next to nothing
    pattern: the secret itself, tried where its hint stands

An issuer's pattern decides by itself, unless what it matched is an example or has too little in it to be
drawn by chance. A value assigned to `password`, `token` and the like counts only if it looks drawn: by its
entropy, and by mixing letters with digits.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.spans import Span

SURE, LIKELY, UNLIKELY = 0.95, 0.7, 0.2


class SecretPattern(NamedTuple):
    """How an issuer's secrets look."""

    kind: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    """The secret is its first group where it has one."""
    before: int = 0
    """Characters before the hint at which it may begin."""


def _pattern(kind: str, hints: str, pattern: str, before: int = 0) -> SecretPattern:
    return SecretPattern(f"secret.{kind}", tuple(hints.split()), re.compile(pattern), before)


ISSUERS = (
    _pattern("aws", "AKIA ASIA", r"(?<![A-Za-z0-9])A(?:KI|SI)A[A-Z2-7]{16}(?![A-Za-z0-9])"),
    _pattern("github", "ghp_ gho_ ghu_ ghs_ ghr_", r"(?<!\w)gh[pousr]_[A-Za-z0-9]{36,255}(?!\w)"),
    _pattern("github", "github_pat_", r"(?<!\w)github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}(?!\w)"),
    _pattern("gitlab", "glpat- gldt- glrt-", r"(?<!\w)gl(?:pat|dt|rt)-[\w-]{20,50}"),
    _pattern("slack", "xoxb- xoxa- xoxp- xoxr- xoxs-", r"(?<!\w)xox[abprs]-\d{6,14}-[A-Za-z0-9-]{12,120}"),
    _pattern("slack", "hooks.slack.com/services/", r"hooks\.slack\.com/services/T\w{7,11}/B\w{7,11}/\w{20,}"),
    _pattern("stripe", "k_live_ k_test_", r"(?<!\w)[sr]k_(?:live|test)_[A-Za-z0-9]{20,100}(?!\w)", 1),
    _pattern("google", "AIza", r"(?<!\w)AIza[\w-]{35}(?![\w-])"),
    _pattern("google", "GOCSPX-", r"(?<!\w)GOCSPX-[\w-]{28}(?![\w-])"),
    _pattern("openai", "T3BlbkFJ", r"sk-(?:[a-z]{2,8}-)?[\w-]{16,100}?T3BlbkFJ[\w-]{16,100}", 110),
    _pattern("anthropic", "sk-ant-", r"(?<!\w)sk-ant-[a-z]{3,8}\d\d-[\w-]{80,120}"),
    _pattern("huggingface", "hf_", r"(?<!\w)hf_[A-Za-z]{34}(?!\w)"),
    _pattern("npm", "npm_", r"(?<!\w)npm_[A-Za-z0-9]{36}(?!\w)"),
    _pattern("pypi", "pypi-AgE", r"(?<!\w)pypi-AgE[\w-]{60,300}"),
    _pattern("sendgrid", "SG.", r"(?<!\w)SG\.[\w-]{22}\.[\w-]{43}(?![\w-])"),
    _pattern("mailgun", "key-", r"(?<![\w-])key-[0-9a-f]{32}(?!\w)"),
    _pattern("digitalocean", "dop_v1_ doo_v1_", r"(?<!\w)do[op]_v1_[0-9a-f]{64}(?!\w)"),
    _pattern("shopify", "shpat_ shpca_ shppa_ shpss_", r"(?<!\w)shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}(?!\w)"),
    _pattern("databricks", "dapi", r"(?<!\w)dapi[0-9a-f]{32}(?:-\d)?(?!\w)"),
    _pattern("telegram", ":AA", r"(?<!\w)\d{8,10}:AA[\w-]{33}(?![\w-])", 10),
    _pattern("vault", "hvs.", r"(?<!\w)hvs\.[\w-]{24,120}"),
    _pattern("jwt", "eyJ", r"(?<!\w)eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}"),
    _pattern(
        "private_key",
        "-----BEGIN",
        r"-----BEGIN (?:[A-Z]{2,10} )?PRIVATE KEY(?: "
            r"BLOCK)?-----[\sA-Za-z0-9+/=:,\\-]{64,8000}?-----END [A-Z ]{11,40}-----",
    ),
    _pattern("url", "://", r"://[\w.~%+-]{0,64}:([^\s:@/\"'<>{}\[\]()$]{6,64})@[A-Za-z0-9.\[-]"),
)  # fmt: skip
"""Every issuer that is known."""
_HINTS = tuple(hint for known in ISSUERS for hint in known.hints)

_NAMES = (b"passw", b"secret", b"token", b"api_key", b"apikey", b"api-key", b"access_key", b"accesskey",
          b"pwd", b"credential", b"auth_key", b"private_key", b"client_key", b"encryption_key",
          b"signing_key", b"account_key", b"accountkey", b"bearer")  # fmt: skip
_TEXT_NAMES = tuple(name.decode() for name in _NAMES)
_ASSIGNED = re.compile(
    r"(?i)[\w-]{0,24}(?:[\"']?\]?\s{0,4}(?::=|=>|[:=])\s{0,4}(?:[bru]?[\"'`]([^\"'`\s]{8,200})[\"'`]"
    r"|([^\s\"'`,;&(){}\[\]<>]{12,200})(?=[\s,;]|\Z))"
    r"|>([^<\s]{8,200})<|\s+([\w.~+/=-]{20,200})(?![\w.(]))"
)
_EXAMPLE = re.compile(
    r"(?i)example|change_?me|placeholder|dummy|sample|your[_-]|x{4,}|\*{3}|\.{3}|1234567|abcdefg|password|"
    r"s3cr3t|secret|insert|redacted|foobar|(?:^|[^a-z])test(?:[^a-z]|$)"
)
_CODE = re.compile(
    r"[\w.]+\(|^[\w.]*\.[A-Za-z_][\w.]*$|^(?:https?|file|git)://|^[./~\\]|[\\%$#]\{|%\(|^\$|^(?:sha\d"
    r"|md5)|[{}]"
)
_WORDS = re.compile(r"[A-Za-z][a-z]*(?:[_.-]?[A-Za-z][a-z]+)*(?:[_.-]?\d{1,3})?\Z")


def is_possible(text: str) -> bool:
    """Whether a text holds what every text with a secret does: an issuer's hint, or a name of secrets."""
    lowered = text.lower()
    return any(hint in text for hint in _HINTS) or any(name in lowered for name in _TEXT_NAMES)


def issued(joined: Joined) -> Iterator[Span]:
    """Secrets that an issuer's pattern knows."""
    text = joined.text
    for known in ISSUERS:
        for hint in known.hints:
            place = text.find(hint)
            while place >= 0:
                match = (
                    known.pattern.search(text, max(place - known.before, 0), place + 9000)
                    if known.before
                    else (known.pattern.match(text, place))
                )
                if match:
                    group = 1 if known.pattern.groups else 0
                    yield Span(*match.span(group), known.kind, _issued_score(known.kind, match[group]))
                place = text.find(hint, match.end() if match else place + len(hint))


def _issued_score(kind: str, value: str) -> float:
    if kind == "secret.private_key":
        return SURE
    if kind == "secret.url":
        return LIKELY if looks_drawn(value, 6) else UNLIKELY
    is_example = "EXAMPLE" in value or re.search(r"(?i)x{6,}|\*{3}|(.)\1{7}", value)
    return UNLIKELY if is_example or entropy_bits(value) < 2.8 else SURE


def assigned(joined: Joined) -> Iterator[Span]:
    """Values assigned to names of secrets, if they look drawn by chance."""
    text = joined.text
    lowered = joined.code_N.tobytes().lower()  # of ASCII letters alone, so that places stay the same
    for name in _NAMES:
        place = lowered.find(name)
        while place >= 0:
            match = _ASSIGNED.match(text, place + len(name))
            if match:
                group = match.lastindex or 0
                is_quoted = group in (1, 3)
                value = match[group] if is_quoted else match[group].rstrip(".!?:")
                if looks_drawn(value, 8 if is_quoted else 12):
                    start = match.start(group)
                    yield Span(start, start + len(value), "secret.assigned", LIKELY)
            place = lowered.find(name, place + len(name))


def looks_drawn(value: str, least: int) -> bool:
    """Whether a value looks drawn by chance, and is neither a word, nor code, nor an example.

    >>> looks_drawn("q7Rk2#vTz9", 8), looks_drawn("get_password()", 8), looks_drawn("changeme123", 8)
    (True, False, False)
    """
    if len(value) < least or _EXAMPLE.search(value) or _CODE.search(value) or _WORDS.match(value):
        return False
    has_digit = any(map(str.isdigit, value))
    has_upper, has_lower = value != value.lower(), value != value.upper()
    has_other = not value.isalnum()
    n_classes = has_digit + has_upper + has_lower + has_other
    needed = 2.7 if len(value) < 16 else 3.0
    return (
        has_digit
        and (has_upper or has_lower)
        and n_classes >= (3 if len(value) < 16 else 2)
        and (entropy_bits(value) >= needed)
    )


def entropy_bits(value: str) -> float:
    """Shannon's entropy of a value's characters, bits per character.

    >>> entropy_bits("aabb")
    1.0
    """
    n = len(value)
    return -sum(count / n * math.log2(count / n) for count in Counter(value).values())
