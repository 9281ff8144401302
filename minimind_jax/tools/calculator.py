"""Arithmetic in text -> its value, without `eval`: the operations listed here, each bounded in time and memory."""

import ast
import math
import operator
import unicodedata
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 1000
MAX_BITS = 4000  # of a whole number: about 1,200 digits

_SPELLINGS = str.maketrans({"^": "**", "²": "**2", "³": "**3", "×": "*", "·": "*", "÷": "/", "−": "-", "π": "pi"})
_CONSTANTS = {"pi": math.pi, "e": math.e}


def calculate(expression: str) -> str:
    """The value of an expression: a whole number exactly, any other to 15 digits. Raises ValueError, in words for the
    model that wrote it, for whatever is not arithmetic, and for numbers that are too large. Full-width characters, `×`,
    `÷`, `^` and `math.` are understood."""
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression is longer than {MAX_CHARACTERS} characters")
    text = unicodedata.normalize("NFKC", expression.translate(_SPELLINGS)).strip()
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, UnicodeError):
        raise ValueError("the expression is not arithmetic that can be read") from None
    except (RecursionError, MemoryError):
        raise ValueError("the expression is nested too deeply") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("a number is too large") from None
    except TypeError:
        raise ValueError("a function has a wrong number or kind of arguments") from None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.15g}"
    return str(value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
            return _SIGNS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _bounded(_OPERATIONS[type(op)](_value(left), _value(right)))
        case ast.Call(func=function, args=arguments, keywords=[]) if _name(function) in _FUNCTIONS:
            return _bounded(_FUNCTIONS[_name(function)](*map(_value, arguments)))
        case ast.Name() | ast.Attribute() if _name(node) in _CONSTANTS:
            return _CONSTANTS[_name(node)]
    what = _name(node.func if isinstance(node, ast.Call) else node)
    raise ValueError(f"{what[:40]!r} is not known to the calculator")


def _name(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="math"), attr=name):
            return name
    return type(node).__name__


def _bounded(number: Any) -> int | float:
    if isinstance(number, complex) or number != number:
        raise ValueError("the result is not a real number")
    if abs(number) == math.inf or (isinstance(number, int) and number.bit_length() > MAX_BITS):
        raise OverflowError
    return number


def _power(base: float, exponent: float) -> float:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        if base.bit_length() * exponent > MAX_BITS + base.bit_length():
            raise OverflowError
    return base**exponent


def _rounded(number: float, digits: int = 0) -> float:
    return round(number, max(-MAX_BITS, min(digits, MAX_BITS))) if digits else round(number)


def _up_to(limit: int, function: Callable[..., int]) -> Callable[..., int]:
    """The function, for arguments up to a limit that bounds its work."""

    def bounded(*numbers: int) -> int:
        if max(numbers, default=0) > limit:
            raise OverflowError
        return function(*numbers)

    return bounded


_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "min": min, "max": max, "round": _rounded, "pow": _power, "factorial": _up_to(500, math.factorial),
    "comb": _up_to(1000, math.comb), "perm": _up_to(1000, math.perm),
    **{name: getattr(math, name) for name in (
        "sqrt exp log log2 log10 sin cos tan asin acos atan atan2 hypot degrees radians floor ceil gcd lcm".split()
    )},
}  # fmt: skip
