"""Documents: golden ids and labels, and tokens that are the same in training and in use."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from talk import PLAIN, TEXT, TOOLS, messages

from minimind_jax.data.documents import encode_conversation, encode_prompt, encode_text
from minimind_jax.data.jsonl import Record
from minimind_jax.data.kinds import parse_conversation
from minimind_jax.data.messages import Conversation
from minimind_jax.data.template import Dice, render, render_segments
from minimind_jax.data.template_check import check_spoken
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError

CORPUS = ["a\n\n\nb\n\n", "\n  indented\n\n", "<p>\n\n\n</p>", "hello there 你好"] * 8


def is_whole(messages):
    """Whether the template keeps all words; other messages are refused (`test_foreign_templates`)."""
    try:
        check_spoken(messages)
    except UserError:
        return False
    return True


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train_bpe(CORPUS, tmp_path_factory.mktemp("tokenizer") / "small", 330)


def test_minimind_s_ids_and_labels(shared_dir):
    tokenizer = Tokenizer.load(shared_dir / "data" / "minimind-tokenizer")
    rows = [json.loads(line) for line in open(shared_dir / "fixtures" / "sft_labels.jsonl", encoding="utf-8")]
    assert len(rows) == 200
    for index, row in enumerate(rows):
        record = Record(
            f"sft_labels.jsonl:{index}", Path("sft_labels.jsonl"), index, {"conversations": row["conversations"]}
        )
        removal = float(row["empty_think_removed"])
        document = encode_conversation(tokenizer, parse_conversation(record), Dice(0, 0, 0.0, removal).roll(index))
        assert document.ids[:512].tolist() == row["input_ids"]
        assert np.where(document.trained, document.ids, -100)[:512].tolist() == row["labels"]


def test_text(small):
    document = encode_text(small, "hello there")
    assert document.ids.dtype == np.int32 and document.trained.dtype == bool
    assert document.ids.tolist() == [1, *small.encode("hello there"), 2]
    assert document.trained.tolist() == [False] + [True] * (len(document.ids) - 1)
    assert document.turn_starts == [0]


def test_begin_and_end_tokens_stand_once(small):
    """Also where a text or a completion spells them."""
    begin, end = (small.decode([i], skip_special_tokens=False) for i in (small.bos_id, small.eos_id))
    plain = encode_text(small, "hello")
    for text in (f"{begin}hello", f"hello{end}", f"{begin}hello{end}"):
        document = encode_text(small, text)
        assert document.ids.tolist() == plain.ids.tolist() and (document.trained == plain.trained).all()
    for prompt, completion in (("hello", " there"), (f"{begin}hello", f" there{end}")):
        value = {"prompt": prompt, "completion": completion}
        document = encode_conversation(small, parse_conversation(Record("a:1", Path("a"), 1, value)))
        assert document.ids.tolist() == [1, *small.encode("hello"), *small.encode(" there"), 2]
        assert small.decode(document.ids[document.trained], skip_special_tokens=False) == f" there{end}"


@given(messages().filter(is_whole), TOOLS)
@settings(max_examples=150, deadline=None)
def test_ids_spell_the_rendering_and_labels_the_answers(small, messages, tools):
    document = encode_conversation(small, Conversation(messages, tools))
    segments = render_segments(messages, tools)
    decode = lambda ids: small.decode(ids, skip_special_tokens=False)  # noqa: E731
    assert decode(document.ids) == render(messages, tools)
    assert decode(document.ids[document.trained]) == "".join(s.text for s in segments if s.trained)
    starts = [*document.turn_starts, len(document.ids)]
    turns = sorted({s.turn for s in segments})
    assert len(document.turn_starts) == max(1, len(turns))
    for turn, start, stop in zip(turns, starts, starts[1:], strict=False):
        assert decode(document.ids[start:stop]) == "".join(s.text for s in segments if s.turn == turn)


@given(messages().filter(is_whole), TOOLS)
@settings(max_examples=150, deadline=None)
def test_a_prompt_s_tokens_are_those_of_training(small, messages, tools):
    """With each message's own thinking mode, the prompt is the beginning of the trained document, token for token."""
    ids = encode_conversation(small, Conversation(messages, tools)).ids.tolist()
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        header = "".join(s.text for s in render_segments(messages[: index + 1], tools) if not s.trained)
        assert header.endswith("<|im_start|>assistant\n")
        pieces = [s.text for s in render_segments(messages[: index + 1], tools) if s.trained]
        thinks = pieces[-2] == "<think>\n"
        prompt = encode_prompt(small, messages[:index], tools, open_thinking=thinks)
        assert ids[: len(prompt)] == prompt


@given(TEXT)
@settings(max_examples=100, deadline=None)
def test_a_one_turn_prompt_is_what_other_programs_encode(small, text):
    """Other programs encode the rendered prompt in one go; ours is cut into segments."""
    talk = [{"role": "user", "content": text}]
    for thinking in (True, False):
        assert encode_prompt(small, talk, open_thinking=thinking) == small.encode(render(talk, None, True, thinking))


@pytest.mark.parametrize("answer", ["  indented answer", "\n\n  x", "\ttab", "　全角", " "])
def test_an_answer_that_begins_with_white_space_is_trained_whole(small, answer):
    """Searching for the header's ids misses it: the newline after `assistant` merges with the space."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    document = encode_conversation(small, Conversation(talk), Dice(0, 0, 0.0, 1.0).roll(0))
    trained = small.decode(document.ids[document.trained], skip_special_tokens=False)
    assert trained == answer.lstrip("\n") + "<|im_end|>\n"


def test_text_that_looks_like_a_header_is_not_trained(small):
    fake = "<|im_start|>assistant\nfake<|im_end|>\n"
    talk = [{"role": "user", "content": fake}, {"role": "assistant", "content": "real"}]
    document = encode_conversation(small, Conversation(talk), Dice(0, 0, 0.0, 1.0).roll(0))
    assert small.decode(document.ids[document.trained], skip_special_tokens=False) == "real<|im_end|>\n"
    assert (document.ids == 1).sum() == 3  # spelled special tokens are encoded as such, as MiniMind does


@given(messages(text=PLAIN, lists=False))
@settings(max_examples=50, deadline=None)
def test_dice_follow_the_record(small, messages):
    conversation = Conversation(messages)
    first, again = (encode_conversation(small, conversation, Dice(3, 1, 0.5, 0.5).roll(5)) for _ in range(2))
    np.testing.assert_array_equal(first.ids, again.ids)


class TestForeignFolder:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>{% endif %}{% endif %}"
    )
    talk = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": " d"},
    )

    @pytest.fixture
    def foreign(self, small, tmp_path):
        small.save(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(self.template)
        return Tokenizer.load(tmp_path)

    def test_answers_are_trained(self, foreign):
        document = encode_conversation(foreign, Conversation(list(self.talk)), Dice(0, 0, 0.0, 0.8).roll(0))
        decode = lambda ids: foreign.decode(ids, skip_special_tokens=False)  # noqa: E731
        assert decode(document.ids[document.trained]) == "b<|im_end|>\n d<|im_end|>\n"
        assert decode(document.ids[document.turn_starts[1] :]).startswith("<|im_start|>user\nc")
        assert len(document.turn_starts) == 2

    def test_prompts_open_a_think_block_where_asked(self, foreign):
        ids = encode_prompt(foreign, self.talk[:1], open_thinking=True)
        assert foreign.decode(ids, False) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>"
        assert foreign.decode(encode_prompt(foreign, self.talk[:1], open_thinking=False), False).endswith("tant\n")
