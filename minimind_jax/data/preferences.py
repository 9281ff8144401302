"""Pairs of answers: the question stands once and is the same before both, whichever way the record says it."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from minimind_jax.data.messages import Conversation, Message, is_trained
from minimind_jax.data.values import Place
from minimind_jax.errors import UserError

SAME = "chosen and rejected are the same; there is nothing to prefer"


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two conversations with one beginning, of which the first goes on better. margin: by how much, 0 if unsaid."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0

    def as_record(self) -> dict[str, Any]:
        """The record that is read as this pair, in our own format."""
        chosen, rejected = self.chosen.as_record(), self.rejected.as_record()
        shared = {name: value for name, value in chosen.items() if name != "conversations"}
        sides = {"chosen": chosen["conversations"], "rejected": rejected["conversations"]}
        return {**shared, **sides, **({"margin": self.margin} if self.margin else {})}


def make_preference(
    base: Conversation, sides: Sequence[list[Message]], tools: Sequence[list | None], margin: float, place: Place
) -> Preference:
    """The pair of two sides, each of which is whole or goes on behind the base. Raises UserError for a pair that is the
    same on both sides, without a question, with a question that stands twice or differs, or in which a side has no
    answer of its own."""
    names = ("chosen", "rejected")
    sides = [_behind(base.messages, side, f"{place.text}{name}") for name, side in zip(names, sides, strict=True)]
    system = next(filter(None, map(_system, (base.messages, *sides))), None)
    if system:  # that stands only on one side holds for both, for the question is one
        sides = [side if _system(side) else [system, *side] for side in sides]
    chosen, rejected = sides[0], _with_beginning_of(sides[0], sides[1], place)
    known = [own for own in (*tools, base.tools) if own]
    if any(own != known[0] for own in known):
        raise UserError(f"{place.text}chosen and rejected offer different tools; expected the same before both answers")
    _check(chosen, rejected, place)
    offered = known[0] if known else None
    return Preference(
        Conversation(chosen, offered, base.variables), Conversation(rejected, offered, base.variables), margin
    )


_TURN = re.compile(r"(?:^|\r?\n\r?\n)(Human|Assistant):")


def turns_of(text: str) -> list[Message] | None:
    """Anthropic's way to write a conversation as one text; None if it is none."""
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def rendered_key(message: Message) -> tuple:
    """What the template makes of a message: two with the same key are rendered alike."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        arguments = function["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append((function["name"], written))
    content = message["content"]
    if message["role"] != "assistant":
        return message["role"], content
    return "assistant", content.lstrip("\n"), (message.get("reasoning_content") or "").strip("\n"), tuple(calls)


def shared_key(message: Message) -> tuple:
    """The same for what stands before the answers, where white space at the ends is no difference."""
    return tuple(part.strip() if isinstance(part, str) else part for part in rendered_key(message))


def count_shared(chosen: Sequence[Message], rejected: Sequence[Message], key: Callable[[Message], tuple]) -> int:
    """How many messages both begin with, which are the same where their keys are."""
    pairs = zip(chosen, rejected, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: key(pair[0]) == key(pair[1]), pairs))


def _system(messages: list[Message]) -> Message | None:
    return messages[0] if messages and messages[0]["role"] == "system" else None


def _behind(prompt: list[Message], side: list[Message], name: str) -> list[Message]:
    """A side with the prompt before it, unless it begins with it already, with or without the system message."""
    asked = prompt[1:] if _system(prompt) else prompt
    if asked and asked[-1]["role"] == "assistant" and side and side[0]["role"] == "assistant":
        raise UserError(f"{name}: the prompt ends with an answer already; expected it to end with the question")
    own = side[1:] if _system(side) else side
    if asked and count_shared(own, asked, shared_key) == len(asked):
        system = _system(side) or _system(prompt)
        return [system, *own] if system else own
    if asked and (side is not own or (own and own[0]["role"] == "user")):
        raise UserError(
            f"{name} begins with another question than the prompt; expected the answer alone, or the whole "
            "conversation with the prompt as its beginning"
        )
    return [*prompt, *side] if asked or not _system(side) else side


def _with_beginning_of(chosen: list[Message], rejected: list[Message], place: Place) -> list[Message]:
    """rejected, with chosen's wording where the messages before the answers differ by white space only."""
    count = count_shared(chosen[:-1], rejected[:-1], shared_key)
    if count_shared(chosen, rejected, rendered_key) < count:
        place.tell("the question differs by white space, that of `chosen` stands")
    return [*chosen[:count], *rejected[count:]]


def _check(chosen: list[Message], rejected: list[Message], place: Place) -> None:
    shared = count_shared(chosen, rejected, rendered_key)
    if shared == len(chosen) == len(rejected):
        raise UserError(f"{place.text}{SAME}")
    if len(chosen) == len(rejected) == count_shared(chosen, rejected, shared_key):
        place.tell(
            "chosen and rejected differ by white space at their ends only, which is what the model learns to prefer"
        )
    if not any(message["role"] in ("user", "tool") for message in chosen[:shared]):
        raise UserError(
            f"{place.text}chosen and rejected have no question in common; expected the same messages before both "
            "answers, or a field `prompt`"
        )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(map(is_trained, side[shared:])):
            raise UserError(f"{place.text}{name} has no answer of its own (an assistant's message with content)")
