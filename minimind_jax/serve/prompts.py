"""Messages and tools of a request -> the tokens of its prompt."""

import functools
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.images import Picture
from minimind_jax.data.messages import REASONING, TEXT_PARTS, read_messages, without_marks
from minimind_jax.data.pictures import marker_of
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.tools import read_tools
from minimind_jax.data.values import Place
from minimind_jax.errors import UserError
from minimind_jax.inference.image_prompts import open_images
from minimind_jax.serve import log
from minimind_jax.serve.errors import refused
from minimind_jax.serve.models import Served
from minimind_jax.serve.pictures import content_of
from minimind_jax.serve.protocol import Json, Reasoning, Thinking

_FIELDS = {"role", "content", "name", "tool_calls", "function_call", "tool_call_id", *REASONING}
_SWITCHES = ("open_thinking", "enable_thinking", "thinking", "think")
_CALL_FIELDS = {"id", "type", "index", "name", "arguments", "function"}
_OPTIONAL = {*_CALL_FIELDS, "description", "strict", "parameters"}
# Words of errors that are for the owner of a file.
_OF_FILES = re.compile(r",? or list it in data\.ignore_fields.*|; only the assistant's is trained")
_NO_EFFORT, _EFFORT = ("none", "minimal", "off", "disabled"), ("low", "medium", "high", "xhigh", "max", "on", "enabled")


class Talk(NamedTuple):
    """Messages and tools as the chat template takes them, whether the model thinks first, and the pictures whose
    markers stand in the messages."""

    messages: list[Json]
    tools: list[Json] | None
    thinking: bool
    pictures: tuple[Picture, ...] = ()


def read_talk(served: Served, messages: list[Json], tools: list[Json] | None, thinking: bool) -> Talk:
    """A conversation of OpenAI's shape. Raises UserError or ApiError with the field at fault.

    Special tokens that are spelled in it are put apart: text of a user must not end his turn and begin another, nor
    pass for a picture. Once more when parts of messages are joined, and the JSON of calls is read, for then others
    may be spelled; the engine refuses a marker among them.
    """
    of_messages, of_tools = (Place(name, is_written=True) for name in ("messages", "tools"))
    marker = marker_of(served.tokenizer, served.vision)
    apart = functools.partial(_apart, pattern=_special(served.tokenizer))
    shown, pictures = open_images(apart(_by_call(messages)), served.vision, marker, content_of, log.once)
    try:
        read, _ = read_messages([_known(message, index) for index, message in enumerate(shown)], of_messages)
        schemas = read_tools([_function(tool, index) for index, tool in enumerate(tools)], of_tools) if tools else None
    except UserError as error:
        raise UserError(_OF_FILES.sub("", str(error))) from error
    again = _apart(without_marks(read), _special(served.tokenizer, marker and marker.text))
    return Talk(again, apart(schemas), thinking, pictures)


def _by_call(messages: list[Json]) -> list[Json]:
    """The messages, results in the order of their calls: the prompt has no ids to tell whose each is."""
    places, turn, ranks = [], 0, {}
    for index, message in enumerate(messages):
        is_result = message.get("role") == "tool"
        if not is_result:
            calls = message.get("tool_calls")
            called = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
            turn, ranks = index, {str(call.get("id")): rank for rank, call in enumerate(called)}
        rank = ranks.get(str(message.get("tool_call_id")), len(ranks)) if is_result else -1
        places.append((turn, rank, index))
    return [messages[index] for *_, index in sorted(places)]


def begun(talk: Talk) -> tuple[Talk, str]:
    """The conversation before its last message, and the words of that, which begin the answer. Raises ApiError."""
    *before, last = talk.messages
    if not before or last["role"] != "assistant" or last.get("tool_calls") or last.get("reasoning_content"):
        raise refused("continue_final_message: the last message must be words of the assistant alone", "messages")
    return talk._replace(messages=before, thinking=False), last["content"]


def prompt_ids(tokenizer: Tokenizer, talk: Talk) -> list[int]:
    return encode_prompt(tokenizer, talk.messages, talk.tools, talk.thinking)


def prompt_text(tokenizer: Tokenizer, talk: Talk, add_generation_prompt: bool = True) -> str:
    segments = tokenizer.prompt_segments(talk.messages, talk.tools, add_generation_prompt, talk.thinking)
    return "".join(segment.text for segment in segments)


