"""Whether an answer in words says the numbers that it should: compared as numbers, never as pieces of text."""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

# Not within a word, a name or another number; `1,234.5` is one number; behind a digit or a bracket, - is no sign.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(?:(?<![)\]])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,4})?"
)
_MAX_CHARACTERS = 100_000


def numbers_in(text: str) -> list[Decimal]:
    """The numbers of a text, in order, with the decimals they are written with."""
    plain = unicodedata.normalize("NFKC", text[:_MAX_CHARACTERS]).replace("−", "-")
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(plain)]


def same_number(expected: Decimal, found: Decimal) -> bool:
    """Whether `found` is `expected`, which may be rounded to no fewer than two decimals and by no more than 0.5 %.

    A whole number is only itself.
    """
    if expected == found:
        return True
    decimals, shown = (max(0, -number.as_tuple().exponent) for number in (expected, found))
    if not decimals or shown < min(decimals, 2):
        return False
    error = abs(expected - found)
    return error <= Decimal(5).scaleb(-min(decimals, shown) - 1) and error * 200 <= abs(expected)


def says(answer: str, expected: Iterable[Decimal]) -> bool:
    """Whether each of the numbers is among those of the answer."""
    found = numbers_in(answer)
    return all(any(same_number(number, other) for other in found) for number in expected)
