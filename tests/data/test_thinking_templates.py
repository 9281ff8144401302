"""Templates that write earlier answers differently once more follow: Qwen3's, and others of models that think."""

import itertools
import json

import pytest
from hypothesis import given, settings
from talk import messages
from templates import CHATML, QWEN3_WHOLE, QWQ, R1, with_template

from minimind_jax.data.documents import encode_conversation, encode_preference, encode_prompt
from minimind_jax.data.kinds import Wanted
from minimind_jax.data.messages import Conversation
from minimind_jax.data.preferences import Preference
from minimind_jax.data.template import prefix_segments, render_jinja
from minimind_jax.data.template_spans import foreign_segments, marked_segments
from minimind_jax.data.tokenise import Encoder
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import TemplateFault, UserError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many birds?"}
FIVE = {"role": "assistant", "content": "Five."}
SIX = {"role": "assistant", "content": "Six.", "reasoning_content": "I count."}
SEVEN = {"role": "assistant", "content": "<think>\nHm, <b>.\n</think>\n\nSeven."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {"what": "birds"}}}],
}
TOOL = {"role": "tool", "content": "5"}
TOOLS = [{"type": "function", "function": {"name": "count", "description": "counts"}}]
CALLED = '<tool_call>\n{"name": "count", "arguments": {"what": "birds"}}\n</tool_call><|im_end|>\n'
EMPTY = "<think>\n\n</think>\n\n"
QWEN3_THINKING = QWEN3_WHOLE.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "{{- '<think>\\n' }}",
)
PHI3 = CHATML.replace("assistant\n{% endif", "assistant\n{% else %}{{ eos_token }}{% endif")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    small = train_bpe(["birds sing and cats sit on mats"] * 3, folder / "small", 310)
    return with_template(small.folder, folder / "qwen", QWEN3_WHOLE, eos_token="<|im_end|>")


@pytest.mark.parametrize(
    ("template", "talk", "trained"),
    [
        (QWEN3_WHOLE, [USER, FIVE], [EMPTY + "Five.<|im_end|>\n"]),
        (QWEN3_WHOLE, [SYSTEM, USER, FIVE, USER, FIVE], ["Five.<|im_end|>\n", EMPTY + "Five.<|im_end|>\n"]),
        (QWEN3_WHOLE, [USER, SIX, USER, SIX], ["Six.<|im_end|>\n", "<think>\nI count.\n</think>\n\nSix.<|im_end|>\n"]),
        (QWEN3_WHOLE, [USER, SEVEN, USER, FIVE], ["Seven.<|im_end|>\n", EMPTY + "Five.<|im_end|>\n"]),
        (QWEN3_WHOLE, [USER, CALL, TOOL, FIVE], [CALLED, EMPTY + "Five.<|im_end|>\n"]),
        (
            QWEN3_WHOLE,
            [USER, {**CALL, "reasoning_content": "I ask."}, TOOL, TOOL, CALL, TOOL, SIX, USER, FIVE],
            [CALLED, CALLED, "Six.<|im_end|>\n", EMPTY + "Five.<|im_end|>\n"],
        ),
        (
            QWEN3_WHOLE,
            [USER, {**CALL, "reasoning_content": "I ask."}, TOOL, SIX],
            ["<think>\nI ask.\n</think>\n\n" + CALLED, "<think>\nI count.\n</think>\n\nSix.<|im_end|>\n"],
        ),
        (QWEN3_WHOLE, [USER, {**FIVE, "train": False}, USER, FIVE], [EMPTY + "Five.<|im_end|>\n"]),
        (QWEN3_WHOLE, [USER, FIVE, FIVE, USER, FIVE, USER], ["Five.<|im_end|>\n"] * 3),
        (QWEN3_WHOLE, [USER, {**FIVE, "content": "<think>x</think>"}, USER, FIVE],
         ["<|im_end|>\n", EMPTY + "Five.<|im_end|>\n"]),
        (QWEN3_THINKING, [USER, SIX, USER, SIX], ["Six.<|im_end|>\n", "I count.\n</think>\n\nSix.<|im_end|>\n"]),
        (QWQ, [USER, SEVEN, USER, SEVEN], ["Seven.<|im_end|>\n", "Hm, <b>.\n</think>\n\nSeven.<|im_end|>\n"]),
        (QWQ, [USER, FIVE, USER, FIVE], ["Five.<|im_end|>\n"] * 2),
        (R1, [USER, FIVE, USER, FIVE], ["Five.</s>"] * 2),
        (PHI3, [USER, FIVE, USER, FIVE], ["Five.<|im_end|>\n", "Five.<|im_end|>\n</s>"]),
    ],
)  # fmt: skip
def test_every_answer_is_trained_with_its_end_and_nothing_else(template, talk, trained):
    segments = foreign_segments(template, talk, None, TOKENS)
    assert [segment.text for segment in segments if segment.trained] == trained
    shown = [{name: value for name, value in message.items() if name != "train"} for message in talk]
    assert "".join(segment.text for segment in segments) == render_jinja(template, shown, None, **TOKENS)
    asked = sum(a["role"] == "assistant" != b["role"] for a, b in itertools.pairwise(talk))
    assert segments[-1].turn == asked


