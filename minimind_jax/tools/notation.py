"""Numbers as people and LaTeX write them, in the plain notation that `answers` compares: 1234.5, -3/4, 50%."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400})"
_PART = rf"\s*(?:\{{\s*(-?{_DECIMAL})\s*\}}|(\d))"  # \frac{1}{2}, \frac12
_FRACTION = re.compile(rf"((?<=\d)(?=\\))?-?\\frac{_PART}{_PART}")
_NOTATIONS = (
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
    (r"\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", "°"),
    (r"\\sqrt\s?(\w)", r"\\sqrt{\1}"),
    (r"\\([%$#&_])", r"\1"),
    (r"[−–]", "-"),
    # Groups of three digits behind a fixed or thin space, LaTeX's {,} and \, or an apostrophe.
    (r"(?<=\d)(?:[\u00a0\u2009\u202f'’_]|\{,\}|,?\\[,!])(?=\d{3}(?!\d))", ""),
    (r"\\[,;:! ]|~", " "),
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),  # one and a half
    (r"([⁰¹²³⁴-⁹⁻]{1,9})", r"^{\1}"),
)
_SCIENTIFIC = re.compile(
    r"(?<![\d.^{])(?:(\d{1,400}(?:\.\d{1,400})?)\s?(?:\\times|\\cdot|[x×*·])\s?)?10\s?\^\s?\{?([-+]?\d{1,4})(?!\d)\}?"
)
_POWER = re.compile(r"(?<![\w.^{])(\d{1,9})\s?\^\s?\{?(\d{1,2})(?!\d)\}?")


def plain(text: str) -> str:
    r"""Text whose numbers stand in plain notation: those of LaTeX and of full width, with any sign and separator.

    \frac{6}{8} is 3/4, 1\frac12 and 1½ are 1 1/2, 3 \times 10^5 is 3e5, 2^{10} is 1024, 1.5万 is 15000, and m^2 is m.
    """
    for pattern, new in _NOTATIONS:
        text = re.sub(pattern, new, text)
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/")
    text = _SCIENTIFIC.sub(lambda found: f"{found[1] or 1}e{int(found[2])}", _FRACTION.sub(_over, text))
    text = _POWER.sub(lambda found: str(int(found[1]) ** int(found[2])), text)
    text = re.sub(r"(?<=[^\W\d_])\s?\^\s?\{?-?\d{1,2}(?!\d)\}?", "", text)
    units = re.compile(rf"(?<!\d)({_DECIMAL})\s?([万亿])")
    return units.sub(lambda found: f"{Decimal(found[1].replace(',', '')) * _UNITS[found[2]]:f}", text)


def _over(found: re.Match[str]) -> str:
    above, below = (Fraction((found[n] or found[n + 1]).replace(",", "")) for n in (2, 4))
    sign = " " if found[1] is not None else "-" * found[0].startswith("-")
    return f"{sign}{above / below if below else f'{above}/0'}"


# Chinese numerals -----------------------------------------------------------------------------------------------------

_DIGITS = {"〇": "0", "两": "2", **{char: str(n) for n, char in enumerate("零一二三四五六七八九")}}
_UNITS = {"亿": 10**8, "万": 10**4, "千": 1000, "百": 100, "十": 10}
_NUMERAL = f"[{''.join([*_DIGITS, *_UNITS])}]{{1,40}}"
_NUMBER = rf"({_NUMERAL}|\d{{1,400}}(?:\.\d{{1,400}})?)"
_COUNTED = "个只元块本人岁天年月日条张页米斤克吨升次种位名件辆颗棵朵头匹支枝枚双对倍%"


def with_digits(text: str) -> str:
    """Text with its Chinese numerals in digits: 一百二十三 is 123, 三分之一 is 1/3, 百分之五十 is 50%.

    One character is a number only alone, or with what it counts behind it: 一 and 十 are parts of many words.
    """
    text = re.sub(rf"({_NUMERAL})点((?:(?![点]){_NUMERAL})+)", _with_point, text)
    text = re.sub(f"百分之{_NUMBER}", lambda found: f"{_value(found[1]) or found[1]}%", text)
    text = re.sub(f"{_NUMBER}分之{_NUMBER}", lambda found: "/".join(map(_value, (found[2], found[1]))), text)
    text = re.sub(_NUMERAL, _if_number, text)
    return re.sub(r"负(?=\d)", "-", text)


def _with_point(found: re.Match[str]) -> str:
    whole, digits = _value(found[1]), [_DIGITS.get(char) for char in found[2]]
    return f"{whole}.{''.join(digits)}" if whole and None not in digits else found[0]


def _if_number(found: re.Match[str]) -> str:
    if found.string[: found.start()].endswith("第"):
        return found[0]
    behind = found.string[found.end() : found.end() + 1]
    is_number = len(found[0]) > 1 or (behind and behind in _COUNTED) or found.string.strip("负。., ") == found[0]
    return (is_number and _value(found[0])) or found[0]


def _value(numeral: str) -> str:
    """In digits; empty for what is no numeral."""
    if not set(numeral) & _UNITS.keys():  # one, or digit by digit as in a year; 三五 is three or five
        return "" if len(numeral) == 2 and not numeral.isdecimal() else "".join(_DIGITS.get(c, c) for c in numeral)
    number = _count(numeral)
    return "" if number is None else str(number)


def _count(numeral: str) -> int | None:
    """一千零五 is 1005, 两千三 is 2300; None for what is none, such as 千万别."""
    for unit, size in _UNITS.items():
        left, is_there, right = numeral.rpartition(unit)
        if is_there:
            high, low = _count(left) if left else (1 if size == 10 else None), _count(right) if right else 0
            if high is None or low is None or low >= size:
                return None
            return high * size + (low * size // 10 if len(right) == 1 and size > 10 else low)
    digit = _DIGITS.get(numeral.lstrip("零〇") or numeral)
    return None if digit is None else int(digit)
