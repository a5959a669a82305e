"""Numbers that name a person: bank accounts, cards, telephones, network addresses, national identities.

Each finder goes over the digit groups of a joined text and yields spans with a score:

    >= 0.9   a check digit or a full international form says so, or a word before it does
    0.6-0.8  the form is the usual one of some country
    <= 0.4   digits alone, an address that no one person has, or what may as well be a version

What counts is decided by a threshold; nothing that was found is lost.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

import numpy as np

from gyrocompass.data.curate import checksums
from gyrocompass.data.curate.calling_codes import national_lengths
from gyrocompass.data.curate.digit_groups import DigitGroups
from gyrocompass.data.curate.joined import Joined, is_any, runs
from gyrocompass.data.curate.national_ids import LONGEST_LETTERS, NATIONAL_IDS, normal
from gyrocompass.data.curate.spans import Span

SURE, LIKELY, POSSIBLE, UNLIKELY = 0.95, 0.7, 0.4, 0.2

IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27,
    "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28,
    "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23,
    "GL": 18, "GR": 27, "GT": 28, "HN": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21,
    "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28,
    "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22,
    "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "SO": 23, "ST": 25,
    "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip
"""Characters of an account number by country (the IBAN registry)."""

_IBAN = re.compile(r"[A-Z]{2}\d\d(?:[ \xa0-]?[A-Z0-9]){11,30}")
_CARD = re.compile(
    r"(?<![\w.,+-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{1,7}|3\d{3}([ -]?)\d{6}\2\d{4,5})(?!\w|[.,-]\d| \d)"
)
_CARD_CONTEXT = re.compile(
    r"(?i)(?:card|visa|mastercard|amex|\bpan\b|kreditkarte|carte|tarjeta)[^\n]{0,24}\Z"
)

_PHONE_WORLD = re.compile(r"(?<![\w+.])\+\d[\d \xa0\-.()/]{5,22}\d(?![\w])")
_PHONE_AMERICA = re.compile(
    r"(?<![\w.+-])(?:1[ .-])?(?:\(([2-9]\d\d)\) ?|([2-9]\d\d)([ .-]))([2-9]\d\d)(?:(?<=\d)[ "
    r".-])\d{4}(?![\w-]|\.\d)"
)
_PHONE_PAIRS = re.compile(r"(?<![\w.+-])0[1-9](?:([ .-])\d\d)(?:\1\d\d){3}(?![\w-]|[ .]\d)")
_PHONE_TRUNK = re.compile(
    r"(?<![\w.+-])(?:\(0\d{1,5}\)|0\d{1,5})(?: ?[-/] ?| )\d{3,8}(?:[ -]\d{2,5}){0,3}(?![\w/-]|[. ]\d)"
)
_PHONE_ANY = re.compile(r"(?<![\w.+-])\(?\d[\d \xa0\-.()/]{5,18}\d(?![\w])")
_PHONE_CONTEXT = re.compile(
    r"(?i)(?:\b(?:tele)?phone|\b(?:tele)?fax\b|\btel\b|\btelefon|t[ée]l[ée]ph|\bfon\b|\bmob(?:ile?"
    r"|il)?\b|\bmovil|"
    r"\bmóvil|\bcell|\bcall\b|\bhandy|whatsapp|sms|\bteléfono|тел|電話|电话|☎|📞)[^\n\d]{0,24}\Z"
)

_VERSION_CONTEXT = re.compile(
    r"(?i)(?:\bv|version|release|\brev|firmware|build|==|>=|<=|~=|§|sections?|chapter)\W{0,3}\Z"
)
_HOST_CONTEXT = re.compile(
    r"(?i)(?:\bip|addr|host|server|from|client|remote|inet|ping|ssh|gateway|//|@)[^\n]{0,16}\Z"
)


def ibans(joined: Joined, groups: DigitGroups) -> Iterator[Span]:
    """International bank account numbers: length by country, and 1 modulo 97."""
    start_R = groups.start_R[(groups.end_R - groups.start_R >= 2) & (groups.start_R >= 2)]
    is_upper = (joined.code_N[start_R - 1] - 65 < 26) & (joined.code_N[start_R - 2] - 65 < 26)
    for start in (start_R[is_upper] - 2).tolist():
        length = IBAN_LENGTHS.get(joined.text[start : start + 2])
        match = _IBAN.match(joined.text, start) if length else None
        if length is None or match is None or joined.text[max(start - 1, 0) : start].isalnum():
            continue
        end = _end_after(joined.text, start, match.end(), length)
        number = re.sub(r"[ \xa0-]", "", joined.text[start:end])
        is_whole = not joined.text[end : end + 1].isalnum()
        if len(number) == length and is_whole and checksums.iban(number):
            yield Span(start, end, "iban", SURE)


def _end_after(text: str, start: int, limit: int, n_characters: int) -> int:
    """Where the n-th letter or digit from `start` ends, `limit` at most."""
    position = start
    while position < limit and n_characters:
        n_characters -= text[position].isalnum()
        position += 1
    return position


def cards(joined: Joined, groups: DigitGroups) -> Iterator[Span]:
    """Payment cards: a network's prefix and length, and Luhn's check."""
    for number in np.flatnonzero(groups.n_digits_G >= 13).tolist():
        start, end = groups.group(number)
        for match in _CARD.finditer(joined.text, start, end + 1):
            digits = re.sub(r"\D", "", match[0])
            if is_card(digits):
                is_named = match[1] or match[2] or _before(_CARD_CONTEXT, joined.text, match.start())
                yield Span(match.start(), match.end(), "card", SURE if is_named else LIKELY)


def is_card(digits: str) -> bool:
    """Whether digits are a payment card's.

    >>> is_card("4111111111111111"), is_card("9111111111111111")
    (True, False)
    """
    first2, first3, first4 = int(digits[:2]), int(digits[:3]), int(digits[:4])
    match len(digits):
        case 13:
            is_network = first2 // 10 == 4
        case 14:
            is_network = 300 <= first3 <= 305 or first2 in (36, 38, 39)
        case 15:
            is_network = first2 in (34, 37)
        case 16:
            is_network = (
                first2 // 10 == 4
                or 51 <= first2 <= 55
                or 2221 <= first4 <= 2720
                or first4 == 6011
                or first2 in (62, 65)
                or 644 <= first3 <= 649
                or 3528 <= first4 <= 3589
            )
        case 17 | 18 | 19:
            is_network = first2 == 62 or (len(digits) == 19 and first2 // 10 == 4)
        case _:
            is_network = False
    return is_network and len(set(digits)) > 1 and checksums.luhn(digits)


def phones(joined: Joined, groups: DigitGroups) -> Iterator[Span]:
    """Telephone numbers: international, North American, in pairs, with a trunk 0, or after a word for it."""
    text = joined.text
    for number in np.flatnonzero(groups.n_digits_G >= 7).tolist():
        start, end = groups.group(number)
        before = text[max(start - 2, 0) : start]
        low = start - (2 if before == "+(" else before[-1:] in {"+", "("})
        if text[low : low + 1] == "+":
            for match in _PHONE_WORLD.finditer(text, low, end + 1):
                is_decimal = re.fullmatch(r"\+\d+\.\d+", match[0]) is not None
                if not is_decimal and _is_international(re.sub(r"\D", "", match[0].replace("(0)", ""))):
                    yield Span(match.start(), match.end(), "phone", SURE)
            continue
        is_named = groups.n_digits_G[number] <= 20 and _before(
            _PHONE_CONTEXT, text, start - (before[-1:] == "(")
        )
        if is_named:
            for match in _PHONE_ANY.finditer(text, low, end + 1):
                if 7 <= sum(map(str.isdigit, match[0])) <= 15:
                    yield Span(match.start(), match.end(), "phone", SURE)
                    break
        yield from _national(text, low, end + 1)


def _national(text: str, start: int, end: int) -> Iterator[Span]:
    for match in _PHONE_AMERICA.finditer(text, start, end):
        area, exchange = match[1] or match[2], match[4]
        is_service = area[1:] == "11" or exchange[1:] == "11"
        is_plain = match[3] == " "
        if not is_service:
            yield Span(match.start(), match.end(), "phone", POSSIBLE if is_plain else LIKELY)
    for match in _PHONE_PAIRS.finditer(text, start, end):
        yield Span(match.start(), match.end(), "phone", LIKELY)
    for match in _PHONE_TRUNK.finditer(text, start, end):
        n_digits = sum(map(str.isdigit, match[0]))
        if 9 <= n_digits <= 12:
            yield Span(match.start(), match.end(), "phone", LIKELY if n_digits >= 10 else POSSIBLE)


def _is_international(digits: str) -> bool:
    """Whether a number begins with a country's calling code and has a length that the country gives out."""
    lengths = national_lengths(digits)
    return lengths is not None and (digits[0] != "1" or (digits[1] in "23456789" and digits[4] in "23456789"))


