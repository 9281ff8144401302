"""What of records in other tools' formats is refused, told or left out, and which tokens of them are trained."""

import json

import numpy as np
import pytest
from format_helpers import ANSWER, SYSTEM, TALK, TOOLS, USER, answers, conversation, pair, record

from minimind_jax.config.sections import DataConfig, ReadingConfig
from minimind_jax.data.jsonl import READING, told_lines
from minimind_jax.data.kinds import parse_conversation, parse_preference, parse_text
from minimind_jax.data.prompts import read_prompt
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, "pairs are needed"),
        ({"messages": TALK, "kto_tag": False}, "pairs are needed"),
        ({"messages": TALK, "note": "x"}, "data.jsonl:7: field 'note' .* is not understood.*data.ignore_fields"),
        ({"messages": [USER, {**ANSWER, "mood": "x"}]}, r"messages\[1\]: field 'mood' .*data.ignore_fields"),
        ({"messages": [USER, {**ANSWER, "train_detail": [{"begin": 0}]}]}, "field 'train_detail'"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\[1\].weight is 0.5; .* \(a weight: 1 or 0\)"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, r"train is 'no'; expected true or false"),
        ({"messages": [{**USER, "train": True}, ANSWER]}, r"train is true on a user message"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing to train on"),
        ({"messages": [USER, {**ANSWER, "reasoning": "r", "thinking": "t"}]}, "`reasoning` and `thinking` .* differ"),
        ({"messages": [USER, {**ANSWER, "reasoning": "r", "content": "<think>t</think>a"}]}, "<think> block .* differ"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]}, "image_url"),
        ({"messages": [USER, {**ANSWER, "images": ["a.png"]}]}, "field 'images'"),
        ({"messages": TALK, "images": ["a.png"]}, "field 'images'"),
        ({"messages": [USER, {**ANSWER, "refusal": "no"}]}, "field 'refusal'"),
        ({"messages": TALK, "conversations": [USER, USER, ANSWER]}, "`conversations` and `messages` .* differ"),
        ({"messages": TALK, "tools": "f(x)"}, "tools is not JSON"),
        ({"instruction": "q", "output": "a", "response": "b"}, "`output` and `response` mean the same and differ"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, r"history\[0\] is a string; expected \[question"),
        ({"messages": TALK, "prompt": "another"}, "field 'prompt'"),
        ({"instruction": "q", "output": ""}, "output is an empty string; expected text"),
        ({"prompt": "q", "completion": None}, "completion is null; expected text"),
        ({"instruction": "q", "output": "a", "history": 5}, "history is a number; expected a list of"),
        ({"messages": TALK, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs sets tools"),
        ({"messages": TALK, **answers("a", "b")}, "field 'chosen' .*`minimind dpo`"),
        ({"messages": TALK, "functions": [{"name": "g"}], "tools": TOOLS}, "`tools` and `functions` .* differ"),
        ({"messages": TALK, "tools": {"tools": TOOLS}}, r"tools\[0\]: missing field `name`"),
        ({"messages": TALK, "tools": [{"name": "f"}, {"name": "f", "parameters": {"a": {}}}]}, "is named 'f', too"),
        ({"messages": TALK, "tools": [{"name": " "}]}, r"tools\[0\]: missing field `name`"),
        ({"messages": TALK, "tools": [{"name": "f", "parameters": '{"a": {}'}]}, r"tools\[0\].parameters is not JSON"),
        ({"messages": TALK, "tools": [{"name": "f", "parameters": '{"a":' * 90 + "1" + "}" * 90}]}, "nested too deep"),
        ({"messages": TALK, "tools": [{"name": "f", "parameters": '{"a": "\\ud800"}'}]}, "tools cannot be written as"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": " "}]}]}, r"tool_calls\[0\]: missing field `name`"),
        ({"messages": [USER, {**ANSWER, "content": "<think>hm"}]}, "message 2: its <think> is never closed"),
        ({"messages": [USER, {**ANSWER, "reasoning": "r", "content": "b<think>r</think>"}]}, "<think> block .* differ"),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": "a", "weight": 0}]}]}, "field 'weight'"),
        ({"instruction": " ", "input": "\n", "output": "a"}, "the instruction is empty"),
        ({"body": "text"}, "missing field `conversations`; expected .*`messages`.*found the fields body"),
    ],
)  # fmt: skip
def test_refused_conversations(value, message):
    with pytest.raises(UserError, match=message):
        conversation(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, "pairs are needed"),
        ({"prompt": "q", "chosen": "\nHello.", "rejected": "Hello."}, "are the same"),
        ({"prompt": "q", "chosen": [{**ANSWER, "reasoning_content": ""}], "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": [{**USER, "content": "other"}, ANSWER], "rejected": "b"}, "begins with another"),
        ({"chosen": TALK, "rejected": [{**USER, "content": "other"}, ANSWER]}, "no question in common"),
        ({"chosen": "a", "rejected": "b"}, "no question in common"),
        ({"chosen": TALK}, "missing field `rejected`"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is null; expected text"),
        ({"prompt": "q", "chosen": "a", "rejected": [{**ANSWER, "content": "b", "weight": 0}]}, "no answer of its own"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "note": "x"}, "field 'note'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "margin is a string"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin is nan; expected a number"),
        ({"conversations": TALK, "chosen": ANSWER, "rejected": {**ANSWER, "content": "b"}}, "ends with an answer"),
        ({"prompt": "q", "chosen": "<think>a", "rejected": "b"}, "<think> is never closed"),
    ],
)  # fmt: skip
def test_refused_pairs(value, message):
    with pytest.raises(UserError, match=message):
        pair(value)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Name one.", "Name one.\nA tern.", " Name one. No."),
        ("\n\nHuman: Name one.\n\nAssistant:", " A tern.", " No."),
        ("Name one.", "\r\n\r\nHuman: Name one.\r\n\r\nAssistant: A tern.", "No."),
        ("\n\nHuman: Name one.\n\nAssistant:", "A tern.", "\n\nHuman: Name one.\n\nAssistant: No."),
    ],
)
def test_the_question_stands_once_in_texts(prompt, chosen, rejected):
    question = {"role": "user", "content": "Name one."}
    sides = {"chosen": "A tern.", "rejected": "No."}
    assert pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == {
        name: [question, {**ANSWER, "content": text}] for name, text in sides.items()
    }


