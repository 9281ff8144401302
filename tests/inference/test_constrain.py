"""Answers of a model that draws at random, bound to a form, read by the readers of that form."""

import contextlib
import json
import random
import re
import sys
import time

import jsonschema
import numpy as np
import pytest
from bound_answers import SCHEMAS, TOOLS, byte_level, checked, drawn, late_fault, ours, sentencepiece, text_of

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.errors import UserError
from minimind_jax.inference.constrain import Grammars, tokens_of
from minimind_jax.inference.grammar import choice, json_object, json_schema, lark, regex, tool_calls
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.request import Request


@pytest.fixture(scope="module", params=[ours, byte_level, sentencepiece])
def kind(request, tmp_path_factory):
    tokenizer = request.param(tmp_path_factory.mktemp("tokenizer"))
    grammars = Grammars(tokenizer, vocab_size=tokenizer.vocab_size + 37)
    yield tokenizer, grammars
    grammars.close()


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("limit", [70, 200])
def test_every_answer_of_a_schema_parses_and_validates(kind, name, limit):
    tokenizer, grammars = kind
    for seed in range(6):
        constraint = grammars.constraint(json_schema(SCHEMAS[name]), limit)
        ids, ended = drawn(tokenizer, constraint, seed, limit)
        assert ended, text_of(tokenizer, ids)
        assert tokenizer.special_ids.isdisjoint(ids)
        jsonschema.validate(json.loads(text_of(tokenizer, ids)), SCHEMAS[name])


def test_any_object(kind):
    tokenizer, grammars = kind
    for seed in range(10):
        ids, ended = drawn(tokenizer, grammars.constraint(json_object(), 60), seed, 60)
        assert ended and isinstance(json.loads(text_of(tokenizer, ids)), dict)


def test_an_end_is_allowed_exactly_where_the_text_is_whole(own):
    tokenizer, grammars = own
    rng = random.Random(0)
    for schema in SCHEMAS.values():
        constraint, text = grammars.constraint(json_schema(schema), 60), ""
        ids = []
        while not constraint.ended:
            allowed = tokens_of(constraint.mask())
            assert tokenizer.special_ids.isdisjoint(allowed), f"an end may come behind {text}"
            ids.append(rng.choice(allowed))
            constraint.accept(ids[-1])
            text = text_of(tokenizer, ids)
        assert [i for i in tokens_of(constraint.mask()) if i in tokenizer.end_ids]
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    "pattern", [r"(\d{3}-)+[a-z/]+", "^你好?(!|！)$", r"[A-Z][a-z]*\$", "", "a\nb|c", "[/\"'\\\\]+"]
)
def test_a_regular_expression_is_matched_whole(kind, pattern):
    tokenizer, grammars = kind
    for seed in range(8):
        ids, ended = drawn(tokenizer, grammars.constraint(regex(pattern), 80), seed, 80)
        assert ended and re.fullmatch(pattern, text_of(tokenizer, ids)), text_of(tokenizer, ids)


def test_one_of_the_choices(kind):
    tokenizer, grammars = kind
    texts = ["billing", "bill", "grün/blau", "a\nb", '"quoted"', "好", "\\d", "<tool_call>"]
    found = {text_of(tokenizer, drawn(tokenizer, grammars.constraint(choice(texts)), s, 30)[0]) for s in range(200)}
    assert found <= {*texts} and len(found) > 4
    with pytest.raises(UserError, match="one or more texts"):
        choice([])


def test_a_long_text_without_a_choice_is_followed_to_the_letter(kind):
    tokenizer, grammars = kind
    text = "".join(f"{n} grüne Äpfel, 苹果 🍏🍎 <tool_call>\n" for n in range(60))
    ids, ended = drawn(tokenizer, grammars.constraint(choice([text]), 8000), 0, 8000)
    assert ended and text_of(tokenizer, ids) == text


@pytest.mark.parametrize("form", [regex("a{99999}"), json_schema({"const": "ab " * 12_000})], ids=["regex", "const"])
def test_a_step_does_not_cost_what_all_of_a_long_text_does(own, form):
    tokenizer, grammars = own
    constraint, begin = grammars.constraint(form, 6), time.thread_time()
    drawn(tokenizer, constraint, 0, 6)
    assert time.thread_time() - begin < 3  # ten times that where each look at the end asks for all of its tokens


def test_a_grammar(kind):
    tokenizer, grammars = kind
    sums = lark('start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]{0,3}/')
    for seed in range(10):
        ids, ended = drawn(tokenizer, grammars.constraint(sums, 40), seed, 40)
        assert ended and re.fullmatch(r"[1-9]\d{0,3}(\+[1-9]\d{0,3})*", text_of(tokenizer, ids))


# Calls of tools -------------------------------------------------------------------------------------------------------


