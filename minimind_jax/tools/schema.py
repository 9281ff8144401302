"""Functions as JSON schemas, from their type hints and docstrings; arguments as a schema wants them."""

import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from minimind_jax.errors import UserError, explained
from minimind_jax.values import is_optional

Schema = dict[str, Any]

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_HEADING = r"\n\s*(?:(?:Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):|:param |:returns?|-{3,})"


def schema_of(function: Callable[..., Any]) -> Schema:
    """What a chat template shows of a function: {"type": "function", "function": {name, description, parameters}}.

    The description is the docstring up to its `Args:` (or `:param x:`), which tell the parameters. Hints may be str,
    int, float, bool, list[...], dict, Literal[...], Any, and each of them `| None`. Raises UserError for other hints,
    none at all, *args, **kwargs, and a function that is asynchronous.
    """
    name = getattr(function, "__name__", "")
    what = f"the tool {name or function!r} has no signature that can be read"
    with explained(what, TypeError, ValueError, NameError):
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"the tool {name} is asynchronous; give a plain function")
    text = inspect.getdoc(function) or ""
    properties = {}
    for parameter in parameters:
        where = f"the tool {name}, parameter {parameter.name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where}: a model gives arguments by their names; expected a parameter that has one")
        if parameter.name not in hints:
            raise UserError(f"{where} has no type hint; expected one such as `{parameter.name}: str`")
        told = {"description": words} if (words := _words_of(parameter.name, text)) else {}
        default = {} if parameter.default is parameter.empty else {"default": _as_json(parameter.default, where)}
        properties[parameter.name] = {**_of_type(hints[parameter.name], where), **told, **default}
    required = [name for name, schema in properties.items() if "default" not in schema]
    description = " ".join(re.split(_HEADING, "\n" + text)[0].split())
    whole = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": whole}}


def _of_type(kind: Any, where: str) -> Schema:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_optional(kind) and len(inner) == 2:
        return {**_of_type(next(k for k in inner if k is not types.NoneType), where), "nullable": True}
    if origin is typing.Literal and {type(choice) for choice in inner} in ({str}, {int}):
        return {"type": _TYPES[type(inner[0])], "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _of_type(inner[0], where)}
    if kind is Any:
        return {}
    if (origin or kind) in _TYPES:
        return {"type": _TYPES[origin or kind]}
    raise UserError(f"{where} has the hint {kind}; expected str, int, float, bool, list, dict or a Literal of texts")


def _words_of(parameter: str, text: str) -> str:
    """What a docstring says of a parameter, in `name: words` or `:param name: words`, also over several lines."""
    found = re.search(
        rf"^[ \t]*(?::param )?{parameter}(?: \([^)\n]*\))?: *(.+(?:\n(?![ \t]*(?::\w|\w+(?: \([^)\n]*\))?:|$)).+)*)",
        text, re.M,
    )  # fmt: skip
    return " ".join(found[1].split()) if found else ""


def _as_json(default: Any, where: str) -> Any:
    try:
        return json.loads(json.dumps(default, allow_nan=False))
    except (TypeError, ValueError):
        raise UserError(f"{where} has the default {default!r:.40}; expected what JSON can say") from None


def fitted(schema: Schema, value: Any, where: str = "arguments") -> Any:
    """`value`, checked against a schema that `schema_of` made; whole numbers become what their hint says. Raises
    ValueError, in words for the model that called."""
    kind = schema.get("type")
    if kind is None or (value is None and schema.get("nullable")):
        return value
    if kind in ("integer", "number") and type(value) in (int, float):
        if value != value or value in (math.inf, -math.inf):
            raise ValueError(f"{where} is no finite number")
        if kind == "number" or value == int(value):
            value = int(value) if kind == "integer" else value
            kind = _TYPES[type(value)]
    if _TYPES.get(type(value)) != kind:
        raise ValueError(f"{where} must be of type {kind}, not {_TYPES.get(type(value), 'null')}")
    if value not in schema.get("enum", [value]):
        raise ValueError(f"{where} must be one of {', '.join(map(str, schema['enum']))}")
    if kind == "array":
        return [fitted(schema.get("items", {}), item, f"{where}[{n}]") for n, item in enumerate(value)]
    if kind == "object" and "properties" in schema:
        known = schema["properties"]
        nulls = {name: None for name in schema["required"] if known[name].get("nullable")}  # which may be left out
        said = {n: item for n, item in value.items() if item is not None or known.get(n, {}).get("nullable")}
        value = {**nulls, **said}
        for name in schema["required"]:
            if name not in value:
                raise ValueError(f"the argument {name} is missing")
        for name in value:
            if name not in known:
                raise ValueError(f"there is no argument {name[:40]!r}; there are {', '.join(known) or 'none'}")
        return {name: fitted(known[name], item, name) for name, item in value.items()}
    return value
