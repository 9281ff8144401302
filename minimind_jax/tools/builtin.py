"""The tools that come with the package, under the names and arguments that MiniMind's data calls them by."""

import datetime
import math
import random
import re
import zoneinfo
from typing import Any

from minimind_jax.tools.calculator import calculate


def calculate_math(expression: str) -> dict[str, Any]:
    """Calculates the value of an arithmetic expression: + - * / ** and functions such as sqrt.

    Args:
        expression: the expression, such as 123+456, 2**10 or sqrt(144)
    """
    return {"result": calculate(expression)}


def get_current_time(timezone: str = "") -> dict[str, Any]:
    """Tells the current date and time.

    Args:
        timezone: a time zone such as Asia/Shanghai or America/New_York; empty for the local one
    """
    try:
        now = datetime.datetime.now(zoneinfo.ZoneInfo(timezone)) if timezone else datetime.datetime.now().astimezone()
    except (KeyError, ValueError, OSError):
        raise ValueError(f"unknown time zone {timezone[:40]!r}; expected a name such as Asia/Shanghai") from None
    return {"datetime": f"{now:%Y-%m-%d %H:%M:%S}", "weekday": f"{now:%A}", "timezone": timezone or now.tzname()}


def unit_converter(value: float, from_unit: str, to_unit: str) -> dict[str, Any]:
    """Converts a value between units of length, mass, temperature, area, volume, speed, time or data.

    Args:
        value: the number to convert
        from_unit: its unit, such as km, miles, kg, pounds, celsius or fahrenheit
        to_unit: the unit wanted
    """
    (kind, scale, zero), (other, to_scale, to_zero) = _unit(from_unit), _unit(to_unit)
    if kind != other:
        raise ValueError(f"{from_unit} is a unit of {kind} and {to_unit} of {other}")
    result = (value * scale + zero - to_zero) / to_scale
    if not math.isfinite(result):
        raise ValueError("the result is too large")
    return {"result": float(f"{result:.12g}"), "from": f"{value:g} {from_unit}", "to": to_unit}


def random_number(min: int = 0, max: int = 100) -> dict[str, Any]:
    """Draws a whole number, both ends included.

    Args:
        min: the smallest that may come
        max: the largest that may come
    """
    if min > max:
        raise ValueError(f"min {min} is above max {max}")
    return {"result": random.randint(min, max)}


def text_length(text: str) -> dict[str, Any]:
    """Counts the characters, words and lines of a text; a Chinese character is a word.

    Args:
        text: the text
    """
    words = re.findall(r"[\u3400-\u9fff]|(?:(?![\u3400-\u9fff])\w)+(?:['’-]\w+)*", text)
    return {"characters": len(text), "words": len(words), "lines": len(text.splitlines())}


# What a user calls them.
BUILTIN = {
    "calculator": calculate_math,
    "time": get_current_time,
    "units": unit_converter,
    "random": random_number,
    "text": text_length,
}

# Of each kind: names of a unit, how much of the first unit it is, and for temperatures where its zero lies.
_KINDS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "length": (
        ("m meter metre 米", 1), ("km kilometer kilometre 公里 千米", 1000), ("cm centimeter centimetre 厘米", 0.01),
        ("mm millimeter millimetre 毫米", 0.001), ("mi mile 英里", 1609.344), ("yd yard 码", 0.9144),
        ("ft foot feet 英尺", 0.3048), ("in inch inches 英寸", 0.0254), ("nmi nautical_mile 海里", 1852), ("里", 500),
    ),
    "mass": (
        ("kg kilogram 千克 公斤", 1), ("g gram 克", 0.001), ("mg milligram 毫克", 1e-6), ("t ton tonne 吨", 1000),
        ("lb pound 磅", 0.45359237), ("oz ounce 盎司", 0.028349523125), ("斤", 0.5), ("两", 0.05),
    ),
    "temperature": (
        ("k kelvin 开尔文", 1), ("c °c celsius 摄氏度", 1, 273.15),
        ("f °f fahrenheit 华氏度", 5 / 9, 273.15 - 32 * 5 / 9),
    ),
    "area": (
        ("m2 m² square_meter square_metre 平方米", 1), ("km2 km² square_kilometer square_kilometre 平方公里", 1e6),
        ("ha hectare 公顷", 1e4), ("acre 英亩", 4046.8564224), ("亩", 2000 / 3),
    ),
    "volume": (
        ("l liter litre 升", 1), ("ml milliliter millilitre 毫升", 0.001), 
        ("m3 m³ cubic_meter cubic_metre 立方米", 1000), ("gal gallon 加仑", 3.785411784), ("cup 杯", 0.2365882365),
    ),
    "speed": (
        ("m/s", 1), ("km/h kph 公里/小时", 1 / 3.6), ("mph 英里/小时", 0.44704), ("kn knot 节", 1852 / 3600),
    ),
    "time": (
        ("s sec second 秒", 1), ("ms millisecond 毫秒", 0.001), ("min minute 分钟", 60), ("h hr hour 小时", 3600),
        ("d day 天", 86400), ("week 周", 604800),
    ),
    "data": (
        ("byte 字节", 1), ("kb", 1e3), ("mb", 1e6), ("gb", 1e9), ("tb", 1e12), ("kib", 2**10), ("mib", 2**20),
        ("gib", 2**30),
    ),
}  # fmt: skip
_UNITS = {
    name: (kind, scale, *(zero or [0]))
    for kind, units in _KINDS.items()
    for names, scale, *zero in units
    for name in names.split()
}


def _unit(name: str) -> tuple[str, float, float]:
    """What it measures, its size, and where its zero lies."""
    plain = "_".join(name.casefold().split())
    found = _UNITS.get(plain) or _UNITS.get(plain.removesuffix("s"))
    if found is None:
        raise ValueError(f"unknown unit {name[:40]!r}; expected one such as km, miles, kg, pounds or celsius")
    return found
