"""Records as token ids with their trained marks: what the token cache stores."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimind_jax.data.records import Conversation
from minimind_jax.data.template import Segment, apply_dice
from minimind_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Document:
    """One record of n tokens.

    ids: int32 (n,). trained: bool (n,), True where this token is a target of the loss.
    turn_starts: offsets, 0 first, at which the document may be cut: where a new message follows the assistant's answer.
    """

    ids: np.ndarray
    trained: np.ndarray
    turn_starts: list[int]


def encode_text(tokenizer: Tokenizer, text: str) -> Document:
    """Text between the tokenizer's begin and end tokens; every token but the first is trained."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = np.array([*begin, *tokenizer.encode(text), tokenizer.eos_id], dtype=np.int32)
    trained = np.ones(len(ids), dtype=bool)
    trained[0] = False
    return Document(ids, trained, [0])


def encode_conversation(
    tokenizer: Tokenizer,
    conversation: Conversation,
    rng: np.random.Generator | None = None,
    system_prompt_probability: float = 0.0,
    empty_think_removal: float = 0.0,
) -> Document:
    """A conversation in the tokenizer's template; trained are the assistant's words and its end of turn.

    rng: of this record's dice (`template.dice_rng`); None leaves the conversation as it is.
    Raises UserError if the tokenizer's own template cannot be split into prompts and answers.
    """
    keep_empty_think = True
    if rng is not None:
        conversation, keep_empty_think = apply_dice(conversation, rng, system_prompt_probability, empty_think_removal)
    return _encode(tokenizer, tokenizer.segments(conversation.messages, conversation.tools, keep_empty_think))


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
