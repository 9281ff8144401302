"""The records, rewards and intervals of scripts/rl_arithmetic.py."""

import json
import re

import pytest

from minimind_jax.data.tools import parse_calls
from minimind_jax.tools.calculator import calculate
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import rl_arithmetic

        yield rl_arithmetic


def agent_file(folder):
    """Prompts as MiniMind's agent data has them, the answer left empty."""
    texts = [f"what is ({n}-53)*7?. Plus, 请计算{n + 3000}/22，还有{n % 9 + 2}**3的结果是什么" for n in range(100, 350)]
    system = {"role": "system", "content": "", "tools": json.dumps([{"function": {"name": "calculate_math"}}])}
    turns = [[system, {"role": "user", "content": text}, {"role": "assistant", "content": ""}] for text in texts]
    records = [{"conversations": turn, "gt": ["1", "2", "3"] if n % 2 else ["1"]} for n, turn in enumerate(turns)]
    (folder / "agent.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return folder / "agent.jsonl"


def test_questions_in_words_share_no_numbers_and_are_what_they_say(script, tmp_path):
    for name in ("one", "two"):
        script.write_words(tmp_path / name, demonstrations=300, prompts=100)
    files = {name: script.read(tmp_path / "one" / f"{name}.jsonl") for name in ("sft", "train", "held_out")}
    for name, records in files.items():
        assert records == script.read(tmp_path / "two" / f"{name}.jsonl")
    numbers = {
        name: [tuple(sorted(re.findall(r"\d+", record["conversations"][0]["content"]))) for record in records]
        for name, records in files.items()
    }
    assert [len(found) for found in numbers.values()] == [300, 100, 200]
    held_out = set(numbers["held_out"])
    assert len(held_out) == 200 and not held_out & {*numbers["sft"], *numbers["train"]}
    right = 0
    for record in files["sft"]:
        question, call, result, answer = record["conversations"]
        expression = json.loads(call["tool_calls"])[0]["arguments"]["expression"]
        assert sorted(re.findall(r"\d+", expression)) == sorted(re.findall(r"\d+", question["content"]))
        assert json.loads(result["content"])["result"] == answer["content"] == calculate(expression)
        right += "Subtract" not in question["content"] or question["content"].startswith(
            f"Subtract {expression.partition('-')[2]} from"
        )
    assert 230 < right < 300  # a tenth of them begin with Subtract, and three quarters of those are careless


def test_no_sum_of_a_held_out_prompt_is_shown_or_learned(script, tmp_path):
    script.write_agent(agent_file(tmp_path), tmp_path, short=40, demonstrations=60)
    sums = {
        name: [script._sums(script._question(record)) for record in script.read(tmp_path / f"{name}.jsonl")]
        for name in ("held_out", "train")
    }
    held_out = set.union(*sums["held_out"])
    assert not held_out & set.union(*sums["train"], set())
    shown = script.read(tmp_path / "short.jsonl") + script.read(tmp_path / "sft.jsonl")
    for record in shown:
        question = next(m["content"] for m in record["conversations"] if m["role"] == "user")
        calls = json.loads(next(m for m in record["conversations"] if "tool_calls" in m)["tool_calls"])
        results = [json.loads(m["content"])["result"] for m in record["conversations"] if m["role"] == "tool"]
        assert results == [calculate(call["arguments"]["expression"]) for call in calls]
        assert not held_out & script._sums(question)
        for dividend, divisor in re.findall(r"(\d+)/(\d+)", question):
            assert int(dividend) % int(divisor) == 0


def test_a_call_is_right_by_what_it_comes_to(script):
    def said(*calls):
        return "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)

    def call(expression):
        return {"name": "calculate_math", "arguments": {"expression": expression}}

    assert script.is_right(said(call("3+4*2")), ["11"]) and script.is_right(said(call("4*2+3")), ["11"])
    assert script.is_right(said(call("3+4"), call("6")), ["7", "6"])
    assert not script.is_right(said(call("3+4"), call("6")), ["7"])
    for text in ("11", said(call("3+4")), said(call("10**")), said(call(7)), said({"name": "x"}), "<tool_call>", ""):
        assert not script.is_right(text, ["11"])
    assert parse_calls(said(call("1")))[1]


def test_the_interval_is_newcombes(script):
    # 48 and 56 of 80: its confint_proportions_2indep(56, 80, 48, 80, method="newcomb")
    assert script.gain(48, 56, 80) == [10.0, -4.7, 24.1]
