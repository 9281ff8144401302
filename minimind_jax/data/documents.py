"""Records as token ids with their trained marks: what the token cache stores."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimind_jax.data.labels import LabelledText
from minimind_jax.data.messages import Conversation, Message
from minimind_jax.data.preferences import SAME, Preference
from minimind_jax.data.template import Roll, Segment, text_of, unchanged
from minimind_jax.data.template_check import check_spoken
from minimind_jax.data.tokenizer import PROBE_WORD, Tokenizer
from minimind_jax.data.values import Tell, unheard
from minimind_jax.errors import TemplateFault, UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """One record of n tokens."""

    ids: np.ndarray  # int32 (n,)
    trained: np.ndarray  # bool (n,), True where this token is a target of the loss
    # offsets, 0 first, at which the document may be cut: where a new message follows the assistant's answer. Of a pair:
    # 0, the length of the prompt both sides begin with, and where the second side begins
    turn_starts: list[int]
    values: tuple[float, ...] = ()  # numbers that belong to it: of a pair its margin, of a labelled text its label
    pictures: tuple[bytes, ...] = ()  # as `pictures.pack` writes them
    picture_starts: Sequence[int] = ()  # offset of the first marker of each
    key: int = 0  # the same for records that say the same (of a labelled one: whose texts do), else another


def encode_text(tokenizer: Tokenizer, text: str) -> Document:
    """Text between the tokenizer's begin and end tokens; every token but the first is trained."""
    ids = np.array(_framed(tokenizer, tokenizer.encode(text), []), dtype=np.int32)
    trained = np.ones(len(ids), dtype=bool)
    trained[0] = False
    return Document(ids, trained, [0])


def encode_conversation(
    tokenizer: Tokenizer, conversation: Conversation, roll: Roll = unchanged, tell: Tell = unheard
) -> Document:
    """A conversation in the tokenizer's template; trained are the assistant's words and its end of turn.

    roll: the record's draws of the template's chances. tell: hears what the template leaves out on purpose.
    Raises UserError if the tokenizer's own template cannot be split into prompts and answers, or leaves words out.
    """
    _check_messages(tokenizer, [conversation], tell)
    if conversation.plain:
        return _encode_completion(tokenizer, *(message["content"] for message in conversation.messages))
    return _encode(tokenizer, _segments(tokenizer, *roll(conversation), tell))


def _check_messages(tokenizer: Tokenizer, sides: list[Conversation], tell: Tell) -> None:
    messages = [message for side in sides if not side.plain for message in side.messages]
    if tokenizer.own_template:
        check_spoken(messages)
    if tokenizer.turn_end and any(tokenizer.turn_end in text_of(message) for message in messages):
        tell("messages hold the token that ends a turn among their words: is the template in the data?")


def _segments(tokenizer: Tokenizer, conversation: Conversation, keep_empty_think: bool, tell: Tell) -> list[Segment]:
    said = conversation.messages, conversation.tools
    return tokenizer.segments(*said, keep_empty_think, conversation.variables, tell)


def _encode_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Document:
    """Two texts end to end between the begin and end tokens, without the template; the second is trained."""
    after = tokenizer.encode(completion)
    ids = np.array(_framed(tokenizer, tokenizer.encode(prompt), after), dtype=np.int32)
    answer = len(after) + (after[-1:] != [tokenizer.eos_id])
    return Document(ids, np.arange(len(ids)) >= max(len(ids) - answer, 1), [0])


def _framed(tokenizer: Tokenizer, before: list[int], after: list[int]) -> list[int]:
    """Two pieces of text between the begin and end tokens, of which a text that has one already gets no second."""
    ids = [*begun(tokenizer, before), *after]
    return ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]