def network_addresses(joined: Joined, groups: DigitGroups) -> Iterator[Span]:
    """IP addresses, version 4 and 6; those that are private, reserved or for documentation score low."""
    yield from _ipv4(joined, groups)
    yield from _ipv6(joined)


def _ipv4(joined: Joined, groups: DigitGroups) -> Iterator[Span]:
    start_R, end_R, code_N = groups.start_R, groups.end_R, joined.code_N
    if len(start_R) < 4:
        return
    is_dot_R = (start_R[1:] - end_R[:-1] == 1) & (code_N[end_R[:-1]] == ord("."))
    for first in np.flatnonzero(is_dot_R[:-2] & is_dot_R[1:-1] & is_dot_R[2:]).tolist():
        start, end = int(start_R[first]), int(end_R[first + 3])
        before, after = joined.text[max(start - 1, 0) : start], joined.text[end : end + 2]
        if before.isalnum() or before in {".", "-", "_"} or _goes_on(after) or end - start > 15:
            continue
        try:
            address = ipaddress.IPv4Address(joined.text[start:end])
        except ValueError:
            continue
        yield Span(start, end, "ip", _ipv4_score(joined.text, start, end, address))


def _goes_on(after: str) -> bool:
    """Whether a number with dots goes on behind its fourth part."""
    return after[:1].isalnum() or after[:1] in {"_", "-"} or (after[:1] == "." and after[1:].isalnum())


