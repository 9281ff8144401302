"""What runs in a worker process: the functions, and calls of them one after the other, as JSON lines."""

import faulthandler
import importlib
import importlib.util
import inspect
import json
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind_jax.errors import UserError
from minimind_jax.tools.builtin import BUILTIN
from minimind_jax.tools.schema import Schema, fitted, schema_of

_ERROR_CHARACTERS = 300

Function = Callable[..., Any]


def serve(names: list[str], characters: int, loader: str) -> None:
    """Says the schemas of the tools, or what is wrong with them; then answers each line with [is_error, text].

    What tools print goes to the standard error. A call that does not end ends the process, also where the program that
    asked is gone.
    """
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a tool neither reads the calls nor writes among the answers
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)
    warnings.simplefilter("ignore", SyntaxWarning)  # of expressions that a model wrote
    module, _, function = loader.partition(":")
    try:
        tools = getattr(importlib.import_module(module), function)(names)
    except UserError as error:
        print(json.dumps({"fault": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({"schemas": [schema for schema, _ in tools.values()]}), file=answers, flush=True)
    nowhere, own = open(os.devnull, "w"), os.getpid()
    for line in calls:
        name, arguments, seed, seconds = json.loads(line)
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nowhere)
        answer = _answer(*tools[name], arguments, seed, characters)
        if os.getpid() != own:  # the tool has forked, and this is the copy: only one is to answer
            os._exit(0)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), file=answers, flush=True)


def _answer(schema: Schema, function: Function, arguments: Any, seed: int | None, characters: int) -> tuple[bool, str]:
    """Whether the call failed, and its result or what is wrong, as text of whole characters."""
    try:
        given = fitted(schema["function"]["parameters"], arguments)
        random.seed(seed)
        result = function(**given)
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        failed = False
    except BaseException as error:  # a tool that calls exit() has only failed
        words = "".join(traceback.format_exception_only(error)).strip().removeprefix("ValueError: ")
        text, failed = error_text(words), True
    if len(text) > characters:
        text = f"{text[:characters]}... (cut: {len(text):,} characters)"
    return failed, text.encode("utf-8", "replace").decode()


def error_text(words: str) -> str:
    """What a model reads where its call failed."""
    return json.dumps({"error": words[:_ERROR_CHARACTERS]}, ensure_ascii=False)


def load(names: list[str]) -> dict[str, tuple[Schema, Function]]:
    """{name: (schema, function)} of tools that are ours, `module:function`, `file.py:function` or a whole `file.py`.
    Raises UserError for what cannot be found or imported, and for two functions of one name."""
    tools: dict[str, tuple[Schema, Function]] = {}
    for name in names:
        for function in _functions(name):
            schema = schema_of(function)
            if tools.setdefault(schema["function"]["name"], (schema, function))[1] is not function:
                raise UserError(f"two tools are named {schema['function']['name']}; rename one")
    return tools


def _functions(name: str) -> list[Function]:
    ours = {**BUILTIN, **{function.__name__: function for function in BUILTIN.values()}}
    if name == "all":
        return list(BUILTIN.values())
    if name in ours:
        return [ours[name]]
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        place, attribute = name, ""
    if not attribute and not place.endswith(".py"):
        raise UserError(f"there is no tool {name}; there are {', '.join(BUILTIN)}, all, module:function and FILE.py")
    try:
        module = imported(place)
    except Exception as error:
        raise UserError(f"tools of {place} cannot be imported: {type(error).__name__}: {error}") from error
    own = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    if not attribute and own:
        return list(own.values())
    if not callable(getattr(module, attribute, None)):
        raise UserError(f"{place} has no function {attribute}; it has {', '.join(own) or 'none'}".replace("  ", " "))
    return [getattr(module, attribute)]


def imported(place: str) -> Any:
    """A module that Python finds, or a file.py."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    sys.path.insert(0, str(path.parent))  # it may import its neighbours
    spec = importlib.util.spec_from_file_location(f"tools_of_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
