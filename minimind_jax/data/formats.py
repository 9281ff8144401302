"""The table of record formats: how each is recognised by its fields, and how it becomes what we train on.

A row of FORMATS says what a record gives (text, conversation, preference), which fields it must have, and how it is
read. A new format is a row and a function. Every field that no function takes is ignorable (`messages.IGNORABLE`),
listed in `data.ignore_fields`, or an error that names it; of texts and labels all other fields are left out.
"""

import dataclasses
import math
import shlex
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data.exports import chatgpt_messages, gemini_messages
from minimind_jax.data.fields import Fields
from minimind_jax.data.jsonl import Record
from minimind_jax.data.messages import REASONING, Conversation, Message, is_message, messages_in, read_messages
from minimind_jax.data.preferences import Preference, count_shared, make_preference, shared_key, turns_of
from minimind_jax.data.tools import read_tools
from minimind_jax.data.values import checked_text, field_names, is_absent, kind_of, meant, respelled, without_nulls
from minimind_jax.errors import UserError

VERSION = 2  # counts up when a record that was read is read as something else; caches of tokens are made anew

Gives = Literal["text", "conversation", "preference"]

TEXT = ("text", "content", "body", "document", "raw_content")
MESSAGES = ("conversations", "messages", "conversation", "dialogue", "texts")
INSTRUCTION = ("instruction", "question", "query")
ANSWER = ("output", "response", "completion", "answer")
CONTEXT = ("input", "context")
SYSTEM = ("system", "system_prompt")
IMAGES = ("image_bytes", "images", "image")  # see `pictures`


def with_system(fields: Fields, messages: list[Message], tools: list | None) -> Conversation:
    """The record's own `system`, `tools` and template settings beside its messages; a system message wins over both."""
    system = fields.text(*SYSTEM)
    value, name = fields.take("tools")
    own_tools = read_tools(value, fields.place(name))
    value, name = fields.take("functions")
    functions = read_tools(value, fields.place(name), bare=True)
    if functions and own_tools not in (None, functions):
        raise UserError(f"{fields.record.where}: `tools` and `functions` mean the same and differ; remove one")
    own_tools = own_tools or functions
    if system and messages and messages[0]["role"] == "system":
        if not messages[0]["content"].strip():
            messages = [{**messages[0], "content": system}, *messages[1:]]
        elif messages[0]["content"] != system:
            fields.tell("`system` is ignored, since there is a system message")
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    if tools and own_tools and tools != own_tools:
        fields.tell("`tools` is ignored, since the system message has its own")
    return Conversation(messages, tools or own_tools, _template_variables(fields))


def _template_variables(fields: Fields) -> dict[str, Any]:
    variables, name = fields.parsed("chat_template_kwargs")
    if not isinstance(variables, dict | None):
        raise UserError(f"{fields.record.where}: {name} is {kind_of(variables)}; expected an object")
    if reserved := {"messages", "tools", "add_generation_prompt"} & set(variables or ()):
        raise UserError(f"{fields.record.where}: {name} sets {min(reserved)}, which the record itself says; remove it")
    return without_nulls(variables or {})


# Conversations


def _chat(fields: Fields) -> Conversation:
    messages, tools = fields.messages(*MESSAGES)
    prompt = fields.left.get("prompt")
    questions = [message["content"].strip() for message in messages if message["role"] == "user"]
    if isinstance(prompt, str) and prompt.strip() in questions:
        fields.leave_out("prompt")
    return with_system(fields, messages, tools)


def _exported(messages_of: Callable[[Fields], list[Message]]) -> Callable[[Fields], Conversation]:
    return lambda fields: with_system(fields, messages_of(fields), None)


def question(fields: Fields) -> list[Message]:
    """Alpaca's history, and its instruction with what it is about."""
    messages: list[Message] = []
    history, name = fields.parsed("history")
    if not isinstance(history, list | None):
        raise UserError(f"{fields.record.where}: {name} is {kind_of(history)}; expected a list of [question, answer]")
    for index, turn in enumerate(history or ()):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise UserError(f"{fields.record.where}: {name}[{index}] is {kind_of(turn)}; expected [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": checked_text(text, f"{fields.record.where}: {name}[{index}]")})
    if messages:
        messages, _ = read_messages(messages, fields.place(name))
    parts = [fields.text(*INSTRUCTION), fields.text(*CONTEXT)]
    if not any(part.strip() for part in parts):
        raise UserError(f"{fields.record.where}: the instruction is empty; expected text")
    return [*messages, {"role": "user", "content": "\n".join(part for part in parts if part.strip())}]