def test_calls_that_are_asked_for_are_valid(kind):
    tokenizer, grammars = kind
    names = set()
    for seed in range(15):
        constraint = grammars.constraint(tool_calls(TOOLS, grammars.tag, required=True), 180)
        ids, ended = drawn(tokenizer, constraint, seed, 180)
        words, called = checked(text_of(tokenizer, ids))
        assert ended and called and not words
        names.update(called)
    assert names == {"weather", "现在", "free"}


def test_the_named_tool_is_called_once(kind):
    tokenizer, grammars = kind
    form = tool_calls(TOOLS, grammars.tag, required=True, name="weather", parallel=False)
    for seed in range(8):
        ids, ended = drawn(tokenizer, grammars.constraint(form, 120), seed, 120)
        assert ended and checked(text_of(tokenizer, ids)) == ("", ["weather"])
    with pytest.raises(UserError, match="no tool 'wether' to call; there are weather"):
        tool_calls(TOOLS, grammars.tag, name="wether")


def test_words_are_free_until_a_call_opens(kind):
    tokenizer, grammars = kind
    opener = tokenizer.encode("<tool_call>")
    text = "Let me see: 好 <tool_cal> "
    for seed in range(6):
        constraint = grammars.constraint(tool_calls(TOOLS, grammars.tag), 220)
        ids = [*tokenizer.encode(text), *(opener if len(opener) == 1 else tokenizer.encode("<tool_call>"))]
        for token in ids:
            assert token in tokens_of(constraint.mask()), tokenizer.decode([token])
            constraint.accept(token)
        rest, ended = drawn(tokenizer, constraint, seed, 220 - len(ids))
        words, called = checked(text_of(tokenizer, ids + rest))
        assert (called and words == text.strip()) or not ended


def test_words_may_end_anywhere_and_never_call_without_tools(own):
    tokenizer, grammars = own
    constraint = grammars.constraint(tool_calls([], grammars.tag))
    for token in tokenizer.encode("a <tool_call"):
        allowed = tokens_of(constraint.mask())
        assert token in allowed and {*tokenizer.end_ids} <= {*allowed}
        assert {*allowed} & tokenizer.mark_ids <= {*tokenizer.end_ids}
        constraint.accept(token)
    assert not any(tokenizer.byte_pieces[i].startswith(b">") for i in tokens_of(constraint.mask()))


def test_no_call_begins_that_there_is_no_room_for(own):
    tokenizer, grammars = own
    opener = tokenizer.encode("<tool_call>")[0]
    allowed = []
    constraint = grammars.constraint(tool_calls(TOOLS, grammars.tag), 100)
    for _ in range(100):
        allowed.append(opener in tokens_of(constraint.mask()))
        constraint.accept(tokenizer.encode("a")[0])
    assert allowed[0] and not allowed[-1] and sorted(allowed, reverse=True) == allowed and not constraint.cut
    for at in range(sum(allowed)):
        constraint = grammars.constraint(tool_calls(TOOLS, grammars.tag), 100)
        for token in [*tokenizer.encode("a") * at, opener]:
            constraint.mask()
            constraint.accept(token)
        ids, ended = drawn(tokenizer, constraint, at, 99 - at)
        assert ended, text_of(tokenizer, ids)
        checked("<tool_call>" + text_of(tokenizer, ids))


def test_thinking_comes_first_and_is_ended_in_time(kind):
    tokenizer, grammars = kind
    has_tags = tokenizer.encode("<think>") == [grammars.tag("<think>")]
    form = json_schema(SCHEMAS["ticket"])
    for seed in range(2):
        ids, ended = drawn(tokenizer, grammars.constraint(form, 120, thinking="open"), seed, 120)
        thought, close, rest = text_of(tokenizer, ids).partition("</think>")
        if has_tags:  # spelled, only a lucky draw ends a thought
            assert thought and close and ended
            jsonschema.validate(json.loads(rest), SCHEMAS["ticket"])
        constraint = grammars.constraint(form, 120, thinking="may")
        starts = {tokenizer.byte_pieces[i] for i in tokens_of(constraint.mask())}
        assert starts <= {b"<think>", b"<", b"{", b'{"'} or not has_tags
        ids, ended = drawn(tokenizer, constraint, seed, 120)
        rest = text_of(tokenizer, ids).partition("</think>")[2] or text_of(tokenizer, ids)
        if ended:
            jsonschema.validate(json.loads(rest), SCHEMAS["ticket"])


# What is cut ----------------------------------------------------------------------------------------------------------


def test_an_answer_that_was_steered_to_its_end_says_so(own):
    tokenizer, grammars = own
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    text = '{"a": "x"}'
    free, short = (grammars.constraint(json_schema(schema), limit) for limit in (200, 30))
    for token in tokenizer.encode(text):
        assert token in tokens_of(free.mask())
        free.accept(token)
    assert free.ended and not free.cut
    ids, [letter] = tokenizer.encode('{"a": "'), tokenizer.encode("x")
    for token in ids:
        short.mask()
        short.accept(token)
    while letter in tokens_of(short.mask()):  # a string that goes on and on
        short.accept(letter)
        ids.append(letter)
    rest, ended = drawn(tokenizer, short, 0, 30)
    assert ended and short.cut and 15 < len(ids + rest) <= 30
    assert json.loads(text_of(tokenizer, ids + rest)).keys() == {"a"}


