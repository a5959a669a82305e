"""Check digits: what tells a number that was issued from one that only looks like it.

Every function takes the number without its separators. A check digit that is right by chance is right one
time in ten (`luhn`, `verhoeff`) to one in 97 (`iban`).
"""

from __future__ import annotations

from collections.abc import Sequence

_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)

_VERHOEFF_TIMES = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip
_VERHOEFF_MOVED = (
    "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415",
    "7046913258",
)  # fmt: skip


def luhn(digits: str) -> bool:
    """Luhn's sum: every second digit from the right is doubled, and its digits added; the total ends in 0.

    >>> luhn("4111111111111111"), luhn("4111111111111112")
    (True, False)
    """
    numbers = [int(digit) for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum(_DOUBLED[number] for number in numbers[1::2])) % 10 == 0


def iban(number: str) -> bool:
    """ISO 13616: with the first four characters moved to the end and letters as 10 to 35, 1 modulo 97.

    >>> iban("GB82WEST12345698765432"), iban("GB82WEST12345698765423")
    (True, False)
    """
    return int("".join(str(int(character, 36)) for character in number[4:] + number[:4])) % 97 == 1


def verhoeff(digits: str) -> bool:
    """Verhoeff's check over the dihedral group D5.

    >>> verhoeff("2363"), verhoeff("2364")
    (True, False)
    """
    check = 0
    for place, digit in enumerate(reversed(digits)):
        check = int(_VERHOEFF_TIMES[check][int(_VERHOEFF_MOVED[place % 8][int(digit)])])
    return check == 0


def iso7064_mod11_10(digits: str) -> bool:
    """ISO 7064, MOD 11,10: what the German tax number and others use.

    >>> iso7064_mod11_10("36574261809"), iso7064_mod11_10("36574261890")
    (True, False)
    """
    check = 10
    for digit in digits[:-1]:
        check = (check + int(digit)) % 10 or 10
        check = check * 2 % 11
    return (11 - check) % 10 == int(digits[-1])


def weighted(digits: str, weights: Sequence[int]) -> int:
    """The sum of each digit times its weight.

    >>> weighted("123", (3, 2, 1))
    10
    """
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))
