"""What is to be answered in a record of any format, and prompts that are made to fit."""

from collections.abc import Callable
from typing import Any, NamedTuple

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data.fields import Fields
from minimind_jax.data.formats import INSTRUCTION, MESSAGES, SYSTEM, question, text_fields, with_system
from minimind_jax.data.jsonl import Record
from minimind_jax.data.messages import Conversation, messages_in, read_messages
from minimind_jax.data.pictures import refuse_pictures
from minimind_jax.data.preferences import turns_of
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.values import checked_text, field_names, meant
from minimind_jax.errors import UserError


class Prompt(NamedTuple):
    """text: to be continued, or asked as a user's message. conversation: that the answer ends, where there is no text.

    others: the record's fields beside these.
    """

    text: str | None
    conversation: Conversation | None
    others: dict[str, Any]

    def as_conversation(self) -> Conversation:
        """With the text, if it is one, as a user's message."""
        return self.conversation or Conversation([{"role": "user", "content": self.text}])


def own_thinking(asked: Conversation, where: str) -> bool | None:
    """Whether the record itself says that its answer thinks, or not; None where it does not say. Raises UserError for
    other variables of a template, which nobody who writes answers follows."""
    others = dict(asked.variables)
    said = [others.pop(name) for name in ("open_thinking", "enable_thinking") if name in others]
    if others:
        raise UserError(
            f"{where}: chat_template_kwargs has {next(iter(others))!r}, and of these only enable_thinking is followed "
            "where answers are written; list chat_template_kwargs in ignore_fields to leave them out"
        )
    return bool(said[0]) if said else None


def read_prompt(record: Record, reading: ReadingConfig, raw: bool = False) -> Prompt:
    """The question of a record: messages (a last answer is left out), an instruction, a prompt or a text.

    raw: a text is one, also if it spells messages. Raises UserError for a record that has none, and for pictures, which
    `pictures.take_pictures` takes away where they are looked at.
    """
    refuse_pictures(record, reading)
    fields = Fields(record, reading.ignore_fields)
    text = conversation = None
    own = [reading.text_field] if reading.text_field else []
    if isinstance(asked := fields.left.get("prompt"), str) and not raw:
        turns = turns_of(asked)
        fields.left["prompt"] = [turn for turn in turns if turn["content"]] if turns else messages_in(asked)
    texts = (*own, "prompt", *text_fields(reading), "problem")  # the last is of MATH and NVIDIA's sets
    names = [name for name in texts if isinstance(fields.left.get(name), str)]
    if isinstance(fields.left.get("prompt"), list | dict):
        fields.leave_out(*MESSAGES)  # which may lack what Open-R1 puts before its prompts
        conversation = _without_answer(with_system(fields, *fields.messages("prompt")), record)
    elif fields.has(*MESSAGES) and not (own and names):
        fields.leave_out("prompt")
        conversation = _without_answer(with_system(fields, *fields.messages(*MESSAGES)), record)
    elif fields.has(*INSTRUCTION, "input") and not names[:1] == ["prompt"]:
        conversation = with_system(fields, question(fields), None)
    elif names or any(isinstance(record.value.get(name), str) for name in ("prompt", "text")):
        name = names[0] if names else next(name for name in ("prompt", "text") if name in record.value)
        text = checked_text(record.value[name], f"{record.where}: {name}")
        fields.left.pop(name, None)
        if fields.has(*SYSTEM, "tools", "functions", *["chat_template_kwargs"] * (not raw)):
            messages, _ = read_messages([{"role": "user", "content": text}], fields.place(name))
            text, conversation = None, with_system(fields, messages, None)
    else:
        raise UserError(
            f"{record.where}: expected a field `prompt` or `text` (a string), or `conversations` (data.text_field, of "
            f"tools --text_field, names another field{meant(record.value, texts)}); found the fields "
            f"{field_names(record.value)}"
        )
    answers = ("completion", "output", "response", "prompt", "text", *MESSAGES)
    return Prompt(text, conversation, {name: value for name, value in fields.left.items() if name not in answers})


def _without_answer(conversation: Conversation, record: Record) -> Conversation:
    messages = conversation.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{record.where}: the conversation is only an assistant's message; expected a question")
    return Conversation(messages, conversation.tools, conversation.variables)


def shortened(
    messages: list[dict[str, Any]], count: Callable[[list[dict[str, Any]]], int], room: int, tokenizer: Tokenizer
) -> list[dict[str, Any]] | None:
    """Messages cut to `room` tokens: the oldest turns go first, then the beginning of the last question.

    count: tokens of messages. The system message stays. None where even an empty question does not fit.
    """
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(head) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user"] or [len(turns) - 1]
    for start in starts:
        if count([*head, *turns[start:]]) <= room:
            return [*head, *turns[start:]]
    turns = turns[starts[-1] :]
    while turns and (over := count([*head, *turns]) - room) > 0:
        if not turns[0]["content"]:
            return None
        kept = tokenizer.decode(tokenizer.encode(turns[0]["content"])[over:])
        kept = kept.lstrip("\N{REPLACEMENT CHARACTER}")  # half a character, which may be as many tokens again
        turns = [{**turns[0], "content": kept}, *turns[1:]]
    return [*head, *turns]
