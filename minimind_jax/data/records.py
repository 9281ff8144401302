"""One validated parser per record format; every error names the file, the line, the field and what was expected."""

import dataclasses
import itertools
import json
import reprlib
from typing import Any

from minimind_jax.data.jsonl import Record, decode_json
from minimind_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Checked messages, in the form the chat template takes.

    messages: dicts with role and content (str), for the assistant also reasoning_content (str) and tool_calls (list of
        {"name", "arguments"} or {"function": {"name", "arguments"}}) where the record has them.
    tools: the JSON schemas the system message offers, or None.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two conversations with one beginning, of which the first goes on better. margin: by how much, 0 if unsaid."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0


def parse_text(record: Record, flag: str = "--data.on_error") -> str:
    """The text of a pretraining record {"text": str}. Raises UserError, which names the flag that skips records."""
    if "text" not in record.value:
        raise UserError(f"{record.where}: missing field `text`; expected a string, {_found(record)}")
    text = checked_text(record.value["text"], f"{record.where}: text")
    if not text.strip():
        raise UserError(f"{record.where}: text is empty; remove the line, or pass {flag} skip")
    return text


def parse_conversation(record: Record, for_training: bool = True) -> Conversation:
    """The conversation of a record {"conversations": [message, ...]}, MiniMind's format.

    tools and tool_calls may be JSON strings or lists; list content is joined. Raises UserError, also for a conversation
    in which the assistant says nothing, unless it is only to be answered (for_training False).
    """
    if "conversations" not in record.value:
        raise UserError(f"{record.where}: missing field `conversations`; expected a list of messages, {_found(record)}")
    conversation = _conversation(record.value["conversations"], f"{record.where}: conversations")
    if for_training and not any(m["role"] == "assistant" and _says_something(m) for m in conversation.messages):
        raise UserError(
            f"{record.where}: nothing to train on; expected at least one assistant message with content, "
            "reasoning_content or tool_calls; remove the line, or pass --data.on_error skip"
        )
    return conversation


def parse_preference(record: Record) -> Preference:
    """The pair of a record {"chosen": [message, ...], "rejected": [message, ...]}, optionally with a number `margin`.

    A `prompt`, a list of messages or a text, stands before both sides; a side may then be a text, too.
    Raises UserError, also for a pair that is the same on both sides, without a question, or in which a side has no
    answer of its own.
    """
    prompt = record.value.get("prompt") or []
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    sides = []
    for name in ("chosen", "rejected"):
        if name not in record.value:
            raise UserError(f"{record.where}: missing field `{name}`; expected a list of messages, {_found(record)}")
        own = record.value[name]
        own = [{"role": "assistant", "content": own}] if isinstance(own, str) and prompt else own
        if isinstance(own, list) and isinstance(prompt, list) and own[: len(prompt)] != prompt:
            own = [*prompt, *own]
        sides.append(_conversation(own, f"{record.where}: {name}"))
    chosen, rejected = sides
    if chosen == rejected:
        raise UserError(f"{record.where}: chosen and rejected are the same; there is nothing to prefer")
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        own = side.messages[shared:]
        if not any(message["role"] == "assistant" and _says_something(message) for message in own):
            raise UserError(f"{record.where}: {name} has no answer of its own (an assistant's message with content)")
    if not any(message["role"] in ("user", "tool") for message in chosen.messages[:shared]):
        raise UserError(
            f"{record.where}: chosen and rejected have no question in common; expected the same messages before both "
            "answers, or a field `prompt`"
        )
    margin = record.value.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise UserError(f"{record.where}: margin is {_kind(margin)}; expected a number")
    return Preference(chosen, rejected, float(margin))


