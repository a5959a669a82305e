"""What names a person in words: e-mail and postal addresses.

E-mail: a domain counts where its last label is a known one; domains that RFC 2606 reserves for examples, and
names that are a service's and not a person's, score low. Postal addresses are known by the words of streets
in English, German, French, Spanish, Italian and Dutch, and score higher with a town and its postcode.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from gyrocompass.data.curate.digit_groups import DigitGroups
from gyrocompass.data.curate.joined import Int64Array, Joined, is_any
from gyrocompass.data.curate.spans import Span

SURE, LIKELY, POSSIBLE, UNLIKELY = 0.95, 0.7, 0.4, 0.2

_GENERIC_NAMES = (
    "com org net edu gov mil int info biz name pro aero coop museum mobi jobs travel cat tel asia "
    "post xxx app dev"
    " io ai page blog cloud online site store shop tech xyz club live email work world today news "
    "media agency"
    " studio design digital solutions systems network company group global team space zone life "
    "health care bank"
    " london berlin paris nyc wien hamburg swiss"
)
_COUNTRY_NAMES = (
    "ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt "
    "bw by bz ca cc"
    " cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj "
    "fk fm fo fr"
    " ga gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir "
    "is it je jm"
    " jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml "
    "mm mn mo mp"
    " mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn "
    "pr ps pt pw"
    " py qa re ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg "
    "th tj tk tl"
    " tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw"
)
_TOP_LEVEL, _COUNTRIES = frozenset(_GENERIC_NAMES.split()), frozenset(_COUNTRY_NAMES.split())
_RESERVED = re.compile(r"(?i)(?:^|\.)(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local)$")
_SERVICES = frozenset(
    ["git", "hg", "svn", "root", "noreply", "no-reply", "donotreply", "postmaster", "hostmaster", "webmaster",
     "abuse",
     "mailer-daemon", "nobody"]
)  # fmt: skip

_LOCAL_BACKWARDS = re.compile(r"[\w%+'-](?:[\w.%+'-]{0,62}[\w%+-])?")
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w-]|\.\w)")
_SPELLED = re.compile(
    r"(?i)(?<![\w.])([\w.%+-]{1,64}) ?[\[(] ?at ?[\])] ?((?:[\w-]{1,63} ?(?:\.|[\[(] ?dot ?[\])]| dot "
    r") ?)+([a-z]{2,24}))\b"
)

_SUFFIX = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Square|Sq|Place|Pl"
    "|Terrace|Parkway|"
    "Pkwy|Highway|Hwy|Close|Crescent|Gardens|Grove|Circle|Cir|Hill|Mews|Row|Quay"
)
_ENGLISH = re.compile(
    rf"\d{{1,5}}[A-Za-z]? (?:[NSEW]\.? |(?:North|South|East|West) )?(?:[A-Z][\w'’-]+ |\d{{1,3}}(?:st"
    rf"|nd|rd|th) ){{1,3}}"
    rf"(?:{_SUFFIX})\b\.?(?:,? (?:Apt|Suite|Unit|Flat|#)\.? ?\w{{1,5}})?"
    r"(,?\s+[A-Z][\w.'’ -]{1,30}?,?\s+(?:[A-Z]{2},?\s+\d{5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]? "
    r"?\d[A-Z]{2}|[A-Z]{2,3} \d{4}))?"
)
_FRENCH = re.compile(
    r"\d{1,4}(?: ?(?:bis|ter))?,? (?:rue|avenue|boulevard|place|chemin|impasse|allée|quai|route|cours)"
    r" (?:(?:de|du|des|la|le|les|l'|d'|l’|d’) ?)*[A-ZÀ-Ý][\w'’-]+(?:[ -](?:(?:de|du|des|la|le|et) "
    r")*[A-ZÀ-Ý][\w'’-]+){0,3}"
    r"(,?\s+\d{5} [A-ZÀ-Ý][\w'’-]+)?"
)
_TOWN = r"(,?\s+(?:[A-Z]{1,2}-)?\d{4,5}(?: [A-Z]{2})? [A-ZÀ-Ý][\w'’-]+)?"
_GERMANIC = re.compile(
    r"(?<!\w)[A-ZÄÖÜ](?:[\wäöüß-]{0,30}(?:stra(?:ß|ss)e|str\.|weg|platz|allee|gasse|ufer|damm|ring"
    r"|straat|laan|plein|gracht"
    r"|kade)|[\wäöüß-]{1,20}[ -](?:Stra(?:ß|ss)e|Str\.|Weg|Platz|Allee|Ring|Ufer)),? \d{1,4} ?[a-z]?\b"
    + _TOWN
)
_GERMANIC_END = re.compile(
    r"(?:(?:[Ss]tra(?:ß|ss)|gass|kad)e|[Ss]tr\.|[Ww]eg|[Pp]latz|[Aa]llee|[Uu]fer|damm|[Rr]ing|straat"
    r"|laan|plein|gracht),? \Z"
)
_IS_ALSO_A_WORD = re.compile(r"(?:ring|weg|platz|ufer|damm|plein),? \d")
_ROMANCE_WORDS = (
    "Calle ",
    "Avenida ",
    "Avda. ",
    "Plaza ",
    "Paseo ",
    "Via ",
    "Viale ",
    "Piazza ",
    "Corso ",
    "Rua ",
)
_ROMANCE = re.compile(
    r"\w+\.?(?: (?:de|del|la|las|los|el|do|da|di|dei|della))*(?: [A-ZÀ-Ý][\w'’-]+){1,3},? \d{1,4} ?[a-z]?\b"
    + _TOWN
)


def emails(joined: Joined) -> Iterator[Span]:
    """E-mail addresses, also with `(at)` and `(dot)` spelled out."""
    text, code_N = joined.text, joined.code_N
    at_A = joined.positions("@")
    at_A = at_A[(at_A > 0) & (at_A < len(code_N) - 3)]
    is_local = is_any(code_N[at_A - 1], " \t\n\"'`(<>[]{},;:=@\0/\\|!#&*$.")
    for at in at_A[~is_local].tolist():
        domain = _DOMAIN.match(text, at + 1)
        local = _LOCAL_BACKWARDS.match(text[max(at - 64, 0) : at][::-1]) if domain else None
        if domain is None or local is None:
            continue
        start = at - local.end()
        start += len(text[start:at]) - len(text[start:at].lstrip("'-.+%"))
        if start < at:
            yield Span(start, domain.end(), "email", _email_score(text, start, at, domain.end()))
    for hint in ("at)", "at]", "AT)", "AT]"):
        for at in _places(text, hint):
            for match in _SPELLED.finditer(text, max(at - 72, 0), at + 96):
                if match.start() < at < match.end() and match[3].lower() in _TOP_LEVEL | _COUNTRIES:
                    yield Span(match.start(), match.end(), "email", LIKELY)


def _places(text: str, word: str) -> Iterator[int]:
    """Where a word stands."""
    place = text.find(word)
    while place >= 0:
        yield place
        place = text.find(word, place + 1)


def _email_score(text: str, start: int, at: int, end: int) -> float:
    local, domain = text[start:at].lower(), text[at + 1 : end].lower()
    last = domain.rsplit(".", 1)[1]
    is_known = last in _TOP_LEVEL or (last in _COUNTRIES and len(domain) > 4) or not last.isascii()
    is_login = (text[end : end + 1] == ":" and text[end + 1 : end + 2].strip() != "") or text[
        start - 2 : start
    ] == "//"
    if not is_known or is_login or local in _SERVICES or _RESERVED.search(domain):
        return UNLIKELY
    before = text[max(start - 48, 0) : start]
    return UNLIKELY if before.endswith(":") and "://" in before.split()[-1] else SURE


def addresses(joined: Joined, groups: DigitGroups) -> Iterator[Span]:
    """Postal addresses: a street with a number, and what follows of town and postcode."""
    is_short = groups.end_R - groups.start_R <= 5
    yield from _number_first(joined, groups.start_R[is_short], groups.end_R[is_short])
    yield from _number_last(joined, groups.start_R[is_short])


def _number_first(joined: Joined, start_R: Int64Array, end_R: Int64Array) -> Iterator[Span]:
    """English and French: `12 Church Street`, `12 rue de Lyon`."""
    text, code_N = joined.text, np.append(joined.code_N, np.zeros(2, np.uint8))
    after, beyond = code_N[end_R], code_N[end_R + 1]
    is_french = is_any(after, " ,") & is_any(beyond, " abcipqr")
    is_english = (after == ord(" ")) & ((beyond - 65 < 26) | (beyond - 48 < 10))
    is_english |= ((after | 32) - 97 < 26) & (beyond == ord(" "))
    for pattern, is_candidate in ((_ENGLISH, is_english), (_FRENCH, is_french)):
        for start in start_R[is_candidate].tolist():
            match = pattern.match(text, start)
            if match and not (
                text[max(start - 1, 0) : start].isalnum() or text[start - 1 : start] in {*"-_./"}
            ):
                yield Span(start, match.end(), "address", SURE if match[1] else LIKELY)


def _number_last(joined: Joined, start_R: Int64Array) -> Iterator[Span]:
    """German, Dutch, Spanish, Italian and Portuguese: `Gartenstraße 12`, `Calle Mayor 5`."""
    text = joined.text
    is_after_word = (start_R >= 4) & (joined.code_N[start_R - 1] == ord(" "))
    for start in start_R[is_after_word].tolist():
        if _GERMANIC_END.search(text, max(start - 10, 0), start):
            for match in _GERMANIC.finditer(text, max(start - 48, 0), min(start + 48, len(text))):
                if match.start() < start < match.end():
                    score = POSSIBLE if _IS_ALSO_A_WORD.search(match[0]) else LIKELY
                    yield Span(match.start(), match.end(), "address", SURE if match[1] else score)
    for word in _ROMANCE_WORDS:
        for start in _places(text, word):
            street = _ROMANCE.match(text, start)
            if street and not text[max(start - 1, 0) : start].isalnum():
                yield Span(start, street.end(), "address", SURE if street[1] else LIKELY)
