"""Streamed text: stop strings that arrive in pieces, characters that arrive in bytes."""

import time

import pytest

from minimind_jax.inference.text import AnswerText


def test_a_stop_string_across_tokens_is_never_shown(tokenizer):
    ids = tokenizer.encode("The cat sat END on the mat")
    text = AnswerText(tokenizer, stop=("END", "nothing"))
    shown = []
    for token in ids:
        shown.append(text.push(token))
        if text.stopped_by:
            break
    assert "".join(shown) == text.text == "The cat sat "
    assert text.finish() == ""


def test_the_beginning_of_a_stop_string_is_held_back_and_given_out_if_nothing_follows(tokenizer):
    text = AnswerText(tokenizer, stop=("mat and",))
    shown = "".join(text.push(token) for token in tokenizer.encode("on the mat"))
    assert shown == "on the "
    assert text.finish() == "mat"
    assert text.text == "on the mat"


def test_the_first_of_several_stop_strings_wins(tokenizer):
    text = AnswerText(tokenizer, stop=("log", "dog"))
    for token in tokenizer.encode("cat dog log"):
        text.push(token)
    assert text.text == "cat "


@pytest.mark.parametrize("stop", ["<|im_end|>", "mat<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<|im_start|>user"])
def test_a_stop_string_may_hold_special_tokens(stop, tokenizer):
    text = AnswerText(tokenizer, stop=(stop,))
    for token in tokenizer.encode("on<|endoftext|> the mat<|im_end|>\n<|im_start|>user\nmore"):
        text.push(token)
    text.finish()
    expected = "on the " if stop.startswith("mat") else "on the mat"
    assert (text.text, text.stopped_by) == (expected, stop)  # and no special token is shown, held back or not


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("n the m", "o"), ("on the", ""), ("the mat and", "on the mat"), ("at<|im_end|>\nm", "on the m")],
)
def test_a_stop_string_may_be_completed_across_a_special_token(stop, expected, tokenizer):
    text = AnswerText(tokenizer, stop=(stop, "none of this"))
    shown = [text.push(token) for token in tokenizer.encode("on<|endoftext|> the<|im_end|> mat<|im_end|>\nmore")]
    text.finish()
    is_found = stop != "the mat and"
    assert text.text == (expected if is_found else "on the mat\nmore")
    assert text.text.startswith("".join(shown)) and (text.stopped_by == stop) == is_found


def test_a_special_token_that_only_begins_a_stop_string_is_not_shown(tokenizer):
    text = AnswerText(tokenizer, stop=("<|im_end|>\nUser",))
    for token in tokenizer.encode("a<|im_end|>\nb"):
        text.push(token)
    text.finish()
    assert (text.text, text.stopped_by) == ("a\nb", None)


def test_no_piece_has_half_a_character(tokenizer):
    sentence = "你好，🐱🐶！"
    text = AnswerText(tokenizer)
    pieces = [text.push(token) for token in tokenizer.encode(sentence)] + [text.finish()]
    assert "".join(pieces) == sentence
    assert not any("�" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 3


def test_a_long_stop_string_costs_what_is_held_and_not_its_length(tokenizer):
    text, began = AnswerText(tokenizer, stop=("cat " * 250_000,)), time.monotonic()
    for token in tokenizer.encode("the cat sat on the mat"):
        text.push(token)
    text.finish()
    assert text.text == "the cat sat on the mat" and time.monotonic() - began < 2  # not minutes
