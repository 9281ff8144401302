"""The text of an answer as it streams -> thinking, words, and calls of tools."""

import json
import re
from typing import NamedTuple

from minimind_jax.data.messages import CLOSE_THINK, OPEN_THINK
from minimind_jax.data.tools import ends_in_string, parse_calls
from minimind_jax.inference.grammar import CLOSE_CALL, OPEN_CALL
from minimind_jax.inference.text import possible_start


class CallPart(NamedTuple):
    """A call that the model has finished. arguments: JSON."""

    name: str
    arguments: str


class Part(NamedTuple):
    """A piece of an answer that is final: thinking, words, or a call."""

    reasoning: str = ""
    content: str = ""
    call: CallPart | None = None


class AnswerSplitter:
    """Parts a streamed answer. However its text is cut into pieces, the parts join to the same message.

    A tag is never shown, nor is what may become one. Line breaks around thinking, and white space around calls, belong
    to the template. What stands between <tool_call> tags and is no call is given as words, tags and all.

    thinking: the prompt ends in an open think block, so the answer begins with thinking. calls: tools were offered.
    """

    def __init__(self, thinking: bool = False, calls: bool = False):
        self.state = "reasoning" if thinking else "content"
        self._calls = calls
        self._held = ""  # may be the beginning of a tag; of a call all of its text
        self._space = ""  # at the end of what was given: shown if more words come
        self._at_start = thinking  # of a block: white space that comes first is the template's

    def push(self, text: str) -> list[Part]:
        """The parts that are final with this text."""
        self._held += text
        parts: list[Part] = []
        while found := self._first_tag():
            start, tag = found
            before, self._held = self._held[:start], self._held[start + len(tag) :]
            self._close(before, tag, parts)
        if self.state != "call":
            keep = possible_start(self._held, self._tags())
            end = len(self._held) - keep
            self._give(self._held[:end], parts)
            self._held = self._held[end:]
        return joined(parts)

    def finish(self) -> list[Part]:
        """The rest: no more text comes."""
        parts: list[Part] = []
        held, self._held = self._held, ""
        if self.state == "call":
            self._call(held, "", parts)
        else:
            self._give(held, parts)
        if self.state != "reasoning":
            parts.append(Part(content=self._space))
        return joined(parts)

    def _tags(self) -> tuple[str, ...]:
        if self.state == "reasoning":
            return (CLOSE_THINK,)
        if self.state == "call":
            return (CLOSE_CALL, OPEN_CALL)
        return (OPEN_THINK, OPEN_CALL) if self._calls else (OPEN_THINK,)

    def _first_tag(self) -> tuple[int, str] | None:
        """Where the next tag stands; what a string of a call's JSON holds is none."""
        places = ((found.start(), found[0]) for found in re.finditer("|".join(self._tags()), self._held))
        return next((p for p in places if self.state != "call" or not ends_in_string(self._held[: p[0]])), None)

    def _close(self, before: str, tag: str, parts: list[Part]) -> None:
        """Ends the block that `before` is the rest of, and begins the one that the tag opens."""
        if self.state == "call":
            self._call(before, CLOSE_CALL if tag == CLOSE_CALL else "", parts)
        else:
            self._give(before, parts)
            self._at_start = self._at_start or tag != OPEN_CALL
        if tag in (OPEN_THINK, CLOSE_THINK):
            self._space = ""
        self.state = {OPEN_THINK: "reasoning", OPEN_CALL: "call"}.get(tag, "content")

    def _call(self, text: str, end: str, parts: list[Part]) -> None:
        calls = parse_calls(f"{OPEN_CALL}{text}{CLOSE_CALL}")[1]
        if any(call.error for call in calls):
            parts.append(Part(content=self._space + OPEN_CALL + text + end))
            self._space, self._at_start = "", False
            return
        self._space, self._at_start = "", True
        for call in calls:
            parts.append(Part(call=CallPart(call.name, json.dumps(call.arguments, ensure_ascii=False))))

    def _give(self, text: str, parts: list[Part]) -> None:
        """Gives text of a block, but for white space at its edges."""
        edge = "\n" if self.state == "reasoning" else None
        if self._at_start:
            text = text.lstrip(edge)
        if not text:
            return
        self._at_start = False
        text = self._space + text
        trims = self.state == "reasoning" or self._calls
        shown = text.rstrip(edge) if trims else text
        self._space = text[len(shown) :]
        parts.append(Part(**{self.state: shown}))


def parted(text: str, thinking: bool) -> Part:
    """The thinking and the words of a whole answer, calls being words. thinking: see `AnswerSplitter`."""
    splitter = AnswerSplitter(thinking)
    parts = [*splitter.push(text), *splitter.finish()]
    return Part("".join(part.reasoning for part in parts), "".join(part.content for part in parts))


def joined(parts: list[Part]) -> list[Part]:
    """The same with neighbours of one kind made one, and without empty ones."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else Part()
        if part.call:
            result.append(part)
        elif part.reasoning and last.reasoning:
            result[-1] = Part(reasoning=last.reasoning + part.reasoning)
        elif part.content and last.content:
            result[-1] = Part(content=last.content + part.content)
        elif part.reasoning or part.content:
            result.append(part)
    return result