@given(messages(lists=False))
@settings(max_examples=40, deadline=None)
def test_both_ways_agree_and_hold_the_whole(talk):
    for template in (QWEN3_WHOLE, CHATML):
        try:
            whole = render_jinja(template, talk, None, **TOKENS)
            marked = marked_segments(template, talk, None, TOKENS)
        except UserError:
            continue
        assert marked is None or "".join(segment.text for segment in marked) == whole
        try:
            assert marked in (None, prefix_segments(template, talk, None, TOKENS))
        except UserError:
            continue


def test_what_tells_no_answers_apart_is_refused_as_before():
    counting = CHATML.replace("{{ message.content }}", "{{ messages | length }}{{ message.content | length }}")
    with pytest.raises(TemplateFault, match=r"not prefix-consistent.*Copy"):
        foreign_segments(counting, [USER, FIVE, USER, FIVE], None, {})


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_ids_are_those_of_transformers(tools, qwen):
    transformers = pytest.importorskip("transformers", reason="the reference")
    theirs = transformers.AutoTokenizer.from_pretrained(qwen.folder)
    talk = [SYSTEM, USER, {**CALL, "reasoning_content": "I ask."}, TOOL, TOOL, SIX, USER, FIVE, USER, SEVEN]
    document = encode_conversation(qwen, Conversation(talk, tools))
    assert document.ids.tolist() == theirs.apply_chat_template(talk, tools=tools, tokenize=True)["input_ids"]
    assert qwen.decode(document.ids[document.trained], skip_special_tokens=False) == (
        CALLED + "Six.<|im_end|>\nFive.<|im_end|>\n<think>\nHm, <b>.\n</think>\n\nSeven.<|im_end|>\n"
    )
    assert qwen.decode(document.ids[document.turn_starts[-1] :], False).startswith("<|im_start|>user\nHow many")
    for thinking in (True, False):
        prompt = theirs.apply_chat_template(
            talk[:-1], tools=tools, add_generation_prompt=True, enable_thinking=thinking, tokenize=True
        )
        assert encode_prompt(qwen, talk[:-1], tools, thinking) == prompt["input_ids"]


def test_thinking_dropped_by_design_is_counted_and_elsewhere_an_error(qwen, tmp_path):
    talks = [[USER, SIX, USER, SIX], [USER, SEVEN, USER, SIX, USER, FIVE], [USER, SIX], [USER, FIVE, USER, SEVEN]]
    file = tmp_path / "a.jsonl"
    lines = [(n, file, n + 1, json.dumps({"messages": talk}).encode()) for n, talk in enumerate(talks)]
    chunk = Encoder("conversation", str(qwen.folder), None, skip=False, wanted=Wanted()).encode(lines)
    ((told, count),) = chunk.told.items()
    assert count == 2 and "leaves out the thinking of earlier answers" in told[1]
    silent = with_template(qwen.folder, tmp_path / "silent", QWEN3_WHOLE.replace("thought.strip('\\n')", "''"))
    for talk in ([USER, SIX, USER, FIVE], [USER, FIVE, USER, SIX]):
        with pytest.raises(TemplateFault, match="leaves out the reasoning_content of assistant message"):
            silent.segments(talk)


def test_pairs_share_all_that_stands_before_the_answers(qwen):
    base = [SYSTEM, USER, SIX, USER]
    sides = [Conversation([*base, answer]) for answer in (SEVEN, FIVE)]
    document = encode_preference(qwen, Preference(*sides))
    answers = qwen.decode(document.ids[document.trained], skip_special_tokens=False)
    assert answers == "<think>\nHm, <b>.\n</think>\n\nSeven.<|im_end|>\n" + EMPTY + "Five.<|im_end|>\n"
    prompt = qwen.decode(document.ids[: document.turn_starts[1]], skip_special_tokens=False)
    assert prompt.endswith("Six.<|im_end|>\n<|im_start|>user\nHow many birds?<|im_end|>\n<|im_start|>assistant\n")
