"""Records of any format as what a stage trains on; every error names the file, the line, the field and the way out."""

from collections.abc import Sequence

from minimind_jax.data.formats import read_record, read_text
from minimind_jax.data.jsonl import READING, Reading, Record
from minimind_jax.data.messages import Conversation, Message, check_closed, is_trained
from minimind_jax.data.preferences import Preference
from minimind_jax.errors import UserError

BEGINNING = 40  # characters of a text, of which the last word is left out


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


def beginning(text: str) -> str:
    """The first words of a text that is not empty."""
    return text[:BEGINNING].rsplit(maxsplit=1)[0] if len(text) > BEGINNING else text.split()[0]


def first_question(messages: Sequence[Message]) -> str:
    """What the user says first; "" if nothing."""
    return next((message["content"] for message in messages if message["role"] == "user"), "")


def spoken(messages: Sequence[Message]) -> str:
    """All that is said and thought in messages."""
    return "\n".join(part for m in messages for part in (m.get("reasoning_content"), m["content"]) if part)