@pytest.mark.parametrize(
    ("value", "messages", "variables"),
    [
        ({"prompt": json.dumps(TALK)}, [USER], {}),
        ({"prompt": "\n\nHuman: q\n\nAssistant:"}, [USER], {}),
        ({"prompt": "q", "chat_template_kwargs": {"enable_thinking": True}}, [USER], {"enable_thinking": True}),
        ({"prompt": "other", "messages": TALK}, [USER], {}),
        ({"prompt": [SYSTEM, USER], "messages": TALK}, [SYSTEM, USER], {}),
    ],
)
def test_prompts_are_read_as_they_are_trained(value, messages, variables):
    given = record(value)
    text, conversation, others = read_prompt(given, READING)
    assert (text, conversation.messages, conversation.variables, others) == (None, messages, variables, {})
    told = str(told_lines(given.told))
    assert ("`prompt` is ignored" in told) == (value["prompt"] == "other")
    assert ("`messages` is ignored" in told) == isinstance(value["prompt"], list)
    if "messages" not in value:
        assert read_prompt(given, READING, raw=True).text == value["prompt"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_parameters_that_are_json_in_a_string_are_read(wrapped):
    schema = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    given = {**schema, "parameters": json.dumps(schema["parameters"])}
    value = {"messages": TALK, "tools": [{"type": "function", "function": given} if wrapped else given] * 2}
    before = json.dumps(value)
    tools = parse_conversation(record(value)).tools
    assert tools == [{"type": "function", "function": schema} if wrapped else schema] * 2
    assert json.dumps(value) == before, "the record is as it was"


def test_the_end_of_a_turn_among_words_is_told(tmp_path, tokenizer, capsys):
    make_cache(tmp_path, tokenizer, "conversation", [{"messages": [USER, {**ANSWER, "content": "a<|im_end|>"}]}])
    assert "messages hold the token that ends a turn" in capsys.readouterr().err


def test_what_is_odd_is_told():
    given = record({"prompt": "Name one.", "chosen": "Name one. A tern.", "rejected": "No."})
    assert parse_preference(given).as_record()["chosen"][-1]["content"] == "Name one. A tern."
    assert "only `chosen` begins with the prompt" in told_lines(given.told)[0]
    given = record({"prompt": "Name one.", "chosen": "A  tern. ", "rejected": "A  tern."})
    parse_preference(given)
    assert "differ by white space at their ends only" in told_lines(given.told)[0]
    given = record({"messages": [{**USER, "weight": 1}, {**ANSWER, "content": ""}, *TALK]})
    assert len(parse_conversation(given).messages) == 4
    assert "`weight` 1 of user messages is ignored" in told_lines(given.told)[0]
    assert "empty answers of the assistant are not trained (once)" in told_lines(given.told)[0]


@pytest.mark.parametrize("arguments", ["", None, "null", {}, "missing"])
def test_calls_without_arguments(arguments):
    call = {"name": "f"} if arguments == "missing" else {"name": "f", "arguments": arguments}
    read = conversation({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert read["conversations"][1]["tool_calls"] == [{"name": "f", "arguments": {}}]


@pytest.mark.parametrize("name", ["text", "content", "body", "document", "raw_content"])
def test_texts_under_their_usual_names(name):
    assert parse_text(record({"id": 1, name: "t"})) == "t"
    assert parse_text(record({"id": 1, "text": None, name: "t"})) == "t"


def test_a_setting_names_the_text():
    reading = ReadingConfig(text_field="Beschreibung")
    assert parse_text(record({"text": "other", "Beschreibung": "t"}), reading=reading) == "t"
    with pytest.raises(UserError, match=r"missing field `Beschreibung`.*found the fields text"):
        parse_text(record({"text": "t"}), reading=reading)


def test_what_is_left_out_is_told_with_counts():
    reading = ReadingConfig(ignore_fields=("note", "mood"))
    read = record({"note": "x", "id": 3, "messages": [{**USER, "name": "Ann"}, {**ANSWER, "mood": "x"}]})
    assert parse_conversation(read, reading=reading).as_record() == {"conversations": TALK}
    parse_conversation(read, reading=reading)
    assert told_lines(read.told) == [
        "data.jsonl: `id` is ignored (2 times); `note` is ignored (2 times); "
        "of messages, `mood` is ignored (2 times); of messages, `name` is ignored (2 times)"
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(["the cat sat on a mat while dogs run"] * 5, tmp_path_factory.mktemp("tokenizer"), 320)


def trained_text(cache, tokenizer, document):
    """What is trained of a document, one piece after another."""
    ids = cache.ids(document, 0, 1 << 20)
    trained = cache.is_trained(document, 0, 1 << 20)
    return tokenizer.decode(ids[trained], skip_special_tokens=False)


def make_cache(folder, tokenizer, kind, rows, name="data.jsonl", **settings):
    file = folder / name
    text = json.dumps(rows, indent=2) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text, settings.get("encoding", "utf-8"))
    data = DataConfig(
        cache_dir=str(folder / "cache"), tokenizer_workers=1, system_prompt_probability=0.0, empty_think_removal=1.0,
        **settings,
    )  # fmt: skip
    return build_cache(kind, [file], tokenizer, data, seed=0)


END = "<|im_end|>\n"


def test_what_is_trained_of_each_format(tmp_path, tokenizer, capsys):
    rows = [
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "content": "b"}], "id": 1},
        {"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "content": "c"}]},
        {"prompt": "the cat ", "completion": "sat"},
        {"instruction": "q", "input": "", "output": "d", "history": [["q", "a"]]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "e"}], "system": "s"},
        {"messages": [USER, {**ANSWER, "reasoning": "r", "content": "<think>\nr\n</think>\n\nf"}]},
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]},
    ]
    cache = make_cache(tmp_path, tokenizer, "conversation", rows, name="data.json")
    end = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
    assert [trained_text(cache, tokenizer, d) for d in range(len(cache))] == [
        f"b{END}",
        f"c{END}",
        f"sat{end}",
        f"a{END}d{END}",
        f"e{END}",
        f"<think>\nr\n</think>\n\nf{END}",
        f'<tool_call>\n{{"name": "f", "arguments": {{}}}}\n</tool_call>{END}',
    ]
    ids = tokenizer.decode(cache.ids(2, 0, 99), skip_special_tokens=False)
    assert ids.endswith(f"the cat sat{end}") and "<|im_start|>user" not in ids
    told = capsys.readouterr().err
    assert "data.json: `id` is ignored (once)" in told and "joined without the chat template (" in told


