"""Records of any format as what a stage trains on; every error names the file, the line, the field and the way out."""

from typing import Any

from minimind_jax.data.formats import read_record, read_text
from minimind_jax.data.jsonl import READING, Reading, Record
from minimind_jax.data.messages import ROLES, Conversation, Message, check_closed, is_trained
from minimind_jax.data.preferences import Preference
from minimind_jax.data.values import checked_text, field_names
from minimind_jax.errors import UserError

__all__ = ["ROLES", "Conversation", "Message", "Preference", "checked_text", "field_names"]  # as records are spoken of


def parse_text(record: Record, flag: str = "--data.on_error", reading: Reading = READING) -> str:
    """The text of a pretraining record {"text": str}. Raises UserError, which names the flag that skips records."""
    text, name = read_text(record, reading)
    if not text.strip():
        raise UserError(f"{record.where}: {name} is empty; remove the line, or pass {flag} skip")
    return text


def parse_conversation(record: Record, for_training: bool = True, reading: Reading = READING) -> Conversation:
    """The conversation of a record of any format (see `formats`), as {"conversations": [message, ...]}, MiniMind's.

    Raises UserError, also for a conversation in which the assistant says nothing that is trained, unless it is only to
    be answered or scored (for_training False); fields that nobody understands are then no error.
    """
    conversation = read_record(record, "conversation", reading, keeps=not for_training)
    if for_training and not any(map(is_trained, conversation.messages)):
        raise UserError(
            f"{record.where}: nothing to train on; expected at least one assistant message with content, "
            "reasoning_content or tool_calls; remove the line, or pass --data.on_error skip"
        )
    if for_training:
        check_closed(conversation.messages, record.where)
    return conversation


def parse_preference(record: Record, reading: Reading = READING) -> Preference:
    """The pair of a record of any format, as {"chosen": [message, ...], "rejected": [message, ...]}.

    Raises UserError, also for a pair that is the same on both sides, without a question, or in which a side has no
    answer of its own.
    """
    pair = read_record(record, "preference", reading)
    check_closed(pair.chosen.messages, f"{record.where}: chosen")
    return pair


def as_record(parsed: str | Conversation | Preference) -> dict[str, Any]:
    """The record of our own format that is read as the same."""
    if isinstance(parsed, str):
        return {"text": parsed}
    if isinstance(parsed, Conversation):
        return parsed.as_record()
    sides = {name: getattr(parsed, name).as_record() for name in ("chosen", "rejected")}
    shared = {name: value for name, value in sides["chosen"].items() if name != "conversations"}
    margin = {"margin": parsed.margin} if parsed.margin else {}
    return {**shared, **{name: side["conversations"] for name, side in sides.items()}, **margin}
