"""Validation of records: what is accepted, and the message for each thing that is not."""

import datetime
import json
from pathlib import Path

import pytest

from minimind_jax.data.jsonl import Record, iter_records
from minimind_jax.data.kinds import parse_conversation, parse_text
from minimind_jax.errors import UserError

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
NAN, NOW = float("nan"), datetime.datetime(2027, 1, 1)  # as Parquet may hold them
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def record(value):
    return Record("data.jsonl:7", Path("data.jsonl"), 7, value)


def said(messages):
    return {"conversations": messages}


def talk(*messages):
    return record(said(list(messages)))


def test_text():
    assert parse_text(record({"text": " a\n", "id": 3})) == " a\n"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"txt": "a"}, r"data\.jsonl:7: missing field `text`; expected a string .*text_field.*, found the fields txt$"),
        ({"text": None}, r"data\.jsonl:7: text is null; expected a string"),
        (said([]), r"missing field `text`.*`minimind sft` takes it"),
        ({"text": 3}, r"data\.jsonl:7: text is a number; expected a string"),
        ({"text": ["a"]}, r"text is a list; expected a string"),
        ({"text": ""}, r"text is empty; .*--data.on_error skip"),
        ({"text": " \n\t\u3000"}, r"text is empty"),
        ({"text": b"a"}, r"text is of type bytes; expected a string"),
        ({f"\x1b[2Jfield {i}\n": i for i in range(99)}, r"found the fields \\x1b\[2Jfield 0\\n, .*, \.\.\.$"),
        ({"text": "ab\ud83d"}, r"text has half a surrogate pair \(\\ud83d\) at character 2"),
    ],
)
def test_bad_text(value, message):
    with pytest.raises(UserError, match=message):
        parse_text(record(value))


@pytest.mark.parametrize("encode", [lambda x: x, json.dumps], ids=["list", "JSON string"])
def test_tools_and_calls(encode):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"function": {"name": "g", "arguments": "{}"}}]
    conversation = parse_conversation(
        talk(
            {"role": "system", "content": "s", "tools": encode(TOOLS)},
            USER,
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": encode(calls)},
            {"role": "tool", "content": "1", "tools": None, "tool_calls": ""},
            ANSWER,
        )
    )
    assert conversation.tools == TOOLS
    assert conversation.messages == [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]


def test_list_content_is_joined():
    parts = [{"type": "text", "text": "a"}, {"text": "b"}, "c", {"type": None, "text": "d"}]
    assert parse_conversation(talk({"role": "user", "content": parts}, ANSWER)).messages[0]["content"] == "abcd"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"talk": [USER]}, r"missing field `conversations`; .*found the fields talk$"),
        ({"text": "a"}, r"missing field `conversations`.*`minimind pretrain` takes it"),
        (said([]), r"conversations is an empty list; expected a list of messages"),
        (said(None), r"conversations is null; expected a list of messages"),
        (said("hi"), r"conversations is a string; expected a list"),
        (said([USER, "hi"]), r"conversations\[1\] is a string; expected an object with role and content"),
        (said([{"content": "q"}]), r"conversations\[0\]: missing field `role`; expected one of system, user"),
        (said([{"speaker": "gpt", "value": "q"}]), r"\[0\]: missing field `role`; .*the fields speaker, value$"),
        (said([{"role": "bot", "content": "q"}]), r"conversations\[0\]: unknown role 'bot'; expected one of"),
        (said([USER, {**ANSWER, "role": "Assistant"}]), r"\[1\]: unknown role 'Assistant'; .*\(in lower case\)$"),
        (said([{"role": "x" * 999, "content": "q"}]), r"unknown role 'x{1,30}\.\.\.x{1,30}'; expected one of"),
        (said([{"role": ["user"], "content": "q"}]), r"conversations\[0\]: unknown role \['user'\]"),
        (said([{"role": "user"}, ANSWER]), r"conversations\[0\]: missing field `content`"),
        (said([{"role": "user", "content": None}, ANSWER]), r"conversations\[0\]\.content is null; expected a string"),
        (said([{"role": "user", "content": [["q"]]}, ANSWER]), r"\[0\]\.content\[0\] is a list; expected a string"),
        (said([USER, {"role": "assistant"}]), r"conversations\[1\]: missing field `content`"),
        (said([USER, {"role": "assistant", "content": " \n"}]), r"nothing to train on"),
        (said([{"role": "user", "content": 5}]), r"conversations\[0\]\.content is a number; expected a str"),
        (said([{"role": "user", "content": [{"type": "image_url"}]}]), r"content\[0\] has type 'image_url'"),
        (said([{"role": "user", "content": [{"text": 1}]}]), r"content\[0\] is a number; expected a string"),
        (said([USER, {**ANSWER, "reasoning_content": 1}]), r"\[1\]\.reasoning_content is a number"),
        (said([USER]), r"nothing to train on; expected at least one assistant message"),
        (said([USER, {"role": "assistant", "content": ""}]), r"nothing to train on"),
        (said([{"role": "system", "content": "", "tools": "[{"}]), r"\[0\]\.tools is not JSON: Expecting"),
        (said([{"role": "system", "content": "", "tools": "{}"}]), r"\[0\]\.tools is an object; expected a l"),
        (said([{"role": "system", "content": "", "tools": [1]}]), r"\.tools\[0\] is a number; expected an obj"),
        (said([{**USER, "tools": TOOLS}]), r"\[0\]: tools on a user message; move them to the system message"),
        (said([{**ANSWER, "tool_calls": "f(1)"}]), r"\[0\]\.tool_calls is not JSON"),
        (said([{**ANSWER, "tool_calls": [3]}]), r"\.tool_calls\[0\] is a number; expected an object"),
        (said([{**ANSWER, "tool_calls": [{"arguments": {}}]}]), r"tool_calls\[0\]: missing field `name`"),
        (said([{**ANSWER, "tool_calls": [{"name": "f", "arguments": []}]}]), r"tool_calls\[0\]\.arguments is an empty"),
        (said([{**ANSWER, "tool_calls": [{"name": "f", "arguments": "x"}]}]), r"\.arguments is not JSON"),
        (said([{**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}]), r"is not JSON: NaN is no JSON"),
        (said([{**ANSWER, "tool_calls": '[{"name": "f", "arguments": {"x": NaN}}]'}]), r"is not JSON: NaN is no JSON"),
        (said([{**ANSWER, "tool_calls": [{"name": "f", "arguments": {"x": NAN}}]}]), r"calls cannot be written as JSO"),
        (said([{**ANSWER, "tool_calls": [{"name": "\ud83d", "arguments": {}}]}]), r"surrogates not allowed"),
        (said([{"role": "system", "content": "", "tools": '[{"x": Infinity}]'}]), r"tools is not JSON: Infinity is"),
        (said([{"role": "system", "content": "", "tools": [{"x": NOW}]}]), r"tools cannot be written as JSON: .*date"),
        (said([{**USER, "tool_calls": [{"name": "f"}]}]), r"\[0\]: tool_calls on a user message"),
    ],
)  # fmt: skip
def test_bad_conversations(value, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_conversation(record(value))
    assert str(caught.value).startswith("data.jsonl:7: ")


@pytest.mark.parametrize("name", ["sft", "toolcall_sft", "lora_identity", "toolcall_tau_airline_long"])
def test_every_real_conversation_is_accepted(shared_dir, name):
    count = sum(1 for r in iter_records([shared_dir / "data" / f"{name}.jsonl"]) if parse_conversation(r))
    assert count > 50
