"""The chat template: MiniMind's bytes, and one text from Jinja, in pieces and from transformers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from talk import TOOLS, messages

from minimind_jax.data.messages import Conversation
from minimind_jax.data.template import (
    CHAT_TEMPLATE,
    EMPTY_THINK,
    SYSTEM_PROMPTS,
    Dice,
    prefix_segments,
    render,
    render_jinja,
    render_segments,
    renders_as_ours,
)
from minimind_jax.errors import UserError

ASSISTANT_HEADER = "<|im_start|>assistant\n"
SWITCH = st.sampled_from([None, True, False])


def jinja(messages, tools=None, **variables):
    return render_jinja(CHAT_TEMPLATE, messages, tools, **variables)


def given_only(**variables):
    return {name: value for name, value in variables.items() if value is not None}


def test_renders_what_minimind_renders(shared_dir):
    rows = [json.loads(line) for line in open(shared_dir / "fixtures" / "template.jsonl", encoding="utf-8")]
    assert len(rows) == 582
    for row in rows:
        thinking = given_only(open_thinking=row.get("open_thinking"))
        prompt = row["add_generation_prompt"]
        assert render(row["messages"], row["tools"], prompt, **thinking) == row["rendered"]
        assert jinja(row["messages"], row["tools"], add_generation_prompt=prompt, **thinking) == row["rendered"]


@given(messages(), TOOLS, st.booleans(), SWITCH, SWITCH)
@settings(max_examples=150, deadline=None)
def test_python_writes_what_jinja_writes(messages, tools, prompt, open_thinking, enable_thinking):
    switches = given_only(open_thinking=open_thinking, enable_thinking=enable_thinking)
    expected = jinja(messages, tools, add_generation_prompt=prompt, **switches)
    assert render(messages, tools, prompt, enable_thinking if open_thinking is None else open_thinking) == expected


@given(messages(), TOOLS)
@settings(max_examples=150, deadline=None)
def test_trained_spans_lie_between_message_boundaries(messages, tools):
    """Reference: the length of the rendering before and after each assistant message."""
    text = jinja(messages, tools)
    expected = np.zeros(len(text), bool)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(jinja(messages[:index], tools)) + len(ASSISTANT_HEADER)
            expected[start : len(jinja(messages[: index + 1], tools))] = True
    marks = [np.full(len(s.text), s.trained) for s in render_segments(messages, tools)]
    np.testing.assert_array_equal(np.concatenate(marks), expected)


def test_turns_end_after_the_assistant():
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    turns = ["".join(s.text for s in render_segments(talk) if s.turn == turn) for turn in range(4)]
    assert turns[0].startswith("<|im_start|>system\ns") and turns[0].endswith("</tool_call><|im_end|>\n")
    assert turns[1].startswith("<|im_start|>user\n<tool_response>\n1") and turns[1].endswith("d<|im_end|>\n")
    assert turns[2] == "<|im_start|>user\ne<|im_end|>\n"
    assert turns[3] == ""


def test_thinking_switches():
    talk = [{"role": "user", "content": "a"}]
    on, off = ASSISTANT_HEADER + "<think>\n", ASSISTANT_HEADER + EMPTY_THINK
    for write, name in ((render, "open_thinking"), (jinja, "open_thinking"), (jinja, "enable_thinking")):
        assert write(talk, add_generation_prompt=True, **{name: True}).endswith(on)
        assert write(talk, add_generation_prompt=True, **{name: False}).endswith(off)
        assert write(talk, add_generation_prompt=True).endswith(off)
    for open_thinking, end in ((True, on), (False, off)):  # llama.cpp sets enable_thinking whatever the client says
        text = jinja(talk, add_generation_prompt=True, open_thinking=open_thinking, enable_thinking=not open_thinking)
        assert text.endswith(end)


def test_all_empty_think_blocks_go_and_what_the_user_wrote_stays():
    talk = [
        {"role": "user", "content": EMPTY_THINK + "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "r"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
    text = "".join(s.text for s in render_segments(talk, keep_empty_think=False))
    assert text.count(EMPTY_THINK) == 1
    assert text == render(talk).replace(ASSISTANT_HEADER + EMPTY_THINK, ASSISTANT_HEADER)


def test_unknown_role_is_named():
    with pytest.raises(UserError, match=r"messages\[1\]: unknown role 'bot'; expected one of system, user, assistant"):
        render([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}])


class TestDice:
    talk = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    def draws(self, conversation, seed=7, epoch=0, count=4000, add=0.2, remove=0.8):
        return [Dice(seed, epoch, add, remove).roll(i)(conversation) for i in range(count)]

    def test_probabilities_and_prompts(self):
        results = self.draws(self.talk)
        added = [c.messages[0]["content"] for c, _ in results if c.messages[0]["role"] == "system"]
        assert abs(len(added) / 4000 - 0.2) < 0.03  # 4 standard deviations
        assert abs(np.mean([not keep for _, keep in results]) - 0.8) < 0.03
        assert set(added) == set(SYSTEM_PROMPTS) and len(SYSTEM_PROMPTS) == 10

    def test_a_pure_function_of_seed_record_and_epoch(self):
        first = self.draws(self.talk, count=50)
        assert first == self.draws(self.talk, count=50)
        assert first != self.draws(self.talk, count=50, epoch=1)
        assert first != self.draws(self.talk, count=50, seed=8)

    def test_extremes(self):
        assert all(c is self.talk and keep for c, keep in self.draws(self.talk, count=50, add=0, remove=0))
        assert all(len(c.messages) == 3 and not keep for c, keep in self.draws(self.talk, count=50, add=1, remove=1))

    @pytest.mark.parametrize("change", ["tools", "system"])
    def test_no_prompt_beside_tools_or_a_system_message(self, change):
        system = [{"role": "system", "content": "s"}] if change == "system" else []
        tools = [{"name": "f"}] if change == "tools" else None
        conversation = Conversation(system + self.talk.messages, tools)
        assert all(c is conversation for c, _ in self.draws(conversation, count=50, add=1))


class TestForeignTemplates:
    chatml = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    # Shows reasoning in the last message only, as Qwen3's does.
    forgetful = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    )

    def test_spans_from_prefixes(self):
        segments = prefix_segments(self.chatml, self.talk, None, {"eos_token": "$"})
        assert [(s.text, s.trained, s.turn) for s in segments] == [
            ("[user]a$[assistant]", False, 0),
            ("b$", True, 0),
            ("[user]c$[assistant]", False, 1),
            ("d$", True, 1),
            ("[user]e$", False, 2),
        ]

    def test_a_template_that_rewrites_history_is_refused(self):
        assert len(prefix_segments(self.forgetful, self.talk[:2], None, {})) == 2
        with pytest.raises(UserError, match=r"not prefix-consistent.*message 2 of 5.*Copy .*chat_template.jinja"):
            prefix_segments(self.forgetful, self.talk, None, {})

    @pytest.mark.parametrize(
        "source", ["{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ strftime_now(3) }}"]
    )
    def test_a_template_that_fails(self, source):
        with pytest.raises(UserError, match="cannot render these messages"):
            render_jinja(source, self.talk)

    def test_a_template_that_complains(self):
        with pytest.raises(UserError, match="cannot render these messages: no system, please"):
            prefix_segments("{{ raise_exception('no system, please') }}", self.talk, None, {})

    def test_only_equal_renderings_count_as_ours(self):
        assert renders_as_ours(CHAT_TEMPLATE)
        assert not renders_as_ours(CHAT_TEMPLATE.replace("# Tools", "# tools"))
        assert not renders_as_ours(self.chatml)
        assert not renders_as_ours("{% if %}")


def test_transformers_renders_the_same():
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="compares with transformers")

    @given(messages(), TOOLS, st.booleans(), SWITCH)
    @settings(max_examples=60, deadline=None)
    def check(messages, tools, prompt, thinking):
        (text,), _ = utils.render_jinja_template(
            [messages], tools, chat_template=CHAT_TEMPLATE, add_generation_prompt=prompt,
            **given_only(enable_thinking=thinking),
        )  # fmt: skip
        assert text == render(messages, tools, prompt, thinking)

    check()