def test_an_end_that_there_is_not_is_not_looked_for_long(own):
    tokenizer, grammars = own
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}}}
    endless["$defs"]["a"]["type"] = "object"
    constraint, begin = grammars.constraint(json_schema(endless), 10**6), time.thread_time()
    for token in tokenizer.encode('{"x":{"x":'):
        assert token in tokens_of(constraint.mask())
        constraint.accept(token)
    assert time.thread_time() - begin < 5  # a million masks take a minute


def test_without_a_limit_nothing_is_steered(own):
    tokenizer, grammars = own
    constraint = grammars.constraint(json_schema({"type": "string"}))
    for token in tokenizer.encode('"' + "a" * 3000):
        constraint.mask()
        constraint.accept(token)
    assert not constraint.ended and not constraint.cut


def test_a_grammar_that_cannot_be_followed_any_further_says_so(own):
    tokenizer, grammars = own
    tried = []
    for harmless, harmful in ("xy", "yx"):  # where the trial goes is not known
        with contextlib.suppress(UserError):
            tried.append((harmful, grammars.constraint(lark(late_fault(harmless, harmful)))))
    [(letter, constraint)] = tried
    with pytest.raises(UserError, match=r"cannot be followed any further: .*items"):
        for token in tokenizer.encode(letter + "b"):
            constraint.mask()
            constraint.accept(token)


def test_ends_that_the_vocabulary_does_not_have_are_left_out(own):
    tokenizer, _ = own
    for ends in ([], [10**6], [10**6, tokenizer.eos_id]):
        grammars = Grammars(tokenizer, end_ids=ends)
        constraint = grammars.constraint(choice(["a"]))
        constraint.accept(tokenizer.encode("a")[0])
        assert constraint.ended and tokens_of(constraint.mask()) == [tokenizer.eos_id]
        grammars.close()


def test_a_missing_library_is_told(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'llguidance"):
        Grammars(own[0])


def test_masks_are_packed_as_the_engine_reads_them(own):
    tokenizer, grammars = own
    mask = grammars.constraint(choice(["a", "b"])).mask()
    assert mask.dtype == np.uint32 and mask.shape == (-(-tokenizer.vocab_size // 32),)
    wanted = {tokenizer.encode("a")[0], tokenizer.encode("b")[0]}
    assert {i for i in range(tokenizer.vocab_size) if mask[i // 32] >> (i % 32) & 1} == wanted


# In the engine --------------------------------------------------------------------------------------------------------


def answers(model_folder, requests):
    """(finish_reason, text) of what a random model answers to (form, thinking, limit, seed), all at once."""
    engine = load_engine(str(model_folder), slots=16)
    grammars = Grammars(engine.tokenizer, engine.model.config.vocab_size, engine.eos_ids)
    asked = []
    for form, thinking, limit, seed in requests:
        form = form(grammars) if callable(form) else form
        sampling = SamplingConfig(max_new_tokens=limit, temperature=1.5, seed=seed)
        bound = grammars.constraint(form, limit, thinking) if form else None
        asked.append(Request(tuple(engine.encode(f"question {seed}")), sampling, constraint=bound))
    found = [(answer.finish_reason, answer.text) for answer in engine.answers(asked)]
    grammars.close()
    return found


def check_engine(model_folder, schemas, calls):
    forms = [json_schema(schema) for schema in SCHEMAS.values()]
    requests = [(forms[n % len(forms)], "open" if n % 7 == 6 else "no", 120, n) for n in range(schemas)]
    requests += [
        (lambda g: tool_calls(TOOLS, g.tag, required=True), "open" if n % 7 == 6 else "no", 160, n)
        for n in range(calls)
    ]
    found = answers(model_folder, [*requests, (None, "no", 20, 0)])
    for n, (reason, text) in enumerate(found[:schemas]):
        schema = list(SCHEMAS.values())[n % len(SCHEMAS)]
        assert reason in ("stop", "length")
        jsonschema.validate(json.loads(text.rpartition("</think>")[2]), schema)
    for reason, text in found[schemas:-1]:
        assert checked(text.rpartition("</think>")[2])[1] and reason in ("stop", "length")
    assert {reason for reason, _ in found[:-1]} == {"stop", "length"}  # some were cut, and say so
    assert found[-1] == answers(model_folder, [(None, "no", 20, 0)])[0]  # the free one is as it is alone


@pytest.mark.slow
def test_a_random_model_answers_in_form(model_folder):
    check_engine(model_folder, 18, 8)


@pytest.mark.slow
def test_500_answers_validate_and_200_calls_are_valid(model_folder):
    check_engine(model_folder, 500, 200)
