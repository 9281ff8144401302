"""Records as other tools write them: each as the record of ours that means the same."""

import json

import pytest
from format_helpers import ANSWER, CALL, CONTEXT, SYSTEM, TALK, TOOLS, USER, answers, conversation, pair

from minimind_jax.data.formats import detect
from minimind_jax.data.jsonl import READING


def thought(text, **more):
    return {"role": "assistant", "content": "a", **more}, {**ANSWER, "reasoning_content": text}


CONVERSATIONS = {
    "OpenAI": (
        {"messages": [{**SYSTEM, "role": "developer"}, USER, ANSWER], "parallel_tool_calls": False},
        {"conversations": [SYSTEM, USER, ANSWER]},
    ),
    "OpenAI, weights": (
        {"messages": [{**USER, "name": "Ann"}, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
        {"conversations": [USER, CONTEXT, USER, ANSWER]},
    ),
    "OpenAI, tools": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
                ANSWER,
            ],
            "tools": TOOLS,
        },
        {
            "conversations": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "2"},
                ANSWER,
            ],
            "tools": TOOLS,
        },
    ),
    "OpenAI, functions": (
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
                {"role": "function", "name": "f", "content": "2"},
                ANSWER,
            ],
            "functions": [{"name": "f", "parameters": {}}],
        },
        {
            "conversations": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
                {"role": "tool", "content": "2"},
                ANSWER,
            ],
            "tools": TOOLS,
        },
    ),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "image_url": None}]}, ANSWER]},
        {"conversations": TALK},
    ),
    "TRL, template settings": (
        {"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}},
        {"conversations": TALK, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "TRL, texts": ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
    "TRL, messages": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "tools": TOOLS},
        {"conversations": [USER, CONTEXT, USER, ANSWER], "tools": TOOLS},
    ),
    "The Cauldron": (
        {"texts": [{"user": "q", "assistant": "a", "source": "tqa"}, {"user": "q", "assistant": "a"}]},
        {"conversations": [USER, ANSWER, USER, ANSWER]},
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        {"conversations": [SYSTEM, USER, ANSWER]},
    ),
    "ShareGPT, tools": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "chatgpt", "value": "a"},
            ],
            "system": "",
            "tools": json.dumps(TOOLS),
        },
        {
            "conversations": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
                {"role": "tool", "content": "2"},
                ANSWER,
            ],
            "tools": TOOLS,
        },
    ),
    "a system message wins": ({"messages": [SYSTEM, *TALK], "system": "t"}, {"conversations": [SYSTEM, *TALK]}),
    "tools on the system message": (
        {"messages": [SYSTEM, *TALK], "tools": TOOLS},
        {"conversations": [{**SYSTEM, "tools": TOOLS}, *TALK]},
    ),
    "Alpaca": (
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": TALK},
    ),
    "Alpaca, all columns": (
        {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
        {"conversations": [SYSTEM, USER, ANSWER, {**USER, "content": "q\ni"}, ANSWER]},
    ),
    "Stanford's Alpaca": (
        {"instruction": "q", "input": "", "output": "a", "text": "Below is ... q ... a"},
        {"conversations": TALK},
    ),
    "Dolly": (
        {"instruction": "q", "context": "c", "response": "a", "category": "open_qa"},
        {"conversations": [{**USER, "content": "q\nc"}, ANSWER]},
    ),
    "a prompt that is JSON": (
        {"prompt": '[{"x": 1}]', "completion": "[1]"},
        {"prompt": '[{"x": 1}]', "completion": "[1]"},
    ),
    "question and answer": ({"question": "q", "answer": "a"}, {"conversations": TALK}),
    "prompt and response": ({"prompt": "q", "response": "a"}, {"conversations": TALK}),
    "Orca": ({"system_prompt": "s", "question": "q", "response": "a"}, {"conversations": [SYSTEM, *TALK]}),
    "UltraChat": ({"prompt": "q", "prompt_id": "7", "messages": TALK}, {"conversations": TALK}),
    "axolotl": (
        {"conversations": [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "training": True}]},
        {"conversations": [USER, CONTEXT, USER, ANSWER]},
    ),
    "ms-swift": (
        {"messages": [USER, {**ANSWER, "loss": False}, USER, ANSWER]},
        {"conversations": [USER, CONTEXT, USER, ANSWER]},
    ),
    "Mistral": (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "prefix": True}]},
        {"conversations": [USER, CONTEXT, USER, ANSWER]},
    ),
    **{
        f"reasoning, {name}": ({"messages": [USER, given]}, {"conversations": [USER, wanted]})
        for name, (given, wanted) in {
            "DeepSeek": thought("r", reasoning_content="r"),
            "OpenRouter": thought("r", reasoning="r"),
            "ollama": thought("r", thinking="r"),
            "twice": thought("r", thinking="r", reasoning_content="r"),
            "empty": ({**ANSWER, "reasoning_content": ""}, ANSWER),
            "white space": ({**ANSWER, "reasoning_content": " \n"}, ANSWER),
            "also inline, not opened": thought("r", reasoning="r", content="r\n</think>\n\na"),
            "also inline": thought("r", reasoning="r", content="<think>\nr\n</think>\n\na"),
            "parts": thought("r", content=[{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]),
        }.items()
    },
    "input and output": ({"instruction": "", "input": "q", "output": "a"}, {"conversations": TALK}),
    "inline <think>": (
        {"messages": [USER, {**ANSWER, "content": "<think>r</think>a"}]},
        {"conversations": [USER, {**ANSWER, "content": "<think>r</think>a"}]},
    ),
    "what Arrow adds": (
        {
            "messages": [
                {**USER, "name": None, "tool_calls": None},
                {
                    "role": "assistant",
                    "content": "a",
                    "name": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "y": None}, "strict": None}}],
                },
            ],
            "conversations": None,
            "tools": "",
        },
        {
            "conversations": [
                USER,
                {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            ]
        },
    ),
    "one tool, as an object or in JSON": (
        {"messages": TALK, "tools": TOOLS[0], "functions": [json.dumps(TOOLS[0])]},
        {"conversations": TALK, "tools": TOOLS},
    ),
    "nothing, in a cell": (
        {"messages": [USER, {**ANSWER, "tool_calls": "null"}], "tools": "null", "chat_template_kwargs": {"x": None}},
        {"conversations": TALK},
    ),
    "empty answers": (
        {"messages": [USER, {**ANSWER, "content": ""}, *TALK]},
        {"conversations": [USER, {**CONTEXT, "content": ""}, *TALK]},
    ),
    "an empty system message": (
        {"messages": [{**SYSTEM, "content": ""}, *TALK], "system": "s"},
        {"conversations": [SYSTEM, *TALK]},
    ),
    "thinking, its beginning lost": (
        {"messages": [USER, {**ANSWER, "reasoning": "r", "content": "</think>a"}]},
        {"conversations": [USER, {**ANSWER, "reasoning_content": "r"}]},
    ),
    "the prompt again": ({"prompt": [USER], "completion": TALK}, {"conversations": TALK}),
    "the prompt again, with a system message": (
        {"prompt": [SYSTEM, USER], "completion": [{**USER, "content": "q\n"}, ANSWER]},
        {"conversations": [SYSTEM, USER, ANSWER]},
    ),
    "an empty answer in the history": (
        {"instruction": "q", "output": "a", "history": [["q", ""]]},
        {"conversations": [USER, {**CONTEXT, "content": ""}, *TALK]},
    ),
    "prompt of messages, response": ({"prompt": [USER], "response": "a"}, {"conversations": TALK}),
    "JSON in a cell": ({"messages": json.dumps(TALK), "tools": "[]", "system": ""}, {"conversations": TALK}),
    "ignorable": ({"id": 1, "source": "x", "score": 0.5, "messages": TALK, "model": "m"}, {"conversations": TALK}),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name):
    given, wanted = CONVERSATIONS[name]
    assert conversation(given) == wanted
    assert conversation(wanted) == wanted, "our own form is read as itself"
    assert detect(given, READING) == "conversation"