def _conversation(turns: Any, place: str) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{place} is {_kind(turns)}; expected a list of messages")
    messages, tools = [], None
    for index, message in enumerate(turns):
        messages.append(_message(message, f"{place}[{index}]"))
        if message.get("tools"):
            tools = _tools(message, f"{place}[{index}]")
    return Conversation(messages, tools)


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{place} is {_kind(message)}; expected an object with role and content")
    role = message.get("role")
    if role is None:
        found = field_names(message)
        raise UserError(f"{place}: missing field `role`; expected one of {', '.join(ROLES)}, found the fields {found}")
    if role not in ROLES:
        hint = " (in lower case)" if isinstance(role, str) and role.lower() in ROLES else ""
        raise UserError(f"{place}: unknown role {reprlib.repr(role)}; expected one of {', '.join(ROLES)}{hint}")
    result: Message = {"role": role, "content": _content(message, place)}
    if message.get("reasoning_content") is not None:
        result["reasoning_content"] = checked_text(message["reasoning_content"], f"{place}.reasoning_content")
    if message.get("tool_calls"):
        if role != "assistant":
            raise UserError(f"{place}: tool_calls on a {role} message; only the assistant calls tools")
        result["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}.tool_calls")
    return result


def _content(message: Message, place: str) -> str:
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant" and (message.get("tool_calls") or message.get("reasoning_content")):
            return ""
        if "content" in message:
            raise UserError(f"{place}.content is null; expected a string")
        raise UserError(f"{place}: missing field `content`; expected a string")
    if not isinstance(content, list):
        return checked_text(content, f"{place}.content")
    for index, part in enumerate(content):
        kind = isinstance(part, dict) and part.get("type")
        if kind and kind != "text":
            raise UserError(
                f"{place}.content[{index}] has type {reprlib.repr(kind)}; only text parts can be trained on"
            )
        checked_text(part.get("text") if isinstance(part, dict) else part, f"{place}.content[{index}]")
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def _tools(message: Message, place: str) -> list[dict[str, Any]]:
    if message["role"] != "system":
        raise UserError(f"{place}: tools on a {message['role']} message; move them to the system message")
    tools = _json_list(message["tools"], f"{place}.tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise UserError(f"{place}.tools[{index}] is {_kind(tool)}; expected an object (a function's JSON schema)")
    _check_json(tools, f"{place}.tools")
    return tools


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    calls = _json_list(value, place)
    for index, call in enumerate(calls):
        here = f"{place}[{index}]"
        if not isinstance(call, dict):
            raise UserError(f"{here} is {_kind(call)}; expected an object with name and arguments")
        function = call.get("function") or call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{here}: missing field `name`; expected the function's name, a string")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _loads(arguments, f"{here}.arguments")
        if not isinstance(arguments, dict):
            raise UserError(f"{here}.arguments is {_kind(arguments)}; expected an object or its JSON")
    _check_json(calls, place)
    return calls


def _json_list(value: Any, place: str) -> list[Any]:
    if isinstance(value, str):
        value = _loads(value, place)
    if not isinstance(value, list):
        raise UserError(f"{place} is {_kind(value)}; expected a list or the JSON of one")
    return value


def _loads(text: str, place: str) -> Any:
    try:
        return decode_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from error


def _check_json(value: Any, place: str) -> None:
    """Raises UserError for what the template could not write: half a surrogate pair, a date or NaN out of Parquet."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place} cannot be written as JSON: {error}") from error


def checked_text(value: Any, place: str) -> str:
    """`value`, a string of whole characters. Raises UserError, which names the place."""
    if not isinstance(value, str):
        raise UserError(f"{place} is {_kind(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} has half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}; "
            "expected Unicode text"
        ) from error
    return value


def _says_something(message: Message) -> bool:
    texts = message["content"], message.get("reasoning_content") or ""
    return bool(message.get("tool_calls")) or any(text.strip() for text in texts)


def field_names(value: dict[str, Any]) -> str:
    """The first fields of an object, as one short line without control characters."""
    names = [repr(name)[1:-1][:40] for name in list(value)[:8]]
    return ", ".join(names + ["..."] * (len(value) > 8)) or "none"


def _found(record: Record) -> str:
    hint = ""
    if "conversations" in record.value:
        hint = " (this is a conversation: `minimind sft` takes it, `evaluate perplexity` with --kind conversation)"
    elif "chosen" in record.value:
        hint = " (this is a pair of answers: `minimind dpo` and `minimind reward` take it)"
    elif "text" in record.value:
        hint = " (this is plain text: `minimind pretrain` takes it)"
    return f"found the fields {field_names(record.value)}{hint}"


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        dict: "an object",
        list: "an empty list" if value == [] else "a list",
    }
    return names.get(type(value)) or f"of type {type(value).__name__}"  # bytes and dates, out of Parquet