def test_pairs_are_compared_as_they_are_rendered(tmp_path, tokenizer):
    rows = [{"prompt": "q", "chosen": [SYSTEM, USER, ANSWER], "rejected": [{**ANSWER, "content": "b", "name": None}]}]
    cache = make_cache(tmp_path, tokenizer, "preference", rows)
    _, prompt, middle = cache.turns(0)
    ids = cache.ids(0, 0, 1 << 20)
    np.testing.assert_array_equal(ids[:prompt], ids[middle : middle + prompt])
    assert tokenizer.decode(ids[:prompt], skip_special_tokens=False).count("q" + END) == 1
    assert trained_text(cache, tokenizer, 0) == f"a{END}b{END}"
    think = "<think>\n\n</think>\n\n"
    with pytest.raises(UserError, match=r"other\.jsonl:1: chosen and rejected are the same"):
        alike = [{"prompt": "q", "chosen": f"{think}a", "rejected": "a"}]
        make_cache(tmp_path, tokenizer, "preference", alike, name="other.jsonl")


def test_template_settings_that_the_template_does_not_have_are_refused(tmp_path, tokenizer):
    rows = [{"messages": TALK, "chat_template_kwargs": {"reasoning_effort": "high"}}]
    with pytest.raises(UserError, match=r"data\.jsonl:1: chat_template_kwargs: 'reasoning_effort' is no variable"):
        make_cache(tmp_path, tokenizer, "conversation", rows)
    kept = [{"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}}]
    cache = make_cache(tmp_path, tokenizer, "conversation", kept)
    assert trained_text(cache, tokenizer, 0).startswith("<think>\n\n</think>")  # as the prompt of such an answer


def test_how_records_are_read_is_part_of_a_cache(tmp_path, tokenizer):
    rows = [{"text": "the cat", "other": "dogs run"}]
    folders = {
        make_cache(tmp_path, tokenizer, "text", rows, **settings).folder
        for settings in ({}, {"text_field": "other"}, {"encoding": "latin-1"}, {"ignore_fields": ("other",)})
    }
    assert len(folders) == 4