def _alpaca(fields: Fields) -> Conversation:
    messages = question(fields)
    value, name = fields.take(*ANSWER)
    answer = {"role": "assistant", "content": checked_text(value, fields.place(name).text)}
    reasoning, name = fields.take(*REASONING)
    if reasoning is not None:
        answer["reasoning_content"] = reasoning
    if not fields.has(*MESSAGES):
        fields.leave_out("text")  # Stanford's own files have the whole rendered, too
    messages.append(read_messages([answer], fields.place(name))[0][0])
    return with_system(fields, messages, None)


def _completion(fields: Fields) -> Conversation:
    """TRL's: only the completion is trained; texts are joined without a template."""
    (prompt, prompt_name), (completion, completion_name) = fields.take("prompt"), fields.take(*ANSWER)
    prompt, completion = messages_in(prompt), messages_in(completion)
    if isinstance(prompt, str) and isinstance(completion, str):
        fields.tell(
            "`prompt` and `completion` are texts, joined without the chat template (the model then answers `generate "
            "--raw true`, not `chat`; for a chat, `minimind data convert` them with --rename prompt=instruction "
            "completion=output and train on that)"
        )
        if prompt.strip() and completion.startswith(prompt):
            fields.tell(f"`{completion_name}` begins with the text of `{prompt_name}`, which then stands twice")
        asked = {"role": "user", "content": checked_text(prompt, fields.place(prompt_name).text)}
        answer = {"role": "assistant", "content": checked_text(completion, fields.place(completion_name).text)}
        return Conversation([asked, answer], plain=True)
    before, tools = read_messages(_as_messages(prompt, "user"), fields.place(prompt_name))
    before = [{**m, "train": False} if m["role"] == "assistant" else m for m in before]
    after, _ = read_messages(_as_messages(completion, "assistant"), fields.place(completion_name))
    asked, own = ([m for m in part if m["role"] != "system"] for part in (before, after))
    if len(own) > len(asked) > 0 and count_shared(own, asked, shared_key) == len(asked):
        fields.tell(f"`{completion_name}` begins with the prompt, which stands once")
        after = own[len(asked) :]
    return with_system(fields, [*before, *after], tools)


def _as_messages(value: Any, role: str) -> Any:
    """A text as a message of that role, a message as a list of one."""
    value = messages_in(value)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _response(fields: Fields) -> Conversation:
    if not isinstance(messages_in(fields.left["prompt"]), str):
        return _completion(fields)
    fields.left["instruction"] = fields.left.pop("prompt")
    return _alpaca(fields)


# Pairs


def _pair(fields: Fields) -> Preference:
    """chosen and rejected, whole or behind a prompt: TRL's, UltraFeedback's, LLaMA-Factory's and HH-RLHF's."""
    chosen, chosen_name = fields.take("chosen")
    rejected, rejected_name = fields.take("rejected")
    if isinstance(asked := fields.left.get("prompt"), str) and turns_of(asked):  # "... Assistant:", then " answer"
        chosen, rejected = (side.strip() if isinstance(side, str) else side for side in (chosen, rejected))
    prompt, tools = _pair_prompt(fields, (chosen, rejected))
    base = with_system(fields, prompt, tools)
    return _preference(fields, base, {chosen_name: chosen, rejected_name: rejected})


def _preference(fields: Fields, base: Conversation, answers: dict[str, Any]) -> Preference:
    sides, tools = [], []
    turns = {name: turns_of(answer) for name, answer in answers.items() if isinstance(answer, str)}
    answers = {**answers, **{name: each for name, each in turns.items() if each and each[0]["role"] == "user"}}
    answers = _without_prompt(fields, base.messages, answers)
    for name, answer in answers.items():
        if isinstance(answer, str) and not base.messages:
            raise UserError(
                f"{fields.record.where}: {name} is a string and there is no prompt, so chosen and rejected have no "
                "question in common; expected a list of messages, or a field `prompt`"
            )
        messages, own_tools = read_messages(_as_messages(answer, "assistant"), fields.place(name))
        sides.append(messages)
        tools.append(own_tools)
    first = base.messages[0] if base.messages and base.messages[0]["role"] == "system" else None
    if first and any(side[0]["role"] == "system" and side[0] != first for side in sides):
        fields.tell("`system` is ignored, since there is a system message")
    return make_preference(base, sides, tools, _margin(fields), fields.place(""))


def _without_prompt(fields: Fields, prompt: list[Message], answers: dict[str, Any]) -> dict[str, Any]:
    """Answers that are texts, without the question where both begin with it; told where only one does."""
    asked = prompt[-1]["content"].strip() if prompt else ""
    texts = {name: answer.lstrip() for name, answer in answers.items() if isinstance(answer, str)}
    again = [
        name for name, text in texts.items() if asked and text.startswith(asked) and text[len(asked) :][:1].isspace()
    ]
    if len(again) == 2:
        fields.tell(f"`{again[0]}` and `{again[1]}` begin with the prompt, which stands once")
        return {name: text[len(asked) :].lstrip() for name, text in texts.items()}
    if again:
        fields.tell(f"only `{again[0]}` begins with the prompt's text, which is trained as part of the answer")
    return answers


