"""Messages in every dialect -> ours: role, content, reasoning_content, tool_calls, and whether they are trained.

Every field of a message is understood under the names that people use for it, is one of IGNORABLE, or is refused by
name: what would be left out without a word could be what the record is about.
"""

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

from minimind_jax.data.tools import calls_in_text, calls_of, read_tools
from minimind_jax.data.values import Place, checked_text, decode_json, field_names, is_absent, kind_of, printed
from minimind_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
CALLING_ROLES = ("function_call", "tool_call")  # whose text is the JSON of the call
OTHER_ROLES = {
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", *CALLING_ROLES), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
CONTENT = ("content", "value", "text")
REASONING = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("train", "training", "loss", "weight")  # whether a message is trained
EMPTY_ANSWERS = "empty answers of the assistant are not trained"
OF_PEOPLE = "; of people who talk with each other, write user for the one who asks, and assistant for who answers"
OPEN_THINK, CLOSE_THINK = "<think>", "</think>"
TEXT_PARTS = ("text", "input_text", "output_text")

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Checked messages, in the form the chat template takes."""

    # dicts with role and content (str), for the assistant also reasoning_content (str) and tool_calls (list of {"name",
    # "arguments"} or {"function": {"name", "arguments"}}) where the record has them, and `train` False where its words
    # are context only
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None  # the JSON schemas the system message offers, or None
    # of the chat template, which the record sets itself
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    plain: bool = False  # a text and its completion, which are joined without the template

    def as_record(self) -> dict[str, Any]:
        """The record that is read as this conversation, in our own format."""
        if self.plain:
            return {"prompt": self.messages[0]["content"], "completion": self.messages[1]["content"]}
        messages = without_marks(self.messages)
        for message, ours in zip(messages, self.messages, strict=True):
            if not ours.get("train", True):
                message["weight"] = 0
        record: dict[str, Any] = {"conversations": messages}
        if self.tools:
            holder = messages[0] if messages[0]["role"] == "system" else record
            holder["tools"] = self.tools
        if self.variables:
            record["chat_template_kwargs"] = self.variables
        return record


def without_marks(messages: Sequence[Message]) -> list[Message]:
    """The messages as others know them: without our `train`."""
    return [{name: value for name, value in message.items() if name != "train"} for message in messages]


def says_something(message: Message) -> bool:
    """Whether there is a word, a thought or a call in a message of ours."""
    texts = message["content"], message.get("reasoning_content") or ""
    return bool(message.get("tool_calls")) or any(text.strip() for text in texts)


def is_trained(message: Message) -> bool:
    """Whether a message of ours is an answer to learn from."""
    return message["role"] == "assistant" and message.get("train", True) and says_something(message)


def check_closed(messages: list[Message], where: str) -> None:
    """Raises UserError for an answer to learn from of which the thinking was cut off: it would follow an empty thought.

    where: file and line.
    """
    for index, message in enumerate(messages):
        if is_trained(message) and message["content"].lstrip().startswith(OPEN_THINK):
            if CLOSE_THINK not in message["content"]:
                raise UserError(
                    f"{where}: message {index + 1}: its <think> is never closed; close it, remove the message, or give "
                    "it the weight 0"
                )


def read_messages(turns: Any, place: Place) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages of any dialect as ours, and the tools that a system message offers. Raises UserError with the place."""
    turns = messages_in(turns)
    if not isinstance(turns, list) or not turns:
        hint = printed(turns) if isinstance(turns, str) else ""
        raise UserError(f"{place.text} is {kind_of(turns)}; expected a list of messages{hint}")
    messages, tools = [], None
    for index, message in enumerate(turns):
        if type(message) is dict and message.keys() == _PLAIN_KEYS and message["role"] in ROLES:
            if isinstance(message["content"], str):  # the usual case, quickly
                content = checked_text(message["content"], f"{place.text}[{index}].content")
                messages.append(_without_loss_if_empty({"role": message["role"], "content": content}, place))
                continue
        here = place.at(f"[{index}]")
        messages.append(read_message(message, here))
        if not is_absent(message.get("tools")) and "tools" not in place.ignore:
            if messages[-1]["role"] != "system":
                raise UserError(
                    f"{here.text}: tools on a {messages[-1]['role']} message; move them to the system message"
                )
            tools = read_tools(message["tools"], here.at(".tools")) or tools
    return messages, tools


_PLAIN_KEYS = {"role", "content"}


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES


def are_messages(value: Any) -> bool:
    """Whether a value is a conversation by itself: the list of its messages, as nanochat has them."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def messages_in(value: Any) -> Any:
    """The messages that a cell of a table holds as JSON, or The Cauldron's pairs; any other value as it is."""
    pair = {"user", "assistant"}
    if isinstance(value, list) and value and all(type(t) is dict and t.keys() - {"source"} == pair for t in value):
        return [{"role": role, "content": turn[role]} for turn in value for role in ("user", "assistant")]
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = decode_json(value)
    except (ValueError, RecursionError):
        return value
    found = [found] if isinstance(found, dict) else found
    are_messages = found and all(isinstance(message, dict) and {"role", "from"} & message.keys() for message in found)
    return found if are_messages else value


def read_message(message: Any, place: Place) -> Message:
    """One message of any dialect as ours. Raises UserError with the place and the field."""
    if not isinstance(message, dict):
        raise UserError(f"{place.text} is {kind_of(message)}; expected an object with role and content")
    left = {name: value for name, value in message.items() if not is_absent(value)}
    for name in left.keys() & place.ignore:
        del left[name]
        place.tell(f"of messages, `{name}` is ignored")
    given, _ = place.take(left, ("role", "from"))
    role = _role(given, message, place)
    left.pop("tools", None)
    result: Message = {"role": role, "content": ""}
    calls = calls_of(left, role, place)
    content, thoughts = _content(left, message, place, required=not calls)
    if given in CALLING_ROLES:
        calls, content = [*calls, *calls_in_text(content, place)], ""
    result["content"] = content
    reasoning = _reasoning(left, thoughts, place)
    if reasoning:
        if role != "assistant":
            raise UserError(f"{place.text}: reasoning on a {role} message; only the assistant's is trained")
        result["reasoning_content"] = reasoning
        result["content"] = _without_inline_copy(content, reasoning, place)
    if calls:
        result["tool_calls"] = calls
    elif not (content or reasoning or set(CONTENT) & message.keys()):
        raise UserError(f"{place.text}: missing field `content`; expected a string")
    if not _trained(left, role, place):
        result["train"] = False
    place.finish(left, "a message", told_of="of messages, ")
    return _without_loss_if_empty(result, place)


def _without_loss_if_empty(message: Message, place: Place) -> Message:
    """An answer of no words is context: whoever learns it learns to say nothing."""
    if message["role"] != "assistant" or says_something(message) or not message.get("train", True):
        return message
    place.tell(EMPTY_ANSWERS)
    return {**message, "train": False}


def _role(given: Any, message: Message, place: Place) -> str:
    if given is None:
        found = field_names(message)
        raise UserError(
            f"{place.text}: missing field `role`; expected one of {', '.join(ROLES)}, found the fields {found}"
            f"{OF_PEOPLE * ('author' in message)}"
        )
    if given in ROLES:
        return given
    if isinstance(given, str) and given in OTHER_ROLES:
        return OTHER_ROLES[given]
    lower = isinstance(given, str) and (given.lower() in ROLES or given.lower() in OTHER_ROLES)
    hint = " (in lower case)" if lower else OF_PEOPLE * ("role" not in message)
    raise UserError(f"{place.text}: unknown role {reprlib.repr(given)}; expected one of {', '.join(ROLES)}{hint}")


_PART_FIELDS = {"type", "text", "id", "index", "annotations", "logprobs", "cache_control"}


def _content(left: dict[str, Any], message: Message, place: Place, required: bool) -> tuple[str, str]:
    """The text of a message, and the thoughts among the parts that it is made of."""
    name = next((name for name in CONTENT if name in message), "content")
    content, _ = place.take(left, CONTENT)
    if content is None:
        content = message.get(name)
        if content is None and required and name in message and not any(left.get(n) for n in REASONING):
            raise UserError(f"{place.text}.{name} is null; expected a string")
        content = "" if is_absent(content) else content
    if not isinstance(content, list):
        return checked_text(content, f"{place.text}.{name}"), ""
    texts, thoughts = [], []
    for index, part in enumerate(content):
        here = place.at(f".{name}[{index}]")
        kind = isinstance(part, dict) and part.get("type")
        if kind == "thinking":
            if inner := part.get("thinking"):
                thoughts.append(_content({"content": inner}, part, here.at(".thinking"), False)[0])
            continue
        if kind and kind not in TEXT_PARTS:
            raise UserError(
                f"{here.text} has type {reprlib.repr(kind)}; only text parts can be trained on, and by vlm-sft images"
            )
        if isinstance(part, dict):
            here.check_known(part, _PART_FIELDS, "a part of a message")
            part = part.get("text")
        texts.append(checked_text(part, here.text))
    return "".join(texts), "".join(thoughts)


def _reasoning(left: dict[str, Any], thoughts: str, place: Place) -> str:
    for name in REASONING:
        if name in left:
            left[name] = checked_text(left[name], f"{place.text}.{name}")
    if thoughts:
        left["thinking parts"] = thoughts
    reasoning, _ = place.take(left, (*REASONING, "thinking parts"), same=str.strip)
    return reasoning if reasoning and reasoning.strip() else ""


def _without_inline_copy(content: str, reasoning: str, place: Place) -> str:
    """The content without the <think> block that says what `reasoning_content` says already."""
    opening, closed, rest = content.partition(CLOSE_THINK)
    inner = opening.split(OPEN_THINK)[-1].strip()
    if not closed or (OPEN_THINK not in opening and inner not in ("", reasoning.strip())):
        return content
    if (inner and inner != reasoning.strip()) or opening.partition(OPEN_THINK)[0].strip() not in ("", inner):
        raise UserError(
            f"{place.text}: the <think> block in the content and the field with the reasoning differ; keep one of them"
        )
    return rest.lstrip("\n")


def _trained(left: dict[str, Any], role: str, place: Place) -> bool:
    given = {name: left.pop(name) for name in SWITCHES if name in left}
    for name, value in given.items():
        if value not in (True, False):  # 0 and 1 are these
            raise UserError(f"{place.text}.{name} is {reprlib.repr(value)}; expected true or false (a weight: 1 or 0)")
        if value and role != "assistant":
            told = f"only the assistant's messages are trained (data.ignore_fields {name} ignores it)"
            if name != "weight":
                raise UserError(f"{place.text}.{name} is true on a {role} message; {told}")
            place.tell(f"`weight` 1 of {role} messages is ignored, only the assistant's are trained")
    return all(given.values()) or role != "assistant"
