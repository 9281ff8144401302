"""A setting's value, as the user wrote it, in the type of its field."""

import decimal
import math
import re
import types
import typing
from typing import Any


def is_optional(kind: Any) -> bool:
    """Whether a type allows None."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType) and type(None) in typing.get_args(kind)


def convert(kind: Any, value: Any) -> Any:
    """`value`, a text or what YAML made of it, as the type of a field. Raises ValueError or TypeError, and
    ArithmeticError for a whole number of more than 64 bits."""
    if is_optional(kind) or kind is types.NoneType:
        if value in (None, "null"):
            return None
        kind = next((k for k in typing.get_args(kind) if k is not types.NoneType), None)
    if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
        return value
    convert_to = {str: _text, bool: _truth, int: _whole_number, float: _number}.get(kind)
    if convert_to is None or (isinstance(value, bool) and kind is not bool):
        raise ValueError(value)
    return convert_to(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError(value)
    return value


def _truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError(value)
    return words[str(value).lower()]


def _whole_number(value: Any) -> int:
    """1e9 and 1_000 are whole numbers, and all of their digits count."""
    exact = decimal.Decimal(_digits(value))
    if not -(2**63) <= exact < 2**63:  # before int(), which would write out 1e999999999
        raise OverflowError(value)
    if int(exact) != exact:
        raise ValueError(value)
    return int(exact)


def _number(value: Any) -> float:
    number = float(_digits(value))
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _digits(value: Any) -> str:
    """The text of a number; Python reads more than that as one, such as ` 1 ` and digits of other scripts."""
    text = value if isinstance(value, str) else repr(value)
    if not re.fullmatch(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?", text, re.ASCII):
        raise ValueError(value)
    return text.replace("_", "")