def _pair_prompt(fields: Fields, answers: Sequence[Any]) -> tuple[list[Message], list | None]:
    if fields.has("prompt"):
        fields.leave_out("messages")  # UltraFeedback's chosen conversation again
        prompt, name = fields.take("prompt")
        turns = turns_of(prompt) if isinstance(prompt, str) else None
        if turns and turns[-1]["content"] == "":
            turns.pop()  # "... Assistant:", where the answers go on
        return read_messages(turns or _as_messages(prompt, "user"), fields.place(name))
    if fields.has(*MESSAGES):
        value, name = fields.take(*MESSAGES)
        if value in answers:  # the conversation of the chosen answer again
            fields.tell(f"`{name}` is ignored")
            return [], None
        return read_messages(value, fields.place(name))
    return (question(fields), None) if fields.has(*INSTRUCTION) else ([], None)


def _openai_pair(fields: Fields) -> Preference:
    asked, name = fields.take("input")
    chosen, _ = fields.take("preferred_output")
    rejected, _ = fields.take("non_preferred_output")
    if not isinstance(asked, dict):
        raise UserError(f"{fields.record.where}: {name} is {kind_of(asked)}; expected an object with messages")
    record = dataclasses.replace(fields.record, where=f"{fields.record.where}: {name}", value=asked)
    inner = Fields(record, fields.here.ignore)
    base = _chat(inner)
    inner.finish(OPENAI_PAIR, _hint(asked, "preference"))
    return _preference(fields, base, {"preferred_output": chosen, "non_preferred_output": rejected})


OPENAI_PAIR = "OpenAI preference"


def _margin(fields: Fields) -> float:
    margin, _ = fields.take("margin")
    scores = [fields.take(f"score_{side}", f"{side}_score")[0] for side in ("chosen", "rejected")]
    if margin is None and None not in scores:
        for name, score in zip(("score_chosen", "score_rejected"), scores, strict=True):
            _check_number(fields, name, score)
        fields.tell("the margin is `score_chosen` less `score_rejected`")
        margin = scores[0] - scores[1]
        if not margin:
            fields.tell("the scores of `chosen` and `rejected` are equal, and the pair counts as others do")
    margin = 0.0 if margin is None else margin
    _check_number(fields, "margin", margin)
    if margin < 0:
        fields.tell("the margin is below 0, as if `rejected` were the better one: are they swapped?")
    return float(margin)


def _check_number(fields: Fields, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        found = value if isinstance(value, float) else kind_of(value)
        raise UserError(f"{fields.record.where}: {name} is {found}; expected a number")


def _unpaired(fields: Fields) -> Preference:
    raise UserError(
        f"{fields.record.where}: one answer with a verdict (KTO); pairs are needed: a better and a worse answer to the "
        'same question in one record, as {"prompt": ..., "chosen": ..., "rejected": ...}'
    )


# The table


class Format(NamedTuple):
    """name: as people call it. gives: what is read. needs: fields, each under any of its names."""

    name: str
    gives: Gives
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Fields], Conversation | Preference]


FORMATS = (
    Format("KTO (unpaired)", "preference", (("kto_tag",),), _unpaired),
    Format("KTO (unpaired)", "preference", (("prompt",), ("completion",), ("label",)), _unpaired),
    Format(OPENAI_PAIR, "preference", (("preferred_output",), ("non_preferred_output",)), _openai_pair),
    Format("chosen and rejected", "preference", (("chosen",), ("rejected",)), _pair),
    Format("messages", "conversation", (MESSAGES,), _chat),
    Format("instruction and output", "conversation", ((*INSTRUCTION, "input"), ANSWER), _alpaca),
    Format("prompt and completion", "conversation", (("prompt",), ("completion",)), _completion),
    Format("prompt and response", "conversation", (("prompt",), ("response", "output", "answer")), _response),
    Format("ChatGPT's export", "conversation", (("mapping",), ("current_node",)), _exported(chatgpt_messages)),
    Format("Gemini", "conversation", (("contents",),), _exported(gemini_messages)),
)

EXPECTED = {
    "conversation": "`conversations` or `messages` (a list of messages), `instruction` and `output`, or `prompt` and "
    "`completion`",
    "preference": "`chosen` and `rejected`, with a `prompt` or the same beginning",
}
TAKEN_BY = {
    "text": "this is plain text: `minimind pretrain` takes it",
    "conversation": "this is a conversation: `minimind sft` takes it, `evaluate perplexity` with --kind conversation",
    "preference": "this is a pair of answers: `minimind dpo` and `minimind reward` take it",
}


