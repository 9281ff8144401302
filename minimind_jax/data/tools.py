"""Tools that a conversation offers, and calls of them, in every dialect -> as the chat template takes them.

Also the calls that a model has written into its answer.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from minimind_jax.data import values
from minimind_jax.errors import UserError


def read_tools(value: Any, place: values.Place, bare: bool = False) -> list[dict[str, Any]] | None:
    """The JSON schemas of tools, from a list or its JSON; None if there are none. Raises UserError.

    bare: functions without the wrapping that says so, as OpenAI's `functions` once were.
    """
    if _is_nothing(value):
        return None
    is_text = isinstance(value, str)
    tools = values.loads(value, place.text) if is_text else value
    tools = [*values.json_list([tools] if isinstance(tools, dict) and tools else tools, place.text)]
    for index, tool in enumerate(tools):
        here = f"{place.text}[{index}]"
        if isinstance(tool, str):  # in a table each schema may be JSON
            tool = tools[index] = values.loads(tool, here)
        if not isinstance(tool, dict):
            raise UserError(f"{here} is {values.kind_of(tool)}; expected an object (a function's JSON schema)")
        tools[index] = _with_parameters_read(tool, here)
    values.check_json(tools, place.text)
    if not is_text:
        tools = _pruned(tools, place, "of tools, ")
    known: dict[str, dict] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function") or tool
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{place.text}[{index}]: missing field `name`; expected a function's JSON schema")
        if known.setdefault(name, tool) != tool:
            raise UserError(f"{place.text}[{index}]: another tool is named {name!r}, too; a call could not tell which")
    if bare:
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools or None


def _with_parameters_read(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """The schema with its parameters read where they are JSON in a string, as a table may have them."""
    function = tool.get("function") or tool
    text = function.get("parameters") if isinstance(function, dict) else None
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return tool
    parameters = values.loads(text, f"{place}.parameters")
    if values.is_deep(parameters):
        raise UserError(f"{place}.parameters is nested too deeply")
    function = {**function, "parameters": parameters}
    return {**tool, "function": function} if tool.get("function") else function


def _is_nothing(value: Any) -> bool:
    """Absent, also as a cell of a table says it."""
    return values.is_absent(value) or (isinstance(value, str) and value.strip() in ("", "null"))


def _pruned(value: Any, place: values.Place, where: str) -> Any:
    pruned = value if place.is_written else values.without_nulls(value)
    if pruned != value:
        place.tell(f"{where}fields that are null are left out; in JSON text they are kept")
    return pruned


def calls_of(left: dict[str, Any], role: str, place: values.Place) -> list[dict[str, Any]]:
    calls = []
    for name in ("tool_calls", "function_call"):
        value = left.pop(name, None)
        if _is_nothing(value):
            continue
        if role != "assistant":
            raise UserError(f"{place.text}: {name} on a {role} message; only the assistant calls tools")
        here = place.at(f".{name}")
        if name == "function_call":
            value = [values.loads(value, here.text) if isinstance(value, str) else value]
        if calls and value:
            raise UserError(f"{place.text}: `tool_calls` and `function_call` mean the same; remove one")
        calls = read_calls(value, here)
    return calls


def calls_in_text(text: str, place: values.Place) -> list[dict[str, Any]]:
    value = values.loads(text, f"{place.text} (a function call)")
    written = dataclasses.replace(place, is_written=True)
    return read_calls(value if isinstance(value, list) else [value], written)


_CALL_FIELDS = {"name", "arguments", "parameters", "function", "id", "type", "index", "call_id"}


def read_calls(value: Any, place: values.Place) -> list[dict[str, Any]]:
    """Tool calls with their arguments: {} where they are empty or missing. Raises UserError."""
    calls = values.json_list(value, place.text)
    result = []
    for index, call in enumerate(calls):
        here = place.at(f"[{index}]")
        if not isinstance(call, dict):
            raise UserError(f"{here.text} is {values.kind_of(call)}; expected an object with name and arguments")
        function = call.get("function") or call
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{here.text}: missing field `name`; expected the function's name, a string")
        here.check_known({**function, **call}, _CALL_FIELDS, "a tool call")
        arguments = function.get("arguments", function.get("parameters"))
        function = {name: item for name, item in function.items() if name != "parameters"}
        function["arguments"] = _arguments(arguments, f"{here.text}.arguments")
        result.append({**call, "function": function} if call.get("function") else function)
    values.check_json(result, place.text)
    return result if isinstance(value, str) else _pruned(result, place, "of tool calls, ")


def _arguments(value: Any, place: str) -> dict[str, Any] | str:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    parsed = values.loads(value, place) if isinstance(value, str) else value
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise UserError(f"{place} is {values.kind_of(parsed)}; expected an object or its JSON")
    return value


# What a model has written ---------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of a tool. error: what is wrong with the text that should be one; it then has no name."""

    name: str
    arguments: dict[str, Any]
    error: str = ""


_STRING = r'"(?:[^"\\\n]|\\.)*"'  # of JSON: what it holds is no tag
_CALL = re.compile(rf"<tool_call>((?:{_STRING}|.)*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)


def ends_in_string(text: str) -> bool:
    """Whether the JSON that `text` begins is inside a string where it ends."""
    return '"' in re.sub(_STRING, "", text.rpartition("\n")[2])


def parse_calls(answer: str) -> tuple[str, list[Call]]:
    """The words of an answer, and the calls in it: <tool_call>, JSON of one call or a list, </tool_call>.

    A call that is never closed ends where the next one begins, or with the answer.
    """
    calls = [call for found in _CALL.finditer(answer) for call in _parsed(found[1])]
    return _CALL.sub("", answer).strip(), calls


def _parsed(text: str) -> list[Call]:
    try:
        calls = calls_in_text(text.strip(), values.Place("tool_call"))
    except UserError as error:
        return [Call("", {}, str(error).partition(";")[0])]  # what comes behind it is for the owner of a file
    found = [called(call) for call in calls]
    if values.is_deep([call.arguments for call in found]):
        return [Call("", {}, "tool_call is nested too deeply")]
    return found or [Call("", {}, "tool_call is an empty list")]


def called(call: dict[str, Any]) -> Call:
    """Name and arguments of a call that `read_calls` has checked."""
    function = call.get("function") or call
    arguments = function["arguments"]
    return Call(function["name"], values.decode_json(arguments) if isinstance(arguments, str) else arguments)


def comparable(call: Call, tools: Sequence[dict[str, Any]]) -> str:
    """What is compared of a call: JSON without nulls and defaults, whatever the white space. 5 is 5.0."""
    schemas = [tool.get("function") or tool for tool in tools]
    own = next((schema for schema in schemas if schema["name"] == call.name), {})
    for name in ("parameters", "properties"):
        own = found if isinstance(found := own.get(name), dict) else {}
    defaults = {name: told["default"] for name, told in own.items() if isinstance(told, dict) and "default" in told}
    try:
        given = values.without_nulls(call.arguments)
        kept = {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}
        return json.dumps([call.name, _plain_value(kept)], sort_keys=True)
    except RecursionError:
        return "nested too deeply to be compared"


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return " ".join(value.split()) if isinstance(value, str) else value
