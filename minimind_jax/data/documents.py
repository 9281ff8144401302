"""Records as token ids with their trained marks: what the token cache stores."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minimind_jax.data.labels import Classes, LabelledText
from minimind_jax.data.messages import Conversation
from minimind_jax.data.preferences import SAME, Preference
from minimind_jax.data.template import Segment, apply_dice
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """One record of n tokens.

    ids: int32 (n,). trained: bool (n,), True where this token is a target of the loss.
    turn_starts: offsets, 0 first, at which the document may be cut: where a new message follows the assistant's answer.
        Of a pair: 0, the length of the prompt both sides begin with, and where the second side begins.
    values: numbers that belong to it: of a pair its margin, of a labelled text its label.
    """

    ids: np.ndarray
    trained: np.ndarray
    turn_starts: list[int]
    values: tuple[float, ...] = ()


def encode_text(tokenizer: Tokenizer, text: str) -> Document:
    """Text between the tokenizer's begin and end tokens; every token but the first is trained."""
    ids = np.array(_framed(tokenizer, tokenizer.encode(text), []), dtype=np.int32)
    trained = np.ones(len(ids), dtype=bool)
    trained[0] = False
    return Document(ids, trained, [0])


def encode_conversation(
    tokenizer: Tokenizer,
    conversation: Conversation,
    rng: np.random.Generator | None = None,
    system_prompt_probability: float = 0.0,
    empty_think_removal: float = 0.0,
    tell: Callable[[str], None] = lambda note: None,
) -> Document:
    """A conversation in the tokenizer's template; trained are the assistant's words and its end of turn.

    rng: of this record's dice (`template.dice_rng`); None leaves the conversation as it is.
    tell: hears what the template leaves out on purpose.
    Raises UserError if the tokenizer's own template cannot be split into prompts and answers.
    """
    if conversation.plain:
        return _encode_completion(tokenizer, *(message["content"] for message in conversation.messages))
    keep_empty_think = True
    if rng is not None:
        conversation, keep_empty_think = apply_dice(conversation, rng, system_prompt_probability, empty_think_removal)
    return _encode(tokenizer, _segments(tokenizer, conversation, keep_empty_think, tell))


def _segments(
    tokenizer: Tokenizer, conversation: Conversation, keep_empty_think: bool, tell: Callable[[str], None]
) -> list[Segment]:
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


def encode_labelled(tokenizer: Tokenizer, text: LabelledText, classes: Classes) -> Document:
    """A text as the tokenizer writes it, without begin and end tokens: what transformers gives a classifier.

    values: the class's number, or with several labels a 0 or 1 for each class.
    """
    ids = np.array(tokenizer.encode(text.text), dtype=np.int32)
    return Document(ids, np.ones(len(ids), dtype=bool), [0], classes.values(text.labels))


def encode_preference(
    tokenizer: Tokenizer,
    preference: Preference,
    rng: Callable[[], np.random.Generator] | None = None,
    system_prompt_probability: float = 0.0,
    empty_think_removal: float = 0.0,
    tell: Callable[[str], None] = lambda note: None,
) -> Document:
    """Both sides of a pair end to end, the chosen one first; trained are the assistant's words where they differ.

    rng: makes the generator of this record's dice; both sides get the same draws. tell: see `encode_conversation`.
    Raises UserError where the template writes both sides alike.
    """
    sides = []
    for conversation in (preference.chosen, preference.rejected):
        keep_empty_think = True
        if rng is not None:
            chances = (system_prompt_probability, empty_think_removal)
            conversation, keep_empty_think = apply_dice(conversation, rng(), *chances)
        sides.append(_segments(tokenizer, conversation, keep_empty_think, tell))
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
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any] | None = None,
    open_thinking: bool | None = None,
    enable_thinking: bool | None = None,
) -> list[int]:
    """Ids of messages with a generation prompt, cut where training cuts: the very tokens a trained model has seen."""
    segments = tokenizer.prompt_segments(messages, tools, True, open_thinking, enable_thinking)
    return _encode(tokenizer, segments).ids.tolist()


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