def recognise(value: dict[str, Any], gives: Gives | None = None, ignore: Sequence[str] = ()) -> Format | None:
    """The row of the table whose fields a record has; None if there is none, as of plain text."""
    present = {name for name, item in value.items() if not is_absent(item) and name not in ignore}
    for row in FORMATS:
        if gives in (None, row.gives) and all(present.intersection(names) for names in row.needs):
            return row
    return None


def detect(value: dict[str, Any], reading: ReadingConfig) -> Gives | None:
    """What a record gives; None if it is of no known format."""
    found = recognise(value, ignore=reading.ignore_fields)
    if found:
        return found.gives
    return "text" if any(name in value for name in text_fields(reading)) else None


def read_record(record: Record, gives: Gives, reading: ReadingConfig, keeps: bool = False) -> Conversation | Preference:
    """A record of any format as a conversation or a pair.

    keeps: fields that are not understood stay with the record, as where answers are added to it, and are no error.
    Raises UserError for a record of no known format, and for a field that is not understood.
    """
    found = recognise(record.value, gives, reading.ignore_fields)
    if "label" in record.value or "kto_tag" in record.value:
        pairs = recognise(record.value, "preference", reading.ignore_fields)
        found = pairs if pairs and pairs.read is _unpaired else found
    if found is None:
        raise UserError(f"{record.where}: {_missing(record.value, gives)}")
    fields = Fields(record, reading.ignore_fields)
    read = found.read(fields)
    if not keeps:
        fields.finish(found.name, _hint(record.value, gives))
    return read


def text_fields(reading: ReadingConfig) -> tuple[str, ...]:
    """Where a text may stand."""
    return (reading.text_field,) if reading.text_field else TEXT


def read_text(record: Record, reading: ReadingConfig) -> tuple[str, str]:
    """The text of a record and the name of its field; its other fields are told as left out. Raises UserError."""
    names = text_fields(reading)
    name = next((n for n in names if record.value.get(n) is not None), None)
    name = name or next((n for n in names if n in record.value), None)
    if name is None:
        found = field_names(record.value) + _hint(record.value, "text")
        raise UserError(
            f"{record.where}: missing field `{names[0]}`; expected a string (data.text_field, of tools --text_field, "
            f"names another field{meant(record.value, names)}), found the fields {found}"
        )
    if name == "content" and not reading.text_field and is_message(record.value):
        raise UserError(
            f"{record.where}: a message by itself; a conversation is one record, a list of its messages in one line or "
            '{"messages": [...]} (to take the text of each: data.text_field content, of tools --text_field)'
        )
    leave_out_others(record, {name})
    return checked_text(record.value[name], f"{record.where}: {name}"), name


def leave_out_others(record: Record, read: Collection[str]) -> None:
    """Tells that the fields beside a text that are not `read` are left out."""
    for name, value in record.value.items():
        if name not in read and not is_absent(value):
            record.tell(f"`{name[:40]}` is ignored")


def _missing(value: dict[str, Any], gives: Gives) -> str:
    """What is said of a record in which the fields of no format are found, or found empty."""
    for row in FORMATS:
        there = [next((name for name in names if name in value), None) for names in row.needs]
        empty = next((name for name in there if name and is_absent(value[name])), None)
        if row.gives == gives and all(there) and empty:
            expected = "a list of messages" if empty in MESSAGES else "text"
            return f"{empty} is {kind_of(value[empty])}; expected {expected}"
    first = {"conversation": "conversations", "preference": "rejected" if "chosen" in value else "chosen"}[gives]
    return (
        f"missing field `{first}`; expected {EXPECTED[gives]} (`minimind data convert --rename {renaming(value)}` "
        f"gives fields other names); found the fields {field_names(value)}{_hint(value, gives)}"
    )


def renaming(value: dict[str, Any], more: Collection[str] = TEXT) -> str:
    """What `data convert --rename` may be given for the fields of a record: those that only have another case, if any.
    more: names beside those of FORMATS."""
    known = {name for row in FORMATS for names in row.needs for name in names} | {*SYSTEM, *CONTEXT, *more}
    return " ".join(shlex.quote(f"{field}={name}") for field, name in respelled(value, known).items()) or "OLD=NEW"


def _hint(value: dict[str, Any], wanted: Gives | None = None) -> str:
    """What the record looks like, and which stage takes it, unless that is what is wanted."""
    if wanted == "conversation" and any(not is_absent(value.get(name)) for name in IMAGES):
        return " (these are pictures: `minimind vlm-sft` takes them)"
    row = next((row for row in FORMATS if all(value.keys() & set(names) for names in row.needs)), None)
    gives = row.gives if row else "text" if isinstance(value.get("text"), str) else None
    if row and row.read is _unpaired:
        return " (this is one answer with a verdict, as for KTO; pairs are needed)"
    return f" ({TAKEN_BY[gives]})" if gives not in (None, wanted) else ""