def thinks(request: Thinking, default: bool) -> bool:
    """What the first of the switches says, by whatever name."""
    inside = request.chat_template_kwargs or {}
    for name in inside.keys() - {*_SWITCHES, "reasoning_effort"}:
        log.once(f"chat_template_kwargs: {name[:40]!r} is ignored; there are {', '.join(_SWITCHES)}")
    for name in _SWITCHES:
        for value in (getattr(request, name), inside.get(name)):
            if isinstance(value, dict):  # {"type": "enabled"}
                value = {"enabled": True, "disabled": False}.get(str(value.get("type")), value)
            if value is not None:
                if not isinstance(value, bool):
                    raise refused(f"{name} must be true or false, or its type enabled or disabled", name)
                return value
    reasoning = request.reasoning or Reasoning()
    if reasoning.enabled is not None:
        return reasoning.enabled
    effort = request.reasoning_effort or reasoning.effort or inside.get("reasoning_effort")
    if effort not in (None, *_NO_EFFORT, *_EFFORT):
        raise refused(f"reasoning_effort must be one of {', '.join((*_NO_EFFORT, *_EFFORT))}", "reasoning_effort")
    return default if effort is None else effort not in _NO_EFFORT


def _known(message: Json, index: int) -> Json:
    """The message without what no model is told, its parts being text."""
    kept = _only(message, _FIELDS, "messages")
    if message.get("role") in ("assistant", "tool") and message.get("content") is None:  # OpenAI's own may have none
        kept["content"] = message.get("refusal") or ""
    if isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [_given(_only(call, _CALL_FIELDS, "tool_calls")) for call in calls]
    if isinstance(kept.get("content"), list):
        where = f"messages[{index}].content"
        kept["content"] = [_text_of(part, f"{where}[{n}]") for n, part in enumerate(kept["content"])]
    return kept


def _only(value: Any, fields: Collection[str], where: str) -> Any:
    """An object with these fields alone; what else says something is told of."""
    if not isinstance(value, dict):
        return value
    for name in value.keys() - fields:
        if value[name] not in (None, [], {}):
            log.once(f"{where}: field {name[:40]!r} is ignored")
    return {name: item for name, item in value.items() if name in fields}


def _given(value: Any) -> Any:
    """A tool or a call without the fields that OpenAI lets be null, where they are; deeper ones are meant."""
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if item is not None or name not in _OPTIONAL}


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind not in (*TEXT_PARTS, "refusal"):
            raise refused(f"{where} has the type {str(kind)[:40]!r}; messages are made of text and pictures", where)
        part = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(part, str):
        raise refused(f"{where} has no text", where)
    return part


def _function(tool: Json, index: int) -> Json:
    """A tool as chat has it: of responses the function stands beside its type."""
    tool = _given(tool)
    if tool.get("type", "function") != "function":
        kind = str(tool["type"])[:40]
        raise refused(f"tools[{index}] has the type {kind!r}; this server has tools of type function", "tools")
    if "function" in tool or "name" not in tool:
        return {name: _given(value) for name, value in tool.items()}
    names = {"input_schema": "parameters", "inputSchema": "parameters"}  # Anthropic's and MCP's
    function = {names.get(name, name): value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": function}


def _special(tokenizer: Tokenizer, marker: str | None = None) -> re.Pattern:
    """What spells a special token, but for the marker of pictures."""
    words = {tokenizer.byte_pieces[i].decode("utf-8", "replace") for i in tokenizer.special_ids} - {marker}
    longest_first = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "$^")


def _apart(value: Any, pattern: re.Pattern) -> Any:
    """A JSON value whose texts spell no special token: a space stands behind its first character."""
    if isinstance(value, str):
        text, count = pattern.subn(lambda found: f"{found[0][0]} {found[0][1:]}", value)
        if count:
            log.once("special tokens that messages spell, such as <|im_end|>, reach the model as text: < |im_end|>")
        return text
    if isinstance(value, dict):
        return {_apart(name, pattern): _apart(item, pattern) for name, item in value.items()}
    return [_apart(item, pattern) for item in value] if isinstance(value, list) else value