def begun(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids of a text behind the tokenizer's begin token, if it has one and they do not begin with it."""
    return ids if tokenizer.bos_id in (None, *ids[:1]) else [tokenizer.bos_id, *ids]


def encode_labelled(tokenizer: Tokenizer, text: LabelledText) -> Document:
    """A text as the tokenizer writes it, without begin and end tokens: what transformers gives a classifier."""
    ids = np.array(tokenizer.encode(text.text), dtype=np.int32)
    return Document(ids, np.ones(len(ids), dtype=bool), [0], text.values)


def encode_preference(
    tokenizer: Tokenizer, preference: Preference, roll: Roll = unchanged, tell: Tell = unheard
) -> Document:
    """Both sides of a pair end to end, the chosen one first; trained are the assistant's words where they differ.

    roll, tell: see `encode_conversation`. Raises UserError where the template writes both sides alike, or leaves
    words out.
    """
    _check_messages(tokenizer, [preference.chosen, preference.rejected], tell)
    sides = [_segments(tokenizer, *roll(side), tell) for side in (preference.chosen, preference.rejected)]
    texts = ["".join(segment.text for segment in side) for side in sides]
    if texts[0] == texts[1]:
        raise UserError(SAME)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False)))
    prompt = _encode(tokenizer, sides[0][:shared])
    documents = [_encode(tokenizer, side) for side in sides]
    for document in documents:
        document.trained[: len(prompt.ids)] = False
    ids, trained = (np.concatenate([getattr(side, name) for side in documents]) for name in ("ids", "trained"))
    return Document(ids, trained, [0, len(prompt.ids), len(documents[0].ids)], (preference.margin,))


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    open_thinking: bool | None = None,
) -> list[int]:
    """Ids of messages with a generation prompt, cut where training cuts: the very tokens a trained model has seen."""
    return _encode(tokenizer, tokenizer.prompt_segments(messages, tools, True, open_thinking)).ids.tolist()


def encode_replies(
    tokenizer: Tokenizer,
    replies: Sequence[Message],
    tools: Sequence[Any] | None = None,
    open_thinking: bool | None = None,
) -> list[int]:
    """Ids of what the template writes behind the token that ends an answer, where replies to it follow: the rest of its
    turn, the replies (results of tools, or a user's message) and the next generation prompt.

    The answer itself is not written: whoever has its tokens appends these. Raises UserError where the template cannot
    write the replies.
    """
    function = {"name": PROBE_WORD, "arguments": {}}
    calls = [{"id": f"call{n:05}", "type": "function", "function": function} for n in range(len(replies))]
    told = [
        {"tool_call_id": call["id"], "name": PROBE_WORD, **reply} if reply["role"] == "tool" else reply
        for reply, call in zip(replies, calls, strict=True)
    ]
    calls = [call for call, reply in zip(calls, replies, strict=True) if reply["role"] == "tool"]
    answer = {"role": "assistant", "content": PROBE_WORD, **({"tool_calls": calls} if calls else {})}
    talk = [{"role": "user", "content": "q"}, answer, *told]
    segments = tokenizer.prompt_segments(talk, tools, True, open_thinking)
    _, found, after = "".join(segment.text for segment in segments).partition(PROBE_WORD)
    if not found:
        raise TemplateFault("the chat template leaves out an answer that replies follow")
    ends = [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.end_ids]
    cuts = [after.index(end) + len(end) for end in ends if end in after]
    return tokenizer.encode(after[min(cuts, default=0) :])


def _encode(tokenizer: Tokenizer, segments: list[Segment]) -> Document:
    pieces = tokenizer.encode_batch([segment.text for segment in segments])
    lengths = [len(piece) for piece in pieces]
    ids = np.array([i for piece in pieces for i in piece], dtype=np.int32)
    trained = np.repeat(np.array([segment.trained for segment in segments], dtype=bool), lengths)
    turns = np.repeat([segment.turn for segment in segments], lengths)
    turn_starts = [0, *(np.flatnonzero(np.diff(turns)) + 1).tolist()]
    if len(trained):
        trained[0] = False  # nothing comes before it that could predict it
    return Document(ids, trained, turn_starts)
