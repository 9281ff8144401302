"""Messages and records that the tests of formats share."""

from pathlib import Path

from minimind_jax.data.jsonl import READING, Record
from minimind_jax.data.kinds import parse_conversation, parse_preference

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TALK = [USER, ANSWER]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CONTEXT = {**ANSWER, "weight": 0}


def record(value):
    return Record("data.jsonl:7", Path("data.jsonl"), 7, value)


def conversation(value, reading=READING):
    return parse_conversation(record(value), reading=reading).as_record()


def pair(value, reading=READING):
    return parse_preference(record(value), reading).as_record()


def answers(chosen, rejected, *before):
    said = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
    return {"chosen": [*before, said[0]], "rejected": [*before, said[1]]}


def write(file, text, encoding="utf-8"):
    file.write_bytes(text.encode(encoding))
    return file
