"""Answers of a model that draws at random, bound to a form, read by the readers of that form."""

import json
import random
import re
import sys

import jsonschema
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.data.tools import parse_calls
from minimind_jax.errors import UserError
from minimind_jax.inference.constrain import Grammars, tokens_of
from minimind_jax.inference.grammar import choice, json_object, json_schema, lark, regex, tool_calls

TEXTS = [
    "The cat sat on the mat, the dog on the log.",
    '{"name": "cat", "age": 3}',
    "你好，世界。今天天气很好 🐱",
    "a/b",
] * 3
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "现在"}},
    {"name": "free", "parameters": {"type": "object", "additionalProperties": {"type": "number"}}},
]
SCHEMAS = {
    "ticket": {
        "type": "object",
        "properties": {
            "label": {"enum": ["billing", "bug", "其他"]},
            "why": {"type": "string"},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["label", "why", "score"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 9},
            "count": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["items", "count"],
        "$defs": {
            "item": {
                "type": "object",
                "properties": {"name": {"type": "string", "minLength": 1}, "size": {"type": ["number", "null"]}},
                "required": ["name", "size"],
                "additionalProperties": False,
            }
        },
    },
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
    },
    "patterns": {
        "type": "object",
        "properties": {
            "mail": {"type": "string", "pattern": r"^[a-z]{2,8}@[a-z]+\.(com|cn)$"},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["mail", "day"],
    },
    "open": {"type": "object", "properties": {"a": {"type": "array", "minItems": 2}}, "required": ["a"]},
    "list": {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
}


def without_our_tags(folder, backend, special=("<s>", "</s>")):
    backend.add_special_tokens(list(special))
    backend.add_tokens(["  ", "    "])  # added, but words
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer.load(folder)


def ours(folder):
    return train_bpe(TEXTS, folder, vocab_size=340)


def byte_level(folder):
    """As on the hub: another order of ids, no tags, and two spellings of a blank."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator(TEXTS, trainer)
    return without_our_tags(folder, backend)


def sentencepiece(folder):
    """Bytes as <0x41>, a blank as ▁ and one more in front of every text."""
    words = ["▁", *(f"<0x{byte:02X}>" for byte in range(256)), *'abcdeint":{},0123', "▁the", '":', "你"]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token=None)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
    return without_our_tags(folder, backend)


@pytest.fixture(scope="module", params=[ours, byte_level, sentencepiece])
def kind(request, tmp_path_factory):
    tokenizer = request.param(tmp_path_factory.mktemp("tokenizer"))
    grammars = Grammars(tokenizer, vocab_size=tokenizer.vocab_size + 37)
    yield tokenizer, grammars
    grammars.close()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    tokenizer = ours(tmp_path_factory.mktemp("tokenizer"))
    grammars = Grammars(tokenizer)
    yield tokenizer, grammars
    grammars.close()


def text_of(tokenizer, ids):
    return b"".join(tokenizer.byte_pieces[i] for i in ids).decode(errors="replace")


def drawn(tokenizer, constraint, seed, limit):
    """Ids without the end, and whether there was one."""
    rng, ids = random.Random(seed), []
    while len(ids) < limit:
        allowed = tokens_of(constraint.mask())
        assert allowed and max(allowed) < tokenizer.vocab_size, "padding, or nothing at all, is allowed"
        token = rng.choice(allowed)
        constraint.accept(token)
        if token in tokenizer.end_ids:
            return ids, True
        ids.append(token)
        if constraint.ended:
            return ids, True
    return ids, False


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


def test_a_grammar(kind):
    tokenizer, grammars = kind
    sums = lark('start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]{0,3}/')
    for seed in range(10):
        ids, ended = drawn(tokenizer, grammars.constraint(sums, 40), seed, 40)
        assert ended and re.fullmatch(r"[1-9]\d{0,3}(\+[1-9]\d{0,3})*", text_of(tokenizer, ids))


# Calls of tools -------------------------------------------------------------------------------------------------------


def schema_of(name):
    tools = {tool.get("function", tool)["name"]: tool.get("function", tool).get("parameters") for tool in TOOLS}
    return tools[name] or {"type": "object", "maxProperties": 0}


def checked(text):
    """The words and the names of the calls in an answer, all of them valid."""
    words, calls = parse_calls(text)
    for call in calls:
        assert not call.error, (call.error, text)
        jsonschema.validate(call.arguments, schema_of(call.name))
    return words, [call.name for call in calls]


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
    for seed in range(5):
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
    assert free.ended and not free.cut and not free.fault
    ids, ended = drawn(tokenizer, short, 3, 30)
    assert ended and short.cut and len(ids) <= 30 and json.loads(text_of(tokenizer, ids))


def test_without_a_limit_nothing_is_steered(own):
    tokenizer, grammars = own
    constraint = grammars.constraint(json_schema({"type": "string"}))
    for token in tokenizer.encode('"' + "a" * 3000):
        constraint.mask()
        constraint.accept(token)
    assert not constraint.ended and not constraint.cut


def test_a_grammar_that_cannot_be_followed_any_further_ends_the_answer(own):
    tokenizer, grammars = own
    constraint = grammars.constraint(json_schema(SCHEMAS["ticket"]))
    constraint.accept(tokenizer.encode("z")[0])  # no engine does
    assert constraint.ended and constraint.cut and constraint.fault
    assert {*tokens_of(constraint.mask())} == {*tokenizer.end_ids}


# What is refused ------------------------------------------------------------------------------------------------------


def deep(levels):
    return json.loads('{"type":"object","properties":{"a":' * levels + "{}" + "}}" * levels)


def chain(links):
    steps = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{links}": {"type": "string"}}}


REFUSED = {
    "a type that there is not": (lambda: json_schema({"type": "strng"}), "Invalid type"),
    "a keyword that is not supported": (lambda: json_schema({"type": "array", "contains": {}}), "contains"),
    "a format that is unknown": (lambda: json_schema({"type": "string", "format": "odd"}), "Unknown format"),
    "one on another machine": (lambda: json_schema({"$ref": "http://127.0.0.1:9/a.json"}), "does not fetch"),
    "a file": (lambda: json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    "itself and no more": (lambda: json_schema({"$ref": "#"}), "no text fits"),
    "no number between": (lambda: json_schema({"type": "integer", "minimum": 5, "maximum": 1}), "minimum"),
    "too many values": (lambda: json_schema({"enum": [f"value {i}" for i in range(10**5)]}), "longer than 50,000"),
    "too many parts": (lambda: json_schema({"allOf": [{"pattern": f"a{i}"} for i in range(99)]}), "took "),
    "too deep": (lambda: json_schema(deep(200)), "recursion limit"),
    "too long a chain": (lambda: json_schema(chain(1000)), "ended its own process"),
    "half a character": (lambda: json_schema({"const": "\ud800"}), "JSON"),
    "an open bracket": (lambda: regex("(a"), "invalid regex"),
    "a look ahead": (lambda: regex("a(?=b)"), "invalid regex"),
    "nothing": (lambda: regex(r"[^\s\S]"), "no text fits"),
    "a rule that there is not": (lambda: lark("start: foo"), "unknown name"),
    "no start": (lambda: lark("a: b"), "start"),
    "a rule that has no end": (lambda: lark('start: start "a"'), "no text fits"),
    "brackets": (lambda: lark("start: " + "(" * 20000 + '"a"' + ")" * 20000), "nested"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_followed_is_refused_and_the_process_lives(own, what):
    form, message = REFUSED[what]
    with pytest.raises(UserError, match=f"(?s)^response_format: .*({message})"):
        own[1].constraint(form(), where="response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
        {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
        {"type": "string", "pattern": "^(a|aa)+$"},
        {"enum": [f"value number {i}" for i in range(1000)]},
        deep(40),
        chain(50),
        {**json_object().parts[0]["json_schema"], "x-guidance": {"whitespace_pattern": " *", "lenient": True}},
    ],
)
def test_large_numbers_cost_nothing(own, schema):
    tokenizer, grammars = own
    constraint = grammars.constraint(json_schema(schema), 90)
    ids, ended = drawn(tokenizer, constraint, 0, 90)
    assert ended
    jsonschema.validate(json.loads(text_of(tokenizer, ids)), schema)
    assert "  " not in re.sub('"[^"]*"', "", text_of(tokenizer, ids))


def test_parameters_that_are_no_object_are_refused(own):
    with pytest.raises(UserError, match="tool 'f': parameters must be"):
        tool_calls([{"name": "f", "parameters": {"type": "string"}}], own[1].tag)


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
