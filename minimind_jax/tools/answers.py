"""Whether an answer in words is the right one: numbers are compared as such, and nothing as a piece of a text."""

import itertools
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from minimind_jax.tools.notation import plain, with_digits

# Not within a word, a name or another number; `1,234.5` is one number; behind a digit or a bracket, - is no sign.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(?:(?<![)\]])-)?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4})?"
)
_MAX_CHARACTERS = 100_000


def numbers_in(text: str) -> list[Decimal]:
    """The numbers of a text, in order, with the decimals they are written with."""
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(plain(text[:_MAX_CHARACTERS]))]


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
_NUMERIC = re.compile(r"[\s$€£¥]*[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4})?[\s%$€£¥°.]*")
_QUANTITY = re.compile(rf"(?<![\d./])(?:(-?)(\d{{1,50}})\s)?(-?\d{{1,50}})/(\d{{1,50}})(?![\d/])|{_NUMBER.pattern}")
_PROSE = (
    (r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d/])", lambda found: found[1].replace(" ", "")),
    (r"^(\W*)-\s+(?=\d)|\bnegative\s(?=\d)|(?<!\d )\bminus\s(?=\d)", lambda found: f"{found[1] or ''}-"),
    (r"\sdegrees?\b", lambda found: "°"),
)
# 5 km, 20 m/s, 5元, 25°C; not 12 Angry Men, nor 5x.
_UNIT = re.compile(
    r"[\s$€£¥]*([a-z]{1,3}/[a-z]{1,15}|[a-z]{2,15}(?: [a-z]{1,15})?|[\u4e00-\u9fff]{1,3}|°?[A-Z]?)(?!\w)"
)


class _Quantity(NamedTuple):
    """A number of a text, and where it stands."""

    value: Decimal | Fraction
    start: int
    end: int


def is_right(answer: str, expected: Sequence[str], question: str = "") -> bool:
    """Whether an answer is the expected one; of several, which must be numbers, it has to say each.

    One number, or fraction, is compared with the final answer that is marked (see `marked`), or with the last one said:
    whoever lists many has only said the last. 1/2 is 0.5, and says neither 1 nor 2. A unit that is expected may be left
    out, and must not be another. A text is compared with what is marked or with the whole answer, apart from case,
    white space, LaTeX's fonts and punctuation around it. Of several numbers, at most as many others may be said, which
    are not in the question. How numbers may be written: see `notation`. Raises ValueError for several texts.
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
    said, wanted = (final or answer)[-_MAX_CHARACTERS:], _readable(_result(expected))
    if not _is_quantity(wanted):
        return _words(said) == _words(expected)
    said = _readable(_result(said) if final else said)
    if not (found := _quantities(said)):
        return False
    due, own = _quantities(wanted)[0], found[0 if final else -1]
    behind = wanted[due.end :], said[own.end :]
    shares = [text.lstrip().startswith(("%", "per")) for text in behind]
    is_same = _same(due.value, own.value)
    if shares[0] != shares[1]:
        scaled = [Fraction(each.value) / (100 if share else 1) for each, share in zip((due, own), shares, strict=True)]
        return is_same or scaled[0] == scaled[1]
    return is_same and _same_unit(*map(_unit, behind))


def _is_quantity(text: str) -> bool:
    """Whether a text is one number or fraction, with a unit or without."""
    found = _quantities(text)
    if len(found) != 1 or re.search(r"[^\W_]|[)\]]", text[: found[0].start]):
        return False
    behind = text[found[0].end :].lstrip("%")
    return not re.search(r"\w", behind[len(_UNIT.match(behind)[0]) :] if _UNIT.match(behind) else behind)


def _unit(behind: str) -> str:
    """What is counted, of the text behind a number; empty where that does not say."""
    found = _UNIT.match(behind)
    return found[1].lower() if found else ""


def _same_unit(expected: str, found: str) -> bool:
    """One that is left out is the same, and so is one cut short: kg and kilograms, hrs and hours."""
    short, long = sorted((expected, found), key=len)
    letters = iter(long)
    return long.startswith(short) or (len(long) > 3 and short[0] == long[0] and all(c in letters for c in short))


def _result(text: str) -> str:
    """Of an equation, such as x = 5 or 2 + 3 = 5, what stands behind the last sign; else the text."""
    before, _, last = text.rpartition("=")
    is_formula = not re.search(r"[^\W\d_]{2}|[,;]\s|[一-鿿]", re.sub(r"\\[A-Za-z]+", "", before))
    return last if is_formula and len(_quantities(_readable(last))) == 1 else text


def _readable(text: str) -> str:
    """Text in plain notation: signs, groups of digits and Chinese numerals of words are digits, too."""
    text = with_digits(plain(text))
    for pattern, new in _PROSE:
        text = re.sub(pattern, new, text)
    return text


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
    read = plain(text)
    found = numbers_in(read) if _NUMERIC.fullmatch(read) else []
    return found[0] if len(found) == 1 else None


def _quantities(text: str) -> list[_Quantity]:
    """The numbers and the fractions of a text in plain notation, in order."""
    found = []
    for match in _QUANTITY.finditer(text):
        sign, whole, above, below = match.groups()
        if below is None:
            found.append(_Quantity(Decimal(match[0].replace(",", "")), *match.span()))
        elif int(below):
            part = Fraction(int(above), int(below))
            is_mixed = whole is not None and 0 <= part < 1
            value = (-1 if sign else 1) * (int(whole) + part) if is_mixed else part
            found.append(_Quantity(value, *match.span()))
    return found


def _same(expected: Decimal | Fraction, found: Decimal | Fraction) -> bool:
    is_plain = isinstance(expected, Decimal) and isinstance(found, Decimal)
    return same_number(expected, found) if is_plain else Fraction(expected) == Fraction(found)


def _words(text: str) -> str:
    words = " ".join(plain(text).casefold().split())
    words = re.sub(r" ?([^\w\s]) ?", r"\1", words)
    return words.strip(_AROUND) or words
