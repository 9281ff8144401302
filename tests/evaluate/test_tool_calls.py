"""Calls scored against those that are due; a small model that was taught to call a tool, also in `chat`."""

import io
import json
from decimal import Decimal
from pathlib import Path

import jax
import pytest
from rich.console import Console
from worlds import World, write_lines

from minimind_jax.config.generation import ChatConfig
from minimind_jax.config.sections import CheckpointConfig, ModelSettings, OptimizerConfig
from minimind_jax.config.tools import ToolCallsConfig
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.jsonl import READING, Record
from minimind_jax.data.template import render
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.data.tools import Call
from minimind_jax.errors import UserError
from minimind_jax.evaluate import tool_calls
from minimind_jax.evaluate.tool_calls import (
    ARGUMENTS,
    CALL,
    CARRIED_OUT,
    GIVEN,
    JSON,
    NO_CALL,
    TOOL,
    Answer,
    Question,
    evaluate_tool_calls,
    marks_of,
    questions_of,
)
from minimind_jax.inference.chat import chat
from minimind_jax.inference.load import load_engine
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.stages import start
from minimind_jax.tools.builtin import calculate_math
from minimind_jax.tools.schema import schema_of
from minimind_jax.tools.toolbox import Toolbox

TOOLS = [schema_of(calculate_math)]
SUMS = {"2 times 3": ("2*3", "6"), "7 plus 4": ("7+4", "11")}


def call(expression):
    return {"name": "calculate_math", "arguments": {"expression": expression}}


def asked(words, expression, result):
    return {
        "conversations": [
            {"role": "system", "content": "", "tools": TOOLS},
            {"role": "user", "content": f"what is {words}?"},
            {"role": "assistant", "content": "", "tool_calls": [call(expression)]},
            {"role": "tool", "content": json.dumps({"result": result})},
            {"role": "assistant", "content": f"It is {result}."},
        ]
    }


HELLO = {
    "conversations": [
        {"role": "system", "content": "", "tools": TOOLS},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello to you"},
    ]
}
RECORDS = [*(asked(words, *sum) for words, sum in SUMS.items()), HELLO]
AGENT = {
    "conversations": [
        {"role": "system", "content": "", "tools": json.dumps(TOOLS)},
        {"role": "user", "content": "what is 2 times 3?"},
        {"role": "assistant", "content": ""},
    ],
    "gt": ["6"],
}


def questions(value):
    return questions_of(Record("f:1", Path("f"), 1, value), READING)


# What is asked --------------------------------------------------------------------------------------------------------


def test_every_answer_of_a_conversation_is_asked_for_behind_the_records_own_messages():
    first, second = questions(asked("2 times 3", "2*3", "6"))
    assert [message["role"] for message in first.messages] == ["system", "user"]
    assert (first.calls, first.numbers) == ([Call(**call("2*3"))], ())
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "tool"]
    assert (second.calls, second.numbers) == ([], (Decimal(6),))
    assert not first.acts and first.tools == TOOLS


def test_the_numbers_due_are_those_that_the_tools_gave_last():
    record = asked("500 dollars in euros", "500*0.85", "420.504")
    record["conversations"][-1]["content"] = "500 dollars are 420.50 euros, at 0.85."
    assert questions(record)[1].numbers == (Decimal("420.50"),)
    record["conversations"] += [{"role": "user", "content": "thanks"}, {"role": "assistant", "content": "420.50 it is"}]
    assert questions(record)[2].numbers == ()


def test_records_with_a_truth_are_asked_once():
    [found] = questions(AGENT)
    assert found.acts and found.calls is None and found.numbers == (Decimal(6),)
    assert [message["role"] for message in found.messages] == ["system", "user"]
    [found] = questions({**AGENT, "gt": [json.dumps(call("1+1")), json.dumps(call("2+2"))]})
    assert not found.acts and [due.arguments["expression"] for due in found.calls] == ["1+1", "2+2"]
    assert questions({**AGENT, "gt": ["yes"]}) == []


