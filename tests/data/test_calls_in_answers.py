"""The calls in a model's answer: well written, broken, or not meant as such."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from talk import JSON

from minimind_jax.data.template import render
from minimind_jax.data.tools import Call, parse_calls

ONE = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("answer", "words", "calls"),
    [
        ("no call", "no call", []),
        (ONE, "", [("f", {"x": 1})]),
        (f"I look.\n{ONE}\n{ONE} Wait.", "I look.\n\n Wait.", [("f", {"x": 1})] * 2),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
        ('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', "", [("f", {"x": 1})]),
        ('<tool_call>{"function": {"name": "f", "arguments": {}}, "id": "1"}</tool_call>', "", [("f", {})]),
        ('<tool_call>[{"name": "f"}, {"name": "g", "arguments": null}]</tool_call>', "", [("f", {}), ("g", {})]),
        ('a<tool_call>{"name": "f"}', "a", [("f", {})]),
        ('<tool_call>{"name": "f"}<tool_call>{"name": "g"}', "", [("f", {}), ("g", {})]),
        ('<tool_call>{"name": "</tool_call>\\""}</tool_call>.', ".", [('</tool_call>"', {})]),
    ],
)
def test_calls_that_can_be_carried_out(answer, words, calls):
    assert parse_calls(answer) == (words, [Call(*call) for call in calls])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is not JSON"),
        ('{"name": "f", "arguments": {"x": ', "is not JSON"),
        ("[1]", "is a number; expected|is a number"),
        ("[]", "is an empty list"),
        ('"f"', "is a string"),
        ('{"arguments": {}}', "missing field `name`"),
        ('{"name": ["f"]}', "missing field `name`"),
        ('{"name": "f", "arguments": [1]}', "arguments is a list"),
        ('{"name": "f", "arguments": "x"}', "arguments is not JSON"),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN is no JSON value"),
        ('{"name": "f", "arguments": {"x": 1e999}}', "too large"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "cannot be written as JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 900 + "]" * 900 + "}}", "nested too deeply"),
        ('{"name": "f", "arguments": "{\\"x\\": ' + "[" * 900 + "]" * 900 + '}"}', "nested too deeply"),
        ("9" * 5000, "is not JSON"),
    ],
)
def test_broken_calls_say_what_is_wrong(text, error):
    _, [call] = parse_calls(f"<tool_call>\n{text}\n</tool_call>")
    assert call.name == "" and pytest.raises(AssertionError, match=error).matches(AssertionError(call.error))
    assert len(call.error) < 250 and "data.ignore_fields" not in call.error


@given(st.lists(st.tuples(st.text("ab_.1中", min_size=1), JSON), min_size=1, max_size=3))
def test_what_the_template_writes_is_read_back(calls):
    given = [{"name": name, "arguments": json.loads(json.dumps(arguments))} for name, arguments in calls]
    text = render([{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": given}])
    words, found = parse_calls(text.partition("</think>\n\n")[2].removesuffix("<|im_end|>\n"))
    assert words == "" and found == [Call(call["name"], call["arguments"]) for call in given]


TAGS = st.sampled_from(["<tool_call>", "</tool_call>", "{", "}", '"name":', '"f"', '"arguments":', ",", "[", "]", "1"])


@given(st.lists(st.one_of(TAGS, st.text(max_size=5)), max_size=25).map("".join))
def test_any_answer_is_read(answer):
    words, calls = parse_calls(answer)
    assert "<tool_call>" not in words
    assert all(call.name == "f" or call.error for call in calls)