PAIRS = {
    "TRL, messages": (answers("a", "b", USER), answers("a", "b", USER)),
    "TRL, prompt": ({"prompt": [USER], **answers("a", "b")}, answers("a", "b", USER)),
    "TRL, texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, answers("a", "b", USER)),
    "UltraFeedback": (
        {
            "prompt": "q",
            "prompt_id": "7",
            "messages": TALK,
            **answers("a", "b", USER),
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
        {**answers("a", "b", USER), "margin": 4.5},
    ),
    "UltraFeedback with a system message": (
        {"prompt": "q", **answers("a", "b", SYSTEM, USER)},
        answers("a", "b", SYSTEM, USER),
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"},
        answers("a", "b", {**USER, "content": "q\ni"}),
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
            "system": "s",
        },
        answers("a", "b", SYSTEM, USER),
    ),
    "OpenAI": (
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [{**ANSWER, "content": "b"}],
        },
        answers("a", "b", USER),
    ),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nAssistant: x\n\nHuman: q\n\nAssistant: b",
        },
        answers("a", "b", USER, {**ANSWER, "content": "x"}, USER),
    ),
    "Orca": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        answers("a", "b", SYSTEM, USER),
    ),
    "the system message stands inside": (
        {"prompt": "q", **answers("a", "b", SYSTEM, USER)},
        answers("a", "b", SYSTEM, USER),
    ),
    "only one side repeats the question": (
        {"prompt": "q", "chosen": [SYSTEM, USER, ANSWER], "rejected": "b"},
        answers("a", "b", SYSTEM, USER),
    ),
    "keys of one side only": (
        {
            "chosen": [{**USER, "tool_calls": None}, ANSWER],
            "rejected": [{**USER, "name": "Ann"}, {**ANSWER, "content": "b", "reasoning_content": "", "name": None}],
        },
        answers("a", "b", USER),
    ),
    "white space in the question": (
        {"prompt": "q\n", **answers("a", "b", USER)},
        answers("a", "b", USER),
    ),
    "white space on one side": (
        {"chosen": TALK, "rejected": [{**USER, "content": "q "}, {**ANSWER, "content": "b"}]},
        answers("a", "b", USER),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    given, wanted = PAIRS[name]
    assert pair(given) == wanted
    assert pair(wanted) == wanted, "our own form is read as itself"
    assert detect(given, READING) == "preference"