def test_conversations_without_tools_are_no_questions():
    assert questions({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) == []


@pytest.mark.parametrize("truth", [[], {}, [["6"]], None, ['{"name": 1}']])
def test_a_truth_that_is_none_is_refused_with_its_line(truth):
    with pytest.raises(UserError, match="f:1: gt"):
        questions({**AGENT, "gt": truth})


# What is right --------------------------------------------------------------------------------------------------------


def marks(calls, found, tools=TOOLS):
    due = [Call(name, arguments) for name, arguments in calls]
    return marks_of(Question("f:1", [], tools, due), Answer("", [Call(*one) for one in found]))


F, G = ("f", {"x": 5, "words": "a b"}), ("g", {})


@pytest.mark.parametrize(
    ("due", "found", "right"),
    [
        ([F], [F], 4),
        ([F, G], [G, F], 4),
        ([F], [("f", {"x": 5.0, "words": " a  b"})], 4),
        ([F], [("f", {"x": 6, "words": "a b"})], 3),
        ([F], [("f", {"x": "5", "words": "a b"})], 3),
        ([("f", {"x": True})], [("f", {"x": 1})], 3),
        ([F], [("f", {"x": 5})], 3),
        ([F], [G], 2),
        ([F], [F, F], 2),
        ([F, F], [F], 2),
        ([F], [F, ("", {}, "is not JSON")], 1),
        ([F], [], 0),
    ],
)
def test_a_call_is_marked_step_by_step(due, found, right):
    assert list(marks(due, found).values()) == [True] * right + [False] * (4 - right)
    assert list(marks(due, found)) == [CALL, JSON, TOOL, ARGUMENTS]


def test_a_call_that_is_nested_deeply_is_marked():
    assert not marks([F], [("f", json.loads('{"x": ' + "[" * 600 + "]" * 600 + "}"))])[ARGUMENTS]


@pytest.mark.parametrize("odd", [None, [], {"properties": [1]}, {"properties": {"x": 1}}])
def test_an_argument_at_its_default_may_be_left_out(odd):
    schema = {"name": "f", "parameters": {"properties": {"x": {"default": "null"}, "y": {}}}}
    assert marks([("f", {"x": "null", "y": 1})], [("f", {"y": 1})], [schema])[ARGUMENTS]
    assert not marks([("f", {"x": "a"})], [("f", {})], [schema])[ARGUMENTS]
    assert not marks([("f", {"x": "null"})], [("f", {})], [{"name": "f", "parameters": odd}])[ARGUMENTS]


@pytest.mark.parametrize(
    ("text", "right"), [("It is 6.", True), ("It is 36.", False), ("six", False), ("6 <tool_call>", False)]
)
def test_numbers_are_compared_as_numbers(text, right):
    calls = [Call("", {}, "?")] if "<" in text else []
    given = marks_of(Question("f:1", [], TOOLS, [], (Decimal(6),)), Answer(text, calls))
    assert given == {NO_CALL: not calls, GIVEN: right}
    acted = marks_of(Question("f:1", [], TOOLS, None, (Decimal(6),), True), Answer(text, [Call("f", {})]))
    assert acted == {CALL: True, JSON: True, CARRIED_OUT: right}


# What is answered -----------------------------------------------------------------------------------------------------


def model(folder, records, texts=(), context=512):
    """A model of random weights whose tokenizer knows the records' words."""
    write_lines(folder / "chat.jsonl", records)
    texts = [render(record["conversations"], TOOLS) for record in RECORDS] + list(texts)
    tokenizer = train_bpe(texts * 4, folder / "tokenizer", 800)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=context,
    )  # fmt: skip
    return save_hf(folder / "hf", config, LanguageModel(config).init(jax.random.key(0)), tokenizer, "float32")


def test_a_model_that_knows_nothing_is_scored_and_every_answer_written(tmp_path, capsys):
    folder = model(
        tmp_path,
        [
            *RECORDS,
            {
                "conversations": [{"role": "user", "content": "long " * 400}, HELLO["conversations"][2]],
                "tools": TOOLS,
                "chat_template_kwargs": {"enable_thinking": True},
            },
        ],
    )
    output = tmp_path / "answers.jsonl"
    config = ToolCallsConfig(
        files=(str(tmp_path / "chat.jsonl"),), model=str(folder), max_new_tokens=4, batch_size=2, output=str(output)
    )
    tool_calls.run(config)
    printed, told = capsys.readouterr()
    assert "`chat_template_kwargs` is ignored" in printed + told
    assert "6 answers are asked for" in printed and "1 prompts leave no room for --max_new_tokens" in printed
    assert "a call where one is due" in printed and "0 of        2     0.0%" in printed
    assert "100.0%" in printed  # no call where none is due
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert len(lines) == 5 and lines[0]["calls_due"][0]["arguments"] == {"expression": "2*3"}
    assert lines[1]["right"] == {NO_CALL: True, GIVEN: False} and lines[1]["numbers_due"] == ["6"]
    with pytest.raises(UserError, match="is there already"):
        tool_calls.run(config)


