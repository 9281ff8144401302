"""The assistant's words under foreign templates that write earlier messages differently once more follow, as those of
thinking models do (Qwen3, QwQ, DeepSeek-R1)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minimind_jax.data.messages import Message, without_marks
from minimind_jax.data.template import Segment, prefix_segments, render_jinja, segments_of_spans
from minimind_jax.errors import TemplateFault

_FIRST_MARK, _MOST_MARKS = 0xF8000, 0x7FFE  # characters for private use, behind those that fonts of icons take
_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _MOST_MARKS - 1)}]")
_LEAD = re.compile(r"(?:\s|<[^<>]*>)*")
_TRAIL = re.compile(r"(?:\s|>[^<>]*<)*")  # of the text read backwards
_OPENED_THOUGHT = re.compile(r"(?:<think>\s*)?(?:</think>\s*)?\Z")

Places = dict[int, tuple[int, int]]  # of a message's number: where its first and its last words stand


def foreign_segments(
    source: str, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
) -> list[Segment]:
    """`prefix_segments`, or where the template is not prefix-consistent, the segments of the whole rendering. Raises
    TemplateFault where neither tells which words are the assistant's."""
    try:
        return prefix_segments(source, messages, tools, variables)
    except TemplateFault:
        segments = marked_segments(source, messages, tools, variables)
        if segments is None:
            raise
        return segments


def marked_segments(
    source: str, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
) -> list[Segment] | None:
    """Segments of a conversation that is rendered once as a whole; None where that does not tell the answers.

    Every message's words are rendered with marks in them, which are then taken out again. An answer begins behind what
    a generation prompt writes between the words before it and its own, and ends with what the template writes behind
    it where it is the last. Where a generation prompt opens or skips a think block that the whole does not have, the
    answer begins before that block.
    """
    shown = without_marks(messages)
    plain = render_jinja(source, shown, tools, **variables)
    if len(shown) > _MOST_MARKS or _MARK.search(plain):
        return None
    marked = [_marked(message, chr(_FIRST_MARK + index)) for index, message in enumerate(shown)]
    whole, places = _unmarked(render_jinja(source, marked, tools, **variables))
    if whole != plain:
        return None
    spans: list[tuple[int, int, int]] = []
    for index, message in enumerate(shown):
        if message["role"] != "assistant":
            continue
        prompt = _unmarked(render_jinja(source, marked[:index], tools, **{**variables, "add_generation_prompt": True}))
        answered = _unmarked(render_jinja(source, marked[: index + 1], tools, **variables))
        start, end = _start(whole, places, prompt, index), _end(whole, places, answered, index, variables)
        if start is None or end is None or start < (spans[-1][2] if spans else 0) or start > places[index][0]:
            return None
        spans.append((index, start, end))
    return segments_of_spans(whole, messages, spans)


def _start(whole: str, places: Places, prompt: tuple[str, Places], index: int) -> int | None:
    """Behind the header of an answer, which follows the last words that both the whole and its prompt hold."""
    text, prompted = prompt
    before = next((n for n in reversed(range(index)) if n in prompted and n in places), None)
    begin, header = (0, text) if before is None else (places[before][1], text[prompted[before][1] :])
    for start in (header, _OPENED_THOUGHT.sub("", header, count=1)):
        if whole.startswith(start, begin):
            return begin + len(start)
    return None


def _end(
    whole: str, places: Places, answered: tuple[str, Places], index: int, variables: Mapping[str, Any]
) -> int | None:
    """Behind what closes an answer; some templates write the end-of-text token behind the last message alone."""
    text, last = answered
    if index not in places or index not in last:
        return None
    tail, begin = text[last[index][1] :], places[index][1]
    for close in (tail, tail.removesuffix(variables.get("eos_token") or "")):
        if (close or not tail) and whole.startswith(close, begin):
            return begin + len(close)
    return None


def _marked(message: Message, mark: str) -> Message:
    """The message with the mark in what it says, where no template looks for white space or tags."""
    marked = dict(message)
    for name in ("content", "reasoning_content"):
        if isinstance(text := message.get(name), str) and text.strip():
            marked[name] = _mark_within(text, mark)
    if message.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(call, mark) for call in message["tool_calls"]]
    elif isinstance(text := message.get("content") or "", str) and not text.strip():
        marked["content"] = text + mark
    return marked


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    if call.get("function"):
        return {**call, "function": _marked_call(call["function"], mark)}
    return {**call, "name": mark + call["name"]}


def _mark_within(text: str, mark: str) -> str:
    start, end = _LEAD.match(text).end(), len(text) - _TRAIL.match(text[::-1]).end()
    if end <= start:
        return text[:start] + mark + text[start:]
    if "</think>" in text[end:]:  # an answer of nothing, before which a template drops the thinking
        end = len(text)
    return text[:start] + mark + text[start:end] + mark + text[end:]


def _unmarked(text: str) -> tuple[str, Places]:
    places: Places = {}
    for count, found in enumerate(_MARK.finditer(text)):
        index, place = ord(found[0]) - _FIRST_MARK, found.start() - count
        places[index] = (places.get(index, (place,))[0], place)
    return _MARK.sub("", text), places
