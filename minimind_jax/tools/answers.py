"""Whether an answer in words is the right one: numbers are compared as such, and nothing as a piece of a text."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction

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


# Whole answers --------------------------------------------------------------------------------------------------------

_MARKS = re.compile(r"answer is|answer\s{0,8}[:：]|答案[是为：:]", re.IGNORECASE)
_AROUND = " \t\n.,;:!?'\"`*$()。，；：！？“”‘’（）"
_NUMERIC = re.compile(r"[\s$€£¥]*[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d{1,4})?[\s%$€£¥°.]*")
_FRACTION = re.compile(r"(?<![\d./])-?\d{1,50}/\d{1,50}(?![\d/])")


def is_right(answer: str, expected: Sequence[str], question: str = "") -> bool:
    """Whether an answer is the expected one; of several, which must be numbers, it has to say each.

    One number, or fraction, is compared with the final answer that is marked (see `marked`), or with the last one said:
    whoever lists many has only said the last. 1/2 is 0.5, and says neither 1 nor 2. A text is compared with what is
    marked or with the whole answer, apart from case, white space and punctuation around it. Of several numbers, at most
    as many others may be said, which are not in the question. Raises ValueError for several texts.
    """
    if len(expected) == 1:
        return _is_one(answer, marked(expected[0]) or expected[0])
    numbers = [_number(text) for text in expected]
    if None in numbers or not numbers:
        raise ValueError("expected one text, or numbers, to check an answer against")
    others = set(numbers_in(answer)) - set(numbers_in(question))
    strays = [other for other in others if not any(same_number(number, other) for number in numbers)]
    return says(answer, numbers) and len(strays) <= len(numbers)


def _is_one(answer: str, expected: str) -> bool:
    final = marked(answer)
    said, due = (final or answer)[-_MAX_CHARACTERS:], [_number(expected)]
    if _FRACTION.fullmatch(_slashed(expected).strip(" $")):
        due = _quantities(expected)
    if due == [None] or not due:
        return _plain(said) == _plain(expected)
    found = _quantities(said)
    return bool(found) and _same(due[0], found[0 if final else -1])


def marked(text: str) -> str:
    r"""The final answer of a text: in its last \boxed{}, behind ####, in <answer>, or behind `answer is` and the like,
    to the end of the line; empty if nothing marks it."""
    _, box, rest = text.rpartition(r"\boxed{")
    if box:
        depths = itertools.accumulate((char == "{") - (char == "}") for char in rest)
        return rest[: next((i for i, depth in enumerate(depths) if depth < 0), len(rest))].strip()
    _, mark, rest = text.rpartition("####")
    if not mark:
        _, mark, rest = text.rpartition("</answer>")[0].rpartition("<answer>")
        if mark:
            return rest.strip()
        ends = [found.end() for found in _MARKS.finditer(text)]
        rest = text[ends[-1] :] if ends else ""
    return rest.strip().partition("\n")[0].strip()


def _number(text: str) -> Decimal | None:
    """The number that a text is; None if it is another text."""
    plain = unicodedata.normalize("NFKC", text).replace("−", "-")
    found = numbers_in(plain) if _NUMERIC.fullmatch(plain) else []
    return found[0] if len(found) == 1 else None


def _slashed(text: str) -> str:
    return re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)


def _quantities(text: str) -> list[Decimal | Fraction]:
    """The numbers and the fractions of a text, in order."""
    plain, found, start = _slashed(text), [], 0
    for match in _FRACTION.finditer(plain):
        above, below = map(int, match[0].split("/"))
        found += [*numbers_in(plain[start : match.start()]), *([Fraction(above, below)] if below else [])]
        start = match.end()
    return found + numbers_in(plain[start:])


def _same(expected: Decimal | Fraction, found: Decimal | Fraction) -> bool:
    is_plain = isinstance(expected, Decimal) and isinstance(found, Decimal)
    return same_number(expected, found) if is_plain else Fraction(expected) == Fraction(found)


def _plain(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip(_AROUND) or words