def test_calls_are_carried_out_until_there_is_an_answer(monkeypatch):
    """The model's words are given here; the tools are real."""
    wrote = {
        "?": ["<tool_call>" + json.dumps(call("2*3")) + "</tool_call>", "It is 6."],
        "broken": ["<tool_call>[1]</tool_call>", "<tool_call>" + json.dumps({"name": "none"}) + "</tool_call>", "6"],
        "endless": ["<tool_call>" + json.dumps(call("9**9**9")) + "</tool_call>"] * 9,
        "at once": ["6"],
    }
    said, results = {name: iter(texts) for name, texts in wrote.items()}, {}

    def generate(generator, prompts, config, notes):
        for messages, _ in prompts:
            results[messages[0]["content"]] = [m["content"] for m in messages if m["role"] == "tool"]
        return [next(said[messages[0]["content"]]) for messages, _ in prompts]

    monkeypatch.setattr(tool_calls, "_generate", generate)
    asked = [Question("f:1", [{"role": "user", "content": name}], TOOLS, None, (Decimal(6),), True) for name in wrote]
    with Toolbox(["calculator"]) as tools:
        notes = tool_calls.Counter()
        answers = tool_calls._answers(
            None, asked, tools, ToolCallsConfig(files=("f",), model="m", tool_rounds=3), notes
        )
    answers = [answers[n] for n in range(len(asked))]
    right = [marks_of(question, answer)[CARRIED_OUT] for question, answer in zip(asked, answers, strict=True)]
    assert right == [True, True, False, True]
    assert [bool(answer.calls) for answer in answers] == [True, True, True, False]
    assert results["?"] == ['{"result": "6"}']
    assert "is a number" in results["broken"][0] and "there is no tool 'none'" in results["broken"][1]
    assert results["endless"] == ['{"error": "a number is too large"}'] * 3
    assert notes["calls were carried out"] == 1 + 2 + 4 and notes["of them failed"] == 2 + 4


# A model that was taught ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(compilation_cache, tmp_path_factory):
    """A model that has learned by heart when to call the calculator, and what to say then."""
    folder = tmp_path_factory.mktemp("taught")
    write_lines(folder / "chat.jsonl", RECORDS)
    write_lines(folder / "agent.jsonl", [AGENT])
    texts = [render(record["conversations"], TOOLS) for record in RECORDS]
    tokenizer = train_bpe(texts * 4, folder / "tokenizer", 800)
    shape = ModelSettings(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    config = World(folder).sft(
        folder / "run", model=shape, optimizer=OptimizerConfig(learning_rate=1e-2), checkpoint=CheckpointConfig(0),
        data={"seq_len": 256, "val_fraction": 0.0, "system_prompt_probability": 0.0},
        training={"steps": 120, "batch_tokens": 768, "eval_every": 0, "log_every": 40},
    )  # fmt: skip
    start(config)
    return folder


@pytest.mark.slow
def test_a_model_that_was_taught_calls_the_tool_and_tells_its_result(taught):
    names = {"model": str(taught / "run"), "max_new_tokens": 60}
    scores, _ = evaluate_tool_calls(ToolCallsConfig(files=(str(taught / "chat.jsonl"),), **names))
    assert {row: (sum(marks), len(marks)) for row, marks in scores.items()} == {
        **dict.fromkeys((CALL, JSON, TOOL, ARGUMENTS), (2, 2)), NO_CALL: (3, 3), GIVEN: (2, 2),
    }  # fmt: skip
    scores, notes = evaluate_tool_calls(ToolCallsConfig(files=(str(taught / "agent.jsonl"),), **names))
    assert scores == {CALL: [True], JSON: [True], CARRIED_OUT: [True]}
    assert notes["calls were carried out"] == 1 and notes["of them failed"] == 0


@pytest.mark.slow
def test_chat_carries_out_the_calls_of_a_model_and_goes_on(taught):
    config = ChatConfig(model="taught", max_new_tokens=60, temperature=0.0, show_speed=False)
    console = Console(file=io.StringIO(), width=200, markup=False, emoji=False, highlight=False)
    with Toolbox(["calculator"]) as tools:
        chat(load_engine(str(taught / "run")), config, console, ["hello", "/clear", "what is 2 times 3?"], tools)
    printed = console.file.getvalue()
    assert "Tools: calculate_math" in printed and "hello to you" in printed
    assert 'calculate_math -> {"result": "6"}\nIt is 6.' in printed
