"""National identity numbers with their check digits, country by country.

    pattern  finds candidates among digits and letters
    is_valid decides by the check digits and dates that the country's rule prescribes
    is_bare  says that the pattern alone would match many other numbers, so that a word nearby must confirm it

Where a country's number has no check digit (US, GB) what the issuer never gives out is excluded instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from gyrocompass.data.curate.checksums import iso7064_mod11_10, luhn, verhoeff, weighted

_MODULO_23 = "TRWAGMYFPDXBNJZSQVHLCKE"
_MODULO_31 = "0123456789ABCDEFHJKLMNPRSTUVWXY"
_CHINESE_CHECK = "10X98765432"
_CODICE_ODD = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12,
        14, 16,
         10, 22, 25, 24, 23),
        strict=True,
    )
)  # fmt: skip


class NationalId(NamedTuple):
    """The identity number of a country."""

    country: str
    """ISO 3166, lower case."""
    pattern: re.Pattern[str]
    """Matches the whole number at the first of its digits, or a few letters before it."""
    is_valid: Callable[[str], bool]
    """Of the number in capitals, without spaces, dots, slashes and hyphens."""
    context: re.Pattern[str]
    """Words that stand before such a number."""
    is_bare: bool = False


def _has_date(month: str, day: str) -> bool:
    return 1 <= int(month) <= 12 and 1 <= int(day) <= 31


def _us(number: str) -> bool:
    return (
        number[:3] not in {"000", "666"} and number[0] != "9" and number[3:5] != "00" and number[5:] != "0000"
    )


def _gb(number: str) -> bool:
    is_given = number[0] not in "DFIQUV" and number[1] not in "DFIOQUV"
    return is_given and number[:2] not in {"BG", "GB", "KN", "NK", "NT", "TN", "ZZ"}


def _fr(number: str) -> bool:
    body = number[:13].replace("2A", "19").replace("2B", "18")
    return number[0] in "12" and body.isdigit() and 97 - int(body) % 97 == int(number[13:])


def _es(number: str) -> bool:
    body = number[:-1].replace("X", "0").replace("Y", "1").replace("Z", "2")
    return _MODULO_23[int(body) % 23] == number[-1]


def _it(number: str) -> bool:
    even = sum(int(c, 36) - (10 if c.isalpha() else 0) for c in number[1:15:2])
    odd = sum(_CODICE_ODD[c] for c in number[:15:2])
    return chr(65 + (odd + even) % 26) == number[15]


def _de(number: str) -> bool:
    counts = sorted(number[:10].count(digit) for digit in set(number[:10]))
    return number[0] != "0" and counts[-1] in (2, 3) and counts.count(1) >= 7 and iso7064_mod11_10(number)


def _pl(number: str) -> bool:
    has_date = _has_date(f"{int(number[2:4]) % 20:02}", number[4:6])
    return has_date and weighted(number, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def _nl(number: str) -> bool:
    return number != "000000000" and weighted(number, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def _br(number: str) -> bool:
    first = weighted(number[:9], range(10, 1, -1)) * 10 % 11 % 10
    second = weighted(number[:10], range(11, 1, -1)) * 10 % 11 % 10
    return len(set(number)) > 1 and number[9:] == f"{first}{second}"


def _se(number: str) -> bool:
    number = number[-10:]
    day = int(number[4:6])
    return _has_date(number[2:4], f"{day - 60 if day > 60 else day}") and luhn(number)


def _be(number: str) -> bool:
    body, check = number[:9], int(number[9:])
    has_date = _has_date(number[2:4], number[4:6])
    return has_date and check in (97 - int(body) % 97, 97 - int("2" + body) % 97)


def _ch(number: str) -> bool:
    return weighted(number, (1, 3) * 7) % 10 == 0


def _fi(number: str) -> bool:
    return (
        _has_date(number[2:4], number[:2]) and _MODULO_31[int(number[:6] + number[-4:-1]) % 31] == number[-1]
    )


def _cn(number: str) -> bool:
    check = _CHINESE_CHECK[weighted(number[:17], [2 ** (17 - place) % 11 for place in range(17)]) % 11]
    return number[6:8] in {"19", "20"} and _has_date(number[10:12], number[12:14]) and check == number[17]


def _ca(number: str) -> bool:
    return number[0] not in "08" and luhn(number)


def _no(number: str) -> bool:
    day = int(number[:2])
    has_date = _has_date(number[2:4], f"{day - 40 if day > 40 else day}")
    first = weighted(number, (3, 7, 6, 1, 8, 9, 4, 5, 2, 1)) % 11 == 0
    return has_date and first and weighted(number, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1)) % 11 == 0


def _tr(number: str) -> bool:
    digits = [int(digit) for digit in number]
    tenth = (sum(digits[0:9:2]) * 7 - sum(digits[1:8:2])) % 10
    return digits[0] != 0 and tenth == digits[9] and sum(digits[:10]) % 10 == digits[10]


def _in(number: str) -> bool:
    return number[0] not in "01" and verhoeff(number)


def _au(number: str) -> bool:
    return weighted(number, (1, 4, 3, 7, 5, 8, 6, 9, 10)) % 11 == 0


def _id(
    country: str, pattern: str, valid: Callable[[str], bool], context: str, bare: bool = False
) -> NationalId:
    whole = re.compile(rf"(?<![\w.-]){pattern}(?!\w|[-.]\w)")
    return NationalId(country, whole, valid, re.compile(rf"(?i)(?:{context})[^\n]{{0,24}}\Z"), bare)


NATIONAL_IDS = (
    _id("us", r"\d{3}-\d\d-\d{4}", _us, r"\bssn\b|social.security"),
    _id("gb", r"[A-Z]{2} ?\d\d ?\d\d ?\d\d ?[A-D]", _gb, r"\bnino?\b|national.insurance"),
    _id("fr", r"[12] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", _fr,
        r"s[ée]curit[ée].sociale|\bnir\b|\binsee\b"),
    _id("es", r"(?:\d{8}|[XYZ]-?\d{7})-?[A-HJ-NP-TV-Z]", _es, r"\bdni\b|\bnie\b|\bnif\b"),
    _id("it", r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", _it, r"codice.fiscale"),
    _id("fi", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-FHJ-NPR-Y]", _fi, r"hetu|henkilötunnus"),
    _id("ch", r"756\.\d{4}\.\d{4}\.\d\d", _ch, r"\bavs\b|\bahv\b"),
    _id("be", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d", _be, r"rijksregister|registre.national"),
    _id("br", r"\d{3}\.\d{3}\.\d{3}-\d\d", _br, r"\bcpf\b"),
    _id("se", r"(?:19|20)?\d{6}[-+]\d{4}", _se, r"personnummer"),
    _id("cn", r"[1-8]\d{5}(?:19|20)\d{9}[\dX]", _cn, r"身份证"),
    _id("de", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", _de, r"steuer.?(?:id|nummer|identifikation)|\bidnr\b|\btin\b",
    True),
    _id("pl", r"\d{11}", _pl, r"pesel", True),
    _id("nl", r"\d{9}|\d{4}\.\d\d\.\d{3}", _nl, r"\bbsn\b|burgerservice", True),
    _id("ca", r"\d{3}([ -]?)\d{3}\1\d{3}", _ca, r"\bsin\b|social.insurance", True),
    _id("no", r"\d{6} ?\d{5}", _no, r"f[øo]dselsnummer|\bfnr\b|personnummer", True),
    _id("tr", r"\d{11}", _tr, r"kimlik|\bt\.?c\.? no", True),
    _id("in", r"\d{4}([ -]?)\d{4}\1\d{4}", _in, r"aadhaar|\buid(?:ai)?\b", True),
    _id("au", r"\d{3} ?\d{3} ?\d{3}", _au, r"\btfn\b|tax.file", True),
)  # fmt: skip
"""Every number that is known. No two of one shape are told apart without a word before them."""

WITH_LETTERS = frozenset({"gb", "es", "it"})
"""Countries whose number may begin with letters."""

LONGEST_LETTERS = 7
"""Characters that may stand before the first digit."""

_SEPARATORS = str.maketrans("", "", " .-/+")


def normal(number: str) -> str:
    """The number as the check wants it: capitals and digits alone.

    >>> normal("756.9217.0769.85")
    '7569217076985'
    """
    return number.translate(_SEPARATORS).upper()
