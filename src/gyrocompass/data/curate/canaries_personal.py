"""Personal data to plant: each kind in the forms people write, and decoys that look alike.

Values are random, and their check digits are right by the same rules that finders apply; those rules are
tested on published examples elsewhere.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Sequence

from gyrocompass.data.curate import checksums
from gyrocompass.data.curate.canaries import Draw, Found, measure, plant
from gyrocompass.data.curate.national_ids import NATIONAL_IDS, normal
from gyrocompass.data.curate.personal import KINDS, PersonalKind, find_in
from gyrocompass.data.curate.personal_numbers import is_card

_FIRST = [
    "anna",
    "bogdan",
    "chloe",
    "dmitri",
    "elif",
    "farid",
    "greta",
    "hiro",
    "ines",
    "jorge",
    "kwame",
    "lena",
    "mateo",
    "nadia",
    "olu",
    "petra",
]
_LAST = [
    "Abel",
    "Brandt",
    "Costa",
    "Dupont",
    "Eriksen",
    "Fontaine",
    "Garcia",
    "Huber",
    "Ivanova",
    "Jansen",
    "Kowalski",
    "Lindqvist",
    "Moreau",
    "Nagy",
]
_HOSTS = [
    "gmail.com",
    "posteo.de",
    "orange.fr",
    "uni-graz.at",
    "mail.ru",
    "bbc.co.uk",
    "proton.me",
    "firma-huber.ch",
    "sapo.pt",
    "acme.io",
]
_STREETS = ["Maple", "Oak", "Washington", "Church", "Mill", "Victoria", "Station", "Highland", "Cedar", "Elm"]
_TOWNS = {
    "en": ["Springfield", "Portland", "Dayton", "Albany", "Reno"],
    "de": ["Berlin", "Hamburg", "Kassel", "Ulm"],
}


def _digits(chance: random.Random, n: int) -> str:
    return "".join(chance.choices(string.digits, k=n))


def _until(valid: Callable[[str], bool], draw: Draw, chance: random.Random) -> str:
    """Draw until it is valid: the shortest way to right check digits, one in ten to one in 97."""
    while True:
        value = draw(chance)
        if valid(value):
            return value


def email(chance: random.Random) -> str:
    """An e-mail address."""
    first, last = chance.choice(_FIRST), chance.choice(_LAST).lower()
    local = chance.choice(
        [f"{first}.{last}", f"{first[0]}{last}", f"{first}_{last}{_digits(chance, 2)}", f"{last}+list"]
    )
    return f"{local}@{chance.choice(_HOSTS)}"


def phone(chance: random.Random) -> str:
    """A telephone number that says of itself what it is: by its plus sign, its form, or a word."""
    area, exchange, line = (
        f"{chance.randint(202, 210)}",
        f"{chance.randint(220, 989)}".replace("11", "12"),
        _digits(chance, 4),
    )
    return chance.choice(
        [
            f"+1 {area} {exchange} {line}",
            f"({area}) {exchange}-{line}",
            f"{area}-{exchange}-{line}",
            f"{area}.{exchange}.{line}",
            f"+49 30 {chance.randint(1, 9)}{_digits(chance, 6)}",
            f"+44 20 7{_digits(chance, 3)} {_digits(chance, 4)}",
            f"+33 6 {' '.join(_digits(chance, 2) for _ in range(4))}",
            f"01 {' '.join(_digits(chance, 2) for _ in range(4))}",
            f"020 7{_digits(chance, 3)} {_digits(chance, 4)}",
            f"+91-{chance.randint(7, 9)}{_digits(chance, 9)}",
            f"+81 3-{chance.randint(2, 9)}{_digits(chance, 3)}-{_digits(chance, 4)}",
        ]
    )


def ip(chance: random.Random) -> str:
    """A public IP address."""
    if chance.random() < 0.3:
        groups = [f"{chance.randint(0, 0xFFFF):x}" for _ in range(6)]
        return (
            f"2a01:4f8:{':'.join(groups)}" if chance.random() < 0.5 else f"2a01:4f8:{groups[0]}::{groups[1]}"
        )
    first = chance.choice([8, 34, 52, 81, 93, 104, 145, 185, 193, 212])
    return f"{first}.{chance.randint(30, 255)}.{chance.randint(0, 255)}.{chance.randint(1, 254)}"


def iban(chance: random.Random) -> str:
    """An account number of one of eight countries, in one piece or in fours."""
    country, form = chance.choice(
        [("DE", "n" * 18), ("GB", "aaaa" + "n" * 14), ("FR", "n" * 10 + "c" * 11 + "nn"), ("NL",
         "aaaa" + "n" * 10),
         ("ES", "n" * 20), ("IT", "a" + "n" * 10 + "c" * 12), ("CH", "n" * 5 + "c" * 12), ("NO", "n" * 11)]
    )  # fmt: skip
    alphabet = {"n": string.digits, "a": string.ascii_uppercase, "c": string.digits + string.ascii_uppercase}
    body = "".join(chance.choice(alphabet[kind]) for kind in form)
    number = next(
        f"{country}{check:02}{body}" for check in range(2, 99) if checksums.iban(f"{country}{check:02}{body}")
    )
    return number if chance.random() < 0.5 else " ".join(number[i : i + 4] for i in range(0, len(number), 4))


def card(chance: random.Random) -> str:
    """A card number of four networks, in one piece or in groups."""
    prefix, length = chance.choice(
        [("4", 16), ("5" + str(chance.randint(1, 5)), 16), ("37", 15), ("6011", 16)]
    )
    number = _until(is_card, lambda c: prefix + _digits(c, length - len(prefix)), chance)
    parts = (
        [number[:4], number[4:10], number[10:]]
        if length == 15
        else [number[i : i + 4] for i in range(0, 16, 4)]
    )
    return chance.choice(["", " ", "-"]).join(parts)


_ID_FORMS = {
    "us": "{3}-{2}-{4}", "gb": "AB{6}C", "fr": "1{2}05{8}{2}", "es": "{8}@", "it": "@@@@@@{2}A15@{3}@",
    "fi": "{2}03{2}-{3}@", "ch": "756.{4}.{4}.{2}", "be": "{2}.04.12-{3}.{2}", "br": "{3}.{3}.{3}-{2}",
    "se": "{2}0312-{4}", "cn": "11010519{2}0312{4}", "de": "{11}", "pl": "{2}0312{5}", "nl": "{9}",
    "ca": "{3}-{3}-{3}", "no": "1203{7}", "tr": "{11}", "in": "{4} {4} {4}", "au": "{3} {3} {3}",
}  # fmt: skip

WORDS = {
    "id.us": "SSN ", "id.de": "Steuer-ID: ", "id.pl": "PESEL ", "id.nl": "BSN ", "id.ca": "SIN ",
    "id.no": "fødselsnummer ", "id.tr": "TC Kimlik No: ", "id.in": "Aadhaar ", "id.au": "TFN ",
}  # fmt: skip
"""Words before numbers that are digits alone."""


def national_id(country: str) -> Draw:
    """What draws the identity number of a country."""
    identity = next(known for known in NATIONAL_IDS if known.country == country)

    def draw(chance: random.Random) -> str:
        value, left = "", _ID_FORMS[country]
        while left:
            if left[0] == "{":
                size, _, left = left[1:].partition("}")
                value += _digits(chance, int(size))
            else:
                value += chance.choice(string.ascii_uppercase) if left[0] == "@" else left[0]
                left = left[1:]
        return value

    def is_valid(value: str) -> bool:
        return identity.pattern.fullmatch(value) is not None and identity.is_valid(normal(value))

    return lambda chance: _until(is_valid, draw, chance)


def address(chance: random.Random) -> str:
    """A postal address in English, German, French or Spanish."""
    number, street = chance.randint(1, 1999), chance.choice(_STREETS)
    return chance.choice(
        [
            f"{number} {street} {chance.choice(['Street', 'Ave', 'Road', 'Lane'])}, "
            f"{chance.choice(_TOWNS['en'])}, "
            f"{chance.choice(['OR', 'OH', 'NY'])} 9{_digits(chance, 4)}",
            f"{number % 200} {street} {chance.choice(['Street', 'Road', 'Close'])}",
            f"{chance.choice(['Haupt', 'Garten', 'Bahnhof'])}straße {number % 99 + 1}, "
            f"1{_digits(chance, 4)} {chance.choice(_TOWNS['de'])}",
            f"{number % 150 + 1} rue de {chance.choice(['Rivoli', 'Lyon', 'Bretagne'])}, "
            f"75{_digits(chance, 3)} Paris",
            f"Calle {chance.choice(['Mayor', 'Goya', 'Serrano'])} {number % 99 + 1}, "
            f"28{_digits(chance, 3)} Madrid",
        ]
    )


DRAWS: dict[str, Draw] = {
    "email": email,
    "phone": phone,
    "ip": ip,
    "iban": iban,
    "card": card,
    "address": address,
    **{f"id.{identity.country}": national_id(identity.country) for identity in NATIONAL_IDS},
}
"""What draws a value of each kind."""

DECOYS: tuple[Draw, ...] = (
    lambda c: f"version {c.randint(0, 9)}.{c.randint(0, 30)}.{c.randint(0, 99)}.{c.randint(0, 255)}",
    lambda c: f"{c.choice(['192.168', '10.0', '127.0'])}.{c.randint(0, 9)}.1",
    lambda c: (
        f"{c.randint(1950, 2030)}-{c.randint(10, 12)}-{c.randint(10, 28)} "
        f"{c.randint(10, 23)}:{c.randint(10, 59)}:00"
    ),
    lambda c: f"{c.randint(1, 12)}/{c.randint(1, 28)}/{c.randint(1950, 2030)}",
    lambda c: hashlib.sha1(c.randbytes(4)).hexdigest(),
    lambda c: (
        f"{c.randbytes(4).hex()}-{c.randbytes(2).hex()}-4{c.randbytes(2).hex()[1:]}-a{c.randbytes(2).hex()[1:]}-{c.randbytes(6).hex()}"
    ),
    lambda c: f"ISBN 978-{c.randint(0, 9)}-{_digits(c, 3)}-{_digits(c, 5)}-{c.randint(0, 9)}",
    lambda c: f"a[{c.randint(0, 9)}::{c.randint(2, 9)}]",
    lambda c: f"std::{c.choice(['dec', 'fabs', 'add'])}",
    lambda c: f"git@github.com:{c.choice(_FIRST)}/tool.git",
    lambda c: f"someone@example.{c.choice(['com', 'org'])}",
    lambda c: f"left@right.{c.choice(['weight', 'T', 'grad', 'shape'])}",
    lambda c: f"@property.{c.choice(['setter', 'getter'])}",
    lambda c: f"{c.random():.12f}",
    lambda c: f"{c.randint(1, 9)}.{_digits(c, 6)}e-{c.randint(10, 99)}",
    lambda c: f"{c.randint(1, 9)}{_digits(c, 6)}",
    lambda c: f"1{_digits(c, 9)}.{_digits(c, 6)}",
    lambda c: f"0x{c.randbytes(8).hex()}",
    lambda c: _until(lambda v: not is_card(v), lambda d: "4" + _digits(d, 15), c),
    lambda c: _until(lambda v: not checksums.iban(v), lambda d: "DE" + _digits(d, 20), c),
    lambda c: f"arXiv:{c.randint(1001, 2612)}.{_digits(c, 5)}",
    lambda c: f"10.{_digits(c, 4)}/{c.choice(_FIRST)}.{c.randint(1990, 2026)}.{_digits(c, 5)}",
    lambda c: f"line {c.randint(1, 900)} of {c.randint(900, 9000)}",
    lambda c: f"{c.randint(2, 90)} Years Later",
    lambda c: f"RFC {c.randint(700, 9400)}, Section {c.randint(1, 9)}.{c.randint(1, 9)}.{c.randint(1, 9)}",
    lambda c: f"{c.randint(10, 23)}:{c.randint(10, 59)}:{c.randint(10, 59)}",
    lambda c: ":".join(c.randbytes(1).hex() for _ in range(6)),
    lambda c: " ".join(str(c.randint(0, 255)) for _ in range(8)),
    lambda c: f"{c.randint(1, 9)},{_digits(c, 3)},{_digits(c, 3)}",
    lambda c: f"1990-{c.randint(1991, 2020)}, 2nd ed., pp. {c.randint(100, 300)}-{c.randint(301, 600)}",
)
"""What draws a decoy."""


def measured(
    seed: int = 0, n: int = 300, kinds: Sequence[PersonalKind] = KINDS, minimum_score: float = 0.5
) -> dict[tuple[str, str], Found]:
    """Recall and precision of `PersonalData` on planted texts, `n` of each slice.

    Args:
        seed: of what is planted.
        n: texts of each slice.
        kinds: those that are planted and looked for.
        minimum_score: of what counts as found.
    """
    draws = {kind: draw for kind, draw in DRAWS.items() if kind.partition(".")[0] in kinds}
    texts = plant(draws, DECOYS, seed=seed, n=n, before=WORDS)
    return measure(lambda text: find_in(text, kinds), texts, minimum_score)