def _ipv4_score(text: str, start: int, end: int, address: ipaddress.IPv4Address) -> float:
    if not address.is_global or address.is_multicast or _before(_VERSION_CONTEXT, text, start):
        return UNLIKELY
    is_small = max(address.packed) < 30 or sum(part < 10 for part in address.packed) >= 3
    return POSSIBLE if is_small and not _before(_HOST_CONTEXT, text, start) else SURE


def _ipv6(joined: Joined) -> Iterator[Span]:
    colon_N = joined.code_N == ord(":")
    at = np.flatnonzero(colon_N[:-2] & colon_N[1:-1])  # `::`
    start_G, end_G = runs(is_any(joined.code_N, "0123456789abcdefABCDEF:"))
    is_long = end_G - start_G >= 15
    has_double = np.zeros(len(start_G), dtype=np.bool_)
    if len(at):
        has_double[np.searchsorted(start_G, at, side="right") - 1] = True
    for start, end in zip(
        start_G[(is_long | has_double) & (end_G - start_G >= 4)].tolist(),
        end_G[(is_long | has_double) & (end_G - start_G >= 4)].tolist(),
        strict=True,
    ):
        token = joined.text[start:end]
        if token.count(":") < 2 or len(token) > 40 or _is_word(joined.text, start, end):
            continue
        end -= len(token) - len(token.rstrip(":")) if not token.endswith("::") else 0
        try:
            address = ipaddress.IPv6Address(joined.text[start:end])
        except ValueError:
            continue
        is_public = address.is_global and address.packed[0] in (0x20, 0x21, 0x22, 0x23, *range(0x24, 0x40))
        is_formed = joined.text[start : start + 4].isalnum()
        yield Span(start, end, "ip", SURE if is_public and is_formed else UNLIKELY)


def _is_word(text: str, start: int, end: int) -> bool:
    """Whether letters or digits touch a token on either side."""
    return text[max(start - 1, 0) : start].isalnum() or text[end : end + 1].isalnum()


def national_ids(joined: Joined, groups: DigitGroups) -> Iterator[Span]:
    """National identity numbers: see the table. Those that are digits alone need a word before them."""
    text = joined.text
    for number in np.flatnonzero(groups.n_digits_G >= 6).tolist():
        start, end = groups.group(number)
        low = max(start - 3, 0)
        for identity in NATIONAL_IDS:
            for match in identity.pattern.finditer(text, low, end + 3):
                if identity.is_valid(normal(match[0])):
                    is_named = _before(identity.context, text, match.start())
                    score = SURE if is_named else UNLIKELY if identity.is_bare else LIKELY
                    yield Span(match.start(), match.end(), f"id.{identity.country}", score)
    yield from _codici(joined, groups)


def _codici(joined: Joined, groups: DigitGroups) -> Iterator[Span]:
    """Italian codes: digits stand in runs of 2, 2 and 3 with a letter between, behind six letters."""
    length_R, gap_R = groups.end_R - groups.start_R, groups.start_R[1:] - groups.end_R[:-1]
    if len(length_R) < 3:
        return
    has_lengths = (length_R[:-2] == 2) & (length_R[1:-1] == 2) & (length_R[2:] == 3)
    italian = next(identity for identity in NATIONAL_IDS if identity.country == "it")
    for first in np.flatnonzero(has_lengths & (gap_R[:-1] == 1) & (gap_R[1:] == 1)).tolist():
        match = italian.pattern.match(joined.text, int(groups.start_R[first]) - LONGEST_LETTERS + 1)
        if match and italian.is_valid(match[0]):
            yield Span(match.start(), match.end(), "id.it", SURE)


def _before(context: re.Pattern[str], text: str, start: int) -> bool:
    """Whether words that the pattern knows stand shortly before a position."""
    return context.search(text, max(start - 48, 0), start) is not None
