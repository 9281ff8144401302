"""What a foreign chat template makes of a conversation: whether it leaves anything out."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from minimind_jax.data.messages import CLOSE_THINK, OPEN_THINK, Message
from minimind_jax.data.template import TEMPLATE_FILE, Segment, text_of
from minimind_jax.errors import TemplateFault, UserError

FORGOTTEN = "the chat template leaves out the thinking of earlier answers, of which only the words are trained"
_WAYS_OUT = (
    "the model would not see it. Leave that out, take a tokenizer whose template writes it (--tokenizer), or copy "
    f"{TEMPLATE_FILE} into the model's folder as chat_template.jinja to use ours"
)


def check_complete(
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    segments: Sequence[Segment],
    with_answers: bool = True,
    render: Callable[[Sequence[Message]], str] | None = None,
) -> bool:
    """Raises UserError, which names it, for anything of a conversation that the rendered text does not hold.

    with_answers: False for a prompt, in which a template may shorten what the assistant has said before.
    render: of the first messages alone. Thinking that it writes there, while the answer is the last, and leaves out
    once more follows is forgotten on purpose: that is no error, and True is returned.
    What is trained must be in its own message's piece (the n-th trained one), the rest anywhere in the text.
    White space does not count, and text may be written as JSON writes it.
    """
    whole = _squeezed("".join(segment.text for segment in segments))
    forgets = False
    answers = iter([_squeezed(segment.text) for segment in segments if segment.trained])
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "assistant" and not with_answers:
            continue
        text = next(answers, "") if role == "assistant" and message.get("train", True) else whole
        lost = [(name, words) for name, words in _said(message) if not all(_is_in(word, text) for word in words)]
        if lost and render and index + 1 < len(messages):
            thoughts, alone = _thoughts(message), _squeezed(render(messages[: index + 1]))
            kept = [said for said in lost if not (said in thoughts and all(_is_in(word, alone) for word in said[1]))]
            forgets |= len(kept) < len(lost)
            lost = kept
        if lost:
            raise UserError(f"the chat template leaves out the {lost[0][0]} of {role} message {index + 1}; {_WAYS_OUT}")
    told = _squeezed("".join(segment.text for segment in segments if not segment.trained))
    if not all(_is_in(_function(tool).get(key), told) for tool in tools or () for key in ("name", "description")):
        raise UserError(f"the chat template leaves out the tools; {_WAYS_OUT}")
    return forgets


def check_spoken(messages: Sequence[Message]) -> None:
    """Raises UserError for words of the assistant that our template leaves out: what stands before a think block inside
    a content, or between two."""
    for index, message in enumerate(messages):
        content = text_of(message)
        if message["role"] != "assistant" or CLOSE_THINK not in content or "reasoning_content" in message:
            continue
        thought, answer = _split_thought(content)
        if OPEN_THINK in thought or CLOSE_THINK in answer:
            raise UserError(
                f"message {index + 1}: words of its content stand before its thinking or between two pieces of it, and "
                "the chat template leaves them out; put the thinking into reasoning_content"
            )


def raise_as_what_it_is(
    error: UserError,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    render: Callable[[Sequence[Message], Sequence[Any] | None], Any],
) -> NoReturn:
    """Raises `error`, as a TemplateFault if `render` fails as well on a plain conversation with the same kinds of
    messages and fields: then it is not what this record says."""
    try:
        render(_plain(messages), [_PLAIN_TOOL] if tools else None)
    except UserError:
        raise TemplateFault(f"{error} (every record of this kind fails, so none is skipped)") from error
    raise error


def _said(message: Message) -> list[tuple[str, list[Any]]]:
    """(name, words) of all that a message holds."""
    content = message.get("content") or ""
    answer = _split_thought(content)[1] if message["role"] == "assistant" else content
    calls = [_function(call) for call in message.get("tool_calls") or ()]
    called = [word for call in calls for word in (call.get("name"), *_leaves(call.get("arguments")))]
    return [("content", [answer]), *_thoughts(message), ("tool_calls", called)]


def _thoughts(message: Message) -> list[tuple[str, list[Any]]]:
    if message["role"] != "assistant":
        return []
    inside = _split_thought(message.get("content") or "")[0]
    return [("content", [inside]), ("reasoning_content", [message.get("reasoning_content") or ""])]


def _split_thought(content: str) -> tuple[str, str]:
    """Thinking that stands in a content, which a template may write in another frame, and the answer."""
    before, found, answer = content.partition(CLOSE_THINK)
    return (before.strip().removeprefix(OPEN_THINK), answer) if found else ("", content)


def _function(call: dict[str, Any]) -> dict[str, Any]:
    return call.get("function") or call


def _leaves(value: Any) -> list[Any]:
    """All keys and values of nested JSON; text may be the JSON itself."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            return [value]
        return _leaves(parsed) if isinstance(parsed, dict | list) else [value]
    if isinstance(value, dict):
        return [word for name, item in value.items() for word in (name, *_leaves(item))]
    if isinstance(value, list | tuple):
        return [word for item in value for word in _leaves(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _is_in(word: Any, squeezed: str) -> bool:
    if not isinstance(word, str):
        return word is None or str(word) in squeezed or json.dumps(word) in squeezed
    if _squeezed(word) in squeezed:
        return True
    return any(_squeezed(json.dumps(word, ensure_ascii=ascii)[1:-1]) in squeezed for ascii in (False, True))


def _plain(messages: Sequence[Message]) -> list[Message]:
    """The shortest talk in which the roles, reasoning and tool calls of `messages` appear."""
    roles = {message["role"] for message in messages}
    answer: Message = {"role": "assistant", "content": "answer"}
    if any(message.get("reasoning_content") for message in messages):
        answer["reasoning_content"] = "thought"
    plain = [{"role": "system", "content": "system"}] if "system" in roles else []
    plain.append({"role": "user", "content": "question"})
    if any(message.get("tool_calls") for message in messages):
        call = {"type": "function", "function": {"name": "call", "arguments": {"key": "value"}}}
        plain.append({**answer, "content": "", "tool_calls": [call]})
        if "tool" in roles:
            plain.append({"role": "tool", "content": "result"})
    return plain if plain[-1]["role"] == "assistant" else [*plain, answer]


_KEY = {"type": "object", "properties": {"key": {"type": "string", "description": "a key"}}}
_PLAIN_TOOL = {"type": "function", "function": {"name": "call", "description": "calls", "parameters": _KEY}}
